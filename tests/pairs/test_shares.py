"""The pairs of an epoch of sources with a weight or a count, against a plain slow choice."""

import hashlib
from collections import Counter

import numpy as np
import pytest

from dpo.batch.order import PairOrder, make_order
from dpo.config import SourceConfig
from dpo.inspect.statistics import EndIds, summarize
from dpo.pairs import prepare as data
from dpo.pairs import token_rows
from dpo.pairs.prepare import prepare_data
from dpo.pairs.shares import pairs_of_epoch, times_in_epoch
from dpo.pairs.tokens import completion_key
from tests.support.data_fixtures import BOS, EOS, TOKENS, TinyModelConfig, all_pairs, make_config, write_jsonl

pytest_plugins = ["tests.support.data_plugin"]
pytestmark = pytest.mark.usefixtures("hf_cache")
MODEL = TinyModelConfig()
DROPPED = {"prompt_ids": [9], "chosen_ids": [5], "rejected_ids": [5]}
OTHER = [{"prompt_ids": [7, 3 + i], "completion_ids": [[5], [6, i], [8]], "pairs": [[0, 1], [2, 1]]} for i in range(30)]


def pairs_of(rows):
    """(prompt, winner, loser) of every kept pair of rows of tokens, in file order."""
    pairs = []
    for row in rows:
        completions = row.get("completion_ids") or [row["chosen_ids"], row["rejected_ids"]]
        pairs += [(row["prompt_ids"], completions[w], completions[v]) for w, v in row.get("pairs", [[0, 1]])]
    return [pair for pair in pairs if pair[1] != pair[2]]


def plain_choice(pairs, num, seed):
    """Takes the pairs one by one, pass after pass, in the order of the hashes of (seed, keys); in file order again."""

    def hashed(place):
        prompt, *both = (np.array(ids) for ids in pairs[place])
        keys = b"".join(completion_key(prompt, ids) for ids in both)
        return int.from_bytes(hashlib.blake2b(keys, key=str(seed).encode(), digest_size=8).digest(), "little")

    ordered = sorted(range(len(pairs)), key=lambda place: (hashed(place), place))
    return [pairs[place] for place in sorted(ordered[i % len(pairs)] for i in range(num))]


@pytest.mark.parametrize(
    ("share", "of_80", "of_60"),
    [
        ({"weight": 0.5}, 40, 30),
        ({"weight": 0.1234}, 10, 7),  # 9.872 and 7.404
        ({"weight": 1.0}, 80, 60),
        ({"weight": 2.0}, 160, 120),
        ({"weight": 2.37}, 190, 142),  # 189.6 and 142.2
        ({"count": 1}, 1, 1),
        ({"count": 60}, 60, 60),
        ({"count": 205}, 205, 205),
    ],
)
@pytest.mark.parametrize("seed", [0, 3])
def test_an_epoch_against_a_plain_choice(tmp_path, share, of_80, of_60, seed):
    """Two sources of 80 and 60 kept pairs, and one without a share; a dropped pair counts in none."""
    first, second = write_jsonl(tmp_path / "a.jsonl", [*TOKENS, DROPPED]), write_jsonl(tmp_path / "b.jsonl", OTHER)
    config = make_config(SourceConfig(first, **share), SourceConfig(second, **share), first, seed=seed)
    prepared = prepare_data(config, MODEL)
    expected = plain_choice(pairs_of(TOKENS), of_80, seed) + plain_choice(pairs_of(OTHER), of_60, seed)
    assert all_pairs(prepared.train) == [*expected, *map(tuple, pairs_of(TOKENS))]
    assert [source.epoch_pairs for source in prepared.report.sources] == [of_80, of_60, 80]
    assert make_order(config, prepared)[1:] == (of_80 + of_60 + 80, of_80 + of_60 + 80)  # one pair per step


