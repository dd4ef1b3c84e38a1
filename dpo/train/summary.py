"""The terminal output of a run: a table at the start, and a line per logged step and evaluation."""

import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import nn

from dpo.adapters.inject import trained
from dpo.adapters.spec import ADAPTER
from dpo.base.units import shown_bytes
from dpo.board.sink import Answer
from dpo.board.writer import MetricsWriter
from dpo.config import Config, OptimConfig, to_yaml
from dpo.disk.sizes import num_bytes, num_parameters
from dpo.run.card_adapters import words_of
from dpo.run_folder.files import PROVENANCE
from dpo.step.deviation import Deviation
from dpo.step.evaluation import Evaluation
from dpo.step.metrics import prefixed
from dpo.step.optim import lr_at, num_warmup_steps, optimizer_elements
from dpo.terminal.console import say, warn
from dpo.train.setup import Run

COLUMNS = 100
"""The maximum length of a line."""
STEPS_LOOKED_AT = 4
"""Steps whose trees are counted for the mean number of tokens per step."""


# --- lines while it runs ---------------------------------------------------------------------------------------------


def step_line(
    step: int, last_step: int, metrics: Mapping[str, float], seconds_left: float, is_reference: bool = False
) -> str:
    """Returns the line of a logged step, in at most COLUMNS columns; omits the last metrics where they do not fit.

    Args:
        step: updates made so far.
        last_step: the number of steps of the whole run.
        metrics: the step's metrics, named `train/...`.
        seconds_left: estimated seconds to the end of the run.
        is_reference: as in `evaluation_line`; the metrics of a step are those before its update.
    """
    digits = len(str(last_step))
    outcome = [_loss(metrics, "train"), "all margins 0"] if is_reference else _outcome(metrics, "train")
    parts = [f"step {step:>{digits}}/{last_step}", *outcome]
    parts += [f"lr {_short(metrics['train/lr'])}", f"grad {_short(metrics['train/grad_norm'])}"]
    parts += [f"eta {remaining(seconds_left)}", f"{_short(metrics['train/pairs_per_second'], 3)} pairs/s"]
    return fitting(parts)


def evaluation_line(step: int, last_step: int, metrics: Mapping[str, float], is_reference: bool = False) -> str:
    """Returns the line of an evaluation, in at most COLUMNS columns.

    Args:
        step: updates made before the evaluation.
        last_step: the number of steps of the whole run.
        metrics: the metrics of the evaluation, named `eval/...`.
        is_reference: whether the policy is still its reference: all margins are 0, and no pair counts as accurate.
    """
    digits = len(str(last_step))
    head, pairs = f"eval {step:>{digits}}/{last_step}", f"{metrics['eval/pairs']:,} pairs"
    if is_reference:
        return fitting([head, _loss(metrics, "eval"), "the policy is the reference: all margins 0", pairs])
    return fitting([head, *_outcome(metrics, "eval"), pairs])


def _outcome(metrics: Mapping[str, float], group: str) -> list[str]:
    """Returns the loss, and where the loss has rewards the accuracy and margin."""
    parts = [_loss(metrics, group)]
    if f"{group}/rewards/margins" in metrics:
        parts.append(f"acc {metrics[f'{group}/rewards/accuracies']:z.3f}")
        parts.append(f"margin {metrics[f'{group}/rewards/margins']:z.3f}")
    return parts


def _loss(metrics: Mapping[str, float], group: str) -> str:
    return f"loss {metrics[f'{group}/loss']:.4f}"


def _short(number: float, digits: int = 2) -> str:
    """Returns a number with so many significant digits: 7.9e-07 as 7.9e-7, and 100 to 99,999 as an integer."""
    if 100 <= abs(number) < 99_999.5:
        return f"{number:.0f}"
    return re.sub(r"e-0", "e-", f"{number:.{digits}g}")


def fitting(parts: Sequence[str]) -> str:
    """Returns the first parts that fit into COLUMNS columns, with two spaces between them."""
    line = parts[0]
    for part in parts[1:]:
        if len(line) + 2 + len(part) > COLUMNS:
            break
        line += f"  {part}"
    return line


