"""Compiles everything that steps and evaluations run before the first of them, by a few rows without an effect."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch

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
from dpo.model.source import SourceModel
from dpo.terminal.console import say

LENGTHS = (17 * BLOCK, 6 * BLOCK)
"""Tokens of the rows. No other size of a model equals the first length, in tokens or in blocks. A length that torch
takes for a constant in the first row becomes symbolic with the second.
"""


def warm_up(policy: Policy, packer: Packer, world: World, passes: tuple[bool, ...]) -> None:
    """Compiles the forward and backward passes of a policy by running them. Weights do not change, and no gradient
    is left.

    It runs nothing where nothing is compiled, on a CPU without `parallel.compile`. Every rank must get here with the
    same `passes`, or the rest hang.

    Args:
        policy: the sharded model.
        packer: the packer of the run.
        world: the ranks.
        passes: the passes to compile: True is a pass with gradients, False a pass without.
    """
    compiled = is_compiled(policy.parallel, policy.device)
    if not compiled and policy.device.type != "cuda":
        return
    compiled_parts = "layers and attention" if compiled else "attention"
    if world.is_main:
        duration = "1 to 3 minutes at the first start, seconds at later ones"
        say(f"compiling {compiled_parts}: {duration}; kernels are kept in {kernel_folder()}")
    started, before = time.monotonic(), num_graphs()
    packer = replace(packer, row_format=policy.row_format)
    with first_length_unknown():
        for with_gradients in passes:
            for length in LENGTHS:
                _run(policy, _row(packer, length), with_gradients)
    reshard(policy)  # before zero_grad, since sharded parameters hold the gradients
    policy.model.zero_grad(set_to_none=True)
    if world.is_main:
        kinds = f" ({describe_graphs(policy.graphs)})" if policy.graphs else ""
        say(f"compiled {num_graphs() - before} graphs in {time.monotonic() - started:.0f} s{kinds}")


def load_and_warm(
    config: Config, world: World, source: SourceModel, packer: Packer, passes: tuple[bool, ...]
) -> Policy:
    """Returns a sharded policy with the weights of a folder, after `warm_up` has compiled `passes`; its adapters, if
    any, change nothing yet (see `build.read_start`). Every rank must get here, or the rest hang.

    Args:
        config: gives the dtype of the master weights and how the model is sharded.
        world: the ranks, after `start_devices`.
        source: the model.
        packer: the packer of the run.
        passes: the passes to compile: True is a pass with gradients, False a pass without; the same on every rank.

    Raises:
        UserError: the model cannot be trained exactly, or the folder lacks weights of it.
    """
    policy = load_policy(config, world, source.config, source.folder, source.adapters)
    warm_up(policy, packer, world, passes)
    return policy


@contextmanager
def first_length_unknown() -> Iterator[None]:
    """Has torch compile the first of `LENGTHS` as a symbolic size at once, which saves the graph for this length alone.
    Versions of torch without this setting, as 2.11, compile that graph too.
    """
    settings: Any = torch.compiler.config
    if not hasattr(settings, "dynamic_values"):
        yield
        return
    with settings.patch(dynamic_values=f"{LENGTHS[0]},{LENGTHS[0] // BLOCK}"):
        yield


def _row(packer: Packer, length: int) -> PackedBatch:
    """Returns a row of `length` tokens: a tree of two tokens, the rest padding, for which every model has enough
    positions.
    """
    ids = np.zeros(1, np.int32)
    plan = packer.plan([Tree(ids, (ids,), ())] * packer.num_lanes)
    row_format = replace(packer.row_format, row_length=lambda _: length)
    return replace(packer, row_format=row_format, ref_logps=None).pack(plan)[0]


def _run(policy: Policy, batch: PackedBatch, with_gradients: bool) -> None:
    """Runs a forward pass, and with gradients a backward pass whose gradients are 0."""
    announce_backward(policy, is_last=True)
    with torch.set_grad_enabled(with_gradients):
        logps = completion_logps(policy, batch.to(policy.device))
    if with_gradients:
        (logps.sum() * 0.0).backward()