def test_numbers_and_places_of_an_epoch(tmp_path):
    """Every second pair of prompts p p q q q, twice: each pair has its own row, index, prompt and lengths."""
    rows = [
        {"prompt_ids": [3 + i // 2] * (1 + i % 3), "chosen_ids": [5, i % 90], "rejected_ids": [6]} for i in range(9)
    ]
    config = make_config(SourceConfig(write_jsonl(tmp_path / "a.jsonl", rows), count=13))
    train = prepare_data(config, MODEL).train
    row = np.asarray(train.row_of_pair)
    assert sorted(Counter(row.tolist()).values()) == [1] * 5 + [2] * 4 and (np.diff(row) >= 0).all()
    assert all_pairs(train) == [tuple(rows[i].values()) for i in row]
    assert train.lengths().tolist() == [[len(ids) for ids in rows[i].values()] for i in row]
    assert train.is_first().tolist() == [True, *(row[1:] != row[:-1])]
    prompts = [tuple(rows[i]["prompt_ids"]) for i in row]
    numbers = {prompt: number for number, prompt in enumerate(dict.fromkeys(prompts))}
    assert np.asarray(train.prompt_of_pair).tolist() == [numbers[prompt] for prompt in prompts]


def test_the_choice_is_by_content(tmp_path):
    """Another order of the file, other processes, another name: the same pairs. Another seed: others. A smaller share
    is a part of a larger one.
    """

    def chosen(rows, weight, seed=0, num_proc=1):
        path = write_jsonl(tmp_path / f"{len(list(tmp_path.iterdir()))}.jsonl", rows)
        config = make_config(SourceConfig(path, weight=weight), seed=seed, num_proc=num_proc)
        return Counter(map(str, all_pairs(prepare_data(config, MODEL).train)))

    half = chosen(TOKENS, 0.5)
    assert half.total() == 40 and set(half.values()) == {1}
    assert half == chosen(TOKENS[::-1], 0.5) == chosen([{"note": 1} | row for row in TOKENS], 0.5, num_proc=3)
    assert half != chosen(TOKENS, 0.5, seed=1)
    assert half < chosen(TOKENS, 0.6) and chosen(TOKENS, 1.5) == half + chosen(TOKENS, 1)


def test_every_pair_has_the_same_chance():
    """Over 400 seeds, 30 of 90 pairs: each is chosen 400/3 times on average, standard deviation sqrt(400 x 2/9) = 9.4;
    all lie within 5 of these, and two neighbors are chosen together 400 x 30/90 x 29/89 = 43.4 times on average.
    """
    keys = np.array([bytes([i + 1, side + 1] * 8) for i in range(90) for side in range(2)], "S16").reshape(-1, 2)
    times = np.array([times_in_epoch(keys, 30, seed) for seed in range(400)])
    assert (times.sum(1) == 30).all() and set(times.ravel()) == {0, 1}
    assert abs(times.sum(0) - 400 / 3).max() <= 5 * 9.4
    together = (times[:, 1:] & times[:, :-1]).sum(0)
    assert abs(together.mean() - 43.4) <= 3 and together.max() <= 43.4 + 5 * np.sqrt(43.4)


def test_equal_pairs_are_chosen_in_file_order():
    """Nine times the same pair: the first four have it once more."""
    keys = np.full((9, 2), b"k" * 16, "S16")
    assert times_in_epoch(keys, 22, seed=0).tolist() == [3] * 4 + [2] * 5
    assert times_in_epoch(keys[:0], 0, seed=0).tolist() == []


def test_rounding_of_a_weight():
    def epoch(num_kept, **share):
        return pairs_of_epoch(SourceConfig("a", **share), num_kept)

    assert [epoch(61135, weight=0.5), epoch(100, weight=0.29), epoch(7, weight=0.5)] == [30568, 29, 4]
    assert [epoch(7), epoch(7, count=20), epoch(0, count=20), epoch(0, weight=2.0), epoch(0)] == [7, 20, 0, 0, 0]


def test_a_share_is_of_what_hold_out_leaves(tmp_path):
    """40 prompts of 2 pairs: 10 prompts are held out; half of the other 60 pairs. Another source has the same rows,
    and a count more than what is left. data.eval has all of its pairs.
    """
    path = write_jsonl(tmp_path / "a.jsonl", TOKENS)
    sources = SourceConfig(path, holdout=10, weight=0.5), SourceConfig(path, count=150)
    prepared = prepare_data(make_config(*sources, eval=[SourceConfig(path)]), MODEL)
    held = {tuple(prompt) for prompt, _, _ in all_pairs(prepared.eval)[80:]}
    left = [pair for pair in pairs_of(TOKENS) if tuple(pair[0]) not in held]
    assert (len(held), len(left), len(prepared.eval)) == (10, 60, 80 + 20)
    assert all_pairs(prepared.train) == plain_choice(left, 30, 0) + plain_choice(left, 150, 0)
    lines = prepared.report.lines()
    assert "  of 60 pairs kept for training an epoch has 30: weight 0.5" in lines
    assert "  of 60 pairs kept for training an epoch has 150: count 150, each 2 or 3 times" in lines
    assert lines[-2] == "180 pairs to train on, 100 to evaluate"
    doubled = prepare_data(make_config(SourceConfig(path, weight=2)), MODEL).report.lines()
    assert "  of 80 pairs kept for training an epoch has 160: weight 2, each 2 times" in doubled


def test_prompts_in_training_are_those_of_an_epoch(tmp_path):
    """Of 80 prompts an epoch has one; the evaluation has them all."""
    path = write_jsonl(tmp_path / "a.jsonl", [row | {"prompt_ids": [3 + i]} for i, row in enumerate(TOKENS)])
    report = prepare_data(make_config(SourceConfig(path, count=1), eval=[SourceConfig(path)]), MODEL).report
    assert report.eval_prompts_in_training == 1


def test_what_a_share_belongs_to(tmp_path, monkeypatch):
    """The rows are tokenized once for all shares; the pairs are cached for each; weight 1 is the set without a share,
    to the last byte of what a run compares.
    """
    path = write_jsonl(tmp_path / "a.jsonl", TOKENS)

    def train(**share):
        return prepare_data(make_config(SourceConfig(path, **share)), MODEL).train

    plain = train()
    monkeypatch.setattr(token_rows, "_write", None)
    whole, half, half_by_count = train(weight=1), train(weight=0.5), train(count=40)
    names = {file.name for file in plain.token_files}
    assert all({file.name for file in other.token_files} == names for other in (whole, half, half_by_count))
    assert whole.content_hash == plain.content_hash != half.content_hash == half_by_count.content_hash
    monkeypatch.setattr(data, "_number", None)
    assert [len(train(weight=0.5)), len(train(count=40)), len(train())] == [40, 40, 80]


@pytest.mark.parametrize("group_by_prompt", [False, True])
@pytest.mark.parametrize("shuffled", [True, False])
def test_every_epoch_has_the_same_pairs(tmp_path, group_by_prompt, shuffled):
    """Three epochs, cut anywhere: each has every pair so many times as the set. Grouped, the pairs of a prompt stand
    together in file order, a repeated one next to itself.
    """
    path, other = write_jsonl(tmp_path / "a.jsonl", TOKENS), write_jsonl(tmp_path / "b.jsonl", OTHER)
    train = prepare_data(make_config(SourceConfig(path, weight=0.7), SourceConfig(other, count=70)), MODEL).train
    order = PairOrder(train.prompt_of_pair, 16, 5, shuffled, group_by_prompt)
    assert order.num_pairs == len(train) == 56 + 70 and order.steps_of(3) == 24  # 378 pairs
    expected = Counter(map(str, all_pairs(train)))
    for epoch in range(3):
        ids = order.between(126 * epoch, 126 * (epoch + 1))
        assert Counter(map(str, all_pairs(train, ids))) == expected
        if group_by_prompt:
            prompts = np.asarray(train.prompt_of_pair)[ids]
            starts = np.flatnonzero(np.diff(prompts, prepend=-1))
            assert len(starts) == len(set(prompts))
            assert all((np.diff(part) > 0).all() for part in np.split(ids, starts[1:]))


def test_statistics_of_a_mixture(tmp_path):
    """A pair that an epoch has three times is no repeat of the data; the lengths are those of an epoch."""
    rows = [*TOKENS[:9], TOKENS[0]]
    found = summarize(
        prepare_data(make_config(SourceConfig(write_jsonl(tmp_path / "a.jsonl", rows), weight=3)), MODEL).train,
        EndIds((BOS,), (EOS,)),
    )
    assert (found.pairs, found.repeats.repeated_pairs, found.repeats.contradicted_pairs) == (30, 1, 0)
    assert sum(found.lengths.prompt.counts) == 30
