"""The steps and pairs of a mixture, as the estimate reads them from the data."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from dpo.base.errors import UserError
from dpo.config import Config, SourceConfig
from dpo.estimate.forecast import reference_passes
from dpo.estimate.lengths import Extent, Lengths, find_lengths
from tests.support.models import family_config
from tests.support.runs import make_config


def save_rows(path: Path, lengths: Sequence[int]) -> str:
    """Rows of different prompts of 2 tokens, whose winners have these lengths and whose losers have one token."""
    rows = [{"prompt_ids": [1, i + 3], "chosen_ids": [5] * n, "rejected_ids": [4]} for i, n in enumerate(lengths)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def mixture(folder: Path, **changes: object) -> Config:
    """20 pairs of 5 to 24 tokens, of which an epoch has each three times, and half of 8 short ones: 64 pairs."""
    long = SourceConfig(save_rows(folder / "a.jsonl", range(2, 22)), format="tokens", weight=3)
    short = SourceConfig(save_rows(folder / "b.jsonl", [1] * 8), format="tokens", count=4)
    facts = {"data__train": [long, short], "data__eval": [SourceConfig(short.path, format="tokens")]}
    return make_config("no model", long.path, "run", **(facts | {"batch__pairs_per_step": 8} | changes))


def lengths_of(config: Config) -> Lengths:
    return find_lengths(config, family_config("llama"), None, None)


def test_steps_and_pairs_of_a_mixture(tmp_path: Path) -> None:
    """Two epochs of 64 pairs at 8 per step: 16 steps. The reference computes 24 pairs and 8 to evaluate once each."""
    config = mixture(tmp_path, train__epochs=2)
    extent = lengths_of(config).extent
    assert extent == Extent(num_steps=16, num_pairs=24, num_eval_pairs=8)
    assert reference_passes(config, extent) == 4


@pytest.mark.parametrize("grouped", [False, True])
def test_a_repeated_pair_takes_the_place_of_no_other(tmp_path: Path, grouped: bool) -> None:
    """Three times the longest pair runs once: the memory of a step is that of the eight longest pairs, each once, of
    17 to 24 tokens.
    """
    longest = lengths_of(mixture(tmp_path, batch__group_by_prompt=grouped)).longest
    assert sorted(tree.num_tokens for tree in longest) == list(range(17, 25))


def test_the_report_comes_before_the_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(
        UserError, match=r"^data\.train: 64 pairs to train on, .*; not trained on: 4 left out by weight "
    ):
        lengths_of(mixture(tmp_path, batch__pairs_per_step=65))
    assert "  of 8 pairs kept for training an epoch has 4: count 4" in capsys.readouterr().err.splitlines()


@pytest.mark.parametrize(("loss", "longest"), [("sft", 10 + 3), ("dpo", 2 + 8 + 7)])
def test_losers_that_are_not_computed_have_no_length(tmp_path: Path, loss: str, longest: int) -> None:
    """Alone the winner of 3 tokens has the longer row, with its prompt of 10; its pair is the shorter one."""
    rows = [
        {"prompt_ids": [3] * 10, "chosen_ids": [5] * 3, "rejected_ids": [4]},
        {"prompt_ids": [3] * 2, "chosen_ids": [5] * 8, "rejected_ids": [4] * 7},
    ]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = SourceConfig(str(path), format="tokens")
    config = make_config("no model", path, "run", data__train=[source], batch__pairs_per_step=1, loss__name=loss)
    assert [tree.num_tokens for tree in lengths_of(config).longest] == [longest]
