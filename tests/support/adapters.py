"""Small runs with adapters of every kind, and the log-probabilities of their evaluation pairs by plain models."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dpo.config import Config, SourceConfig
from dpo.run_folder.evaluations import read_evaluation
from tests.support.models import plain_logp, save_model, save_pairs
from tests.support.runs import make_config, run

Keys = dict[str, Any]
KINDS: Sequence[tuple[str, Keys]] = (
    ("llama", {}),
    ("gpt2", {}),
    ("gpt-neox", {}),
    ("gpt-neox", {"lora__rslora": True}),
    ("llama", {"lora__dora": True}),
    ("gpt2", {"lora__dora": True}),
    ("llama", {"lora__train_embeddings": True}),
    ("llama-tied", {"lora__train_embeddings": True}),
    ("gpt2", {"lora__train_embeddings": True}),
    ("gpt-neox", {"lora__train_embeddings": True}),
    ("llama", {"lora__target_modules": ["v_proj"], "lora__target_parameters": ["q_proj.weight"]}),
)
"""Families of `models.FAMILIES`, and the keys of the config that make a kind of adapters."""


def name_of(family: str, keys: Mapping[str, Any]) -> str:
    """A kind in one word."""
    return "-".join([family, *(key.removeprefix("lora__") for key in keys)])


def adapter_run(root: Path, family: str, **keys: Any) -> tuple[Path, Path]:
    """Trains adapters of rank 3 and alpha 5 for a new model in `root`; gives the model and the run folder."""
    root.mkdir(parents=True, exist_ok=True)
    model = save_model(root / "model", family)
    return model, run(adapter_config(model, root / "run", **keys))


def run_maker(root: Path) -> Callable[..., tuple[Path, Path]]:
    """A function that trains a run of a kind once, in `root`, and gives its model and its run folder."""
    made = dict[str, tuple[Path, Path]]()

    def find(family: str, **keys: Any) -> tuple[Path, Path]:
        name = name_of(family, keys)
        if name not in made:
            made[name] = adapter_run(root / name, family, **keys)
        return made[name]

    return find


def adapter_config(model: Path, run_dir: Path, **keys: Any) -> Config:
    """Two steps that move the adapters of a model visibly, a checkpoint after each, evaluations before and after."""
    save_pairs(run_dir.parent / "pairs.jsonl", 8)
    save_pairs(run_dir.parent / "eval.jsonl", 3, seed=1)
    facts = {
        "data__eval": [SourceConfig(str(run_dir.parent / "eval.jsonl"))],
        "batch__pairs_per_step": 4,
        "train__steps": 2,
        "train__eval_every": 2,
        "optim__lr": 1e-2,
        "optim__warmup_steps": 0,
        "checkpoint__save_every": 1,
        "reference__cache_dir": str(run_dir.parent / "cache"),
        "lora__rank": 3,
        "lora__alpha": 5.0,
    }
    return make_config(model, run_dir.parent / "pairs.jsonl", run_dir, **(facts | keys))


def rows_of(run_dir: Path) -> list[dict[str, Any]]:
    """The rows of the evaluation pairs of a run of `adapter_config`."""
    return [json.loads(line) for line in (run_dir.parent / "eval.jsonl").read_text().splitlines()]


def pair_logps(model: Any, rows: Sequence[Mapping[str, Any]]) -> np.ndarray:
    """The oracle: (P, 2) summed log-probabilities of winners and losers, each alone through a plain model."""
    with torch.no_grad():
        sums = [[plain_logp(model, row["prompt_ids"], ids).item() for ids in row["completion_ids"]] for row in rows]
    return np.array(sums)


def recorded_logps(run_dir: Path, step: int) -> np.ndarray:
    """The same by the run's own evaluation after `step` steps."""
    arrays = read_evaluation(run_dir, step)
    return np.stack([arrays["logps_chosen"], arrays["logps_rejected"]], axis=1)
