"""What the user gave, found, checked and hashed to the last row before any weights are in memory."""

import sys
from dataclasses import dataclass
from pathlib import Path

from datasets import disable_progress_bars
from transformers import PretrainedConfig

from dpo.config import Config
from dpo.data import PreferenceData, prepare_data
from dpo.distributed import World, first_on_each_node, on_main
from dpo.objective import has_reference
from dpo.plan import PairOrder
from dpo.progress import say
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


def read_inputs(config: Config, world: World) -> Inputs:
    """Finds and checks all input. Every rank must get here; UserErrors are raised on every rank alike."""
    if not (world.is_main and sys.stderr.isatty()):
        disable_progress_bars()
    folders = find_models(config, world)
    model_config = on_main(world, lambda: read_model_config(folders[0], config.model.trust_remote_code))
    data = first_on_each_node(world, lambda: prepare_data(config, model_config))
    if world.is_main:
        for line in data.report.lines():
            say(line)
    model, reference = hash_models(config, world, folders)
    order, last_step, last_item = make_order(config, data)
    return Inputs(model, reference, data, order, last_step, last_item)


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
