"""The start of a run: the checkpoint to resume from, whether steps are left, the check of a fresh run's first step."""

from pathlib import Path

from dpo.base.sums import SUMS
from dpo.board.sinks import check_installed
from dpo.checkpoint.final_sums import find_fault_of_export
from dpo.checkpoint.verify import first_usable
from dpo.config import Config
from dpo.disk.storage import check_folders
from dpo.distributed.collectives import on_main
from dpo.distributed.world import World
from dpo.hub.files import find_config
from dpo.run.folder import Start, check_writable, find_candidates, read_starts, seems_finished, start_from
from dpo.run.identity import check_identity, identity_of
from dpo.run.inputs import Inputs
from dpo.run_folder.files import FINAL, PROVENANCE, REPORT
from dpo.step.deviation import Deviation, rounding_scale
from dpo.step.first_step import Terms, verify_start
from dpo.terminal.console import say, warn
from dpo.train.setup import Run


def check_outputs(config: Config, world: World) -> None:
    """Checks that a run can write where it is told to, before anything is read. Every rank must get here, or the rest
    hang.

    Raises UserError, on every rank, where rank 0 lacks the package of a sink or cannot write to the run folder, or
    where other nodes do not see the folders: they would take all of its checkpoints for damaged.
    """
    on_main(world, lambda: check_installed(config.train.report_to))
    on_main(world, lambda: check_writable(Path(str(config.train.run_dir))))
    check_folders(config, world)


def find_start_together(config: Config, world: World) -> Start:
    """Returns the start that `checkpoint.resume` gives with the run folder as it is, which all nodes see
    (`check_outputs`). Writes nothing.

    Rank 0 lists the checkpoints; all ranks together look for the newest one whose files are as they were written. Every
    rank must get here, or the rest hang.

    Raises UserError, on every rank, where the folder cannot be used, or there are checkpoints and none can be used, and
    RunError where one of them cannot be read now.
    """
    candidates = on_main(world, lambda: find_candidates(config))
    found, faults = first_usable(candidates, world)
    return on_main(world, lambda: start_from(found, faults, config))


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
    if not on_main(world, lambda: seems_finished(config, start, inputs.last_step)):
        return False
    if not _is_whole(Path(str(config.train.run_dir)) / FINAL, world):
        return False
    if world.is_main:  # train.steps may be less than the steps that were made
        steps, final = max(start.step, inputs.last_step), f"{config.train.run_dir}/{FINAL}"
        what = "the adapters are" if inputs.model.adapters else "the model is"
        more = "to train on, raise train.steps or train.epochs; to begin anew, set another train.run_dir"
        say(f"{config.train.run_dir} is finished: its {steps} steps are done, {what} in {final}; {more}")
    return True


def _is_whole(final: Path, world: World) -> bool:
    """Returns whether the files of an exported model are as they were written, and tells on rank 0 where they are not.

    The folders of older versions have no SHA256SUMS; they are believed, which is told. Every rank must get here, or the
    rest hang.
    """
    if on_main(world, lambda: _is_of_an_older_version(final)):
        if world.is_main:
            say(f"{final} has no {SUMS}: an older version wrote it, and its files are not compared")
        return True
    fault = find_fault_of_export(final, world)
    if fault and world.is_main:
        warn(f"{final} is damaged, and is exported again: {fault}")
    return fault is None


def _is_of_an_older_version(final: Path) -> bool:
    """Returns whether an exported model never had SHA256SUMS: the last start of its run did not tell its first step,
    which every version tells that writes them.
    """
    starts = read_starts(final.parent / PROVENANCE) or [{}]
    return not (final / SUMS).exists() and "first_step" not in starts[-1]


def lacks_report(run_dir: Path) -> bool:
    """Returns whether a finished run has no page, or one of an earlier time: a kill came between export and page."""
    page, model = run_dir / REPORT, find_config(run_dir / FINAL)
    return not page.is_file() or (model is not None and page.stat().st_mtime < model.stat().st_mtime)


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
