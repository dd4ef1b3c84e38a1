"""Finds, checks and hashes all input, down to the last row, before any weights are loaded."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from huggingface_hub.utils import disable_progress_bars  # type: ignore[attr-defined]  # documented
from transformers import PretrainedConfig

from dpo.adapters.choice import find_adapters
from dpo.adapters.choice import find_warnings as find_adapter_warnings
from dpo.adapters.quantized import base_alone, stored_hash
from dpo.adapters.spec import AdapterSpec
from dpo.adapters.start import start_hash
from dpo.base.errors import UserError
from dpo.batch.order import PairOrder, make_order
from dpo.config import Config, ParallelConfig
from dpo.distributed.collectives import all_gather, first_on_each_node, on_main, together
from dpo.distributed.world import World, check_mesh
from dpo.machine.driver import check_asked
from dpo.machine.facts import Facts, gather_facts
from dpo.machine.toolchain import check_toolchain, find_warnings, needs_of
from dpo.model.download import find_model
from dpo.model.model_config import read_model_config
from dpo.model.parallelize import compute_dtype
from dpo.model.source import SourceModel
from dpo.model.weights import hash_model
from dpo.pairs.prepare import PreferenceData, prepare_data
from dpo.run.agreement import NamedModel, check_agreement
from dpo.run.model_files import Digests, hash_model_files
from dpo.sources.kept import find_fault, trust
from dpo.terminal.console import is_quiet, say, warn


@dataclass(frozen=True)
class Inputs:
    """All input of a run, as known before any weights are loaded."""

    model: SourceModel
    reference: SourceModel
    model_files: Digests
    """Of the files beside the weights of both, and of the tokenizer's."""
    data: PreferenceData
    order: PairOrder
    last_step: int
    last_item: int | None
    """The end of the sequence of pairs, after `train.epochs` epochs; None where `train.steps` sets the length of the
    run.
    """


def read_inputs(config: Config, world: World) -> Inputs:
    """Finds, checks and hashes all input. Every rank must get here, or the rest hang.

    Raises UserError, on every rank, where any input is wrong.
    """
    check_mesh(world, config.parallel)
    if is_quiet() or not (world.is_main and sys.stderr.isatty()):
        disable_progress_bars()  # those of `datasets` too, once it is imported
    facts = examine_machine(world)
    folders = find_models(config, world)
    model_config = read_config(config, world, folders[0])
    reference_config = read_config(config, world, folders[1])
    check_machines(world, facts, config.parallel, config.model.dtype, [model_config, reference_config])
    if world.is_main:
        say("data: reading, and tokenizing rows that are not in the cache")
    fault_of = find_fault if world.local_rank == 0 else trust
    data = first_on_each_node(world, lambda: prepare_data(config, model_config, fault_of))
    check_same_data(data, world)
    if world.is_main:
        for line in data.report.lines():
            say(line)
    policy = NamedModel("model.path", folders[0], model_config)
    other = NamedModel("reference.path", folders[1], reference_config)
    on_main(world, lambda: check_agreement(config, policy, other, data))
    order, last_step, last_item = make_order(config, data)
    model, reference = hash_models(config, world, folders)
    files = on_main(world, lambda: hash_model_files(config, *folders))
    return Inputs(model, reference, files, data, order, last_step, last_item)


def find_models(config: Config, world: World) -> tuple[Path, Path]:
    """Returns the folders of the model from which the policy starts and of the reference; by default the same. Every
    rank must get here, or the rest hang.
    """
    model = find_model(config.model.path, "model.path", world)
    if config.reference.path is None:
        return model, model
    return model, find_model(config.reference.path, "reference.path", world)


def read_config(config: Config, world: World, folder: Path) -> PretrainedConfig:
    """Reads a model's config, on every rank: its class may be code of the model folder, which cannot be pickled. Every
    rank must get here, or the rest hang.

    Args:
        config: gives `model.trust_remote_code`.
        world: the ranks.
        folder: the model's folder, as `find_models` returns it.

    Raises:
        UserError: the config cannot be read, or the trainer cannot be exact for the model.
    """
    return first_on_each_node(world, lambda: read_model_config(folder, config.model.trust_remote_code))


