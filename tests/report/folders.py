"""Run folders written by hand, without a training."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dpo.config import SourceConfig, to_yaml
from dpo.report.record import Record
from dpo.run_folder.evaluations import write_evaluation
from tests.support.runs import make_config

PROMPT = "Who is 5 < 6?"


def train_line(step: int, chosen: float = 0.2, rejected: float = -0.3, **more: float) -> dict[str, float]:
    """A line of a training step, with these mean rewards."""
    metrics = {
        "loss": 0.6,
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/margins": chosen - rejected,
        "rewards/accuracies": 0.75,
        "logps/chosen": -20.0,
        "logps/rejected": -22.0,
        "grad_norm": 2.5,
        "lr": 1e-6,
        "tokens": 500,
        "tokens_per_second": 250.0,
        "step_seconds": 2.0,
    }
    return {"step": step} | {f"train/{name}": value for name, value in (metrics | more).items()}


def eval_line(
    step: int, chosen: float, rejected: float, accuracy: float = 0.75, loss: float = 0.5, **more: float
) -> dict[str, float]:
    """A line of an evaluation, with these mean rewards."""
    rewards = {"chosen": chosen, "rejected": rejected, "margins": chosen - rejected, "accuracies": accuracy}
    metrics = {"loss": loss, "pairs": 4} | {f"rewards/{name}": value for name, value in rewards.items()}
    return {"step": step} | {f"eval/{name}": value for name, value in (metrics | more).items()}


def nats(chosen: float, rejected: float) -> dict[str, float]:
    """The log-ratios per token of a line."""
    return {"logratios_per_token/chosen": chosen, "logratios_per_token/rejected": rejected}


def pairs_of(chosen: Sequence[float], rejected: Sequence[float], beta: float = 0.1) -> dict[str, np.ndarray]:
    """The arrays of an evaluation with these log-ratios, of answers of 10 and 5 tokens, all of one source."""
    ratios = {"chosen": np.array(chosen), "rejected": np.array(rejected)}
    return {
        **{f"logratios_{side}": values for side, values in ratios.items()},
        **{f"rewards_{side}": beta * values for side, values in ratios.items()},
        **{f"logps_{side}": values - 20 for side, values in ratios.items()},
        "tokens_chosen": np.full(len(chosen), 10, np.int32),
        "tokens_rejected": np.full(len(chosen), 5, np.int32),
        "source": np.zeros(len(chosen), np.int32),
        "sources": np.array(["data.eval[0] data/eval.jsonl"]),
    }


def record_of(lines: Sequence[Mapping[str, float]] = (), folder: str = "runs/x", **facts: Any) -> Record:
    """A record with these lines of metrics.jsonl; of the loss dpo unless `config` says otherwise."""
    return Record(Path(folder), **({"config": {"loss.name": "dpo"}, "lines": tuple(lines)} | facts))


def save_run(
    run_dir: Path,
    lines: Sequence[Mapping[str, float]],
    pairs: Mapping[int, Mapping[str, np.ndarray]] | None = None,
    **changes: Any,
) -> Path:
    """A run folder as a finished training writes it, with answers after steps 0 and 20."""
    (run_dir / "answers").mkdir(parents=True)
    (run_dir / "final").mkdir()
    (run_dir / "final" / "config.json").write_text("{}")
    facts = {"data__eval": [SourceConfig("data/eval.jsonl")], "train__steps": 20} | changes
    (run_dir / "config.yaml").write_text(to_yaml(make_config("models/sft", "data/train.jsonl", run_dir, **facts)))
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    start = {
        "version": "0.2.0",
        "ranks": 2,
        "last_step": 20,
        "hosts": ["n1"],
        "layout": {"devices": {"NVIDIA H100": 2}},
    }
    (run_dir / "provenance.json").write_text(json.dumps([start]))
    for step in (0, 20):
        row = {"prompt": PROMPT, "reference": "I do not know.", "policy": f"Nobody, after {step}."}
        (run_dir / "answers" / f"step-{step:06d}.jsonl").write_text(json.dumps(row) + "\n")
    for step, arrays in (pairs or {}).items():
        write_evaluation(run_dir, step, arrays)
    return run_dir
