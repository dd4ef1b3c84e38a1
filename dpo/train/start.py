"""The start of a run: the checkpoint to resume from, whether steps are left, the check of a fresh run's first step."""

from pathlib import Path

from dpo.board.sinks import check_installed
from dpo.config import Config
from dpo.distributed.collectives import on_main
from dpo.distributed.world import World
from dpo.run.folder import Start, find_start, is_finished
from dpo.run.identity import check_identity, identity_of
from dpo.run.inputs import Inputs
from dpo.run_folder.files import FINAL, REPORT
from dpo.step.deviation import Deviation, rounding_scale
from dpo.step.first_step import Terms, verify_start
from dpo.terminal.console import say
from dpo.train.setup import Run


def find_start_together(config: Config, world: World) -> Start:
    """Returns the start that rank 0 finds (`find_start`). Every rank must get here, or the rest hang.

    Raises UserError, on every rank, where rank 0 lacks the package of a sink.
    """
    on_main(world, lambda: check_installed(config.train.report_to))
    return on_main(world, lambda: find_start(config))


def is_done(config: Config, start: Start, inputs: Inputs, world: World) -> bool:
    """Returns whether nothing is left to do, and reports so on rank 0. Every rank must get here, or the rest hang.

    Args:
        config: the run's.
        start: the start that `find_start_together` found.
        inputs: the run's data and models, of which the checkpoint must be.
        world: the ranks.

    Raises:
        UserError: on every rank, where the checkpoint belongs to another run.
    """
    identity = identity_of(config, inputs)
    on_main(world, lambda: check_identity(start, identity))
    if not on_main(world, lambda: is_finished(config, start, inputs.last_step)):
        return False
    if world.is_main:  # train.steps may be less than the steps that were made
        steps, final = max(start.step, inputs.last_step), f"{config.train.run_dir}/{FINAL}"
        more = "to train on, raise train.steps or train.epochs; to begin anew, set another train.run_dir"
        say(f"{config.train.run_dir} is finished: its {steps} steps are done, the model is in {final}; {more}")
    return True


def lacks_report(run_dir: Path) -> bool:
    """Returns whether a finished run has no page, or one of an earlier time: a kill came between export and page."""
    page, model = run_dir / REPORT, run_dir / FINAL / "config.json"
    return not page.is_file() or page.stat().st_mtime < model.stat().st_mtime


def check_first_step(run: Run) -> Deviation | None:
    """Checks that a fresh run's policy agrees with its cached reference on the first step (`verify_start`).

    Returns the measured deviation; None where the run does not begin at its reference. Every rank must get here, or the
    rest hang.
    """
    if not run.begins_at_reference:
        return None
    return verify_start(run.policy, run.packer, run.trees(1), run.config.loss, first_step_terms(run))


def first_step_terms(run: Run) -> Terms:
    """Returns the bounds for the check of a run's first step."""
    scale = rounding_scale(run.compute_dtype, run.config.parallel.tf32 and run.world.device.type == "cuda")
    otherwise = run.reference_pass.made_differently if run.reference_pass else None
    return Terms(scale, run.config.reference.first_step_check, otherwise)
