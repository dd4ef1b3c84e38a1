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
from dpo.checkpoint.export import export
from dpo.checkpoint.store import load_model, newest_checkpoint, read_state
from dpo.config import Config, load_config
from dpo.distributed.collectives import on_main, together
from dpo.distributed.startup import open_world, start_devices
from dpo.distributed.world import make_mesh
from dpo.export.arguments import read_arguments
from dpo.hub.files import CONFIG_FILE
from dpo.model.build import build_policy
from dpo.model.download import find_model
from dpo.model.model_config import read_model_config
from dpo.run.card import model_card
from dpo.run_folder.files import FINAL
from dpo.terminal.console import say

CHECKPOINT = "command line: --checkpoint"


def main() -> None:
    """Runs `python -m dpo.export`."""
    args = read_arguments()
    checkpoint = find_checkpoint(args.checkpoint)
    config = _config_of(checkpoint)
    if args.dtype:
        config = replace(config, checkpoint=replace(config.checkpoint, export_dtype=args.dtype))
    with open_world(config.parallel.setup_timeout_seconds) as world:
        step = on_main(world, lambda: _check(checkpoint, args.out))
        folder = find_model(config.model.path, "model.path", world)
        model_config = together(lambda: read_model_config(folder, config.model.trust_remote_code))
        start_devices(world, config.parallel.timeout_seconds)
        mesh = make_mesh(world, replace(config.parallel, shard=None, replicate=1))
        policy = build_policy(model_config, config.parallel, config.model.dtype, mesh, config.model.trust_remote_code)
        load_model(checkpoint, policy.model)
        export(policy, folder, args.out, config, world, partial(model_card, config, step, folder))
        if world.is_main:
            say(f"the model of {checkpoint} is in {args.out}")


def find_checkpoint(path: Path) -> Path:
    """Returns the checkpoint that a path names: itself, or the newest of a run folder. Raises UserError for others."""
    if not path.is_dir():
        raise UserError(CHECKPOINT, f"no such folder: {path}", "RUN/checkpoints/step-000100")
    newest = newest_checkpoint(path)
    if newest or path.resolve().parent.name == "checkpoints":
        return newest or path
    kind = "an exported model" if (path / CONFIG_FILE).is_file() else "no checkpoint and no run with one"
    around = newest_checkpoint(path.resolve().parent) if path.name.startswith(FINAL) else None
    raise UserError(CHECKPOINT, f"{path} is {kind}", str(around or "RUN/checkpoints/step-000100"))


def _config_of(checkpoint: Path) -> Config:
    run_dir = checkpoint.resolve().parent.parent
    path = run_dir / "config.yaml"
    if not path.is_file():
        raise UserError(CHECKPOINT, f"{path} is missing", "a checkpoint that lies in its run folder")
    config = load_config(["--config", str(path)], "dpo.export")
    return replace(config, train=replace(config.train, run_dir=str(run_dir)))  # it may have been moved


def _check(checkpoint: Path, out: Path) -> int:
    """Returns the step of a complete checkpoint. Raises UserError where it is not complete, or `out` is not empty."""
    step = read_state(checkpoint, CHECKPOINT).step
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError("command line: --out", f"{out} is not empty", "a new or an empty folder")
    return step
