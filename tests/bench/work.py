"""FLOPs that the steps of a benchmark need by the formula of `dpo/batch/costs.py`, for this trainer and for a padded
one, on the 50M Llama.
"""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from dpo.batch.costs import Units, cost_model, step_flops, units
from dpo.batch.plan import plan_step
from dpo.batch.trees import grow_trees
from dpo.config import ParallelConfig
from dpo.estimate.speed import units_of
from dpo.pairs.pair_set import Pair
from tests.bench.jobs import LIVE
from tests.bench.worlds import SIZES, llama_config

MODEL = llama_config(SIZES["50m"])
COSTS = cost_model(MODEL)


def counted_flops(result: dict[str, Any]) -> float:
    """Of all steps of a run but the first. With adapters the weights that they are for get no gradient, and what the
    adapters themselves compute, a twentieth, is left out.
    """
    parallel = ParallelConfig(
        compute_dtype="float32", activation_checkpointing="full" if result["checkpointing"] else "none"
    )
    each, is_lora = result["pairs_per_step"], bool(result.get("adapter"))
    pairs = read_pairs(Path(result["pairs"]))[each : result["steps"] * each]
    steps = [pairs[start : start + each] for start in range(0, len(pairs), each)]
    if result["trainer"] == "ours":
        budget = int(result["keys"]["batch.tokens_per_micro_batch"])
        return sum(packed_flops(step, result["ranks"], budget, parallel, is_lora) for step in steps)
    size, paid = result["micro_batch"], _paid(units(parallel.activation_checkpointing, 0.0), is_lora)
    parts = [step[start : start + size] for step in steps for start in range(0, each, size)]
    return sum(padded_flops(part, paid, live=result["mode"] == LIVE) for part in parts)


def packed_flops(
    pairs: Sequence[Pair], ranks: int, budget: int, parallel: ParallelConfig, is_lora: bool = False
) -> float:
    """Of a step of ours, with the part of the head that is computed again."""
    plan = plan_step(grow_trees(pairs), ranks, budget, COSTS)
    micro_batches = [trees for rank in plan.micro_batches for trees in rank]
    return sum(
        step_flops(trees, COSTS, _paid(units_of(parallel, trees, MODEL.vocab_size, "cpu"), is_lora))
        for trees in micro_batches
    )


def _paid(paid: Units, is_lora: bool) -> Units:
    """The units of a step; frozen weights get no gradient, which is one unit of their products."""
    return replace(paid, body=paid.body - 1, head=paid.head - 1) if is_lora else paid


def padded_flops(pairs: Sequence[Pair], paid: Units, live: bool) -> float:
    """Of a micro-batch of two rows a pair, all as long as the longest, with the head on every token; `live`: and of a
    forward pass of the reference.
    """
    lengths = [len(pair.prompt_ids) + max(len(pair.chosen_ids), len(pair.rejected_ids)) for pair in pairs]
    rows, length = 2 * len(pairs), max(lengths)
    body, attended = COSTS.per_token * length, COSTS.per_attended * length * (length + 1) / 2
    body_units, attention_units, head_units = paid.body + live, paid.attention + live, paid.head + live
    spared = paid.spared * COSTS.per_token_last * length
    return rows * (body_units * body - spared + attention_units * attended + head_units * COSTS.per_scored * length)


def read_pairs(path: Path) -> list[Pair]:
    """The pairs of a JSONL of token ids."""
    rows = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    return [Pair(*(np.array(row[name], np.int32) for name in names)) for row in rows]
