"""The loop of a run: steps, evaluations, checkpoints."""

import functools
import math
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, closing, contextmanager

from dpo.base.console import Progress, progress, say, warn
from dpo.base.errors import Preempted, RunError
from dpo.base.prefetch import prefetch
from dpo.batch.costs import MODEL_UNITS
from dpo.batch.packing import PackedBatch
from dpo.batch.trees import Tree, grow_trees
from dpo.board.dashboard import Answer
from dpo.board.writer import MetricsWriter
from dpo.checkpoint.saver import Saver
from dpo.checkpoint.store import RunState
from dpo.distributed.collectives import on_main
from dpo.distributed.world import use_device
from dpo.model.kernels import describe_graphs, num_graphs
from dpo.run.answers import AnswerBook, answer, keep_answers
from dpo.run.files import PROFILE
from dpo.run.folder import lacks_evaluation
from dpo.run.profiling import StepHook, profiled
from dpo.run.setup import Run
from dpo.run.summary import show_evaluation, step_line
from dpo.step.evaluation import evaluate
from dpo.step.metrics import pair_means, prefixed, train_figures
from dpo.step.objective import has_reference
from dpo.step.optim import lr_at, set_lr
from dpo.step.update import train_step


def train(run: Run, writer: MetricsWriter | None, saver: Saver) -> None:
    """All steps from the run's start to its last, with evaluations and checkpoints in between.

    Raises Preempted after a step at which any rank was asked to stop, with that step on its way to the disk.
    """
    first, last, every = run.start.step + 1, run.inputs.last_step, run.config.train.eval_every
    if is_time(first - 1, every, last) and on_main(run.world, lambda: lacks_evaluation(run.dir, first - 1)):
        _evaluate(run, writer, saver, first - 1)
    started = time.monotonic()
    ahead = prefetch(
        functools.partial(_batches, run), range(first, last + 1), functools.partial(use_device, run.world.device)
    )
    with closing(ahead), _bar(run) as bar, _profiled(run) as (begin, end):
        for step in range(first, last + 1):
            begin(step)
            with _telling_new_graphs(run, f"step {step}"):
                figures, must_stop = _step(run, step, ahead)
            end(step)
            bar.advance(1)
            if writer:
                writer.write(step, figures)
                if is_time(step, run.config.train.log_every, last) or step == first:
                    seconds_a_step = (time.monotonic() - started) / (step - first + 1)
                    say(step_line(step, last, figures, seconds_a_step * (last - step)))
            if must_stop or is_time(step, run.config.checkpoint.save_every, last):
                _save(run, writer, saver, step)
            if must_stop:
                raise Preempted(step)
            if is_time(step, every, last):
                _evaluate(run, writer, saver, step)


@contextmanager
def _telling_new_graphs(run: Run, what: str) -> Iterator[None]:
    """Warns where `what`, done inside, compiled graphs, for which all ranks have waited."""
    before = num_graphs()
    yield
    new = num_graphs() - before
    if new and run.world.is_main:
        kinds = f" ({describe_graphs(run.policy.graphs)} in all)" if run.policy.graphs else ""
        warn(f"{what}: {new} more graphs were compiled, while every rank waited{kinds}")


def is_time(step: int, every: int | None, last_step: int) -> bool:
    """Before the first step, every `every` steps, and after the last."""
    return step in (0, last_step) or (every is not None and step % every == 0)


def _bar(run: Run) -> AbstractContextManager[Progress]:
    """The bar of a terminal; elsewhere the lines of logged steps are all."""
    steps = run.inputs.last_step
    return progress("train", steps, "steps", run.world.is_main, done=run.start.step, lines_elsewhere=False)


def _profiled(run: Run) -> AbstractContextManager[tuple[StepHook, StepHook]]:
    steps = run.config.train.profile_steps if run.world.is_main else None
    first, last = run.start.step + 1, run.inputs.last_step
    if steps is not None and (steps[1] < first or steps[0] > last):
        warn(f"train.profile_steps {list(steps)}: none of them is run, those of this start are {first} to {last}")
    return profiled(steps, run.dir / PROFILE, run.world.device)


def _step(run: Run, step: int, ahead: Iterator[list[PackedBatch]]) -> tuple[dict[str, float], bool]:
    """Step `step` from its micro-batches to its metrics, and whether any rank was asked to stop."""
    started = time.perf_counter()
    batches = next(ahead)
    lr = lr_at(step, run.inputs.last_step, run.config.optim)
    set_lr(run.optimizer, lr)
    try:
        sums = train_step(run.policy, run.optimizer, batches, run.config, run.head_bytes, run.stop_requested)
    except RunError as failure:
        raise RunError(f"step {step}: {failure}") from failure
    seconds = time.perf_counter() - started
    best = MODEL_UNITS * batches[0].forward_flops_in_step / run.peak_flops if run.peak_flops else None
    means = pair_means(sums, has_reference(run.config.loss)) | {"grad_norm": sums["grad_norm"], "lr": lr}
    return prefixed("train", means | train_figures(sums, seconds, best)), bool(sums["stop_requested"])


def _batches(run: Run, step: int) -> list[PackedBatch]:
    """This rank's micro-batches of a step, a function of (seed, step)."""
    plan = run.packer.plan(_trees(run, step))
    if plan.num_oversized and run.world.is_main:
        say(f"step {step}: {plan.num_oversized} trees are over batch.tokens_per_micro_batch; each runs alone")
    return run.packer.pack(plan)


def _trees(run: Run, step: int) -> list[Tree]:
    return grow_trees(run.inputs.data.train.pairs(run.inputs.order.items(step, run.inputs.last_item)))


def _save(run: Run, writer: MetricsWriter | None, saver: Saver, step: int) -> None:
    # No crash may leave a checkpoint whose steps are missing in metrics.jsonl.
    saver.save(RunState(step, run.identity), before_commit=writer.sync if writer else lambda: None)


def _evaluate(run: Run, writer: MetricsWriter | None, saver: Saver, step: int) -> None:
    """Evaluates after `step` steps. Raises Preempted, with that step saved, where any rank is asked to stop."""
    if not len(run.inputs.data.eval):
        return
    pairs, loss = run.inputs.data.eval, run.config.loss
    with _telling_new_graphs(run, f"evaluation after step {step}"):
        result = evaluate(run.policy, pairs, run.packer, loss, run.head_bytes, run.stop_requested)
    if result is None:  # who goes on makes it anew
        if step > run.start.step and not is_time(step, run.config.checkpoint.save_every, run.inputs.last_step):
            _save(run, writer, saver, step)
        raise Preempted(step)
    if not math.isfinite(result.figures["loss"]):
        raise RunError(f"evaluation after step {step}: the loss is {result.figures['loss']}")
    with _telling_new_graphs(run, f"answers after step {step}"):
        answers = _answers(run, run.answers, step) if run.answers else []
    if writer:
        show_evaluation(run, writer, step, result, answers)


def _answers(run: Run, book: AnswerBook, step: int) -> list[Answer]:
    """What the policy says; before the first step, where it is the reference, that is known already."""
    if step == 0 and run.begins_at_reference:
        return keep_answers(book, step, book.references)
    return answer(run.policy, book, step)
