"""What was found, as one screen of at most 100 columns."""

from collections.abc import Sequence
from textwrap import wrap

from dpo.distributed.world import World
from dpo.doctor.parts import Finding

COLUMNS = 100
NAME = 13
"""Columns of a part's name."""


def header(world: World, num_nodes: int) -> list[str]:
    """Who is examined."""
    backend = "NCCL" if world.device.type == "cuda" else "gloo"
    return [f"{counted(world.size, 'rank')} on {counted(num_nodes, 'node')}, {backend}"]


def lines_of(found: Finding) -> list[str]:
    """A part's name and what was found, problems marked with FAIL."""
    texts = [*found.lines, *(f"note: {t}" for t in found.advice), *(f"FAIL: {t}" for t in found.problems)]
    indent = " " * NAME
    lines = [line for text in texts for line in _wrapped(text)]
    return [(found.name.ljust(NAME) if number == 0 else indent) + line for number, line in enumerate(lines)]


def _wrapped(text: str) -> list[str]:
    """Lines that break at spaces: commands and names of packages stay whole."""
    return wrap(text, COLUMNS - NAME, subsequent_indent="  ", break_on_hyphens=False)


def verdict(findings: Sequence[Finding]) -> str:
    """One line: whether a run would work."""
    failed = [found.name for found in findings if found.problems]
    return f"a run would fail here: {', '.join(failed)}" if failed else "a run works here"


def gib(number: float) -> str:
    """Bytes in GiB, without the unit."""
    return f"{number / 2**30:,.1f}"


def rate(number: float) -> str:
    """Bytes a second."""
    return f"{number / 1e9:.3g} GB/s" if number >= 1e9 else f"{number / 1e6:.3g} MB/s"


def flops(number: float) -> str:
    """Floating point operations a second."""
    return f"{number / 1e12:,.0f} TFLOP/s" if number >= 1e13 else f"{number / 1e9:,.0f} GFLOP/s"


def counted(number: int, what: str) -> str:
    """1 rank, 2 ranks."""
    return f"{number} {what}" + ("s" if number != 1 else "")
