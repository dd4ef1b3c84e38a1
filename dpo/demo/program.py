"""The demo: a small policy learns a preference on two processes, in minutes; it generates its data and model.

    python -m dpo.demo [--out DIR]

1. Data: writes questions with ranked answers, and a small untrained Llama (`world.py`).
2. SFT: trains the model on the winners (`loss.name: sft`), so that it answers like its data, well or badly.
3. DPO: trains it to prefer the better answers; questions that it never saw are held out.
4. Results: shows the metrics and some answers before and after DPO.

All files lie in one folder, which the next demo with the same DIR replaces.
"""

import math
import os
import random
import shlex
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers.utils.logging import disable_progress_bar

from dpo.base.errors import UserError
from dpo.base.files import write_file
from dpo.config import (
    BatchConfig,
    CheckpointConfig,
    Config,
    DataConfig,
    EvalConfig,
    LossConfig,
    ModelConfig,
    OptimConfig,
    ReferenceConfig,
    SourceConfig,
    TrainConfig,
    to_yaml,
)
from dpo.demo.arguments import read_arguments
from dpo.demo.world import Question, grade_of, preference_row, questions, sample_answers, save_model, save_rows
from dpo.run_folder.files import read_metrics
from dpo.terminal.console import harmless, in_one_line

MARKER = ".dpo-demo"
NUM_TRAINING, NUM_HELD_OUT = 600, 100  # questions
NUM_ANSWERS = 4  # per question: 6 pairs
SEED = 0
TEMPERATURE = 0.7
NUM_RANKS = 2


@dataclass(frozen=True)
class Answers:
    """A model's answers to the held-out questions, and the shares (0 to 1) of answers that are right, kind, short."""

    texts: tuple[str, ...]
    right: float
    kind: float
    short: float


# --- the folder ------------------------------------------------------------------------------------------------------


def start_afresh(out: Path) -> None:
    """Makes `out` an empty folder with the demo's marker. Raises UserError where `out` has other files."""
    valid = "a folder of an earlier demo, or a path that does not exist"
    if out.exists() and not out.is_dir():
        raise UserError("command line: --out", f"{out} is a file", valid)
    if out.is_dir() and any(out.iterdir()):
        if not (out / MARKER).is_file():
            what = f"{out} has files but no {MARKER}: no demo made it, so it is not replaced"
            raise UserError("command line: --out", what, valid)
        shutil.rmtree(out)
    out.mkdir(parents=True, exist_ok=True)
    write_file(out / MARKER, b"Made by python -m dpo.demo; the next demo in this folder removes all its files.\n")


def write_world(out: Path) -> list[Question]:
    """Writes data/train.jsonl, data/heldout.jsonl and model/; returns the held-out questions."""
    drawn = questions(NUM_TRAINING + NUM_HELD_OUT, SEED)
    rng = random.Random(SEED)
    rows = [preference_row(question, NUM_ANSWERS, rng) for question in drawn]
    save_rows(out / "data" / "train.jsonl", rows[:NUM_TRAINING])
    save_rows(out / "data" / "heldout.jsonl", rows[NUM_TRAINING:])
    save_model(out / "model", rows, SEED)
    return drawn[NUM_TRAINING:]


# --- the two runs ----------------------------------------------------------------------------------------------------


def sft_config(out: Path) -> Config:
    """Returns the config of the SFT run: cross-entropy of the winners, from the untrained model.

    The winner of a pair can still be a bad answer, where the loser is worse. So the trained model answers in the form
    of its data, but not yet well.
    """
    optim = OptimConfig(name="adamw", lr=2e-3, warmup_steps=20, schedule="linear")
    return _config(out, "sft", out / "model", LossConfig(name="sft"), optim, num_steps=250)


def dpo_config(out: Path) -> Config:
    """Returns the config of the DPO run, from the SFT model.

    The paper's learning rate, 1e-6, is for models 10,000 times as large.
    """
    optim = OptimConfig(name="rmsprop", lr=1e-4, warmup_steps=10)
    return _config(out, "dpo", out / "sft" / "final", LossConfig(name="dpo", beta=0.5), optim, num_steps=150)


def _config(out: Path, name: str, model: Path, loss: LossConfig, optim: OptimConfig, num_steps: int) -> Config:
    return Config(
        model=ModelConfig(path=str(model)),
        reference=ReferenceConfig(cache_dir=str(out / "cache" / "reference")),
        data=DataConfig(
            train=[SourceConfig(path=str(out / "data" / "train.jsonl"))],
            eval=[SourceConfig(path=str(out / "data" / "heldout.jsonl"))],
        ),
        batch=BatchConfig(group_by_prompt=True),  # a prompt is computed once for all its answers: a third of the tokens
        loss=loss,
        optim=optim,
        train=TrainConfig(steps=num_steps, eval_every=50, run_dir=str(out / name)),
        eval=EvalConfig(max_new_tokens=48),
        checkpoint=CheckpointConfig(save_every=None),
    )


def run_stage(config: Config, path: Path) -> None:
    """Writes the config to `path` and trains on all ranks, whose output goes to the terminal.

    Raises SystemExit with the exit code of the training where it fails and has printed its error.
    """
    write_file(path, to_yaml(config).encode())
    arguments = ["--standalone", "--nproc-per-node", str(NUM_RANKS), "-m", "dpo.train", "--config", str(path)]
    print(in_one_line(f"$ {shlex.join(['torchrun', *arguments])}"), flush=True)
    command = [sys.executable, "-m", "torch.distributed.run", *arguments]
    code = subprocess.run(command, env=stage_environment(path.parent), check=False).returncode
    if code:
        line = f"demo: {path} ended with exit code {code}; its error is printed above"
        print(in_one_line(line), file=sys.stderr, flush=True)
        raise SystemExit(code)


