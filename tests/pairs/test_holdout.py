"""Which prompts are held out, and that none is on both sides."""

import numpy as np
import pytest

from dpo.base.errors import UserError
from dpo.config import SourceConfig
from dpo.pairs.holdout import choose_prompts
from dpo.pairs.prepare import prepare_data
from tests.support.data_fixtures import (
    TOKENS,
    TinyModelConfig,
    all_pairs,
    make_config,
    write_jsonl,
)

pytest_plugins = ["tests.support.data_plugin"]
pytestmark = pytest.mark.usefixtures("hf_cache")
MODEL = TinyModelConfig()


def prompts(pair_set):
    return {tuple(prompt) for prompt, _, _ in all_pairs(pair_set)}


def held_out(path, holdout, seed=0, **fields):
    return prepare_data(make_config(SourceConfig(path=path, holdout=holdout), seed=seed, **fields), MODEL)


@pytest.mark.parametrize(("holdout", "num"), [(7, 7), (0.25, 10), (0.5, 20), (0.001, 1), (0.09, 4), (39, 39)])
def test_holdout(tmp_path, holdout, num):
    """40 prompts, two pairs each; 0.09 of 40 is 3.6, rounded 4; never less than one."""
    prepared = held_out(write_jsonl(tmp_path / "a.jsonl", TOKENS), holdout)
    assert len(prompts(prepared.eval)) == num and len(prepared.eval) == 2 * num
    assert prompts(prepared.train).isdisjoint(prompts(prepared.eval))
    assert sorted(all_pairs(prepared.train) + all_pairs(prepared.eval)) == sorted(tuple(row.values()) for row in TOKENS)
    source = prepared.report.sources[0]
    assert (source.pairs, source.held_out_prompts, source.held_out_pairs, source.removed_pairs) == (80, num, 2 * num, 0)


def test_holdout_is_a_function_of_seed_and_prompts(tmp_path):
    """The same prompts in another order, under another name, with other rows' limits; others with another seed."""
    path, other = write_jsonl(tmp_path / "a.jsonl", TOKENS), write_jsonl(tmp_path / "b.jsonl", TOKENS[::-1])
    chosen = prompts(held_out(path, 8).eval)
    assert chosen == prompts(held_out(path, 8).eval) == prompts(held_out(other, 8).eval)
    assert chosen == prompts(held_out(path, 8, max_length=2).eval)
    assert chosen < prompts(held_out(path, 9).eval), "one more prompt joins, none leaves"
    assert chosen != prompts(held_out(path, 8, seed=1).eval)


def test_holdout_over_sources(tmp_path):
    """Source b has the prompts of a and 40 more: what a holds out is removed from b, and counted there."""
    path = write_jsonl(tmp_path / "a.jsonl", TOKENS)
    more = [row | {"prompt_ids": [44 + i % 40]} for i, row in enumerate(TOKENS)]
    other = write_jsonl(tmp_path / "b.jsonl", TOKENS + more)
    eval_path = write_jsonl(tmp_path / "c.jsonl", [{"prompt_ids": [99], "chosen_ids": [4], "rejected_ids": [5]}])
    config = make_config(SourceConfig(path=path, holdout=5), other, eval=[SourceConfig(path=eval_path)])
    prepared = prepare_data(config, MODEL)
    assert prompts(prepared.train).isdisjoint(prompts(prepared.eval))
    first, second, third = prepared.report.sources
    assert (first.held_out_pairs, first.removed_pairs, second.held_out_pairs, second.removed_pairs) == (10, 0, 0, 10)
    assert third.pairs == 1 and all_pairs(prepared.eval)[0] == ([99], [4], [5]), "sources of data.eval come first"
    assert (len(prepared.train), len(prepared.eval)) == (80 + 160 - 20, 11)


def test_prompts_that_truncation_makes_equal_are_not_on_both_sides(tmp_path):
    """40 different prompts that end alike: as the model sees them there are 4, each of ten rows."""
    rows = [{"prompt_ids": [10 + i, 3 + i % 4], "chosen_ids": [5], "rejected_ids": [6]} for i in range(40)]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    prepared = held_out(path, 1, max_prompt_length=1)
    assert len(prepared.eval) == 1 and prompts(prepared.train).isdisjoint(prompts(prepared.eval))
    source = prepared.report.sources[0]
    assert (source.held_out_pairs, source.removed_pairs, len(prepared.train)) == (1, 9, 30)


def test_holdout_of_everything():
    keys = np.array([bytes([i]) * 16 for i in (1, 2, 1)], "S16")
    for holdout in (2, 3, 0.9):
        with pytest.raises(UserError, match=r"^data\.train\[0\]\.holdout: holding out \d of 2 prompts leaves none to"):
            choose_prompts(keys, holdout, 0, "data.train[0].holdout")
