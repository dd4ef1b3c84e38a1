"""Adds a folder of adapters, such as `final/` of a run, to the weights of the model that they are for."""

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path

from dpo.adapters.reading import read_spec
from dpo.adapters.spec import AdapterSpec
from dpo.base.errors import UserError
from dpo.checkpoint.export import Finish, export_merged
from dpo.config import CheckpointConfig, Config, DataConfig, ModelConfig, ParallelConfig, TrainConfig
from dpo.config.peft_folder import base_of
from dpo.distributed.collectives import on_main, together
from dpo.distributed.startup import open_world, start_devices
from dpo.distributed.world import World, make_mesh
from dpo.encode.tokenizer import has_tokenizer
from dpo.hub.files import ADAPTER_CONFIG, find_config, is_of_adapters
from dpo.model.build import build_policy, load_weights, read_start
from dpo.model.download import find_model
from dpo.model.model_config import read_model_config
from dpo.model.policy import Policy
from dpo.run.card import merged_card
from dpo.terminal.console import say

ADAPTER = "command line: --adapter"
BASE = "base_model_name_or_path"
"""The key of adapter_config.json that names the base."""


def merge(args: argparse.Namespace, check_out: Callable[[], None]) -> None:
    """Runs `python -m dpo.export --adapter`.

    Args:
        args: the command line.
        check_out: raises UserError where the folder to write cannot be used; called on rank 0.
    """
    config = config_of(args)
    key = "command line: --base" if args.base else f"{args.adapter / ADAPTER_CONFIG}: {BASE}"
    with open_world(config.parallel.setup_timeout_seconds) as world:
        on_main(world, check_out)
        folder = find_model(config.model.path, key, world)
        start_devices(world, config.parallel.timeout_seconds)
        spec = together(lambda: read_spec(args.adapter))
        policy = _load(config, folder, spec, world)
        finish = Finish(partial(merged_card, config, args.adapter, folder))
        export_merged(policy, folder, args.out, config, world, finish)
        if world.is_main:
            say(f"{config.model.path} with the adapters of {args.adapter} is in {args.out}")


def config_of(args: argparse.Namespace) -> Config:
    """Returns the config by which adapters are merged: in float32, with the tokenizer that lies beside them.

    Raises UserError where the folder holds no adapters, or does not name their base.
    """
    folder: Path = args.adapter
    if not is_of_adapters(folder):
        found = find_config(folder)
        what = f"no such folder: {folder}" if not folder.is_dir() else f"{folder} holds no adapters"
        valid = "a folder with adapter_config.json and adapter_model.safetensors"
        raise UserError(ADAPTER, what if found is None else f"{folder} has {found.name}: it is a whole model", valid)
    base = args.base or base_of(folder)
    if not base:
        raise UserError(ADAPTER, f"{folder / ADAPTER_CONFIG} names no {BASE}", "with --base MODEL")
    return Config(
        model=ModelConfig(
            path=base,
            tokenizer=str(folder) if has_tokenizer(folder) else None,
            trust_remote_code=args.trust_remote_code,
        ),
        data=DataConfig(train=[]),
        parallel=ParallelConfig(compute_dtype="float32"),
        train=TrainConfig(run_dir=str(args.out.absolute())),  # whose name the card has
        checkpoint=CheckpointConfig(export_dtype=args.dtype or "auto"),
    )


def _load(config: Config, folder: Path, spec: AdapterSpec, world: World) -> Policy:
    """Returns the base with its adapters, sharded over all ranks. Every rank must get here, or the rest hang."""
    trust = config.model.trust_remote_code
    model_config = together(lambda: read_model_config(folder, trust))
    mesh = make_mesh(world, config.parallel)
    policy = build_policy(model_config, config.parallel, config.model.dtype, mesh, trust, spec)
    load_weights(policy, folder)
    read_start(policy)
    return policy
