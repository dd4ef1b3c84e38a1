"""The loop of a run: all steps, with evaluations and checkpoints in between; `dpo.run.schedule` says when."""

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial

from dpo.base.errors import Preempted, RunError
from dpo.base.prefetch import prefetch
from dpo.batch.packing import PackedBatch
from dpo.board.writer import MetricsWriter
from dpo.checkpoint.saver import Saver
from dpo.checkpoint.state import RunState
from dpo.command.status import write_status
from dpo.distributed.collectives import on_main
from dpo.distributed.world import use_device
from dpo.run.folder import lacks_evaluation
from dpo.run.schedule import is_time
from dpo.run_folder.files import SKIPPED, read_metrics
from dpo.step.evaluation import evaluate
from dpo.step.metrics import pair_means, prefixed, step_metrics
from dpo.step.optim import lr_at
from dpo.step.update import StepResult, train_step
from dpo.terminal.console import say, warn
from dpo.train.nonfinite import report_evaluation, report_step
from dpo.train.outputs import keep_pairs
from dpo.train.setup import Run
from dpo.train.spikes import WINDOW, find_spike, losses_of
from dpo.train.summary import show_evaluation, step_line, tell_resumed
from dpo.train.watch import profiled_steps, step_bar, telling_new_graphs
from dpo.watch.beats import stand


@dataclass(frozen=True)
class Taken:
    """A step that was taken, or that could not be."""

    metrics: dict[str, float | None]
    """None for a metric that is not finite."""
    must_stop: bool
    """Whether any rank was asked to stop."""
    fault: str = ""
    """The line that tells why the weights were not updated, and the pairs; empty where they were."""


def train(run: Run, writer: MetricsWriter | None, saver: Saver) -> None:
    """Takes all steps from the run's start to its last, with evaluations and checkpoints in between.

    Every rank must get here, or the rest hang.

    Args:
        run: the run, ready for its next step.
        writer: of the metrics, on rank 0; None on the other ranks.
        saver: of the checkpoints.

    Raises:
        Preempted: on every rank, after a step at which any rank was asked to stop; the checkpoint of that step is in
            flight.
        RunError: on every rank, where a step that may not be skipped or an evaluation is not finite.
    """
    first, last, every = run.start.step + 1, run.inputs.last_step, run.config.train.eval_every
    skipped = run.start.state.skipped if run.start.state else 0
    losses = losses_of(read_metrics(run.dir)) if writer else []
    if writer:
        write_status({"state": "training", "step": first})
    if is_time(first - 1, every, last) and on_main(run.world, lambda: lacks_evaluation(run.dir, first - 1)):
        _evaluate(run, writer, saver, RunState(first - 1, run.identity, skipped))
    started = time.monotonic()
    ahead = prefetch(run.batches, range(first, last + 1), partial(use_device, run.world.device))
    with closing(ahead), step_bar(run) as bar, profiled_steps(run) as (begin, end):
        for step in range(first, last + 1):
            begin(step)
            with telling_new_graphs(run, f"step {step}"):
                taken = _step(run, step, ahead)
            skipped = _count_skips(run, taken, skipped)
            end(step)
            bar.advance(1)
            if step == first:
                tell_resumed(run)
            state = RunState(step, run.identity, skipped)
            if writer:
                writer.write(step, taken.metrics)
                _tell_step(run, step, taken.metrics, time.monotonic() - started)
                losses = _tell_spike(losses, step, taken.metrics["train/loss"])
            if taken.must_stop or is_time(step, run.config.checkpoint.save_every, last):
                _save(run, writer, saver, state)
            if taken.must_stop:
                raise Preempted(step, is_saved=True)
            if is_time(step, every, last):
                _evaluate(run, writer, saver, state)


def _step(run: Run, step: int, ahead: Iterator[list[PackedBatch]]) -> Taken:
    """Takes step `step`; where it is not finite, names and writes its pairs."""
    started = time.perf_counter()
    stand("the reading of the batch", step)
    batches = next(ahead)
    result, metrics = take_step(run, step, batches, started)
    fault = report_step(run, step, batches, result) if result.fault else ""
    return Taken(metrics, bool(result.sums["stop_requested"]), fault)


