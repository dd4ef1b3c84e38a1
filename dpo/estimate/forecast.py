"""What a run needs of a cluster: seconds, memory of the hosts and bytes on disk, for `launch.submit`.

For example, 6,400 pairs and 100 steps of 12 s, with `train.eval_every` 50 and 640 evaluation pairs: the forward pass is
a third of a step's arithmetic, so the reference takes 100 + 10 forward passes of 64 pairs of 4 s each, 440 s, and each
of the evaluations after steps 0, 50 and 100 takes 10 of them, 40 s. The sampled answers of an evaluation, of at most
128 tokens, take 128 forward passes, one after the other: at 0.05 s each 6.4 s.

Downloads, tokenizing, the start of the processes and compilation are not counted.
"""

import math
from collections.abc import Callable
from itertools import pairwise

from dpo.base.units import shown_bytes, shown_duration, shown_rate, shown_seconds
from dpo.config import Config
from dpo.disk.sizes import Sizes
from dpo.estimate.lengths import Extent
from dpo.estimate.memory import COPY
from dpo.estimate.speed import gather_seconds
from dpo.estimate.words import Estimate, verdict
from dpo.machine.data_sheets import GIB
from dpo.model.generation import ROWS_PER_LANE
from dpo.ref_logps.blocks import ROW
from dpo.run.schedule import is_time
from dpo.run_folder.forecast import ASSUMED_RATE, Forecast

PROCESS_BYTES = {"cpu": 0.75 * GIB, "cuda": 6 * GIB}
"""Host memory that the process of a rank is assumed to take beside its tensors. On CUDA: the driver's and NCCL's
buffers, the libraries, and the processes that compile kernels.
"""
LAYER_SECONDS = 1e-3
"""Seconds that a decoder layer is assumed to take per generated token beside its matrix products: generation runs
uncompiled, and its many small operations are started one by one.
"""
NOT_COUNTED = "downloads, tokenizing, start and compilation"
"""Parts of a run's time that depend on more than the config."""


def forecast(estimate: Estimate, sizes: Sizes, extent: Extent | None, write_rate: float | None = None) -> Forecast:
    """Returns the forecast that follows from an estimate.

    Args:
        estimate: of a step.
        sizes: of the run's checkpoints.
        extent: the number of steps and pairs; None where the data was not read.
        write_rate: bytes per second that all ranks together write; None where it was not measured.
    """
    config, cluster, memory = estimate.config, estimate.cluster, estimate.memory
    on_cpu, copied = cluster.device.is_cpu, memory.host[COPY]
    tensors = memory.host.total() - copied + (memory.device.total() if on_cpu else 0)
    reference, evaluations, answers = seconds_of_passes(estimate, extent) if extent else (None, None, None)
    seconds = estimate.speed.serial
    num_steps = extent.num_steps if extent else config.train.steps
    return Forecast(
        device=cluster.device.name,
        lengths=estimate.lengths,
        fits=estimate.fits,
        verdict=verdict(estimate),
        step_seconds=seconds,
        num_steps=num_steps,
        reference_seconds=reference,
        evaluation_seconds=evaluations,
        answers_seconds=answers,
        checkpoint_bytes=sizes.checkpoint,
        disk_bytes=sizes.disk_bytes(0),
        copy_bytes=copied * cluster.ranks_per_node,
        step_bytes=tensors * cluster.ranks_per_node,
        process_bytes=PROCESS_BYTES["cpu" if on_cpu else "cuda"] * cluster.ranks_per_node,
        write_rate=write_rate,
        num_ranks=cluster.num_ranks,
        checkpoint_seconds=checkpoint_seconds(config, sizes, num_steps, seconds, write_rate) if num_steps else None,
        keep=sizes.keep,
        final_bytes=sizes.final,
        cache_bytes=cache_bytes(config, extent) if extent else None,
    )


def checkpoint_seconds(
    config: Config, sizes: Sizes, num_steps: int, step_seconds: float, write_rate: float | None
) -> float:
    """Returns the seconds in which a run waits for its files: for the last checkpoint and the export, and at each
    earlier save for what the checkpoint before takes longer than the steps in between, beside which it is written.

    Args:
        config: the run's.
        sizes: the bytes of its checkpoints.
        num_steps: the steps of the run.
        step_seconds: the seconds of each.
        write_rate: as in `forecast`.
    """
    rate, every = write_rate or ASSUMED_RATE, config.checkpoint.save_every or num_steps
    each = sizes.checkpoint / rate
    saves = [*range(every, num_steps, every), num_steps]  # the last interval may be shorter
    waits: float = sum(max(0.0, each - (save - before) * step_seconds) for before, save in pairwise(saves))
    return waits + each + sizes.export / rate


def cache_bytes(config: Config, extent: Extent) -> int:
    """Returns the bytes of the log-probabilities of the reference: of both completions of each pair a row in a block of
    the cache, and one in the table of the run. Pairs that share a completion need fewer.
    """
    num_completions = 2 * (extent.num_pairs + extent.num_eval_pairs)
    return 2 * ROW.itemsize * num_completions if config.loss.facts.uses_reference else 0


# --- for the user ----------------------------------------------------------------------------------------------------


def lines_of_run(found: Forecast, on_cpu: bool) -> list[str]:
    """Returns lines about the whole run: its time by part, its GPU-hours or rank-hours, and its bytes on disk."""
    return [*_time_lines(found, on_cpu), *_disk_lines(found)]


