"""The weight and the margin of the pairs of a row, which are read only where the source's `columns` name them.

They hold for all pairs of the row. Token rows have them as columns beside `token_rows.COLUMNS`.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from dpo.base.errors import InvalidValue
from dpo.sources.formats.numbers import as_number
from dpo.sources.formats.row_fields import Row, field, shown
from dpo.sources.source import decode_row

NEUTRAL: Mapping[str, float] = {"weight": 1.0, "margin": 0.0}
"""The value of pairs whose source names no column for it, by the name in `columns`."""
LARGEST = float(np.finfo(np.float32).max)
"""The largest number, since losses are computed in float32."""


def named_values(columns: Mapping[str, str]) -> dict[str, str]:
    """Returns the source's own names of weight and margin, of those that `columns` of the config names."""
    return {name: columns[name] for name in NEUTRAL if name in columns}


def valued_row(
    record: Row,
    index: int,
    named: Mapping[str, str],
    has_lines: bool,
    tokenize_row: Callable[[Row, int], dict[str, Any]],
) -> dict[str, Any]:
    """Returns one record of `Source.rows` as a token row with its weight and margin; `error` is set where one is wrong.

    Args:
        record: a row of `Source.rows`.
        index: its number, from 0.
        named: the source's own names of weight and margin, from `named_values`.
        has_lines: `Source.has_lines`.
        tokenize_row: (record, index) -> the token row without them.
    """
    tokens, (row, _) = tokenize_row(record, index), decode_row(record, index, has_lines)
    try:
        return tokens | {name: _number(field(row, column), name, column) for name, column in named.items()}
    except InvalidValue as broken:
        fault = {} if tokens["error"] else {"error": broken.what, "valid": broken.valid}
        return tokens | {name: NEUTRAL[name] for name in named} | fault


def _number(value: Any, name: str, column: str) -> float:
    """Returns the value of a column, which must be a finite number, and for a weight 0 or above.

    Args:
        value: the field's value.
        name: `weight` or `margin`.
        column: the source's own name of the column.

    Raises:
        InvalidValue: the value is anything else.
    """
    least, valid = (0.0, "a finite number >= 0") if name == "weight" else (-math.inf, "a finite number")
    number = as_number(value)
    if number is None or abs(number) > LARGEST or number < least:
        raise InvalidValue(f"{column}, the {name} of the row's pairs, is {shown(value)}", valid)
    return float(number)
