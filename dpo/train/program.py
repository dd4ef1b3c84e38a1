"""The training program: `torchrun --standalone --nproc-per-node 2 -m dpo.train --config FILE [--loss.beta 0.5]`.

Without torchrun, `python -m dpo.train` runs on one rank. The code has three levels: the program, in this file; the loop
over steps, `dpo/train/loop.py`; one step, `dpo/step/update.py`.
"""

import time
from pathlib import Path

from dpo.command.status import telling_end
from dpo.config import Config
from dpo.disk.storage import check_space
from dpo.distributed.preemption import listen_for_stop
from dpo.distributed.startup import open_world, start_devices
from dpo.distributed.world import World
from dpo.estimate.at_start import decide_parallel
from dpo.report.program import report_at_end
from dpo.run.folder import Start
from dpo.run.inputs import Inputs, read_inputs
from dpo.terminal.console import begin_log
from dpo.train.closing import conclude
from dpo.train.hold import contents_of, holding_folder, refuse_if_in_use
from dpo.train.loop import train
from dpo.train.outputs import export_run, open_checkpoints, open_outputs
from dpo.train.phases import Phases, process_start
from dpo.train.setup import Hooks, Run, build_run
from dpo.train.start import check_first_step, check_outputs, find_start_together, is_done, lacks_report
from dpo.train.summary import introduce
from dpo.train.words import read_arguments
from dpo.watch.beats import stand
from dpo.watch.failures import remembered_need


def run_training(config: Config, begun: float | None = None) -> None:
    """Checks all input, then builds, trains and exports the policy. Every rank must get here, or the rest hang.

    Args:
        config: the run's.
        begun: when this process was started to train, on the monotonic clock; None: it was started for another purpose,
            and its start counts from now.

    Raises UserError before the first step where any input is wrong, and Preempted where a rank is asked to stop.
    """
    parallel, phases = config.parallel, Phases(time.monotonic() if begun is None else begun)
    phases.end("imports")
    begin_log()
    with (
        listen_for_stop() as stop_requested,
        open_world(parallel.setup_timeout_seconds, parallel.replicate) as world,
    ):
        phases.end("ranks")
        refuse_if_in_use(config, world)
        check_outputs(config, world)
        stand("the check of the checkpoints")
        before, start = contents_of(config, world), find_start_together(config, world)
        stand("the reading of the input")
        inputs = read_inputs(config, world)
        if _is_done(config, start, inputs, world):
            return
        with holding_folder(config, world) as check_lock:
            if contents_of(config, world) != before:  # by another start, which has ended since
                stand("the check of the checkpoints")
                start = find_start_together(config, world)
                if _is_done(config, start, inputs, world):
                    return
            check_space(config, start, inputs, world)
            stand("the start of the devices")
            start_devices(world, config.parallel.timeout_seconds)
            config, need = decide_parallel(config, start, inputs, world)
            phases.end("data")
            stand("the building of the model", start.step)
            with remembered_need(need):
                train_and_export(build_run(config, world, inputs, start, Hooks(stop_requested, check_lock, phases)))


def _is_done(config: Config, start: Start, inputs: Inputs, world: World) -> bool:
    """Returns `is_done`; writes, on rank 0, the page of a finished run that lacks it."""
    done, run_dir = is_done(config, start, inputs, world), Path(str(config.train.run_dir))
    if done and world.is_main and lacks_report(run_dir):
        report_at_end(run_dir)
    return done


def train_and_export(run: Run) -> None:
    """Takes the steps of a run that is built, exports the policy, and tells how the run ended.

    Every rank must get here, or the rest hang.

    Raises RunError where the first step is wrong or a number is not finite, and Preempted where a rank is asked to
    stop.
    """
    stand("the check of the first step")
    deviation = check_first_step(run)
    with open_outputs(run) as writer:
        introduce(run, writer, deviation)
        run.hooks.phases.end("run folder")
        with telling_end(run.world.is_main):  # before the trackers are waited for
            with open_checkpoints(run) as saver:
                train(run, writer, saver)
            stand("the export")
            export_run(run)
        if run.world.is_main:
            report_at_end(run.dir)
        conclude(run)


def main() -> None:
    """Runs `python -m dpo.train`."""
    run_training(read_arguments(), process_start())
