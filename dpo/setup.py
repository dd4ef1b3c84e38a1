"""From a config to everything that a run needs, in the order in which it can go wrong: input first, weights later.

`read_inputs` finds, checks and hashes what the user gave, to the last row, before any weights are in memory;
`build_run` then makes the policy, the reference's log-probabilities and the optimizer.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from datasets import disable_progress_bars
from transformers import PretrainedConfig

from dpo.batches import Packer
from dpo.cache import RefRows, default_cache_dir, reference_key
from dpo.checkpoint import load_checkpoint
from dpo.config import Config
from dpo.data import PreferenceData, prepare_data
from dpo.distributed import World, first_on_each_node, make_mesh, on_main
from dpo.objective import has_reference
from dpo.optim import make_optimizer
from dpo.plan import PairOrder
from dpo.policy import Policy, attention_windows, build_policy, compute_dtype, cost_model, load_weights, reshard
from dpo.progress import say
from dpo.reference import ReferencePass, fill, lookup, numerics
from dpo.run_folder import Start, check_identity, find_start, identity_of
from dpo.weights import find_model, hash_model, read_model_config


@dataclass(frozen=True)
class SourceModel:
    """A model folder, its config, and its hash by content ("" where nothing depends on it)."""

    folder: Path
    config: PretrainedConfig
    hash: str


@dataclass(frozen=True)
class Inputs:
    """What is known before any weights are in memory."""

    model: SourceModel
    reference: SourceModel
    data: PreferenceData
    order: PairOrder
    last_step: int
    last_item: int | None
    """Where the sequence of pairs ends: after `train.epochs` epochs; None where `train.steps` says how long a run
    is.
    """
    start: Start
    identity: dict[str, Any]


@dataclass(frozen=True)
class Run:
    """Everything of a run."""

    config: Config
    world: World
    inputs: Inputs
    policy: Policy
    optimizer: torch.optim.Optimizer
    packer: Packer
    compute_dtype: torch.dtype
    reference_pass: ReferencePass | None
    """None where the loss has no reference."""

    @property
    def dir(self) -> Path:
        """The run folder."""
        return Path(str(self.config.train.run_dir))

    @property
    def head_bytes(self) -> int:
        """The most memory that the head's logits may take at a time, bytes."""
        return self.config.parallel.head_memory_mib * 2**20

    @property
    def begins_at_reference(self) -> bool:
        """Whether the next step's policy is the reference: a fresh run from it. Its first step is then checked."""
        same = self.inputs.model.hash == self.inputs.reference.hash
        return self.inputs.start.step == 0 and self.reference_pass is not None and same


# --- the input -------------------------------------------------------------------------------------------------------


def read_inputs(config: Config, world: World) -> Inputs:
    """Finds and checks all input. Every rank must get here; UserErrors are raised on every rank alike."""
    if not (world.is_main and sys.stderr.isatty()):
        disable_progress_bars()
    start = on_main(world, lambda: find_start(config))
    folders = find_models(config, world)
    model_config = on_main(world, lambda: read_model_config(folders[0], config.model.trust_remote_code))
    data = first_on_each_node(world, lambda: prepare_data(config, model_config))
    if world.is_main:
        for line in data.report.lines():
            say(line)
    model, reference = hash_models(config, world, folders)
    order, last_step, last_item = make_order(config, data)
    identity = identity_of(config, data.train.content_hash, reference.hash)
    on_main(world, lambda: check_identity(start, identity))
    return Inputs(model, reference, data, order, last_step, last_item, start, identity)


def find_models(config: Config, world: World) -> tuple[Path, Path]:
    """The folders of the policy's start and of the reference; one and the same by default."""
    model = find_model(config.model.path, "model.path", world)
    if config.reference.path is None:
        return model, model
    return model, find_model(config.reference.path, "reference.path", world)