def remaining(seconds: float) -> str:
    """Returns a duration in its two largest units: 45s, 12m33s, 3h05m, 2d01h."""
    for unit, name, part, part_name in ((86_400, "d", 3600, "h"), (3600, "h", 60, "m"), (60, "m", 1, "s")):
        whole, rest = divmod(round(seconds / part), unit // part)
        if whole:
            return f"{whole}{name}{rest:02}{part_name}"
    return f"{round(seconds)}s"


# --- at the start ----------------------------------------------------------------------------------------------------


def start_lines(run: Run, deviation: Deviation | None) -> list[str]:
    """Returns the table that is shown before the first step: model, reference, pairs, steps, ranks, memory, folder."""
    first_step = [("first step", f"policy against its cached reference: {deviation}")] if deviation else []
    return table_lines(
        [
            ("model", _model(run)),
            *([("adapters", _adapters(run))] if run.policy.adapters else []),
            ("reference", _reference(run)),
            *first_step,
            ("pairs", f"{len(run.inputs.data.train):,} to train on, {len(run.inputs.data.eval):,} to evaluate"),
            ("steps", _steps(run)),
            ("ranks", _ranks(run)),
            ("memory", _memory(run)),
            ("run", str(run.dir)),
            ("charts", charts_command(run.dir)),
        ]
    )


def charts_command(run_dir: Path) -> str:
    """Returns the command that shows a run in TensorBoard, for a shell."""
    return shlex.join(["tensorboard", "--logdir", str(run_dir)])


def table_lines(rows: Sequence[tuple[str, str]]) -> list[str]:
    """Returns a line per row, (name, text), with the texts in one column."""
    width = max(len(name) for name, _ in rows)
    return [f"{name:<{width}}  {text}" for name, text in rows]


def _model(run: Run) -> str:
    kind = type(run.policy.model).__name__.removeprefix("FSDP")
    dtypes = f"{_name(run.policy.dtype)}, computes in {_name(run.compute_dtype)}"
    if run.policy.adapters:
        frozen = num_parameters(run.policy.model) - _num_trained(run)
        stored = run.policy.adapters.quantize or _name(run.compute_dtype)
        dtypes = f"{stored} are frozen, computes in {_name(run.compute_dtype)}"
        return f"{run.config.model.path}: {kind}, {frozen:,} parameters in {dtypes}"
    return f"{run.config.model.path}: {kind}, {num_parameters(run.policy.model):,} parameters in {dtypes}"


def _adapters(run: Run) -> str:
    words = words_of(run.policy.model.peft_config[ADAPTER].to_dict())
    return f"{words}: {_num_trained(run):,} parameters are trained in {_name(run.policy.dtype)}"


def _num_trained(run: Run) -> int:
    return sum(parameter.numel() for parameter in trained(run.policy.model.parameters()))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _reference(run: Run) -> str:
    if run.reference_pass is None:
        return "none: the loss has no reference"
    before = "the model before training" if run.inputs.model.hash == run.inputs.reference.hash else "the model alone"
    return run.config.reference.path or before


def _steps(run: Run) -> str:
    first, last = run.start.step + 1, run.inputs.last_step
    if first > last:
        return f"none are left of {last:,}"
    span = f"{last:,}" if first == 1 else f"{first:,} to {last:,}"
    return f"{span}, each of {run.config.batch.pairs_per_step} pairs in about {tokens_per_step(run):,} tokens"


def tokens_per_step(run: Run) -> int:
    """Returns the tokens that the model's body computes per step, over all lanes: the mean of the first steps."""
    steps = range(1, min(STEPS_LOOKED_AT, run.inputs.last_step) + 1)
    return round(sum(tree.num_tokens for step in steps for tree in run.trees(step)) / len(steps))


def _ranks(run: Run) -> str:
    nodes = run.world.size // run.world.local_size
    copies = run.config.parallel.replicate
    parts = run.world.size // copies
    layout = f", the model sharded over {parts}" if parts > 1 else ""
    layout += f", in {copies} replicas" if copies > 1 else ""
    return f"{run.world.size} on {nodes} node{'s' if nodes > 1 else ''} ({run.world.device.type}){layout}"


def _memory(run: Run) -> str:
    size = state_bytes(run.policy.model, run.config, run.world.size)
    what = "weights, gradients and optimizer"
    if run.policy.adapters:
        quantized = f"{run.policy.adapters.quantize} and " if run.policy.adapters.quantize else ""
        what = f"frozen weights in {quantized}{_name(run.compute_dtype)} and adapters with gradients and optimizer"
    return f"{shown_bytes(size)} per rank for {what}, without activations"


def state_bytes(model: nn.Module, config: Config, num_ranks: int) -> float:
    """Returns the bytes per rank of the sharded state: weights, and of those that are trained gradients and the
    optimizer's state.

    Args:
        model: the whole model, sharded or not.
        config: gives the optimizer and the number of replicas.
        num_ranks: ranks of the run.
    """
    updated = num_bytes(trained(model.parameters()))
    whole = num_bytes(model.parameters()) + updated * (1 + optimizer_elements(config.optim))
    return whole * config.parallel.replicate / num_ranks


def tell_warmup(last_step: int, optim: OptimConfig) -> None:
    """Tells the user, in one line, where the warm-up is more than a tenth of the run; a fraction was chosen for it.

    Args:
        last_step: the number of steps of the whole run.
        optim: the optimizer and its schedule.
    """
    warmup = num_warmup_steps(last_step, optim)
    if isinstance(optim.warmup_steps, float) or last_step >= 10 * warmup:
        return
    advice = "for a tenth of the run: --optim.warmup_steps 0.1"
    if last_step <= warmup:
        rates = f"the learning rate ends at {lr_at(last_step, last_step, optim):.2g}, not {optim.lr:.2g}"
        warn(f"optim.warmup_steps {warmup} is not below the run's {last_step} steps: {rates}; {advice}")
    else:
        say(f"optim.warmup_steps {warmup} is more than a tenth of the run's {last_step} steps; {advice}")


# --- shown -----------------------------------------------------------------------------------------------------------


def introduce(run: Run, writer: MetricsWriter | None, deviation: Deviation | None) -> None:
    """Shows, on rank 0, the run that is about to start: on the terminal, and as texts and histograms in TensorBoard.

    Args:
        run: the run.
        writer: the writer of metrics; None except on rank 0.
        deviation: the result of the check of the first step; None where there was no check.
    """
    if writer is None:
        return
    if run.reference_pass and run.start.step == 0:
        writer.write(0, prefixed("reference", run.reference_pass.metrics))
    if deviation:
        writer.write(0, prefixed("first_step", vars(deviation)))
    table = start_lines(run, deviation)
    for line in table:
        say(line)
    tell_warmup(run.inputs.last_step, run.config.optim)
    writer.text("summary", "\n".join(table))
    writer.text("config", to_yaml(run.config))
    writer.text("data", "\n".join(run.inputs.data.report.lines()))
    writer.text("code", (run.dir / PROVENANCE).read_text(encoding="utf-8"))
    writer.hparams(run.config)
    if run.start.step == 0:
        names = ("prompt", "chosen", "rejected") if run.config.loss.facts.compares else ("prompt", "chosen")
        for name, tokens in zip(names, run.inputs.data.train.lengths().T, strict=False):
            writer.histogram(f"train/lengths/{name}", tokens, 0)


def tell_resumed(run: Run) -> None:
    """Tells, on rank 0 after the first step of a resumed run, how long the start has taken, by phase."""
    run.hooks.phases.end("first step")
    if run.start.step and run.world.is_main:
        say(f"resumed at step {run.start.step} after {run.hooks.phases.line()}")


def show_evaluation(run: Run, writer: MetricsWriter, step: int, result: Evaluation, answers: Sequence[Answer]) -> None:
    """Writes and shows, on rank 0, the result of an evaluation.

    Args:
        run: the run.
        writer: the writer of metrics.
        step: updates made before the evaluation.
        result: the metrics, and the reward margin of each pair.
        answers: the sampled answers of this step; may be empty.
    """
    metrics = prefixed("eval", result.metrics)
    writer.write(step, metrics)
    if len(result.margins):
        writer.histogram("eval/rewards/margins", result.margins, step)
    if answers:
        writer.answers(step, answers)
    say(evaluation_line(step, run.inputs.last_step, metrics, step == 0 and run.begins_at_reference))
