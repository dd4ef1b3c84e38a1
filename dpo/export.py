"""A policy as a Hugging Face folder: what `final/` is, and `python -m dpo.export` makes of any checkpoint.

    python -m dpo.export --checkpoint RUN/checkpoints/step-000100 --out DIR [--dtype bfloat16]

The folder loads with plain `AutoModelForCausalLM.from_pretrained`. Under torchrun every rank loads and writes
its shards.
"""

import argparse
import shutil
from dataclasses import replace
from pathlib import Path

import torch

from dpo.base.console import say
from dpo.base.errors import UserError, parse_arguments
from dpo.checkpoint.store import load_model, read_state
from dpo.config import Config, load_config
from dpo.data.tokens import has_tokenizer, load_tokenizer
from dpo.distributed.program import exit_program
from dpo.distributed.world import World, make_mesh, on_main, open_world, start_devices, together
from dpo.model.policy import Policy, build_policy, stored_tensors
from dpo.model.weights import find_model, read_model_config, save_tensors


def export(policy: Policy, model_folder: Path, out: Path, config: Config, world: World) -> None:
    """Writes weights, config, tokenizer, chat template and generation config to `out`, which appears when it is whole.

    `model_folder` is where the policy started from. Every rank must get here.
    """
    dtype = getattr(torch, config.checkpoint.export_dtype)
    draft = out.with_name(f".{out.name}.draft")
    on_main(world, lambda: _make_empty(draft))
    save_tensors(draft, stored_tensors(policy), dtype, world)
    on_main(world, lambda: _complete(draft, out, model_folder, config, dtype))


def _make_empty(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def _complete(draft: Path, out: Path, model_folder: Path, config: Config, dtype: torch.dtype) -> None:
    model_config = read_model_config(model_folder, config.model.trust_remote_code)
    model_config.dtype = dtype
    model_config.save_pretrained(draft)
    generation = model_folder / "generation_config.json"
    if generation.is_file():  # copied: some that are in use would not pass transformers' check on saving
        shutil.copyfile(generation, draft / generation.name)
    _save_tokenizer(config.model.tokenizer or str(model_folder), draft, config.model.trust_remote_code)
    shutil.rmtree(out, ignore_errors=True)
    draft.replace(out)


def _save_tokenizer(path: str, draft: Path, trust_remote_code: bool) -> None:
    """None for a local model without one, which data in `format: tokens` does not need."""
    if Path(path).is_dir() and not has_tokenizer(Path(path)):
        return
    try:
        load_tokenizer(path, trust_remote_code).save_pretrained(draft)
    except UserError as failure:  # the run did without: it must not lose its model for it
        say(f"the exported model has no tokenizer: {failure}")


# --- the program -----------------------------------------------------------------------------------------------------


def main() -> None:
    """`python -m dpo.export`."""
    parser = argparse.ArgumentParser(
        "python -m dpo.export",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--checkpoint", type=Path, required=True, help="RUN/checkpoints/step-000100")
    parser.add_argument("--out", type=Path, required=True, help="a new or an empty folder")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="default: the run's checkpoint.export_dtype")
    args = parse_arguments(parser)
    config = _config_of(args.checkpoint)
    if args.dtype:
        config = replace(config, checkpoint=replace(config.checkpoint, export_dtype=args.dtype))
    with open_world(config.parallel.setup_timeout_seconds) as world:
        on_main(world, lambda: _check(args.checkpoint, args.out))
        folder = find_model(config.model.path, "model.path", world)
        model_config = together(lambda: read_model_config(folder, config.model.trust_remote_code))
        start_devices(world, config.parallel.timeout_seconds)
        mesh = make_mesh(world, replace(config.parallel, shard=None, replicate=1))
        policy = build_policy(model_config, config.parallel, config.model.dtype, mesh, config.model.trust_remote_code)
        load_model(args.checkpoint, policy.model)
        export(policy, folder, args.out, config, world)
        if world.is_main:
            say(f"the model is in {args.out}")


def _config_of(checkpoint: Path) -> Config:
    if not checkpoint.is_dir():
        raise UserError(f"command line: --checkpoint: no such folder: {checkpoint}; valid: RUN/checkpoints/step-000100")
    path = checkpoint.resolve().parent.parent / "config.yaml"
    if not path.is_file():
        raise UserError(
            f"command line: --checkpoint: {path} is missing; valid: a checkpoint that lies in its run folder"
        )
    return load_config(["--config", str(path)], "dpo.export")


def _check(checkpoint: Path, out: Path) -> None:
    read_state(checkpoint, "command line: --checkpoint")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"command line: --out: {out} is not empty; valid: a new or an empty folder")


if __name__ == "__main__":
    exit_program(main)
