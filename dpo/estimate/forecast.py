"""What a run needs of a cluster: seconds, memory of the hosts and bytes on disk, for `launch.submit`.

For example, 6,400 pairs and 100 steps of 12 s, with `train.eval_every` 50 and 640 evaluation pairs: the forward pass is
a third of a step's arithmetic, so the reference takes 100 + 10 forward passes of 64 pairs of 4 s each, 440 s, and each
of the evaluations after steps 0, 50 and 100 takes 10 of them, 40 s.
"""

import math

from dpo.base.units import shown_bytes, shown_duration
from dpo.batch.costs import MODEL_UNITS
from dpo.config import Config
from dpo.estimate.lengths import Extent
from dpo.estimate.memory import COPY
from dpo.estimate.words import Estimate, verdict
from dpo.machine.data_sheets import GIB
from dpo.run.disk import Sizes
from dpo.run.forecast import Forecast
from dpo.run.loop import is_time

PROCESS_BYTES = {"cpu": 0.75 * GIB, "cuda": 6 * GIB}
"""Host memory that the process of a rank is assumed to take beside its tensors. On CUDA: the driver's and NCCL's
buffers, the libraries, and the processes that compile kernels.
"""


def forecast(estimate: Estimate, sizes: Sizes, extent: Extent | None) -> Forecast:
    """Returns the forecast that follows from an estimate.

    Args:
        estimate: of a step.
        sizes: of the run's checkpoints.
        extent: the number of steps and pairs; None where the data was not read.
    """
    config, cluster, memory = estimate.config, estimate.cluster, estimate.memory
    on_cpu, copied = cluster.device.is_cpu, memory.host[COPY]
    tensors = memory.host.total() - copied + (memory.device.total() if on_cpu else 0)
    forward = forward_seconds(estimate)
    return Forecast(
        device=cluster.device.name,
        lengths=estimate.lengths,
        fits=estimate.fits,
        verdict=verdict(estimate),
        step_seconds=estimate.speed.serial,
        num_steps=extent.num_steps if extent else config.train.steps,
        reference_seconds=reference_passes(config, extent) * forward if extent else None,
        evaluation_seconds=evaluation_passes(config, extent) * forward if extent else None,
        checkpoint_bytes=sizes.checkpoint,
        disk_bytes=sizes.disk_bytes(0),
        copy_bytes=copied * cluster.ranks_per_node,
        step_bytes=tensors * cluster.ranks_per_node,
        process_bytes=PROCESS_BYTES["cpu" if on_cpu else "cuda"] * cluster.ranks_per_node,
    )


def line_of_run(found: Forecast, num_ranks: int) -> str:
    """Returns one line about the whole run: its time, by part and times the devices, and bytes on disk."""
    disk = f"it needs {shown_bytes(found.disk_bytes)} in its run folder"
    if found.num_steps is None or found.seconds is None:
        return f"a run: the number of steps is not known, since the data was not read; {disk}"
    parts = [f"{found.num_steps:,} steps {shown_duration(found.num_steps * found.step_seconds)}"]
    for name, more in (("the reference", found.reference_seconds), ("evaluations", found.evaluation_seconds)):
        parts += [f"{name} {shown_duration(more)}"] if more else []
    whole, all_devices = shown_duration(found.seconds), shown_duration(found.seconds * num_ranks)
    return f"a run takes {whole} ({', '.join(parts)}), times {num_ranks} devices {all_devices}; {disk}"


def forward_seconds(estimate: Estimate) -> float:
    """Returns the seconds of a forward pass of `batch.pairs_per_step` pairs without gradients: its share of a step's
    arithmetic, and one of the two all-gathers of each micro-batch (see `traffic.step_traffic`).
    """
    speed, once = estimate.speed, 2 if estimate.config.parallel.reshard_after_forward else 1
    gather = sum(part.seconds for part in speed.parts if part.name == "all-gather") / once
    return speed.model_seconds / MODEL_UNITS / speed.mfu + gather


def reference_passes(config: Config, extent: Extent) -> int:
    """Returns the number of forward passes of `batch.pairs_per_step` pairs that the reference takes."""
    num_pairs = extent.num_pairs + extent.num_eval_pairs
    return math.ceil(num_pairs / config.batch.pairs_per_step) if config.loss.facts.uses_reference else 0


def evaluation_passes(config: Config, extent: Extent) -> int:
    """Returns the number of forward passes of `batch.pairs_per_step` pairs of all evaluations together."""
    last, every = extent.num_steps, config.train.eval_every
    evaluations = sum(is_time(step, every, last) for step in range(last + 1))
    return evaluations * math.ceil(extent.num_eval_pairs / config.batch.pairs_per_step)
