"""Derives what people get wrong from the needs of a run: the time to save, memory, CPUs, and restarts. Pure functions.

For example, checkpoints of 64 GB at 1 GB/s and steps of 6 s. A save first waits for the checkpoint that is being
written, so a stop may take two of them and a step, 134 s, and 10 s for messages between ranks: 144 s. The ranks have
three quarters of --signal-delay (see `launch.node`), so it must be 4/3 x 144 = 192, rounded up to 200 s.
"""

import math
import re
from dataclasses import dataclass, replace

from dpo.base.errors import UserError
from dpo.base.units import shown_bytes, shown_duration, shown_rate
from dpo.run_folder.forecast import Forecast
from launch.arguments import LEAST_SIGNAL_DELAY, Request
from launch.site import Site

GIB = 2**30
SHARE_OF_DELAY = 0.75
"""The share of --signal-delay that the ranks have to save."""
MESSAGES_SECONDS = 10
CPUS_PER_GPU = 8
"""CPUs that a rank with a GPU can use: its main thread and that of its collectives, one that plans the next step, one
that writes checkpoints, and processes that tokenize or compile.
"""
SPARE_MEMORY = 1.1
SPARE_BYTES = 4 * GIB
"""Host memory is the estimate's times SPARE_MEMORY, plus SPARE_BYTES for the launcher and files in memory."""


_MEMORY_BY_PART, _CPUS_BY_OPTION = ("mem-per-cpu", "mem-per-gpu"), ("cpus-per-task", "cpus-per-gpu")
"""Options of --sbatch that take the place of those that are derived."""


@dataclass(frozen=True)
class Setting:
    """A value of the job: derived, or given by the user."""

    value: int | None
    line: str
    """The value and the numbers behind it, for the user."""
    warning: str = ""
    """What is wrong with a value that the user gave, or with the cluster."""


@dataclass(frozen=True)
class Known:
    """What is known before a job is queued."""

    forecast: Forecast
    write_rate: float
    """Bytes per second at which checkpoints are written."""
    rate_source: str
    """Where `write_rate` comes from, for the user."""
    site: Site
    steps_done: int
    """The step of the newest checkpoint in the run folder."""


def with_settings(request: Request, known: Known) -> tuple[Request, list[Setting]]:
    """Returns the request with a value for each option that the user left out, and all settings for the user to read.

    Raises UserError if --time leaves no time to save.
    """
    delay, mib, cpus = signal_delay(request, known), memory(request, known), cpus_per_rank(request, known.site)
    if request.minutes and 60 * request.minutes <= (delay.value or 0):
        what = f"{60 * request.minutes} s are not more than the {delay.value} s for saving a checkpoint"
        raise UserError("command line: --time", what, "a longer time, or a shorter --signal-delay")
    asked = () if mib.value is None else (("mem", f"{mib.value}M" if mib.value else "0"),)
    settled = replace(request, signal_delay=delay.value, cpus_per_gpu=cpus.value, sbatch=(*request.sbatch, *asked))
    return settled, [delay, mib, cpus, time_needed(settled, known)]


def with_cpus(request: Request, site: Site) -> tuple[Request, list[Setting]]:
    """Returns the request with the CPUs of each rank, and the setting, where the needs of the run are not known."""
    cpus = cpus_per_rank(request, site)
    return replace(request, cpus_per_gpu=cpus.value), [cpus]


# --- the time to save ------------------------------------------------------------------------------------------------


