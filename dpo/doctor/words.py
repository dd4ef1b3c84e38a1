"""The findings as one screen of at most 100 columns."""

from collections.abc import Sequence
from textwrap import wrap

from dpo.distributed.world import World
from dpo.doctor.parts import Finding

COLUMNS = 100
NAME = 13
"""Columns of the name of a part."""


def header(world: World, num_nodes: int) -> list[str]:
    """Returns the first lines: the number of ranks and nodes, and the backend."""
    backend = "NCCL" if world.device.type == "cuda" else "gloo"
    return [f"{counted(world.size, 'rank')} on {counted(num_nodes, 'node')}, {backend}"]


def lines_of(finding: Finding) -> list[str]:
    """Returns the name and the lines of a finding; problems are marked with FAIL."""
    texts = [*finding.lines, *(f"note: {t}" for t in finding.advice), *(f"FAIL: {t}" for t in finding.problems)]
    indent = " " * NAME
    lines = [line for text in texts for line in _wrapped(text)]
    return [(finding.name.ljust(NAME) if number == 0 else indent) + line for number, line in enumerate(lines)]


def _wrapped(text: str) -> list[str]:
    """Wraps a text at spaces only: commands and names of packages stay whole."""
    return wrap(text, COLUMNS - NAME, subsequent_indent="  ", break_on_hyphens=False)


def verdict(findings: Sequence[Finding]) -> str:
    """Returns one line that says whether a run would work."""
    failed = [finding.name for finding in findings if finding.problems]
    return f"a run would fail here: {', '.join(failed)}" if failed else "a run works here"


def flops(number: float) -> str:
    """Returns floating point operations per second as text."""
    return f"{number / 1e12:,.0f} TFLOP/s" if number >= 1e13 else f"{number / 1e9:,.0f} GFLOP/s"


def counted(number: int, noun: str) -> str:
    """Returns a number with its noun: 1 rank, 2 ranks."""
    return f"{number} {noun}" + ("s" if number != 1 else "")
