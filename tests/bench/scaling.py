"""How a step's time grows: `python -m tests.bench.scaling [--out bench]`, against the formula of `dpo/batch/costs.py`.

Six series of `tests.bench.steps`, a panel each: a step's time over the length of its completions, their number, the
vocabulary, the number of micro-batches, and over one and two processes with the same work (strong) and with the same
work each (weak). A line is the formula's FLOPs divided by one rate, that of the series' first point; two processes
should take half of the time (strong) or the same (weak), and have one thread each in both.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tests.bench.plots import Panel, draw
from tests.bench.steps import Case

THREADS = 2


@dataclass(frozen=True)
class Series:
    """Cases that differ in one thing, `values`; `ranks` and threads a rank of each."""

    name: str
    label: str
    values: tuple[int, ...]
    cases: tuple[Case, ...]
    ranks: tuple[int, ...]
    threads: int = THREADS


def single(name: str, label: str, key: str, values: tuple[int, ...], **facts: int) -> Series:
    """A series on one rank over one key of `Case`."""
    cases = tuple(Case(**(facts | {key: value})) for value in values)
    return Series(name, label, values, cases, (1,) * len(values))


ALL = (
    single("length", "tokens of a completion", "completion", (32, 64, 128, 256, 512, 1024), trees=4),
    single("completions", "completions of a prompt", "completions", (2, 3, 4, 6, 8), trees=4, prompt=512),
    single("vocabulary", "vocabulary", "vocabulary", (8192, 16384, 32768, 65536, 131072, 262144), trees=8),
    Series(
        "micro-batches",
        "micro-batches of a step, the same 16 trees",
        (1, 2, 4, 8, 16),
        tuple(Case(tokens_per_micro_batch=4096 // parts) for parts in (1, 2, 4, 8, 16)),
        (1,) * 5,
    ),
    Series("strong", "processes, 32 trees in all", (1, 2), (Case(trees=32),) * 2, (1, 2), threads=1),
    Series("weak", "processes, 16 trees each", (1, 2), (Case(trees=16), Case(trees=32)), (1, 2), threads=1),
)


def run_cases(cases: Sequence[Case], ranks: int, threads: int) -> list[dict[str, Any]]:
    """The results of some cases on so many processes."""
    with tempfile.TemporaryDirectory() as folder:
        given, found = Path(folder, "cases.json"), Path(folder, "results.json")
        given.write_text(json.dumps([asdict(case) for case in cases]), encoding="utf-8")
        start = [sys.executable, "-m"]
        if ranks > 1:
            start += ["torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), "-m"]
        environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
        subprocess.run([*start, "tests.bench.steps", str(given), str(found)], env=environment, check=True)
        return json.loads(found.read_text(encoding="utf-8"))


def run_series(series: Series) -> list[dict[str, Any]]:
    """The results of a series, in the order of its values."""
    results: dict[int, list[dict[str, Any]]] = {}
    for ranks in sorted(set(series.ranks)):
        mine = [case for case, number in zip(series.cases, series.ranks, strict=True) if number == ranks]
        results[ranks] = run_cases(mine, ranks, series.threads)
    return [results[ranks].pop(0) for ranks in series.ranks]


def expected(results: Sequence[dict[str, Any]]) -> list[float]:
    """Seconds by formula: FLOPs a rank over the rate of the first result."""
    rate = results[0]["flops"] / results[0]["ranks"] / results[0]["seconds"]
    return [result["flops"] / result["ranks"] / rate for result in results]


def table(series: Series, results: Sequence[dict[str, Any]]) -> list[str]:
    """Markdown rows of a series."""
    lines = [f"| {series.label} | seconds a step | by formula | measured / formula | GFLOP/s |", "|---" * 5 + "|"]
    for value, result, seconds in zip(series.values, results, expected(results), strict=True):
        measured = result["seconds"]
        speed = result["flops"] / measured / 1e9
        lines.append(f"| {value:,} | {measured:.3f} | {seconds:.3f} | {measured / seconds:.2f} | {speed:.0f} |")
    return lines


def main() -> None:
    """Runs all series, writes scaling.json, scaling.md and scaling.png."""
    parser = argparse.ArgumentParser(prog="tests.bench.scaling", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("bench"))
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    found, lines, panels = {}, ["# A step's time against the formula"], []
    for series in ALL:
        results = found[series.name] = run_series(series)
        lines += ["", *table(series, results)]
        measured = [result["seconds"] for result in results]
        panels.append(Panel(series.label, series.values, {"measured": measured, "formula": expected(results)}))
        print(*table(series, results), sep="\n", flush=True)
    (out / "scaling.json").write_text(json.dumps(found, indent=1), encoding="utf-8")
    (out / "scaling.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    draw(out / "scaling.png", panels, "seconds a step")


if __name__ == "__main__":
    main()
