"""The micro-batches of one rank: from the pairs of a step to packed tensors. The same path for training, evaluation and
the reference pass."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from transformers import PretrainedConfig

from dpo.batch.block_mask import Window
from dpo.batch.costs import CostModel, cost_model
from dpo.batch.layout import attention_windows
from dpo.batch.packing import PackedBatch, RefLogps, pack, padded_length
from dpo.batch.plan import StepPlan, plan_step
from dpo.batch.trees import Tree, grow_trees
from dpo.config import Config
from dpo.data.pair_set import PairSet
from dpo.distributed.world import World

PAIRS_PER_EVALUATION_PLAN = 1024
"""An evaluation set is planned in parts of so many pairs: planning grows faster than linearly."""


@dataclass(frozen=True)
class Packer:
    """What turns trees into this rank's tensors; the same all through a run."""

    rank: int
    num_ranks: int
    tokens_per_micro_batch: int
    costs: CostModel
    windows: tuple[Window, ...]
    device: torch.device
    dtype: torch.dtype
    row_length: Callable[[int], int]
    """`padded_length` on CUDA: rows of few lengths, which few compiled graphs run; no padding on a CPU."""
    ref_logps: RefLogps

    def plan(self, trees: Sequence[Tree]) -> StepPlan:
        """The plan of all ranks."""
        return plan_step(trees, self.num_ranks, self.tokens_per_micro_batch, self.costs)

    def pack(self, plan: StepPlan) -> list[PackedBatch]:
        """This rank's micro-batches, in the memory of the host; every rank has the same number of them."""
        return [
            pack(trees, plan, self.ref_logps, self.windows, self.device, self.dtype, self.row_length)
            for trees in plan.micro_batches[self.rank]
        ]


def make_packer(config: Config, world: World, model_config: PretrainedConfig) -> Packer:
    """The packer of a rank for a model; all its completions have reference 0 until it is given better."""
    return Packer(
        rank=world.rank,
        num_ranks=world.size,
        tokens_per_micro_batch=config.batch.tokens_per_micro_batch,
        costs=cost_model(model_config),
        windows=attention_windows(model_config),
        device=world.device,
        dtype=getattr(torch, config.model.dtype),
        row_length=padded_length if world.device.type == "cuda" else int,
        ref_logps=lambda prompt_ids, completion_ids: 0.0,
    )


def evaluation_plans(pairs: PairSet, packer: Packer) -> list[StepPlan]:
    """Plans that together hold every pair of an evaluation set once, each with the denominators of the whole set."""
    order = np.argsort(pairs.prompt_of_pair, kind="stable")  # so that trees are whole, but at the parts' ends
    parts = np.split(order, range(PAIRS_PER_EVALUATION_PLAN, len(order), PAIRS_PER_EVALUATION_PLAN))
    plans = [packer.plan(grow_trees(pairs.pairs(part))) for part in parts if len(part)]
    winner_tokens = sum(plan.winner_tokens_in_step for plan in plans)
    return [replace(plan, pairs_in_step=len(pairs), winner_tokens_in_step=winner_tokens) for plan in plans]
