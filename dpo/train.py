"""The training program: `torchrun --standalone --nproc-per-node 2 -m dpo.train --config FILE [--loss.beta 0.5]`.

Without torchrun, `python -m dpo.train` is a run on one rank. Read `train_step` first, then `train`.
"""

import functools
import math
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from typing import Any

import torch

from dpo.base.console import Progress, progress, say, warn
from dpo.base.errors import Preempted, RunError
from dpo.base.prefetch import prefetch
from dpo.batch.costs import MODEL_UNITS
from dpo.batch.packing import PackedBatch
from dpo.batch.plan import Tree, grow_trees
from dpo.board.dashboard import Answer
from dpo.checkpoint.saver import Saver, open_saver
from dpo.checkpoint.store import RunState
from dpo.config import Config, load_config
from dpo.distributed.failures import remembered_need
from dpo.distributed.preemption import StopRequest, listen_for_stop
from dpo.distributed.program import exit_program
from dpo.distributed.world import World, all_gather, on_main, open_world, start_devices
from dpo.estimate.at_start import decide_parallel
from dpo.export import export
from dpo.model.kernels import describe_graphs, num_graphs
from dpo.model.policy import Policy, announce_backward, completion_logps
from dpo.run.answers import AnswerBook, answer, keep_answers, open_answers
from dpo.run.files import FINAL, PROFILE
from dpo.run.folder import (
    Start,
    check_identity,
    decided_so_far,
    find_start,
    identity_of,
    is_finished,
    lacks_evaluation,
    layout_of,
    open_run_folder,
)
from dpo.run.inputs import Inputs, read_inputs
from dpo.run.profiling import StepHook, profiled
from dpo.run.provenance import provenance
from dpo.run.setup import Run, build_run
from dpo.run.summary import conclude, introduce, show_evaluation, step_line
from dpo.step.evaluation import evaluate
from dpo.step.first_step import verify_start
from dpo.step.metrics import MetricsWriter, StepMetrics, pair_means, prefixed, train_figures
from dpo.step.objective import has_reference, pair_losses
from dpo.step.optim import clip_gradient, lr_at, set_lr, square_norm

DESCRIPTION = """Trains a model by Direct Preference Optimization. On one node with eight GPUs:
torchrun --standalone --nproc-per-node 8 -m dpo.train --config FILE; without torchrun, python -m dpo.train is a run on
one rank."""


def train_step(
    policy: Policy,
    optimizer: torch.optim.Optimizer,
    batches: Sequence[PackedBatch],
    config: Config,
    head_bytes: int,
    stop_requested: StopRequest,
) -> dict[str, float]:
    """One update on the global batch; its gradient is that of the mean loss over its pairs, on any number of ranks.

    Gives the step's sums over all ranks (`StepMetrics.reduce`) and `grad_norm`, L2, before clipping. Raises RunError,
    on every rank and before the update, where the gradient is not finite. Every rank must get here with the same
    number of micro-batches.
    """
    metrics = StepMetrics(policy.device)
    for number, batch in enumerate((batch.to(policy.device) for batch in batches), start=1):
        announce_backward(policy, is_last=number == len(batches))
        pi_logps = completion_logps(policy, batch, head_bytes)  # (B,)
        losses, rewards = pair_losses(pi_logps, batch, config.loss)  # (T,), (B,)
        (losses.sum() / batch.pairs_in_step).backward()  # FSDP sums over ranks
        metrics.add(losses, rewards, pi_logps, batch)
    # The step's one exchange, and the one time that the host waits for the device: the update and the next step's work
    # are queued behind each other. No rank may update before all know that the gradient is finite.
    sums = metrics.reduce(square_norm(policy.model.parameters()), stop_requested())
    grad_norm = math.sqrt(sums["square_norm"] / config.parallel.replicate)  # every copy has the whole gradient
    if not math.isfinite(grad_norm):
        raise RunError(f"the gradient norm is {grad_norm}; the weights were not updated")
    clip_gradient(policy.model.parameters(), grad_norm, config.optim.max_grad_norm)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return sums | {"grad_norm": grad_norm}


def train(run: Run, writer: MetricsWriter | None, saver: Saver) -> None:
    """All steps from the run's start to its last, with evaluations and checkpoints in between.

    Raises Preempted after a step at which any rank was asked to stop, with that step on its way to the disk.
    """
    first, last, every = run.start.step + 1, run.inputs.last_step, run.config.train.eval_every
    if is_time(first - 1, every, last) and on_main(run.world, lambda: lacks_evaluation(run.dir, first - 1)):
        _evaluate(run, writer, saver, first - 1)
    started = time.monotonic()
    ahead = prefetch(functools.partial(_batches, run), range(first, last + 1), run.world.device)
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


# --- the program -----------------------------------------------------------------------------------------------------


def run_training(config: Config) -> None:
    """The whole run: its input is checked, then the policy is built, trained and exported."""
    with listen_for_stop() as stop_requested, open_world(config.parallel.setup_timeout_seconds) as world:
        start = on_main(world, lambda: find_start(config))
        inputs = read_inputs(config, world)
        identity = identity_of(config, inputs.data.train.content_hash, inputs.reference.hash)
        on_main(world, lambda: check_identity(start, identity))
        if on_main(world, lambda: is_finished(config, start, inputs.last_step)):
            if world.is_main:  # a run may be told to end where it has passed already
                steps = max(start.step, inputs.last_step)
                say(f"{config.train.run_dir} is finished: its {steps} steps are done, the model is in final/")
            return
        start_devices(world, config.parallel.timeout_seconds)
        config, need = decide_parallel(_as_so_far(config, world, start), world, inputs)
        with remembered_need(need):
            _train_and_export(config, world, inputs, start, identity, stop_requested)


def _train_and_export(
    config: Config, world: World, inputs: Inputs, start: Start, identity: dict[str, Any], stop_requested: StopRequest
) -> None:
    """What follows once all is decided: from the weights to the exported model."""
    run = build_run(config, world, inputs, start, identity, stop_requested)
    deviation = None
    if run.begins_at_reference:
        terms = run.first_step_terms
        deviation = verify_start(run.policy, run.packer, _trees(run, 1), config.loss, terms, run.head_bytes)
    origin = provenance(all_gather(socket.gethostname()), inputs.last_step) | {"layout": _layout(config, world)}
    on_main(world, lambda: open_run_folder(config, start, origin))
    if run.answers:
        on_main(world, functools.partial(open_answers, run.answers, start.step))
    writing = closing(MetricsWriter(run.dir, start.step + 1)) if world.is_main else nullcontext()
    with writing as writer:
        if writer:
            introduce(run, writer, deviation)
        keep, seconds = config.checkpoint.keep, config.parallel.timeout_seconds
        with open_saver(run.dir, run.policy.model, run.optimizer, keep, world, seconds) as saver:
            train(run, writer, saver)
        export(run.policy, inputs.model.folder, run.dir / FINAL, config, world)
        if writer:
            conclude(run)


def _as_so_far(config: Config, world: World, start: Start) -> Config:
    layout = _layout(config, world)
    return on_main(world, lambda: decided_so_far(config, start, layout))


def _layout(config: Config, world: World) -> dict[str, Any]:
    """The run's layout, with the devices of all ranks. Every rank must get here."""
    kind = torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else world.device.type
    return layout_of(config, all_gather(kind))


def main() -> None:
    """`python -m dpo.train`."""
    run_training(load_config(sys.argv[1:], prog="dpo.train", description=DESCRIPTION))


if __name__ == "__main__":
    exit_program(main)