def signal_delay(request: Request, known: Known) -> Setting:
    """Returns the seconds before the end of the job at which the ranks are asked to save."""
    forecast = known.forecast
    saving = 2 * forecast.checkpoint_bytes / known.write_rate
    needed = (saving + forecast.step_seconds + MESSAGES_SECONDS) / SHARE_OF_DELAY
    derived = max(LEAST_SIGNAL_DELAY, 10 * math.ceil(needed / 10))
    value = request.signal_delay or derived
    written = f"{shown_bytes(forecast.checkpoint_bytes)} at {shown_rate(known.write_rate)} ({known.rate_source})"
    seconds = f"{saving + forecast.step_seconds:,.0f} s"
    why = f"two checkpoints of {written} and a step take {seconds}, and the ranks have three quarters of the delay"
    warnings = []
    if value < needed:
        warnings.append(f"--signal-delay {value} is too short to save, {derived} would be enough: {why}")
    if request.minutes and 60 * request.minutes < 2 * value:
        warnings.append(f"half of --time or more is left for saving: {value} of {60 * request.minutes} s")
    grace = known.site.grace_seconds
    if grace is not None and 0 < grace < SHARE_OF_DELAY * needed:
        what = f"a preempted job of partition {known.site.partition} has a GraceTime of {grace} s"
        remedy = "steps since the last checkpoint may be lost; checkpoint.save_every limits them"
        warnings.append(f"{what}, and saving may take {SHARE_OF_DELAY * needed:,.0f} s: {remedy}")
    return Setting(value, f"signal  {value} s before the end of --time: {why}", "; ".join(warnings))


# --- memory of a node ------------------------------------------------------------------------------------------------


def memory(request: Request, known: Known) -> Setting:
    """Returns the MiB of each node's memory to ask for; 0 for all of it; None where SLURM does not limit memory, or the
    user has asked for some.
    """
    needed, why = _memory_needed(known.forecast, request.ranks_per_node)
    given, site = request.sbatch_option("mem"), known.site
    for name in _MEMORY_BY_PART:
        if request.sbatch_option(name) is not None:
            return Setting(None, f"memory  --{name} {request.sbatch_option(name)}, as given; a node needs {why}")
    if given is not None:
        asked = mib_of(given)
        short = asked is not None and 0 < asked < needed
        warning = f"--mem {given} is less than the {needed // 1024} GiB that a node needs: {why}"
        return Setting(None, f"memory  --mem {given} per node, as given", warning if short else "")
    if site.memory_mib is not None and site.memory_mib < needed:
        room = f"a node of partition {site.partition} has {site.memory_mib / 1024:,.0f} GiB"
        warning = f"{room} of memory, and the ranks on it need {needed // 1024} GiB: {why}"
        return Setting(0 if site.limits_memory else None, f"memory  all of each node: {room}", warning)
    line = f"memory  {needed // 1024} GiB per node: {why}"
    if not site.limits_memory:
        reason = "SLURM does not limit memory here" if site.limits_memory is False else "no answer from SLURM"
        return Setting(None, f"{line}; not asked for: {reason}")
    return Setting(needed, line)


def _memory_needed(forecast: Forecast, num_ranks: int) -> tuple[int, str]:
    """Returns the MiB that the ranks of a node need, in whole GiB, and the numbers behind it."""
    parts = {
        "the copies from which checkpoints are written": forecast.copy_bytes,
        "tensors of a step": forecast.step_bytes,
        f"{num_ranks} processes": forecast.process_bytes,
    }
    needed = SPARE_MEMORY * sum(parts.values()) + SPARE_BYTES
    summands = ", ".join(f"{name} {shown_bytes(size)}" for name, size in parts.items() if size)
    return 1024 * math.ceil(needed / GIB), f"{summands}; a tenth and {shown_bytes(SPARE_BYTES)} are added"


def mib_of(text: str) -> int | None:
    """Returns an sbatch --mem in MiB, rounded up; None where it has another form. 0 means all memory of a node."""
    match = re.fullmatch(r"(\d+)([KMGT]?)", text.upper())
    units = {"K": 1 / 1024, "": 1, "M": 1, "G": 1024, "T": 1024**2}
    return math.ceil(int(match[1]) * units[match[2]]) if match else None


# --- CPUs of a node --------------------------------------------------------------------------------------------------


