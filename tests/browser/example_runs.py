"""Run folders with plausible metrics, written through `Dashboard` as the trainer writes them, in a second."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from dpo.board.dashboard import Dashboard
from dpo.board.sink import Answer
from dpo.config import Config, SourceConfig, to_yaml
from tests.support.runs import make_config

NUM_STEPS, EVAL_EVERY = 60, 10
ANSWERS = [
    Answer("What is 2 | 3?\n\nAssistant:", " I do not know.", " 2 | 3 is `3`:\n    0b10 | 0b11 == 0b11"),
    Answer("Say <b>bold</b> *twice*.", "<b>bold</b> <script>alert(1)</script>", "bold, bold"),
    Answer("Who are you?", " A model. " * 30, " A small one. " * 20),
]


def save_run(run_dir: Path, beta: float, until: int = NUM_STEPS, seed: int = 0, **changes: Any) -> Config:
    """A run that was interrupted after step `until`, or one that is done."""
    facts = {
        "loss__beta": beta,
        "train__steps": NUM_STEPS,
        "train__eval_every": EVAL_EVERY,
        "data__eval": [SourceConfig("data/eval.jsonl")],
    }
    config = make_config("models/sft", "data/train.jsonl", run_dir, **(facts | changes))
    run_dir.mkdir(parents=True)
    (run_dir / "config.yaml").write_text(to_yaml(config))
    board = Dashboard(run_dir / "tensorboard", 1)
    board.hparams(config)
    board.text("config", to_yaml(config))
    board.text("data", "data.train[0] data/train.jsonl (preference): 1,800 rows, 1,794 pairs kept, 6 dropped")
    rng = np.random.default_rng(seed)
    for side, mean in (("prompt", 80), ("chosen", 60), ("rejected", 50)):
        board.histogram(f"train/lengths/{side}", rng.poisson(mean, 2000), 1)
    with (run_dir / "metrics.jsonl").open("w") as file:
        for step, metrics in lines(beta, until, rng):
            board.metrics(step, metrics)
            print(json.dumps({"step": step, **metrics}), file=file)
            if "eval/loss" in metrics:
                board.histogram("eval/rewards/margins", rng.normal(metrics["eval/rewards/margins"], 0.3, 500), step)
                board.answers(step, ANSWERS)
    board.close()
    if until == NUM_STEPS:
        (run_dir / "final").mkdir()
    return config


def lines(beta: float, until: int, rng: np.random.Generator) -> Iterator[tuple[int, dict[str, float]]]:
    """(step, metrics) in the order in which a trainer writes them."""
    yield 0, {"reference/rows_computed": 3588, "reference/rows_reused": 0, "reference/seconds": 12.5}
    yield 0, preference("eval", beta, 0, rng, noise=0.0)
    for step in range(1, until + 1):
        yield step, preference("train", beta, step, rng, noise=0.1) | speed(step, rng)
        if step % EVAL_EVERY == 0:
            yield step, preference("eval", beta, step, rng, noise=0.02)


def preference(part: str, beta: float, step: int, rng: np.random.Generator, noise: float) -> dict[str, float]:
    """What `pair_means` measures, of a policy that learns."""
    learnt = 1 - math.exp(-step / 20)
    chosen, rejected = beta * (2 * learnt + noise * rng.normal()), beta * (-6 * learnt + noise * rng.normal())
    metrics = {
        "loss": math.log1p(math.exp(rejected - chosen)),
        "loss_sft": 1.9 - 0.1 * learnt,
        "logps/chosen": -110 + chosen / beta,
        "logps/rejected": -120 + rejected / beta,
        "logratios_per_token/chosen": chosen / beta / 50,
        "logratios_per_token/rejected": rejected / beta / 50,
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/margins": chosen - rejected,
        "rewards/accuracies": min(1.0, 0.5 + 0.4 * learnt + noise * 0.2 * rng.normal()),
        "pairs": 64 if part == "train" else 200,
    }
    return {f"{part}/{name}": metric for name, metric in metrics.items()}


def speed(step: int, rng: np.random.Generator) -> dict[str, float]:
    """What `step_metrics` measures."""
    seconds = 0.5 + 0.05 * rng.random()
    metrics = {
        "grad_norm": 3 + rng.random(),
        "lr": 1e-6 * min(1, step / 20),
        "tokens": 9000,
        "padding_fraction": 0.0,
        "step_seconds": seconds,
        "pairs_per_second": 64 / seconds,
        "tokens_per_second": 9000 / seconds,
        "peak_memory_bytes": 2e9,
    }
    return {f"train/{name}": metric for name, metric in metrics.items()}
