"""The table and the plot of `peer.py` from its results, and whether the two trainers did the same."""

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from tests.bench.jobs import CACHED, LIVE, PRECOMPUTED
from tests.bench.plots import draw_bars
from tests.bench.work import counted_flops
from tests.bench.worlds import WORKLOADS

Result = dict[str, Any]
TOLERANCE = 1e-4
GIB = 2**30
NAMES = {CACHED: "ours", LIVE: "TRL", PRECOMPUTED: "TRL, precomputed"}
WANTED = {
    ("usual", "hh", LIVE): 8.0,
    ("usual", "hh", PRECOMPUTED): 6.0,
    ("usual", "pandalm", LIVE): 15.0,
    ("usual", "pandalm", PRECOMPUTED): 12.0,
    ("usual", "long-answers", LIVE): 1.5,
    ("usual", "long-answers", PRECOMPUTED): 1.5,
    ("lora", "hh", LIVE): 6.0,
}
"""How many times TRL's pairs a second ours should reach, by setting, workload and TRL's mode."""
WANTED_MEMORY = 0.4
"""The most of TRL's peak memory that ours may take in the settings usual and lora."""
EXPLANATION = """\
Random weights, {pairs_per_step} pairs a step, float32, RMSprop; both read the same token ids, nothing is truncated.
Two threads on one process, one each on two; TRL 1.16.0 with DDP there. *usual*: TRL 8 pairs at a time, its default,
but without the gradient checkpointing that it comes with; ours 4,096 tokens, 8 pairs of 512; *checkpointed*: both with
checkpointing; *small*: TRL one pair, its fastest and its leanest, ours 1,024 tokens; *lora*: as usual, with adapters of
rank 16 on all linear layers, both from the same tensors, TRL's reference its own model without them. *Pairs a second*:
in all steps after a first one; what the reference takes before the first step is not in it, but in the column
*reference*, pairs a second. *Faster* and *memory*: ours of the same setting against that row, with what is wanted in
brackets. *Counted*: how many times the FLOPs of ours that row has to compute, by `dpo/batch/costs.py`: its padded
tokens, the head on each, a live reference. *Peak memory*: of the resident set during the steps, in a process of its
own, the maximum over the ranks; some {imports:.2f} GiB of it are Python and torch after their imports. *Losses*: the
greatest difference of a step's loss from ours; the loss of the last step is told to show that it left ln 2 = 0.6931."""


def pairs_a_second(result: Result) -> float:
    """Over all steps but the first."""
    return result["pairs_per_step"] / fmean(result["step_seconds"][1:])


def write_report(folder: Path, results: Sequence[Result]) -> None:
    """peer.md and peer.png."""
    folder.mkdir(parents=True, exist_ok=True)
    text = "\n".join(["# This trainer and TRL's", "", explanation(results), "", *table(results)])
    (folder / "peer.md").write_text(text + "\n", encoding="utf-8")
    print(text)
    groups = [group[0] for group in grouped(results)]
    labels = [
        f"{WORKLOADS[one['workload']].title}\n{one['ranks']} x {one['threads']}, {one['setting']}" for one in groups
    ]
    measures = {
        "pairs a second": pairs_a_second,
        "peak memory, GiB": lambda result: result["peak_bytes"] / GIB,
    }
    panels = {
        name: {NAMES[mode]: [_value(group, mode, measure) for group in grouped(results)] for mode in NAMES}
        for name, measure in measures.items()
    }
    draw_bars(folder / "peer.png", labels, panels)


def explanation(results: Sequence[Result]) -> str:
    """What the metrics are."""
    return EXPLANATION.format(**results[0], imports=max(result["import_bytes"] for result in results) / GIB)


def table(results: Sequence[Result]) -> list[str]:
    """Markdown, a row a run."""
    titles = ["workload", "processes", "setting", "trainer", "s a step", "pairs a second", "faster", "counted"]
    lines = [
        "| " + " | ".join([*titles, "peak GiB", "memory", "reference", "losses", "loss"]) + " |",
        "|---" * 13 + "|",
    ]
    for group in grouped(results):
        lines += [_row(result, group[0]) for result in group]
    return lines


def _row(result: Result, ours: Result) -> str:
    pairs, reference = result["steps"] * result["pairs_per_step"], result["reference_seconds"]
    cells = [
        WORKLOADS[result["workload"]].title,
        str(result["ranks"]),
        result["setting"],
        NAMES[result["mode"]],
        f"{fmean(result['step_seconds'][1:]):.2f}",
        f"{pairs_a_second(result):.2f}",
        _faster(result, ours),
        f"{counted_flops(result) / counted_flops(ours):.1f}x" if result is not ours else "",
        f"{result['peak_bytes'] / GIB:.2f}",
        _memory(result, ours),
        f"{pairs / reference:.2f}" if reference else "",
        f"{difference(result, ours):.0e}" if result is not ours else "",
        f"{result['losses'][-1]:.4f}",
    ]
    return "| " + " | ".join(cells) + " |"


def _faster(result: Result, ours: Result) -> str:
    if result is ours:
        return ""
    wanted = WANTED.get((result["setting"], result["workload"], result["mode"]))
    told = f" (>= {wanted:g})" if wanted else ""
    return f"{pairs_a_second(ours) / pairs_a_second(result):.1f}x{told}"


def _memory(result: Result, ours: Result) -> str:
    if result is ours:
        return ""
    told = f" (<= {WANTED_MEMORY})" if result["setting"] in ("usual", "lora") else ""
    return f"{ours['peak_bytes'] / result['peak_bytes']:.2f}{told}"


def grouped(results: Sequence[Result]) -> list[list[Result]]:
    """The results of one workload, number of ranks and setting together, ours first; none without ours."""
    groups: dict[tuple[str, int, str], list[Result]] = {}
    for result in results:
        groups.setdefault((result["workload"], result["ranks"], result["setting"]), []).append(result)
    return [group for group in groups.values() if group[0]["mode"] == CACHED]


def _value(group: list[Result], mode: str, measure: Any) -> float:
    return next((measure(result) for result in group if result["mode"] == mode), 0.0)


def difference(result: Result, ours: Result) -> float:
    """The greatest difference of a step's losses."""
    return max(abs(a - b) for a, b in zip(result["losses"], ours["losses"], strict=True))


def disagreements(results: Sequence[Result]) -> list[str]:
    """Where the two did not do the same, a line each."""
    lines = []
    for ours, *others in grouped(results):
        for other in others:
            what = f"{other['workload']}, {other['ranks']} processes, {NAMES[other['mode']]}, {other['setting']}"
            if other["seen"] != ours["seen"]:
                lines.append(f"{what}: other token ids than ours")
            if not difference(other, ours) <= TOLERANCE:
                lines.append(f"{what}: losses {other['losses']}, ours {ours['losses']}")
    return lines
