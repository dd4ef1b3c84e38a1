"""What was found, as one screen of at most 100 columns."""

from collections.abc import Sequence
from textwrap import wrap

from dpo.distributed import World
from dpo.doctor.parts import Finding

COLUMNS = 100
NAME = 13
"""Columns of a part's name."""


def lines_of(findings: Sequence[Finding], world: World, num_nodes: int) -> list[str]:
    """All findings, problems marked with FAIL, and the verdict."""
    ranks = f"{world.size} rank" + ("s" if world.size > 1 else "")
    nodes = f"{num_nodes} node" + ("s" if num_nodes > 1 else "")
    backend = "NCCL" if world.device.type == "cuda" else "gloo"
    return [
        f"{ranks} on {nodes}, {backend}",
        *(line for found in findings for line in _lines(found)),
        verdict(findings),
    ]


def verdict(findings: Sequence[Finding]) -> str:
    """One line: whether a run would work."""
    failed = [found.name for found in findings if found.problems]
    return f"a run would fail here: {', '.join(failed)}" if failed else "a run works here"


def _lines(found: Finding) -> list[str]:
    texts = [*found.lines, *(f"note: {t}" for t in found.advice), *(f"FAIL: {t}" for t in found.problems)]
    indent = " " * NAME
    lines = [line for text in texts for line in wrap(text, COLUMNS - NAME, subsequent_indent="  ")]
    return [(found.name.ljust(NAME) if number == 0 else indent) + line for number, line in enumerate(lines)]


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