def stage_environment(out: Path) -> dict[str, str]:
    """Returns the environment of a run: no access to model hubs, and the cache of token rows in the demo's folder."""
    defaults = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    return defaults | os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str((out / "cache").resolve())}


# --- results ---------------------------------------------------------------------------------------------------------


def ask(folder: Path, held_out: Sequence[Question]) -> Answers:
    """Samples a model's answer to each held-out question, and grades it by the rule that made the training data."""
    texts = sample_answers(folder, [question.prompt for question in held_out], TEMPERATURE, SEED)
    grades = [grade_of(question, text) for question, text in zip(held_out, texts, strict=True)]
    return Answers(
        tuple(texts),
        right=statistics.fmean(grade.right for grade in grades),
        kind=statistics.fmean(grade.kind for grade in grades),
        short=statistics.fmean(grade.short for grade in grades),
    )


def metrics_table(lines: Sequence[Mapping[str, float]], before: Answers, after: Answers) -> Table:
    """Returns the table of results, before and after the DPO run.

    Args:
        lines: the lines of the DPO run's metrics.jsonl.
        before: the held-out answers before the run, with the share of each quality.
        after: the same after the run.
    """
    steps = [line for line in lines if "train/loss" in line]
    evaluations = [line for line in lines if "eval/loss" in line]
    table = Table(box=box.SIMPLE_HEAD, caption=_caption(steps), caption_justify="left")
    table.add_column("what DPO changed")
    table.add_column("before", justify="right")
    table.add_column("after", justify="right")
    table.add_row(f"training loss (ln 2 = {math.log(2):.4f})", *_ends(steps, "train/loss", "z.4f"))
    table.add_row("held-out loss", *_ends(evaluations, "eval/loss", "z.4f"))
    table.add_row("held-out reward margin", *_ends(evaluations, "eval/rewards/margins", "z.3f"))
    table.add_row("held-out reward accuracy *", *_ends(evaluations, "eval/rewards/accuracies", "z.1%"))
    for quality in ("right", "kind", "short"):
        table.add_row(f"held-out answers that are {quality} **", *_ends([vars(before), vars(after)], quality, "z.0%"))
    return table


def _ends(lines: Sequence[Mapping[str, Any]], name: str, form: str) -> tuple[str, str]:
    """Returns a metric of the first and of the last line; `form` is a format with z, which writes -0 as 0."""
    return format(lines[0][name], form), format(lines[-1][name], form)


def _caption(steps: Sequence[Mapping[str, float]]) -> str:
    speed = statistics.median(line["train/pairs_per_second"] for line in steps)
    return (
        f"{len(steps)} steps, {speed:,.0f} pairs per second on {NUM_RANKS} ranks\n"
        "*  before, all rewards are 0, and a tie counts as wrong\n"
        f"** of {NUM_HELD_OUT} answers, sampled at temperature {TEMPERATURE}"
    )


def answers_table(held_out: Sequence[Question], before: Answers, after: Answers) -> Table:
    """Returns the table of the first six held-out questions with the answers of both models.

    Args:
        held_out: the questions, in the order of the answers.
        before: the answers before the DPO run.
        after: the answers after it.
    """
    table = Table("a new question", "before", "after", box=box.SIMPLE_HEAD)
    for question, *texts in list(zip(held_out, before.texts, after.texts, strict=True))[:6]:
        table.add_row(f"{question.name}: {question.text}?", *(Text(harmless(text.strip())) for text in texts))
    return table


def tensorboard_command(out: Path) -> str:
    """Returns the command that shows both runs as charts, for the folder in which the demo was started."""
    script = Path(sys.executable).with_name("tensorboard")
    if script.is_relative_to(Path.cwd()):
        script = script.relative_to(Path.cwd())
    return shlex.join([str(script) if script.exists() else "tensorboard", "--logdir", str(out)])


# --- the program -----------------------------------------------------------------------------------------------------


def run_demo(out: Path) -> None:
    """Runs the four parts, each under its heading."""
    console, started = Console(highlight=False), time.perf_counter()
    disable_progress_bar()
    start_afresh(out)
    console.rule("1 of 4: data", align="left")
    held_out = write_world(out)
    about = f"{NUM_TRAINING} questions to learn from, {NUM_HELD_OUT} held out, {NUM_ANSWERS} ranked answers each"
    console.print(Text(in_one_line(f"{out}: {about}, and an untrained Llama")), soft_wrap=True)
    console.rule("2 of 4: SFT on the winners", align="left")
    run_stage(sft_config(out), out / "sft.yaml")
    console.rule("3 of 4: DPO from the SFT model", align="left")
    run_stage(dpo_config(out), out / "dpo.yaml")
    console.rule("4 of 4: results", align="left")
    before, after = (ask(out / name / "final", held_out) for name in ("sft", "dpo"))
    console.print(answers_table(held_out, before, after), metrics_table(read_metrics(out / "dpo"), before, after))
    end = f"{time.perf_counter() - started:.0f} seconds. The charts: {tensorboard_command(out)}"
    console.print(Text(in_one_line(end)), soft_wrap=True)


def main() -> None:
    """Runs `python -m dpo.demo`."""
    run_demo(read_arguments().out)
