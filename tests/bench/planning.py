"""What a step's plan costs and how even it is: `python -m tests.bench.planning [--out bench]`.

64 pairs a step of the shared HH file, for the 260K model, on 1 to 512 ranks: medians over the steps of an epoch of the
milliseconds from pair ids to this rank's tensors, and the worst max/mean of the ranks' costs. All of it is done by a
thread while the step before runs; "plan / step" is what planning would be of a step of Llama-3-8B on H100s at an MFU of
40 %, if a step had to wait for it.
"""

import argparse
import itertools
import os
import statistics
import time
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import AutoConfig, LlamaConfig

from dpo.batch.costs import MODEL_UNITS, CostModel, cost_model
from dpo.batch.order import PairOrder
from dpo.batch.packing import RowFormat, pack
from dpo.batch.plan import StepPlan, plan_step
from dpo.batch.trees import grow_trees
from dpo.machine.peaks import device_peak
from dpo.pairs.prepare import PairSet, prepare_data
from tests.support.runs import make_config

BUDGET, MFU = 16384, 0.4
LLAMA_3_8B = LlamaConfig(
    vocab_size=128256,
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
)
HEADER = "| ranks | read ms | plan ms | pack ms | plan / step | max/mean cost |"


class Measured(NamedTuple):
    """One step on one number of ranks: seconds of each stage, and max/mean of the ranks' costs."""

    read: float
    plan: float
    pack: float
    imbalance: float


def measure(data: PairSet, order: PairOrder, step: int, num_lanes: int, costs: CostModel) -> Measured:
    """One step of the order, planned for `num_lanes` and packed for lane 0."""
    times = [time.perf_counter()]
    pairs = data.pairs(order.items(step))
    times.append(time.perf_counter())
    plan = plan_step(grow_trees(pairs), num_lanes, BUDGET, costs)
    times.append(time.perf_counter())
    for micro in plan.micro_batches[0]:
        pack(micro, plan, None, RowFormat((None,), torch.device("cpu")))
    times.append(time.perf_counter())
    read, planned, packed = (after - before for before, after in itertools.pairwise(times))
    return Measured(read, planned, packed, imbalance(plan, costs))


def imbalance(plan: StepPlan, costs: CostModel) -> float:
    """The dearest rank's cost over the mean."""
    loads = [sum(costs.cost(tree) for micro in rank for tree in micro) for rank in plan.micro_batches]
    return max(loads) * len(loads) / sum(loads)


def main() -> None:
    """Prints the table, and writes it to planning.md."""
    parser = argparse.ArgumentParser(prog="tests.bench.planning", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("bench"))
    out = parser.parse_args().out
    shared = Path(os.environ.get("DPO_TEST_DATA", "../shared/data"))
    config = make_config(shared / "stories260K", shared / "hh" / "public-0000-1799.jsonl.gz", "unused")
    model = AutoConfig.from_pretrained(shared / "stories260K")
    data, costs = prepare_data(config, model).train, cost_model(model)
    order, large = PairOrder(data.prompt_of_pair, 64), cost_model(LLAMA_3_8B)
    trees = [tree for step in range(1, 9) for tree in grow_trees(data.pairs(order.items(step)))]
    flops = MODEL_UNITS * sum(large.cost(tree) for tree in trees) / 8
    lines = ["# A step's plan", "", HEADER, "|---" * 6 + "|"]
    for num_ranks in (1, 2, 8, 16, 64, 512):
        found = [measure(data, order, step, num_ranks, costs) for step in range(1, order.steps_of(1))]
        read, plan, packed, _ = (statistics.median(column) for column in zip(*found, strict=True))
        step = flops / ((device_peak("H100", "bfloat16") or 0) * MFU * num_ranks)
        worst = max(one.imbalance for one in found)
        times = " | ".join(f"{1e3 * seconds:.2f}" for seconds in (read, plan, packed))
        lines.append(f"| {num_ranks} | {times} | {plan / step:.2%} | {worst:.3f} |")
    out.mkdir(parents=True, exist_ok=True)
    (out / "planning.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(*lines, sep="\n")


if __name__ == "__main__":
    main()