def cpus_per_rank(request: Request, site: Site) -> Setting:
    """Returns the CPUs of each rank to ask for; None where the CPUs of a node are not known."""
    for name in _CPUS_BY_OPTION:
        if request.sbatch_option(name) is not None:
            return Setting(None, f"cpus    --{name} {request.sbatch_option(name)}, as given")
    available = site.cpus and max(1, site.cpus // request.ranks_per_node)
    if request.cpus_per_gpu:
        total = request.cpus_per_gpu * request.ranks_per_node
        over = site.cpus is not None and total > site.cpus
        what = f"--cpus-per-gpu {request.cpus_per_gpu} asks for {total} CPUs, a node has {site.cpus}"
        return Setting(request.cpus_per_gpu, f"cpus    {request.cpus_per_gpu} per rank, as given", what if over else "")
    if not available:
        return Setting(None, f"cpus    not asked for: no answer from SLURM; {_few(request)}")
    wanted = min(CPUS_PER_GPU, available) if request.gpus else available
    why = f"a node of partition {site.partition} has {site.cpus} for {request.ranks_per_node} ranks"
    most = f", and a rank with a GPU uses at most {CPUS_PER_GPU}" if request.gpus else ""
    return Setting(wanted, f"cpus    {wanted} per rank: {why}{most}")


def _few(request: Request) -> str:
    """Returns what may come of a job that asks for no CPUs."""
    many = f"the {request.ranks_per_node} ranks of a node share" if request.ranks_per_node > 1 else "a rank has"
    return f"where SLURM gives a task one CPU, {many} it; to ask for more: --cpus-per-gpu N"


# --- the time of the run ---------------------------------------------------------------------------------------------


def time_needed(request: Request, known: Known) -> Setting:
    """Returns the number of restarts because of --time. Warns where the run needs more than --max-timeouts."""
    parts, minutes, limit = _parts(known), request.minutes or 0, known.site.max_minutes
    warnings = []
    if limit and minutes > limit:
        over = f"--time is over the limit of partition {known.site.partition}, {shown_duration(60 * limit)}"
        warnings.append(f"{over}: the job may never start")
    if parts is None:
        line = f"time    {shown_duration(known.forecast.step_seconds)} per step; the number of steps is not known"
        return Setting(None, line, "; ".join(warnings))
    if known.steps_done >= (known.forecast.num_steps or 0):
        return Setting(0, f"time    no step is left after step {known.steps_done:,}", "; ".join(warnings))
    seconds, delay = sum(parts.values()), signal_delay(request, known).value or 0
    restarts = max(0, math.ceil(seconds / max(60 * minutes - delay, 1)) - 1)
    if restarts > request.max_timeouts:
        what = f"the run takes about {shown_duration(seconds)}, {restarts} restarts of {shown_duration(60 * minutes)}"
        remedy = f"a longer --time, or --max-timeouts {2 * restarts}"
        warnings.append(f"{what}, and --max-timeouts allows {request.max_timeouts}: {remedy}")
    summands = ", ".join(f"{name}: {shown_duration(part)}" for name, part in parts.items() if part)
    done = f", after step {known.steps_done:,}" if known.steps_done else ""
    line = f"time    about {shown_duration(seconds)} by the estimate for {known.forecast.device}{done}: {summands}"
    counted = f"{restarts} restart{'' if restarts == 1 else 's'}"
    line += f"; --time is {shown_duration(60 * minutes)}: {counted}; lengths: {known.forecast.lengths}"
    return Setting(restarts, line, "; ".join(warnings))


def _parts(known: Known) -> dict[str, float] | None:
    """Returns the seconds of the rest of a run by part; None where the number of steps is not known. A run that resumes
    has its reference.
    """
    forecast = known.forecast
    if forecast.num_steps is None:
        return None
    left = max(0, forecast.num_steps - known.steps_done)
    return {
        f"{left:,} steps of {shown_duration(forecast.step_seconds)}": left * forecast.step_seconds,
        "the reference": 0 if known.steps_done else forecast.reference_seconds or 0,
        "evaluations": (forecast.evaluation_seconds or 0) * left / max(forecast.num_steps, 1),
        "checkpoints": forecast.checkpoint_seconds or 0,
    }
