"""The columns of rows that hold a value in some row."""

from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.compute as pc

from dpo.sources.formats.json_rows import EMPTY_TEXTS

if TYPE_CHECKING:
    import datasets


def filled_columns(rows: "datasets.Dataset") -> set[str]:
    """Returns the columns with a value that is not EMPTY in some row. Reads on in a column only until the
    first such value.
    """
    return {name for name in rows.column_names if any(map(_is_filled, rows.data.column(name).chunks))}


def _is_filled(values: pa.Array) -> bool:
    """Returns whether some value is not null, and neither one of EMPTY_TEXTS, an empty list nor an empty object."""
    kind = values.type
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        return bool(pc.any(pc.invert(pc.is_in(values, pa.array([*EMPTY_TEXTS, None], kind)))).as_py())
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return bool((pc.max(pc.list_value_length(values)).as_py() or 0) > 0)
    return bool(values.null_count < len(values) and not (pa.types.is_struct(kind) and kind.num_fields == 0))