def hash_models(config: Config, world: World, folders: tuple[Path, Path]) -> tuple[SourceModel, SourceModel]:
    """The policy's start and the reference with their hashes; nothing is hashed for a loss without a reference."""

    def read(folder: Path) -> SourceModel:
        model_config = on_main(world, lambda: read_model_config(folder, config.model.trust_remote_code))
        return SourceModel(
            folder, model_config, hash_model(folder, model_config, world) if has_reference(config.loss) else ""
        )

    model = read(folders[0])
    return model, model if folders[1] == folders[0] else read(folders[1])


def make_order(config: Config, data: PreferenceData) -> tuple[PairOrder, int, int | None]:
    """The order of pairs, the number of the last step, and the place in the sequence where the last step ends."""
    order = PairOrder(
        data.train.prompt_of_pair,
        config.batch.pairs_per_step,
        config.train.seed,
        shuffled=config.data.order == "shuffled",
        group_by_prompt=config.batch.group_by_prompt,
    )
    if config.train.steps is not None:
        return order, config.train.steps, None
    epochs = config.train.epochs or 1
    return order, order.steps_of(epochs), epochs * order.num_pairs


# --- the run ---------------------------------------------------------------------------------------------------------


def build_run(config: Config, world: World, inputs: Inputs) -> Run:
    """Policy, reference log-probabilities, optimizer; at the start or where the checkpoint ends. Every rank must get
    here.
    """
    policy = build_model(config, world, inputs.model)
    packer = make_packer(config, world, policy)
    reference_pass = None
    if has_reference(config.loss):
        is_own = inputs.reference.hash == inputs.model.hash

        def reference() -> Policy:
            return policy if is_own else build_model(config, world, inputs.reference)

        rows, reference_pass = fill_cache(config, world, inputs, reference, packer)
        packer = replace(packer, ref_logps=lookup(rows))
        reshard(policy)
    optimizer = make_optimizer(policy.model.parameters(), config.optim)
    if inputs.start.checkpoint:
        load_checkpoint(inputs.start.checkpoint, policy.model, optimizer)
    compute = compute_dtype(config.parallel, policy.dtype, world.device)
    return Run(config, world, inputs, policy, optimizer, packer, compute, reference_pass)


def build_model(config: Config, world: World, source: SourceModel) -> Policy:
    """A sharded model with its weights. Every rank must get here."""
    mesh = make_mesh(world, config.parallel)
    policy = build_policy(source.config, config.parallel, config.model.dtype, mesh, config.model.trust_remote_code)
    load_weights(policy, source.folder)
    return policy


def make_packer(config: Config, world: World, policy: Policy) -> Packer:
    """The packer of a rank, whose completions have reference 0 until it is given better."""
    return Packer(
        rank=world.rank,
        num_ranks=world.size,
        tokens_per_micro_batch=config.batch.tokens_per_micro_batch,
        costs=cost_model(policy.config),
        windows=attention_windows(policy.config),
        device=world.device,
        dtype=policy.dtype,
        ref_logps=lambda prompt_ids, completion_ids: 0.0,
    )


def fill_cache(
    config: Config, world: World, inputs: Inputs, reference: Callable[[], Policy], packer: Packer
) -> tuple[RefRows, ReferencePass]:
    """The reference's log-probabilities of all training and evaluation pairs; says how many were in the cache."""
    compute = compute_dtype(config.parallel, packer.dtype, world.device)
    facts = {"model": inputs.reference.hash} | numerics(config.model.dtype, compute, world.device)
    root = Path(config.reference.cache_dir).expanduser() if config.reference.cache_dir else default_cache_dir()
    head_bytes = config.parallel.head_memory_mib * 2**20
    sets = [inputs.data.train, inputs.data.eval]
    rows, done = fill(sets, root / reference_key(facts), facts, reference, packer, head_bytes, world)
    if world.is_main:
        say(f"reference: {done.rows_computed} log-probabilities computed, {done.rows_reused} from the cache {root}")
    return rows, done
