"""Exports the policy of a checkpoint as a Hugging Face folder, as a run does with its last policy in `final/`.

    python -m dpo.export --checkpoint RUN/checkpoints/step-000100 --out DIR [--dtype bfloat16] [--merge]
    python -m dpo.export --adapter RUN/final --merge --out DIR

A run folder stands for its newest checkpoint. The exported folder loads with plain
`AutoModelForCausalLM.from_pretrained`. A run with adapters exports these alone, in peft's form; with --merge it exports
a whole model, to whose weights they are added in float32. Under torchrun the model is sharded over the ranks, and each
rank loads and writes its shards.
"""

import argparse
from dataclasses import replace
from functools import partial
from pathlib import Path

from dpo.adapters.spec import AdapterSpec
from dpo.base.errors import UserError
from dpo.checkpoint.export import Finish, export, export_merged
from dpo.checkpoint.folders import CHECKPOINTS, checkpoints_of
from dpo.checkpoint.state import FILES, VALID, RunState, read_verified_state
from dpo.checkpoint.store import load_model
from dpo.checkpoint.verify import first_usable
from dpo.config import Config, load_config
from dpo.distributed.collectives import on_main, together
from dpo.distributed.startup import open_world, start_devices
from dpo.distributed.world import World, make_mesh
from dpo.export.adapters import merge
from dpo.export.arguments import read_arguments
from dpo.hub.files import find_config, is_of_adapters
from dpo.model.build import build_policy, load_weights
from dpo.model.download import find_model
from dpo.model.model_config import read_model_config
from dpo.model.policy import Policy
from dpo.model.weights import hash_model
from dpo.run.card import model_card
from dpo.run.identity import recorded_adapters
from dpo.run.model_files import tell_changes
from dpo.run.own_code import check_own_code
from dpo.run_folder.files import CONFIG, FINAL
from dpo.terminal.console import say

CHECKPOINT = "command line: --checkpoint"


def main() -> None:
    """Runs `python -m dpo.export`."""
    args = read_arguments()
    if args.adapter:
        merge(args, partial(_check_out, args.out))
    else:
        export_checkpoint(args)


def export_checkpoint(args: argparse.Namespace) -> None:
    """Exports the policy of a checkpoint, as the command line says."""
    candidates = find_candidates(args.checkpoint)
    config = _config_of(candidates[0])
    check_own_code(config, args.trust_remote_code, CHECKPOINT)
    if args.dtype:
        config = replace(config, checkpoint=replace(config.checkpoint, export_dtype=args.dtype))
    with open_world(config.parallel.setup_timeout_seconds) as world:
        on_main(world, lambda: _check_out(args.out))
        checkpoint, state = _first_usable(candidates, world)
        adapters = recorded_adapters(state.identity)
        if args.merge and not adapters:
            raise UserError("command line: --merge", f"the run of {checkpoint} has no adapters", "without --merge")
        folder = find_model(config.model.path, "model.path", world)
        start_devices(world, config.parallel.timeout_seconds)
        policy = _build(config, folder, adapters, args.merge, world)
        if args.merge:
            _load_base(policy, folder, config, state, world)
        load_model(checkpoint, policy.model)
        on_main(world, lambda: tell_changes(state.identity.get(FILES, {}), config, folder))
        write = export_merged if args.merge else export
        write(policy, folder, args.out, config, world, Finish(partial(model_card, config, state.step, folder)))
        if world.is_main:
            what = "the adapters" if adapters and not args.merge else "the model"
            say(f"{what} of {checkpoint} {'are' if what == 'the adapters' else 'is'} in {args.out}")


def _build(config: Config, folder: Path, adapters: AdapterSpec | None, merges: bool, world: World) -> Policy:
    """Returns the policy, sharded over all ranks, whose weights are not yet read. Every rank must get here, or the rest
    hang.

    Args:
        config: of the run.
        folder: of the model, or of the base of adapters.
        adapters: those of the run; None: the whole model was trained.
        merges: whether the adapters will be added to the frozen weights, which are then not rounded.
        world: all ranks.
    """
    trust, dtype = config.model.trust_remote_code, config.model.dtype
    parallel = replace(config.parallel, shard=None, replicate=1, compute_dtype=dtype if merges else "auto")
    model_config = together(lambda: read_model_config(folder, trust))
    return build_policy(model_config, parallel, dtype, make_mesh(world, parallel), trust, adapters)


def _load_base(policy: Policy, folder: Path, config: Config, state: RunState, world: World) -> None:
    """Reads the weights that a checkpoint of adapters does not hold. Every rank must get here, or the rest hang.

    Raises UserError, on every rank, where they are not those for which the adapters were trained.
    """
    model_config = together(lambda: read_model_config(folder, config.model.trust_remote_code))
    if hash_model(folder, model_config, world) != state.identity.get("model.path"):
        what = f"the content of {folder} has changed since the checkpoint was written"
        raise UserError("model.path", what, "the model that the adapters are for")
    load_weights(policy, folder)


def find_candidates(path: Path) -> list[Path]:
    """Returns the checkpoint that a path names, or those of a run folder, newest first. Raises UserError for others."""
    if not path.is_dir():
        raise UserError(CHECKPOINT, f"no such folder: {path}", VALID)
    found = checkpoints_of(path)[::-1]
    if found or CHECKPOINTS in (path.absolute().parent.name, path.resolve().parent.name):
        return found or [path]
    if is_of_adapters(path):
        raise UserError(CHECKPOINT, f"{path} holds adapters", f"--adapter {path} --merge adds them to their base")
    kind = "an exported model" if find_config(path) else "no checkpoint and no run with one"
    around = checkpoints_of(path.resolve().parent) if path.name.startswith(FINAL) else []
    raise UserError(CHECKPOINT, f"{path} is {kind}", str(around[-1]) if around else VALID)


def _first_usable(candidates: list[Path], world: World) -> tuple[Path, RunState]:
    """Returns the first of rank 0's candidates whose files are as they were written, and its state. Every rank must get
    here, or the rest hang. Raises UserError, on every rank, where there is none.
    """
    found, faults = first_usable(on_main(world, lambda: candidates), world)
    if found is None:
        each = "; ".join(f"{path}: {fault}" for path, fault in faults.items())
        raise UserError(CHECKPOINT, each, VALID)
    return found, on_main(world, lambda: read_verified_state(found, CHECKPOINT))


def _config_of(checkpoint: Path) -> Config:
    folders = [path.parent.parent for path in (checkpoint.absolute(), checkpoint.resolve())]  # it may be a link
    run_dir = next((folder for folder in folders if (folder / CONFIG).is_file()), folders[0])
    path = run_dir / CONFIG
    if not path.is_file():
        raise UserError(CHECKPOINT, f"{path} is missing", "a checkpoint that lies in its run folder")
    config = load_config(["--config", str(path)], "dpo.export")
    return replace(config, train=replace(config.train, run_dir=str(run_dir)))  # it may have been moved


def _check_out(out: Path) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError("command line: --out", f"{out} is not empty", "a new or an empty folder")
