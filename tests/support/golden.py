"""The trajectories of a peer on real weights and real preferences: the config that takes its steps, and the bound."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dpo.config import Config
from tests.support.runs import make_config

Step = Mapping[str, float]


def golden_config(shared_data: Path, run_dir: Path, lr: float, **changes: Any) -> Config:
    """16 AdamW steps of 8 pairs in file order, two passes over 64 pairs; see NOTICE of golden-trl."""
    return make_config(
        shared_data / "stories260K",
        shared_data / "golden-trl" / "pairs.jsonl",
        run_dir,
        data__max_length=None,
        data__max_prompt_length=None,
        data__order="sequential",
        batch__pairs_per_step=8,
        optim__name="adamw",
        optim__lr=lr,
        optim__warmup_steps=0,
        optim__max_grad_norm=None,
        train__epochs=2,
        **changes,
    )


def assert_trajectory(lines: Sequence[Step], steps: Sequence[Step], begins_with_ties: bool) -> None:
    """|x - x*| <= 3e-4 |x*| + 1e-4 in all 16 steps; accuracies from step 2 where every reward of step 1 is a tie up to
    rounding.
    """
    assert len(lines) == len(steps) == 16
    compared = steps[0].keys() - {"step"}
    assert compared >= {"loss", "grad_norm", "rewards/chosen", "rewards/rejected", "rewards/margins"}
    for line, expected in zip(lines, steps, strict=True):
        ties = {"rewards/accuracies"} if expected["step"] == 1 and begins_with_ties else set()
        for metric in compared - ties:
            value = expected[metric]
            assert abs(line[f"train/{metric}"] - value) <= 3e-4 * abs(value) + 1e-4, (expected["step"], metric)
