"""The trees of a step -> the micro-batches of one lane: the same path for training, evaluation and the reference
pass.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from transformers import PretrainedConfig

from dpo.batch.costs import CostModel, cost_model
from dpo.batch.layout import attention_windows
from dpo.batch.packing import PackedBatch, RefLogps, RowFormat, pack, padded_length
from dpo.batch.plan import StepPlan, plan_step
from dpo.batch.trees import Tree, grow_trees
from dpo.config import Config
from dpo.distributed.world import World
from dpo.pairs.pair_set import PairSet

PAIRS_PER_EVALUATION_PLAN = 1024
"""Pairs per plan of an evaluation set, which has one plan per part: the time to plan grows faster than linearly."""


@dataclass(frozen=True)
class Packer:
    """Turns the trees of a step into the micro-batches of one lane; it stays the same throughout a run."""

    lane: int
    num_lanes: int
    tokens_per_micro_batch: int
    costs: CostModel
    row_format: RowFormat
    ref_logps: RefLogps | None = None
    """None until the reference is known, and for a loss without a reference: batches then carry none."""

    def plan(self, trees: Sequence[Tree]) -> StepPlan:
        """Returns the plan of all lanes."""
        return plan_step(trees, self.num_lanes, self.tokens_per_micro_batch, self.costs)

    def pack(self, plan: StepPlan) -> list[PackedBatch]:
        """Returns the micro-batches of this lane, in the memory of the host; every lane has the same number of them."""
        return [pack(trees, plan, self.ref_logps, self.row_format) for trees in self.trees(plan)]

    def trees(self, plan: StepPlan) -> Sequence[Sequence[Tree]]:
        """Returns the trees of each micro-batch of this lane."""
        return plan.micro_batches[self.lane]


def make_packer(config: Config, world: World, model_config: PretrainedConfig) -> Packer:
    """Returns the packer of a lane for a model; set `ref_logps` before it packs for a loss with a reference.

    Args:
        config: gives the tokens per micro-batch and the dtype of log-probabilities.
        world: gives the lane, the number of lanes and the device.
        model_config: the transformers config of the model, for its sizes and attention windows.
    """
    row_length = padded_length if world.device.type == "cuda" else int
    dtype = getattr(torch, config.model.dtype)
    return Packer(
        lane=world.lane,
        num_lanes=world.num_lanes,
        tokens_per_micro_batch=config.batch.tokens_per_micro_batch,
        costs=cost_model(model_config),
        row_format=RowFormat(attention_windows(model_config), world.device, dtype, row_length),
    )


def evaluation_plans(pairs: PairSet, packer: Packer) -> list[StepPlan]:
    """Returns plans that together hold every pair of an evaluation set once and with weight 1, each with the
    denominators of the whole set.
    """
    pairs = replace(pairs, weights=None)
    order = np.argsort(pairs.prompt_of_pair, kind="stable")  # so that trees are whole except at the ends of parts
    parts = np.split(order, range(PAIRS_PER_EVALUATION_PLAN, len(order), PAIRS_PER_EVALUATION_PLAN))
    plans = [packer.plan(grow_trees(pairs.pairs(part))) for part in parts if len(part)]
    winner_tokens = sum(plan.winner_tokens_in_step for plan in plans)
    return [replace(plan, pairs_in_step=len(pairs), winner_tokens_in_step=winner_tokens) for plan in plans]
