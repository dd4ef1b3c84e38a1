"""Recorded and replayed metrics of the same steps: their differences, and the table. Pure functions.

On the layout of the run every metric must be equal to the last bit, but for those of the clock and of memory. On
another one rounding differs, and grows with every step: there the losses must agree to TOLERANCE.
"""

from collections.abc import Mapping, Sequence

from dpo.run_folder.files import SKIPPED

Metrics = Mapping[str, float]
"""The metrics of a step by name; one that was not finite is absent."""
LOSS, NORM = "train/loss", "train/grad_norm"
FAILED: Metrics = {SKIPPED: 1.0}
"""Takes the place of the line of a step that was not finite and ended its run, which wrote no line of it."""
MEASURED = tuple(
    f"train/{name}" for name in ("step_seconds", "pairs_per_second", "tokens_per_second", "peak_memory_bytes", "mfu")
)
"""Metrics of the clock and of memory."""
TOLERANCE = 1e-5
"""The part of a loss by which layouts may differ."""
MOST_ROWS = 12
"""Rows of a table; of more steps the ends are shown, and the steps around the first difference."""


def differences(recorded: Metrics | None, replayed: Metrics, is_same_layout: bool) -> list[str]:
    """Returns the names of the metrics of a step that differ, in the order of the line; `no line` where none is
    recorded.

    Args:
        recorded: the line of metrics.jsonl; None where there is none.
        replayed: the metrics that were computed again.
        is_same_layout: every metric must be equal; else the loss within TOLERANCE.
    """
    if recorded is None:
        return ["no line"]
    if recorded == FAILED:
        return [] if SKIPPED in replayed else [SKIPPED]
    if not is_same_layout:
        return [] if _agree(recorded.get(LOSS), replayed.get(LOSS)) else [LOSS]
    names = [name for name in {**recorded, **replayed} if name not in MEASURED]
    return [name for name in names if recorded.get(name) != replayed.get(name)]


def _agree(loss: float | None, other: float | None) -> bool:
    if loss is None or other is None:
        return loss is other
    return abs(loss - other) <= TOLERANCE * max(abs(loss), abs(other))


def describe(recorded: Metrics | None, replayed: Metrics, names: Sequence[str]) -> str:
    """Returns how a step differs: the first of the metrics `names`, with both values, and how many more there are."""
    if recorded is None:
        return "metrics.jsonl has no line of it"
    if recorded == FAILED:
        return "it was not finite, which ended the run, and it is finite again"
    more = f", and {len(names) - 1} more" if len(names) > 1 else ""
    values = [_shown(metrics.get(names[0])) for metrics in (recorded, replayed)]
    return f"{names[0]} is {values[0]} in metrics.jsonl and {values[1]} again{more}"


def table(rows: Sequence[tuple[int, Metrics | None, Metrics, Sequence[str]]]) -> list[str]:
    """Returns the lines of the table: of each step loss and gradient norm, recorded and replayed, and what differs.

    Args:
        rows: step, recorded and replayed metrics, and the names of those that differ.
    """
    first = next((at for at, row in enumerate(rows) if row[3]), 0)
    ends = {*range(3), *range(len(rows) - 3, len(rows)), *range(first - 2, first + 3)}
    lines = [f"{'step':>8}  {'loss':>22}  {'again':>22}  {'grad_norm':>22}  {'again':>22}"]
    is_cut = False
    for at, (step, recorded, replayed, names) in enumerate(rows):
        if len(rows) > MOST_ROWS and at not in ends:
            lines += [] if is_cut else [f"{'…':>8}"]
            is_cut = True
            continue
        is_cut = False
        values = [_shown((metrics or {}).get(name)) for name in (LOSS, NORM) for metrics in (recorded, replayed)]
        lines.append("  ".join([f"{step:>8}", *(f"{value:>22}" for value in values), _verdict(names)]).rstrip())
    return lines


def _verdict(names: Sequence[str]) -> str:
    shown = ", ".join(name.removeprefix("train/") for name in names[:3])
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"differs: {shown}{more}" if names else "equal"


def _shown(value: float | None) -> str:
    """Returns a value with all its digits; one that was not finite as a word."""
    return "not finite" if value is None else repr(value)
