"""The training program: `torchrun --standalone --nproc-per-node 2 -m dpo.train --config FILE [--loss.beta 0.5]`.

Without torchrun, `python -m dpo.train` is a run on one rank. Read `train_step` first, then `train`.
"""

import math
import sys
import time
from collections.abc import Sequence

import torch

from dpo.checkpoint import RunState, save_checkpoint
from dpo.config import Config, load_config
from dpo.distributed import on_main, open_world, run_program
from dpo.errors import RunError
from dpo.evaluation import evaluate, verify_start
from dpo.export import export
from dpo.inputs import read_inputs
from dpo.metrics import MetricsWriter, StepMetrics, pair_means, prefixed, train_figures
from dpo.objective import has_reference, pair_losses
from dpo.optim import clip_gradient, lr_at, set_lr
from dpo.packing import PackedBatch
from dpo.plan import grow_trees
from dpo.policy import Policy, announce_backward, completion_logps
from dpo.progress import progress, say
from dpo.run_folder import check_identity, find_start, identity_of, is_finished, open_run_folder
from dpo.setup import Run, build_run

DESCRIPTION = """Trains a model by Direct Preference Optimization. On one node with eight GPUs:
torchrun --standalone --nproc-per-node 8 -m dpo.train --config FILE; without torchrun, python -m dpo.train is a run on
one rank."""


def train_step(
    policy: Policy, optimizer: torch.optim.Optimizer, batches: Sequence[PackedBatch], config: Config, head_bytes: int
) -> tuple[StepMetrics, float]:
    """One update on the global batch; its gradient is that of the mean loss over its pairs, on any number of ranks.

    Gives the rank's sums and the gradient's L2 norm before clipping. Raises RunError, on every rank and before the
    update, where the gradient is not finite. Every rank must get here with the same number of micro-batches.
    """
    metrics = StepMetrics(policy.device)
    for number, batch in enumerate(batches, start=1):
        announce_backward(policy, is_last=number == len(batches))
        pi_logps = completion_logps(policy, batch, head_bytes)  # (B,)
        losses, rewards = pair_losses(pi_logps, batch, config.loss)  # (T,), (B,)
        (losses.sum() / batch.pairs_in_step).backward()  # FSDP sums over ranks
        metrics.add(losses, rewards, pi_logps, batch)
    grad_norm = clip_gradient(policy.model.parameters(), config.optim.max_grad_norm).item()
    if not math.isfinite(grad_norm):
        raise RunError(f"the gradient norm is {grad_norm}; the weights were not updated")
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return metrics, grad_norm


def train(run: Run, writer: MetricsWriter | None) -> None:
    """All steps from the run's start to its last, with evaluations and checkpoints in between."""
    first, last = run.start.step + 1, run.inputs.last_step
    if first == 1:
        _evaluate(run, writer, 0)
    with progress("train", last, "steps", run.world.is_main, done=first - 1) as bar:
        for step in range(first, last + 1):
            figures = _step(run, step)
            if writer:
                writer.write(step, figures)
            bar.advance(1, _summary(figures))
            if is_time(step, run.config.train.eval_every, last):
                _evaluate(run, writer, step)
            if is_time(step, run.config.checkpoint.save_every, last):
                state = RunState(step, run.identity)
                save_checkpoint(run.dir, state, run.policy.model, run.optimizer, run.config.checkpoint.keep, run.world)


def is_time(step: int, every: int | None, last_step: int) -> bool:
    """Every `every` steps, and after the last."""
    return step == last_step or (every is not None and step % every == 0)


def _step(run: Run, step: int) -> dict[str, float]:
    """Step `step` from its pairs to its metrics."""
    started = time.perf_counter()
    batches = _batches(run, step)
    lr = lr_at(step, run.inputs.last_step, run.config.optim)
    set_lr(run.optimizer, lr)
    try:
        metrics, grad_norm = train_step(run.policy, run.optimizer, batches, run.config, run.head_bytes)
    except RunError as failure:
        raise RunError(f"step {step}: {failure}") from failure
    sums = metrics.reduce()
    seconds = time.perf_counter() - started
    means = pair_means(sums, has_reference(run.config.loss)) | {"grad_norm": grad_norm, "lr": lr}
    return prefixed("train", means | train_figures(sums, seconds))


def _batches(run: Run, step: int) -> list[PackedBatch]:
    """This rank's micro-batches of a step, a function of (seed, step)."""
    ids = run.inputs.order.items(step, run.inputs.last_item)
    plan = run.packer.plan(grow_trees(run.inputs.data.train.pairs(ids)))
    if plan.num_oversized and run.world.is_main:
        say(f"step {step}: {plan.num_oversized} trees are over batch.tokens_per_micro_batch; each runs alone")
    return run.packer.pack(plan)


def _evaluate(run: Run, writer: MetricsWriter | None, step: int) -> None:
    if not len(run.inputs.data.eval):
        return
    figures = prefixed("eval", evaluate(run.policy, run.inputs.data.eval, run.packer, run.config.loss, run.head_bytes))
    if not math.isfinite(figures["eval/loss"]):
        raise RunError(f"evaluation after step {step}: the loss is {figures['eval/loss']}")
    if writer:
        writer.write(step, figures)
        say(
            f"evaluation after step {step}: "
            + "  ".join(f"{name} {figure}" for name, figure in _summary(figures).items())
        )


def _summary(figures: dict[str, float]) -> dict[str, str]:
    """What the terminal shows of a step's or an evaluation's figures."""
    names = {
        "loss": "loss",
        "rewards/accuracies": "accuracy",
        "rewards/margins": "margin",
        "pairs_per_second": "pairs/s",
    }
    found = {name.split("/", 1)[1]: figure for name, figure in figures.items()}
    return {shown: f"{found[name]:.4g}" for name, shown in names.items() if name in found}


# --- the program -----------------------------------------------------------------------------------------------------


def run_training(config: Config) -> None:
    """The whole run: its input is checked, then the policy is built, trained and exported."""
    with open_world(config.parallel.timeout_seconds) as world:
        start = on_main(world, lambda: find_start(config))
        inputs = read_inputs(config, world)
        identity = identity_of(config, inputs.data.train.content_hash, inputs.reference.hash)
        on_main(world, lambda: check_identity(start, identity))
        steps = max(start.step, inputs.last_step)  # a run may be told to end where it has passed already
        if on_main(world, lambda: is_finished(config, start, inputs.last_step)):
            if world.is_main:
                say(f"{config.train.run_dir} is finished: its {steps} steps are done, the model is in final/")
            return
        run = build_run(config, world, inputs, start, identity)
        if run.begins_at_reference:
            verify_start(run.policy, _batches(run, 1), config.loss, run.compute_dtype, run.head_bytes)
        on_main(world, lambda: open_run_folder(config, start))
        writer = MetricsWriter(run.dir, start.step + 1) if world.is_main else None
        if writer and run.reference_pass and start.step == 0:
            writer.write(0, prefixed("reference", vars(run.reference_pass)))
        train(run, writer)
        export(run.policy, inputs.model.folder, run.dir / "final", config, world)
        if writer:
            writer.close()
            say(f"done: {steps} steps, the model is in {run.dir / 'final'}")


def main() -> None:
    """`python -m dpo.train`."""
    run_training(load_config(sys.argv[1:], prog="dpo.train", description=DESCRIPTION))


if __name__ == "__main__":
    sys.exit(run_program(main))
