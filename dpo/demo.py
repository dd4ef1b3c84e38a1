"""The demo: a preference is learnt on two processes, in minutes, from nothing but this repository.

    python -m dpo.demo [--out DIR]

1. writes questions with ranked answers and a small untrained Llama (`demo_world`),
2. warms the model up on the winners (`loss.name: sft`), so that it answers like its data: now well, now badly,
3. trains it with DPO to answer like the better half of its data, measured on questions that it never saw,
4. shows what came of it.

All of it lies in one folder, which the next demo in the same place replaces.
"""

import argparse
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

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from dpo.config import (
    BatchConfig,
    CheckpointConfig,
    Config,
    DataConfig,
    LossConfig,
    ModelConfig,
    OptimConfig,
    SourceConfig,
    TrainConfig,
    to_yaml,
)
from dpo.demo_world import Grade, Question, grade_of, preference_row, questions, save_model, save_rows
from dpo.distributed import run_program
from dpo.errors import UserError
from dpo.metrics import read_metrics

MARKER = ".dpo-demo"
NUM_TRAINING, NUM_HELD_OUT = 600, 100  # questions
NUM_ANSWERS = 4  # to a question: 6 pairs
SEED = 0
NUM_RANKS = 2


@dataclass(frozen=True)
class Answers:
    """What a model says to some questions, and the share (0 to 1) of answers that are right, kind, short."""

    texts: tuple[str, ...]
    right: float
    kind: float
    short: float


# --- the folder ------------------------------------------------------------------------------------------------------


def start_afresh(out: Path) -> None:
    """Makes `out` an empty folder with the demo's marker. Raises UserError where that would remove another's files."""
    if out.exists() and not out.is_dir():
        raise UserError(f"--out: {out} is a file; valid: a folder of an earlier demo, or a name that is free")
    if out.is_dir() and any(out.iterdir()):
        if not (out / MARKER).is_file():
            raise UserError(f"--out: {out} is not a demo's folder; valid: one with {MARKER} in it, or a free name")
        shutil.rmtree(out)
    out.mkdir(parents=True, exist_ok=True)
    (out / MARKER).write_text("Made by python -m dpo.demo; its next run in this place removes this folder.\n")


def write_world(out: Path) -> list[Question]:
    """Writes data/train.jsonl, data/heldout.jsonl and model/; gives the held-out questions."""
    asked = questions(NUM_TRAINING + NUM_HELD_OUT, SEED)
    rng = random.Random(SEED)
    rows = [preference_row(question, NUM_ANSWERS, rng) for question in asked]
    save_rows(out / "data" / "train.jsonl", rows[:NUM_TRAINING])
    save_rows(out / "data" / "heldout.jsonl", rows[NUM_TRAINING:])
    save_model(out / "model", rows, SEED)
    return asked[NUM_TRAINING:]


# --- the two runs ----------------------------------------------------------------------------------------------------


def sft_config(out: Path) -> Config:
    """The warm-up: cross-entropy of the winners, from the untrained model."""
    optim = OptimConfig(name="adamw", lr=2e-3, warmup_steps=20, schedule="linear")
    return _config(out, "sft", out / "model", LossConfig(name="sft"), optim, num_steps=150)


def dpo_config(out: Path) -> Config:
    """DPO as in the paper, but for a learning rate that fits so small a model and so short a run."""
    optim = OptimConfig(lr=1e-4, warmup_steps=10)
    return _config(out, "dpo", out / "sft" / "final", LossConfig(), optim, num_steps=100)


def _config(out: Path, name: str, model: Path, loss: LossConfig, optim: OptimConfig, num_steps: int) -> Config:
    return Config(
        model=ModelConfig(path=str(model)),
        data=DataConfig(
            train=[SourceConfig(path=str(out / "data" / "train.jsonl"))],
            eval=[SourceConfig(path=str(out / "data" / "heldout.jsonl"))],
            num_proc=1,
        ),
        batch=BatchConfig(group_by_prompt=True),
        loss=loss,
        optim=optim,
        train=TrainConfig(steps=num_steps, eval_every=50, run_dir=str(out / name)),
        checkpoint=CheckpointConfig(save_every=None),
    )


def run_stage(config: Config, out: Path) -> float:
    """Trains on all ranks, its output shown as it comes; seconds that it took.

    Raises SystemExit with the trainer's exit code where it fails; its error then stands on stderr already.
    """
    name = Path(str(config.train.run_dir)).name
    path = out / f"{name}.yaml"
    path.write_text(to_yaml(config), encoding="utf-8")
    arguments = ["--standalone", "--nproc-per-node", str(NUM_RANKS), "-m", "dpo.train", "--config", str(path)]
    print(f"$ {shlex.join(['torchrun', *arguments])}", flush=True)
    started = time.perf_counter()
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", *arguments], env=stage_environment(out))
    if done.returncode:
        print(f"demo: {name} failed with exit code {done.returncode}; its error stands above", file=sys.stderr)
        raise SystemExit(done.returncode)
    return time.perf_counter() - started


def stage_environment(out: Path) -> dict[str, str]:
    """The environment of a run: its caches lie in the demo's folder, and nothing is looked for on the network."""
    cache = str((out / "cache").resolve())
    own = {"HF_HOME": cache, "HF_HUB_OFFLINE": "1", "DPO_CACHE": cache}
    return {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"} | os.environ | own
