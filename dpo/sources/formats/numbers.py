"""Reads numbers of a row, which a table keeps as texts: "1" is 1.

`number_of` and `whole_number` raise InvalidValue for a wrong value; their argument `name` is the field's name in it.
"""

import re
import sys

from dpo.base.errors import InvalidValue
from dpo.sources.formats.row_fields import shown

NUMBER = re.compile(r"[+-]?\d+(\.\d+)?([eE][+-]?\d+)?")


def number_of(value: object, name: str) -> float:
    """Returns a finite number; truth values are none."""
    number = as_number(value)
    if number is None:
        raise InvalidValue(f"{name} is {shown(value)}", "a finite number")
    return number


def whole_number(value: object, name: str, valid: range) -> int:
    """Returns a whole number of a range, also of a float without fraction, as a table writes a column with gaps."""
    number = as_number(value)
    if number is None or number not in valid:
        between = "or" if len(valid) == 2 else "to"
        raise InvalidValue(f"{name} is {shown(value)}", f"{valid[0]} {between} {valid[-1]}")
    return int(number)


def as_number(value: object) -> float | None:
    """Returns a number that is finite as a float; None for another value."""
    if isinstance(value, str) and NUMBER.fullmatch(value.strip()):
        value = float(value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return value if abs(value) <= sys.float_info.max else None
