"""The same pairs give the same loss and gradient on any number of ranks, in any micro-batches; so does a whole run."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from dpo.train.program import run_training
from tests.support.golden import assert_trajectory, golden_config
from tests.support.models import save_model, save_pairs
from tests.support.ranks import Ranks
from tests.support.runs import eval_lines, make_config, train_lines, without_clock, worst_relative

pytestmark = pytest.mark.xdist_group("ranks")

FIGURES = ["train/loss", "train/grad_norm", "train/logps/chosen", "train/logps/rejected", "train/tokens", "train/pairs"]
BUDGETS = (1, 200, 100_000)
"""One tree a micro-batch, a few, and all at once."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"), "llama")


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 prompts with 3 completions and 2 pairs each: 80 pairs, so that a second step crosses the epoch's end."""
    return save_pairs(tmp_path_factory.mktemp("pairs") / "pairs.jsonl", 40, completions=3, pairs_each=2)


def run(ranks: Ranks, size: int, model: Path, pairs: Path, run_dir: Path, **changes: Any) -> list[dict[str, float]]:
    """The training lines of a run of four steps of 64 pairs on `size` ranks."""
    changes = {"train__steps": 4, "optim__warmup_steps": 2, "optim__lr": 1e-5} | changes
    ranks(size, run_training, make_config(model, pairs, run_dir, **changes))
    return train_lines(run_dir)


def test_any_ranks_any_micro_batches_give_one_trajectory(
    ranks: Ranks, model: Path, pairs: Path, tmp_path: Path
) -> None:
    """Contract: loss and gradient norm agree to 1e-5 relative over 1, 2, 3, 4 ranks x three budgets; the first loss is
    ln 2, since the policy is its own reference."""
    oracle = run(ranks, 1, model, pairs, tmp_path / "oracle")
    assert oracle[0]["train/loss"] == pytest.approx(math.log(2), abs=1e-5)
    for size in (1, 2, 3, 4):
        for budget in BUDGETS:
            lines = run(ranks, size, model, pairs, tmp_path / f"{size}-{budget}", batch__tokens_per_micro_batch=budget)
            assert len(lines) == 4
            assert worst_relative(oracle, lines, FIGURES) <= 1e-5, f"{size} ranks, {budget} tokens a micro-batch"


def test_two_identical_runs_are_bitwise_equal(ranks: Ranks, model: Path, pairs: Path, tmp_path: Path) -> None:
    """Every metric but the clock's and memory's; and the exported weights, byte for byte. The reference is cached by
    the first run for both."""
    run(ranks, 2, model, pairs, tmp_path / "zero", train__steps=1)
    first = run(ranks, 2, model, pairs, tmp_path / "first")
    second = run(ranks, 2, model, pairs, tmp_path / "second")
    assert without_clock(first) == without_clock(second)
    weights = [(tmp_path / name / "final" / "model.safetensors").read_bytes() for name in ("first", "second")]
    assert weights[0] == weights[1]


def test_grouping_by_prompt_does_not_change_a_step_of_all_pairs(ranks: Ranks, model: Path, tmp_path: Path) -> None:
    """A set of exactly 64 pairs: every step has all of them, in whatever order."""
    pairs = save_pairs(tmp_path / "pairs.jsonl", 32, completions=3, pairs_each=2)
    plain = run(ranks, 2, model, pairs, tmp_path / "plain")
    grouped = run(ranks, 2, model, pairs, tmp_path / "grouped", batch__group_by_prompt=True)
    assert worst_relative(plain, grouped, FIGURES) <= 1e-5


@pytest.mark.parametrize("family", ["llama", "llama-tied", "gpt2"])
def test_more_ranks_than_pairs(ranks: Ranks, family: str, tmp_path: Path) -> None:
    """5 ranks on 2 pairs: three of them run fillers only, with tied and untied heads."""
    model, pairs = save_model(tmp_path / "model", family), save_pairs(tmp_path / "pairs.jsonl", 2)
    changes = {"batch__pairs_per_step": 2, "train__eval_every": 2}
    config = {"data__eval": make_config(model, pairs, tmp_path).data.train} | changes
    one = run(ranks, 1, model, pairs, tmp_path / "one", **config)
    five = run(ranks, 5, model, pairs, tmp_path / "five", **config)
    assert worst_relative(one, five, FIGURES) <= 1e-5
    assert (
        worst_relative(eval_lines(tmp_path / "one"), eval_lines(tmp_path / "five"), ["eval/loss", "eval/pairs"]) <= 1e-5
    )
    assert [line["step"] for line in eval_lines(tmp_path / "five")] == [0, 2, 4]


def test_a_partial_last_step_is_divided_by_its_own_count(
    ranks: Ranks, model: Path, pairs: Path, tmp_path: Path
) -> None:
    """80 pairs in one epoch: ceil(80 / 64) = 2 steps, the last of 16 pairs; its loss is still near ln 2."""
    lines = run(ranks, 3, model, pairs, tmp_path / "run", train__steps=None)
    assert [line["train/pairs"] for line in lines] == [64, 16]
    assert lines[1]["train/loss"] == pytest.approx(math.log(2), abs=0.05)


GOLDENS: dict[str, dict[str, Any]] = {
    "dpo": {},
    "apo_zero": {"loss__name": "apo_zero"},
    "simpo": {"loss__name": "simpo", "loss__beta": 2.0, "loss__gamma": 0.5},
}
"""The loss of each golden trajectory of TRL."""


def golden_steps(folder: Path, name: str) -> list[dict[str, float]]:
    """The steps of the peer; simpo's log-probabilities there are means per token, which are no metrics of ours."""
    if name == "dpo":
        steps = json.loads((folder / "trl_golden_public.json").read_text())["cases"]["sigmoid_b0.1"]["steps"]
    else:
        steps = json.loads((folder / f"{name}.json").read_text())["steps"]
    left_out = {"logps/chosen", "logps/rejected", "nll_loss"} if name == "simpo" else set()
    return [{key: value for key, value in step.items() if key not in left_out} for step in steps]


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("name", GOLDENS)
def test_the_peers_trajectory(ranks: Ranks, name: str, size: int, shared_data: Path, tmp_path: Path) -> None:
    """16 AdamW steps of TRL 1.16 at lr 1e-3 on real weights and real preferences (golden-trl, see its `how`).

    |x - x*| <= 3e-4 |x*| + 1e-4; accuracies from step 2 where there is a reference, since at step 1 every
    reward is then a tie up to rounding.
    """
    steps = golden_steps(shared_data / "golden-trl", name)
    ranks(size, run_training, golden_config(shared_data, tmp_path / "run", 1e-3, **GOLDENS[name]))
    assert_trajectory(train_lines(tmp_path / "run"), steps, begins_with_ties=name != "simpo")
