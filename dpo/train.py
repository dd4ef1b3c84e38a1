"""The training program: `torchrun --standalone --nproc-per-node 2 -m dpo.train --config FILE [--loss.beta 0.5]`.

Without torchrun, `python -m dpo.train` is a run on one rank. Read `train_step` first, then `train`.
"""

import functools
import socket
import sys
from contextlib import closing, nullcontext
from typing import Any

import torch

from dpo.base.console import say
from dpo.board.writer import MetricsWriter
from dpo.checkpoint.export import export
from dpo.checkpoint.saver import open_saver
from dpo.config import Config, load_config
from dpo.distributed.collectives import all_gather, on_main
from dpo.distributed.failures import remembered_need
from dpo.distributed.preemption import StopRequest, listen_for_stop
from dpo.distributed.program import exit_program
from dpo.distributed.startup import open_world, start_devices
from dpo.distributed.world import World
from dpo.estimate.at_start import decide_parallel
from dpo.run.answers import open_answers
from dpo.run.files import FINAL
from dpo.run.folder import (
    Start,
    check_identity,
    decided_so_far,
    find_start,
    identity_of,
    is_finished,
    layout_of,
    open_run_folder,
)
from dpo.run.inputs import Inputs, read_inputs
from dpo.run.loop import _trees, train
from dpo.run.provenance import provenance
from dpo.run.setup import build_run
from dpo.run.summary import conclude, introduce
from dpo.step.first_step import verify_start

DESCRIPTION = """Trains a model by Direct Preference Optimization. On one node with eight GPUs:
torchrun --standalone --nproc-per-node 8 -m dpo.train --config FILE; without torchrun, python -m dpo.train is a run on
one rank."""


# --- the program -----------------------------------------------------------------------------------------------------


def run_training(config: Config) -> None:
    """The whole run: its input is checked, then the policy is built, trained and exported."""
    with listen_for_stop() as stop_requested, open_world(config.parallel.setup_timeout_seconds) as world:
        start = on_main(world, lambda: find_start(config))
        inputs = read_inputs(config, world)
        identity = identity_of(config, inputs.data.train.content_hash, inputs.reference.hash)
        on_main(world, lambda: check_identity(start, identity))
        if on_main(world, lambda: is_finished(config, start, inputs.last_step)):
            if world.is_main:  # a run may be told to end where it has passed already
                steps = max(start.step, inputs.last_step)
                say(f"{config.train.run_dir} is finished: its {steps} steps are done, the model is in final/")
            return
        start_devices(world, config.parallel.timeout_seconds)
        config, need = decide_parallel(_as_so_far(config, world, start), world, inputs)
        with remembered_need(need):
            _train_and_export(config, world, inputs, start, identity, stop_requested)


def _train_and_export(
    config: Config, world: World, inputs: Inputs, start: Start, identity: dict[str, Any], stop_requested: StopRequest
) -> None:
    """What follows once all is decided: from the weights to the exported model."""
    run = build_run(config, world, inputs, start, identity, stop_requested)
    deviation = None
    if run.begins_at_reference:
        terms = run.first_step_terms
        deviation = verify_start(run.policy, run.packer, _trees(run, 1), config.loss, terms, run.head_bytes)
    origin = provenance(all_gather(socket.gethostname()), inputs.last_step) | {"layout": _layout(config, world)}
    on_main(world, lambda: open_run_folder(config, start, origin))
    if run.answers:
        on_main(world, functools.partial(open_answers, run.answers, start.step))
    writing = closing(MetricsWriter(run.dir, start.step + 1)) if world.is_main else nullcontext()
    with writing as writer:
        if writer:
            introduce(run, writer, deviation)
        keep, seconds = config.checkpoint.keep, config.parallel.timeout_seconds
        with open_saver(run.dir, run.policy.model, run.optimizer, keep, world, seconds) as saver:
            train(run, writer, saver)
        export(run.policy, inputs.model.folder, run.dir / FINAL, config, world)
        if writer:
            conclude(run)


def _as_so_far(config: Config, world: World, start: Start) -> Config:
    layout = _layout(config, world)
    return on_main(world, lambda: decided_so_far(config, start, layout))


def _layout(config: Config, world: World) -> dict[str, Any]:
    """The run's layout, with the devices of all ranks. Every rank must get here."""
    kind = torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else world.device.type
    return layout_of(config, all_gather(kind))


def main() -> None:
    """`python -m dpo.train`."""
    run_training(load_config(sys.argv[1:], prog="dpo.train", description=DESCRIPTION))


if __name__ == "__main__":
    exit_program(main)
