"""The loop of a run: all steps, with evaluations and checkpoints in between; `dpo.run.schedule` says when."""

import math
import time
from collections.abc import Iterator, Mapping
from contextlib import closing
from functools import partial

from dpo.base.errors import Preempted, RunError
from dpo.base.prefetch import prefetch
from dpo.batch.packing import PackedBatch
from dpo.board.writer import MetricsWriter
from dpo.checkpoint.saver import Saver
from dpo.checkpoint.store import RunState
from dpo.command.status import write_status
from dpo.distributed.collectives import on_main
from dpo.distributed.world import use_device
from dpo.run.folder import lacks_evaluation
from dpo.run.schedule import is_time
from dpo.step.evaluation import evaluate
from dpo.step.metrics import pair_means, prefixed, step_metrics
from dpo.step.optim import lr_at
from dpo.step.update import train_step
from dpo.terminal.console import say
from dpo.train.outputs import keep_pairs
from dpo.train.setup import Run
from dpo.train.summary import show_evaluation, step_line
from dpo.train.watch import profiled_steps, step_bar, telling_new_graphs


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
        RunError: on every rank, where a gradient or an evaluation loss is not finite.
    """
    first, last, every = run.start.step + 1, run.inputs.last_step, run.config.train.eval_every
    if writer:
        write_status({"state": "training", "step": first})
    if is_time(first - 1, every, last) and on_main(run.world, lambda: lacks_evaluation(run.dir, first - 1)):
        _evaluate(run, writer, saver, first - 1)
    started = time.monotonic()
    ahead = prefetch(run.batches, range(first, last + 1), partial(use_device, run.world.device))
    with closing(ahead), step_bar(run) as bar, profiled_steps(run) as (begin, end):
        for step in range(first, last + 1):
            begin(step)
            with telling_new_graphs(run, f"step {step}"):
                metrics, must_stop = _step(run, step, ahead)
            end(step)
            bar.advance(1)
            if writer:
                writer.write(step, metrics)
                _tell_step(run, step, metrics, time.monotonic() - started)
            if must_stop or is_time(step, run.config.checkpoint.save_every, last):
                _save(run, writer, saver, step)
            if must_stop:
                raise Preempted(step, is_saved=True)
            if is_time(step, every, last):
                _evaluate(run, writer, saver, step)


def _step(run: Run, step: int, ahead: Iterator[list[PackedBatch]]) -> tuple[dict[str, float], bool]:
    """Takes step `step`; returns its metrics, and whether any rank was asked to stop."""
    started = time.perf_counter()
    batches = next(ahead)
    lr = lr_at(step, run.inputs.last_step, run.config.optim)
    try:
        sums = train_step(run.policy, run.optimizer, batches, run.config, lr, run.stop_requested)
    except RunError as failure:
        raise RunError(f"step {step}: {failure}") from failure
    seconds = time.perf_counter() - started
    means = pair_means(sums, run.config.loss.facts) | {"grad_norm": sums["grad_norm"], "lr": lr}
    best_seconds = run.best_seconds(batches[0].forward_flops_in_step)
    return prefixed("train", means | step_metrics(sums, seconds, best_seconds)), bool(sums["stop_requested"])


def _tell_step(run: Run, step: int, metrics: Mapping[str, float], seconds: float) -> None:
    """Prints the line of a step that `train.log_every` names, or of the first one, given the seconds of all steps."""
    first, last = run.start.step + 1, run.inputs.last_step
    if is_time(step, run.config.train.log_every, last) or step == first:
        left = seconds / (step - first + 1) * (last - step)
        say(step_line(step, last, metrics, left, is_reference=step == 1 and run.begins_at_reference))


def _save(run: Run, writer: MetricsWriter | None, saver: Saver, step: int) -> None:
    # The metrics are synced first: no crash may leave a checkpoint whose steps are missing in metrics.jsonl.
    saver.save(RunState(step, run.identity), before_commit=writer.sync if writer else lambda: None)


def _evaluate(run: Run, writer: MetricsWriter | None, saver: Saver, step: int) -> None:
    """Evaluates after `step` steps. Raises Preempted where any rank is asked to stop; that step is saved first."""
    if not len(run.inputs.data.eval):
        return
    with telling_new_graphs(run, f"evaluation after step {step}"):
        result = evaluate(run.policy, run.inputs.data.eval, run.packer, run.config.loss, run.stop_requested)
    if result is None:  # the next start evaluates this step again
        has_begun = step > run.start.step
        if has_begun and not is_time(step, run.config.checkpoint.save_every, run.inputs.last_step):
            _save(run, writer, saver, step)
        raise Preempted(step, is_saved=has_begun)
    if not math.isfinite(result.metrics["loss"]):
        raise RunError(f"evaluation after step {step}: the loss is {result.metrics['loss']}")
    on_main(run.world, lambda: keep_pairs(run, step, result))
    with telling_new_graphs(run, f"answers after step {step}"):
        answers = run.answers_after(step)
    if writer:
        show_evaluation(run, writer, step, result, answers)
