"""All that steps and evaluations run is compiled before the first of them, on a few rows that are thrown away."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PretrainedConfig

from dpo.base.console import say
from dpo.batch.block_mask import BLOCK
from dpo.batch.packer import Packer
from dpo.batch.packing import PackedBatch
from dpo.batch.trees import Tree
from dpo.config import Config
from dpo.distributed.world import World
from dpo.model.build import load_policy
from dpo.model.kernels import describe_graphs, kernel_folder, num_graphs
from dpo.model.parallelize import is_compiled
from dpo.model.policy import Policy, announce_backward, completion_logps, reshard

LENGTHS = (17 * BLOCK, 6 * BLOCK)
"""Tokens of the rows. The first, as a number of tokens or of blocks, is the size of nothing else in a model. A length
that torch took for a constant in the first row is an unknown from the second on.
"""


def warm_up(policy: Policy, packer: Packer, world: World, passes: tuple[bool, ...]) -> None:
    """Compiles what `passes` ask for: True is a pass with gradients, False one without. Weights do not change, and no
    gradient is left. Where nothing is compiled, nothing is run.

    Every rank must get here with the same `passes`, or the rest hang.
    """
    compiled = is_compiled(policy.parallel, policy.device)
    if not compiled and policy.device.type != "cuda":
        return
    what = "layers and attention" if compiled else "attention"
    if world.is_main:
        how_long = "1 to 3 minutes at the first start, seconds where kernels are kept from another"
        say(f"compiling {what}: {how_long}; they are kept in {kernel_folder()}")
    started, before = time.monotonic(), num_graphs()
    packer = replace(packer, row_format=policy.row_format)
    with first_length_unknown():
        for with_gradients in passes:
            for length in LENGTHS:
                _run(policy, _row(packer, length), with_gradients)
    reshard(policy)  # first: gradients are those of the sharded parameters
    policy.model.zero_grad(set_to_none=True)
    if world.is_main:
        kinds = f" ({describe_graphs(policy.graphs)})" if policy.graphs else ""
        say(f"compiled {num_graphs() - before} graphs in {time.monotonic() - started:.0f} s{kinds}")


def load_and_warm(
    config: Config, world: World, model_config: PretrainedConfig, folder: Path, packer: Packer, passes: tuple[bool, ...]
) -> Policy:
    """A sharded policy with the weights of a folder, and all compiled that `passes` ask for (see `warm_up`). Every rank
    must get here.
    """
    policy = load_policy(config, world, model_config, folder)
    warm_up(policy, packer, world, passes)
    return policy


@contextmanager
def first_length_unknown() -> Iterator[None]:
    """Inside, torch takes the first of `LENGTHS` for an unknown at once, which saves the graph that holds for it alone.
    Versions that cannot, as 2.11, compile that graph, too.
    """
    settings: Any = torch.compiler.config
    if not hasattr(settings, "dynamic_values"):
        yield
        return
    with settings.patch(dynamic_values=f"{LENGTHS[0]},{LENGTHS[0] // BLOCK}"):
        yield


def _row(packer: Packer, length: int) -> PackedBatch:
    """A tree of two tokens on each lane, the rest of the row padding: no model has too few positions for it."""
    ids = np.zeros(1, np.int32)
    plan = packer.plan([Tree(ids, (ids,), ())] * packer.num_lanes)
    row_format = replace(packer.row_format, row_length=lambda _: length)
    return replace(packer, row_format=row_format, ref_logps=None).pack(plan)[0]


def _run(policy: Policy, batch: PackedBatch, with_gradients: bool) -> None:
    announce_backward(policy, is_last=True)
    with torch.set_grad_enabled(with_gradients):
        logps = completion_logps(policy, batch.to(policy.device))
    if with_gradients:
        (logps.sum() * 0.0).backward()