def examine_machine(world: World) -> Facts:
    """Returns the facts of this rank's machine, before models are looked for. Every rank must get here, or the rest
    hang.

    Raises UserError, on every rank, where a job asked for GPUs and a rank has none that torch can use.
    """
    facts = together(lambda: gather_facts(world.device))
    together(lambda: check_asked(facts))
    return facts


def check_machines(
    world: World,
    facts: Facts,
    parallel: ParallelConfig,
    dtype: str,
    models: Sequence[PretrainedConfig],
    compiles: bool = True,
) -> None:
    """Checks that the machine of each rank has the driver, compiler and GPU that these models need.

    Every rank must get here, or the rest hang.

    Args:
        world: all ranks.
        facts: of this rank's machine, from `examine_machine`.
        parallel: gives the compute dtype.
        dtype: the dtype of the master weights.
        models: the configs of the models.
        compiles: whether kernels will be compiled, as in training.

    Raises:
        UserError: on every rank, where any machine lacks them.
    """
    needs = needs_of(compute_dtype(parallel, getattr(torch, dtype), world.device), models, compiles)
    together(lambda: check_toolchain(facts, needs))
    warnings = all_gather(find_warnings(facts, needs))
    if world.is_main:
        for line in sorted({line for lines in warnings for line in lines}):
            warn(line)


def check_same_data(data: PreferenceData, world: World) -> None:
    """Raises UserError where a rank reads other pairs than rank 0: the ranks would compute parts of different steps.

    Every rank must get here, or the rest hang.
    """
    hashes = all_gather((data.train.content_hash, data.eval.content_hash))
    for rank, found in enumerate(hashes):
        if found != hashes[0]:
            key = "data.train" if found[0] != hashes[0][0] else "data.eval"
            what = f"rank {rank} reads other pairs than rank 0 (content {found} and {hashes[0]})"
            raise UserError(key, what, "the same files, tokenizer and versions on every node")


def hash_models(config: Config, world: World, folders: tuple[Path, Path]) -> tuple[SourceModel, SourceModel]:
    """Returns the model from which the policy starts, and the reference, with their hashes by content. Hashes nothing
    where the loss has no reference and the whole model is trained. Every rank must get here, or the rest hang.

    Args:
        config: gives the loss and the adapters.
        world: the ranks, each of which hashes a part of the tensors.
        folders: of the model and of the reference, from `find_models`; equal folders are read once.
    """

    uses_reference = config.loss.facts.uses_reference
    adapters = first_on_each_node(world, lambda: find_adapters(config))
    if world.is_main:
        for line in find_adapter_warnings(config):
            warn(line)

    def read(folder: Path) -> SourceModel:
        model_config = read_config(config, world, folder)
        if not uses_reference and not adapters:
            return SourceModel(folder, model_config, "")
        if world.is_main:
            say(f"weights: hashing {folder}")
        content = hash_model(folder, model_config, world)
        return SourceModel(folder, model_config, content if uses_reference else "", base_hash=content)

    base = _as_stored(read(folders[0]), adapters)
    model, starts_as_base = base, True
    if adapters:
        content = on_main(world, lambda: start_hash(base.base_hash, adapters))
        starts_as_base = content == stored_hash(base.base_hash, adapters)
        model = replace(base, adapters=adapters, hash=content if base.hash else "")
    if not folders[1].samefile(folders[0]):
        return model, read(folders[1])
    is_base = starts_as_base or config.reference.adapter == "base" or config.reference.path is not None
    return model, base if is_base else model


def _as_stored(base: SourceModel, adapters: AdapterSpec | None) -> SourceModel:
    """Returns the base of adapters without these, its weights quantized as theirs."""
    if adapters is None or adapters.quantize is None:
        return base
    content = stored_hash(base.base_hash, adapters) if base.hash else ""
    return replace(base, adapters=base_alone(adapters), hash=content)
