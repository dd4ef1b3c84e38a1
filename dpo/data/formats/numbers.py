"""Reads numbers of a row, which a table keeps as texts: "1" is 1.

Every function here raises InvalidValue for a wrong value; its argument `name` is the field's name in the message.
"""

import math
import re

from dpo.base.errors import InvalidValue
from dpo.data.formats.row_fields import shown

NUMBER = re.compile(r"[+-]?\d+(\.\d+)?([eE][+-]?\d+)?")


def number_of(value: object, name: str) -> float:
    """Returns a finite number; truth values are none."""
    number = _number(value)
    if number is None:
        raise InvalidValue(f"{name} is {shown(value)}", "a finite number")
    return number


def whole_number(value: object, name: str, valid: range) -> int:
    """Returns a whole number of a range, also of a float without fraction, as a table writes a column with gaps."""
    number = _number(value)
    if number is None or number not in valid:
        between = "or" if len(valid) == 2 else "to"
        raise InvalidValue(f"{name} is {shown(value)}", f"{valid[0]} {between} {valid[-1]}")
    return int(number)


def _number(value: object) -> float | None:
    """Returns a finite number; None for another value."""
    if isinstance(value, str) and NUMBER.fullmatch(value.strip()):
        value = float(value)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return value