def _time_lines(found: Forecast, on_cpu: bool) -> list[str]:
    each = "" if on_cpu else ", if no parts overlap"
    if found.num_steps is None or found.seconds is None or found.device_hours is None:
        what = "the number of steps is not known, since the data was not read and train.steps is null"
        return [f"hours of a run: not known: {what}; a step takes {shown_seconds(found.step_seconds)}{each}"]
    source = "assumed" if found.write_rate is None else "measured"
    rate = f"{shown_rate(found.write_rate or ASSUMED_RATE)} ({source})"
    rows = [
        ("steps", found.num_steps * found.step_seconds, f"{shown_seconds(found.step_seconds)} each{each}"),
        ("reference pass", found.reference_seconds, "once: its log-probabilities are cached"),
        ("evaluations", found.evaluation_seconds, ""),
        ("sampled answers", found.answers_seconds, "at most, eval.max_new_tokens each; 1 ms per layer assumed"),
        ("checkpoints", found.checkpoint_seconds, f"the last, and final/, at {rate}; others beside steps"),
    ]
    hours = f"{found.device_hours:,.1f}" if found.device_hours >= 0.1 else "under 0.1"
    unit = f"rank-hours on {found.num_ranks} ranks" if on_cpu else f"GPU-hours on {found.num_ranks} GPUs"
    bound = "at least " if any(seconds is None for _, seconds, _ in rows) else ""
    head = f"a run of {found.num_steps:,} steps takes {bound}{shown_duration(found.seconds)}, {hours} {unit}:"
    parts = [_row(name, seconds, shown_duration, about) for name, seconds, about in rows if seconds != 0]
    return [head, *parts, f"  not counted: {NOT_COUNTED}"]


def _disk_lines(found: Forecast) -> list[str]:
    keep = "null keeps all" if found.keep is None else str(found.keep)
    bound = "at least" if found.keep is None and found.num_steps is None else "at most"
    rows = [
        ("checkpoint", found.checkpoint_bytes, f"each; checkpoint.keep {keep}"),
        ("final/", found.final_bytes, "at most as much again while it is written"),
        ("cache", found.cache_bytes, "at most, of the reference pass, in reference.cache_dir"),
    ]
    head = f"disk of a run: {bound} {shown_bytes(found.disk_bytes)} at once in train.run_dir:"
    return [head, *(_row(name, number, shown_bytes, about) for name, number, about in rows if number != 0)]


def _row(name: str, number: float | None, shown: Callable[[float], str], about: str) -> str:
    """Returns a row of a table; `number` is None where it depends on the number of pairs, which is not known."""
    if number is None:
        return f"  {name:<16} not known   the number of pairs is missing, since the data was not read"
    return f"  {name:<16}{shown(number):>10}   {about}".rstrip()


# --- parts -----------------------------------------------------------------------------------------------------------


def seconds_of_passes(estimate: Estimate, extent: Extent) -> tuple[float, float, float]:
    """Returns the seconds of the reference pass, of all evaluations, and of the answers that are sampled with them."""
    config, forward = estimate.config, forward_seconds(estimate)
    tokens = generated_tokens(config, extent, estimate.cluster.num_ranks)
    reference, evaluations = (passes(config, extent) * forward for passes in (reference_passes, evaluation_passes))
    return reference, evaluations, tokens * token_seconds(estimate)


def forward_seconds(estimate: Estimate) -> float:
    """Returns the seconds of a forward pass of `batch.pairs_per_step` pairs without gradients: its arithmetic, at the
    same share of the peak as a step's, and one of the two all-gathers of each micro-batch (see `traffic.step_traffic`).
    """
    speed, once = estimate.speed, 2 if estimate.config.parallel.reshard_after_forward else 1
    gather = sum(part.seconds for part in speed.parts if part.name == "all-gather") / once
    return speed.forward_seconds / speed.mfu + gather


def reference_passes(config: Config, extent: Extent) -> int:
    """Returns the number of forward passes of `batch.pairs_per_step` pairs that the reference takes."""
    num_pairs = extent.num_pairs + extent.num_eval_pairs
    return math.ceil(num_pairs / config.batch.pairs_per_step) if config.loss.facts.uses_reference else 0


def evaluation_passes(config: Config, extent: Extent) -> int:
    """Returns the number of forward passes of `batch.pairs_per_step` pairs of all evaluations together."""
    return num_evaluations(config, extent) * math.ceil(extent.num_eval_pairs / config.batch.pairs_per_step)


def num_evaluations(config: Config, extent: Extent) -> int:
    """Returns the number of evaluations of a run."""
    last, every = extent.num_steps, config.train.eval_every
    return sum(is_time(step, every, last) for step in range(last + 1))


def generated_tokens(config: Config, extent: Extent, num_ranks: int) -> int:
    """Returns the maximum number of forward passes that generate a token of the sampled answers of all evaluations: a
    wave of answers, ROWS_PER_LANE on each rank, takes `eval.max_new_tokens` of them.

    The reference answers once; where the policy starts from it, these are the answers of step 0 too.
    """
    same = config.loss.facts.uses_reference and config.reference.path in (None, config.model.path)
    rounds = num_evaluations(config, extent) + (0 if same else 1)
    waves = math.ceil(min(config.eval.samples, extent.num_eval_pairs) / (num_ranks * ROWS_PER_LANE))
    return rounds * waves * config.eval.max_new_tokens


def token_seconds(estimate: Estimate) -> float:
    """Returns the seconds of a forward pass that generates a token of ROWS_PER_LANE answers: the parameters are
    all-gathered, and each is multiplied with each answer, at the rate of a step.
    """
    config, groups, speed = estimate.config, estimate.groups, estimate.speed
    num_parameters, num_layers = groups.num_parameters, len(groups.layers)
    arithmetic = next(part.seconds for part in speed.parts if part.name == "arithmetic")
    rate = speed.flops / estimate.cluster.num_ranks / arithmetic
    products = 2 * num_parameters * ROWS_PER_LANE / rate
    return gather_seconds(config, groups, estimate.cluster) + products + num_layers * LAYER_SECONDS
