"""Exports the policy of a checkpoint as a Hugging Face folder, as a run does with its last policy in `final/`.

    python -m dpo.export --checkpoint RUN/checkpoints/step-000100 --out DIR [--dtype bfloat16]

A run folder stands for its newest checkpoint. The exported folder loads with plain
`AutoModelForCausalLM.from_pretrained`. Under torchrun the model is sharded over the ranks, and each rank loads and
writes its shards.
"""

from dataclasses import replace
from functools import partial
from pathlib import Path

from dpo.base.errors import UserError
from dpo.checkpoint.export import Finish, export
from dpo.checkpoint.folders import CHECKPOINTS, checkpoints_of
from dpo.checkpoint.state import FILES, VALID, RunState, read_verified_state
from dpo.checkpoint.store import load_model
from dpo.checkpoint.verify import first_usable
from dpo.config import Config, load_config
from dpo.distributed.collectives import on_main, together
from dpo.distributed.startup import open_world, start_devices
from dpo.distributed.world import World, make_mesh
from dpo.export.arguments import read_arguments
from dpo.hub.files import CONFIG_FILE
from dpo.model.build import build_policy
from dpo.model.download import find_model
from dpo.model.model_config import read_model_config
from dpo.run.card import model_card
from dpo.run.model_files import tell_changes
from dpo.run.own_code import check_own_code
from dpo.run_folder.files import CONFIG, FINAL
from dpo.terminal.console import say

CHECKPOINT = "command line: --checkpoint"


def main() -> None:
    """Runs `python -m dpo.export`."""
    args = read_arguments()
    candidates = find_candidates(args.checkpoint)
    config = _config_of(candidates[0])
    check_own_code(config, args.trust_remote_code, CHECKPOINT)
    if args.dtype:
        config = replace(config, checkpoint=replace(config.checkpoint, export_dtype=args.dtype))
    with open_world(config.parallel.setup_timeout_seconds) as world:
        on_main(world, lambda: _check_out(args.out))
        checkpoint, state = _first_usable(candidates, world)
        folder = find_model(config.model.path, "model.path", world)
        model_config = together(lambda: read_model_config(folder, config.model.trust_remote_code))
        start_devices(world, config.parallel.timeout_seconds)
        mesh = make_mesh(world, replace(config.parallel, shard=None, replicate=1))
        policy = build_policy(model_config, config.parallel, config.model.dtype, mesh, config.model.trust_remote_code)
        load_model(checkpoint, policy.model)
        on_main(world, lambda: tell_changes(state.identity.get(FILES, {}), config, folder))
        finish = Finish(partial(model_card, config, state.step, folder))
        export(policy, folder, args.out, config, world, finish)
        if world.is_main:
            say(f"the model of {checkpoint} is in {args.out}")


def find_candidates(path: Path) -> list[Path]:
    """Returns the checkpoint that a path names, or those of a run folder, newest first. Raises UserError for others."""
    if not path.is_dir():
        raise UserError(CHECKPOINT, f"no such folder: {path}", VALID)
    found = checkpoints_of(path)[::-1]
    if found or CHECKPOINTS in (path.absolute().parent.name, path.resolve().parent.name):
        return found or [path]
    kind = "an exported model" if (path / CONFIG_FILE).is_file() else "no checkpoint and no run with one"
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