def take_step(
    run: Run, step: int, batches: Sequence[PackedBatch], started: float
) -> tuple[StepResult, dict[str, float | None]]:
    """Takes step `step`; returns its result and its metrics, None for each that is not finite. Every rank must get
    here, or the rest hang.

    Args:
        run: the run, after `step` - 1 updates.
        step: the number of the step.
        batches: its micro-batches of this lane.
        started: when it began, by `time.perf_counter`.
    """
    lr = lr_at(step, run.inputs.last_step, run.config.optim)
    result = train_step(run.policy, run.optimizer, batches, run.config, lr, run.hooks.stop_requested)
    seconds, sums = time.perf_counter() - started, result.sums
    means = pair_means(sums, run.config.loss.facts) | {"grad_norm": sums["grad_norm"], "lr": lr}
    best_seconds = run.best_seconds(batches[0].forward_flops_in_step)
    metrics = prefixed("train", means | step_metrics(sums, seconds, best_seconds))
    skipped = {SKIPPED: 1.0} if result.fault else {}
    known = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
    return result, known | skipped


def _count_skips(run: Run, taken: Taken, skipped: int) -> int:
    """Returns the number of steps that were skipped in a row, the one that was taken included; warns of it on rank 0.

    Raises RunError, on every rank, where it may not be skipped.
    """
    if not taken.fault:
        return 0
    most = run.config.train.max_skipped
    if run.config.train.on_nonfinite == "stop":
        raise RunError(f"{taken.fault}; the weights were not updated")
    if skipped >= most:
        raise RunError(f"{taken.fault}; the {skipped} steps before it were skipped, train.max_skipped {most}")
    if run.world.is_main:
        warn(f"{taken.fault}; the step is skipped, {skipped + 1} of at most {most} in a row")
    return skipped + 1


def _tell_spike(losses: Sequence[float], step: int, loss: float | None) -> list[float]:
    """Warns of a loss that is far above those before it. Returns the losses that the next step is compared with."""
    if loss is None:
        return list(losses)
    if spike := find_spike(losses, loss):
        warn(f"step {step}: {spike}")
    return [*losses, loss][-WINDOW:]


def _tell_step(run: Run, step: int, metrics: Mapping[str, float | None], seconds: float) -> None:
    """Prints the line of a step that `train.log_every` names, or of the first one, given the seconds of all steps."""
    first, last = run.start.step + 1, run.inputs.last_step
    known = {name: value for name, value in metrics.items() if value is not None}
    if SKIPPED not in known and (is_time(step, run.config.train.log_every, last) or step == first):
        left = seconds / (step - first + 1) * (last - step)
        say(step_line(step, last, known, left, is_reference=step == 1 and run.begins_at_reference))


def _save(run: Run, writer: MetricsWriter | None, saver: Saver, state: RunState) -> None:
    stand("the checkpoint", state.step)
    # The metrics are synced first: no crash may leave a checkpoint whose steps are missing in metrics.jsonl.
    saver.save(state, before_commit=writer.sync if writer else lambda: None)


def _evaluate(run: Run, writer: MetricsWriter | None, saver: Saver, state: RunState) -> None:
    """Evaluates after `state.step` steps. Raises Preempted where any rank is asked to stop; that step is saved first.
    Raises RunError, on every rank, where a metric is not finite.
    """
    step = state.step
    if not len(run.inputs.data.eval):
        return
    stand("the evaluation", step)
    with telling_new_graphs(run, f"evaluation after step {step}"):
        result = evaluate(run.policy, run.inputs.data.eval, run.packer, run.config.loss, run.hooks.stop_requested)
    if result is None:  # the next start evaluates this step again
        has_begun = step > run.start.step
        if has_begun and not is_time(step, run.config.checkpoint.save_every, run.inputs.last_step):
            _save(run, writer, saver, state)
        raise Preempted(step, is_saved=has_begun)
    if fault := report_evaluation(run, step, result):
        raise RunError(fault)
    on_main(run.world, lambda: keep_pairs(run, step, result))
    stand("the sampled answers", step)
    with telling_new_graphs(run, f"answers after step {step}"):
        answers = run.answers_after(step)
    if writer:
        show_evaluation(run, writer, step, result, answers)
