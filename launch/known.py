"""Learns what a run needs and what the cluster gives, before a job is queued."""

import uuid
from contextlib import suppress
from pathlib import Path

from dpo.base.errors import UserError
from dpo.base.files import nearest_existing, timed_write
from dpo.run_folder.forecast import ASSUMED_RATE, Forecast
from dpo.terminal.console import say, warn
from launch.arguments import Request
from launch.forecast import Unknown, ask_forecast
from launch.reports import newest_checkpoint
from launch.resources import Known
from launch.site import Site, ask_site
from launch.sweep import PlannedRun

_FILE_BYTES = 64 * 2**20


def learn(request: Request, run: PlannedRun) -> Known | None:
    """Returns what is known about a run; None, with a warning that gives the reason, where the estimate fails, or where
    a dry run, which submits nothing, would be refused.

    Args:
        request: the nodes, ranks and device.
        run: the run, or the first of a sweep.

    Raises:
        UserError: the estimate finds that the input is wrong, unless this is a dry run.
    """
    say("estimating what the run needs")
    try:
        forecast = ask_forecast(request, run.words, run.config)
    except UserError as refusal:
        if not request.dry_run:
            raise
        warn(f"launch.submit would refuse this run: {refusal}")
        return None
    except Unknown as reason:
        warn(f"the run's needs are not known, so --time, --mem and --signal-delay are not checked: {reason}")
        return None
    if not forecast.fits:
        warn(f"a step does not fit by the estimate on {forecast.device}: {forecast.verdict}; python -m dpo.estimate")
    rate, source = write_rate(run.dir, forecast)
    return Known(forecast, rate, source, site_of(request), steps_done(run.dir))


def site_of(request: Request) -> Site:
    """Returns the facts of the partition of the runs."""
    return ask_site(request.sbatch_option("partition"), request.gpus)


def site_to_prepare(request: Request) -> Site:
    """Returns the facts of the partition of the job of --prepare; no facts where SLURM is not used."""
    if request.cluster != "slurm":
        return Site()
    return ask_site(request.prepare_partition or request.sbatch_option("partition"), None)


def write_rate(run_dir: Path, forecast: Forecast) -> tuple[float, str]:
    """Returns the bytes per second at which checkpoints are written, and where this comes from: the measured file that
    the estimate has read, or a file that is written and synced now beside the run folder.
    """
    if forecast.write_rate:
        return forecast.write_rate, "measured there"
    file = nearest_existing(run_dir) / f".{uuid.uuid4().hex}.trial"
    try:
        return _FILE_BYTES / timed_write(file, _FILE_BYTES), "one process here, now"
    except OSError as failure:
        return ASSUMED_RATE, f"assumed: {failure.strerror}"
    finally:
        with suppress(OSError):  # a file system that is mounted to read alone refuses also where there is no file
            file.unlink()


def steps_done(run_dir: Path) -> int:
    """Returns the step of the newest complete checkpoint of a run; 0 if it has none."""
    return int(newest_checkpoint(run_dir).removeprefix("step-") or 0)
