"""What is counted of a set of pairs, against a plain loop over its rows and by hand."""

import dataclasses
import functools
import random

import numpy as np
import pytest

from dpo.batch.order import PairOrder
from dpo.config import LossConfig, SourceConfig
from dpo.inspect import statistics as data_statistics
from dpo.inspect.lengths import PERCENTS, LengthGroup, bin_width, length_bias, lengths_of
from dpo.inspect.statistics import EndIds, Ends, Repeats, shared_pairs, summarize
from dpo.inspect.step_tokens import StepTokens, step_tokens
from dpo.pairs import token_rows
from dpo.pairs.prepare import prepare_data
from tests.support.data_fixtures import BOS, EOS, TinyModelConfig, make_config, make_tokenizer, write_jsonl

pytest_plugins = ["tests.support.data_plugin"]
pytestmark = pytest.mark.usefixtures("hf_cache")
MODEL = TinyModelConfig()
UNKNOWN = 6
IDS = EndIds((BOS,), (EOS,), (UNKNOWN,))


# --- the statistics of a set -----------------------------------------------------------------------------------------


def random_rows(seed: int, count: int = 60) -> list[dict]:
    """Rows of tokens from few prompts, so that prompts and pairs repeat, with BOS and EOS in all sorts of places."""
    rng = random.Random(seed)
    starts = [[], [BOS], [BOS, BOS]]
    prompts = [rng.choice(starts) + rng.choices(range(3, 9), k=rng.randint(1, 9)) for _ in range(12)]
    prompts += [[7, *range(3, 9)], [8, *range(3, 9)], [BOS]]  # two are equal after truncation
    answers = [[rng.randint(3, 5), *rng.choices([EOS, 3, 4, 5, 6], k=rng.randint(0, 11))] for _ in range(15)]
    rows = []
    for _ in range(count):
        completions = [[*rng.choice(answers), *rng.choice([[], [EOS]])] for _ in range(rng.randint(2, 4))]
        pairs = [rng.sample(range(len(completions)), 2) for _ in range(rng.randint(0, 3))]
        rows.append({"prompt_ids": rng.choice(prompts), "completion_ids": completions, "pairs": pairs})
    return rows


def plain_row(row: dict) -> tuple[list, list, list, int]:
    """(prompt, completions, kept pairs, cut completions in these) at max_prompt_length 6 and max_length 14."""
    prompt, completions = row["prompt_ids"], row["completion_ids"]
    if len(prompt) > 6:
        prompt = [BOS, *prompt[-5:]] if prompt[0] == BOS else prompt[-6:]
    short = [ids[: 14 - len(prompt)] for ids in completions]
    kept = [(w, v) for w, v in row["pairs"] if short[w] != short[v]]
    return prompt, short, kept, sum(short[i] != completions[i] for i in {i for pair in kept for i in pair})


def plain_summary(rows: list[dict]) -> tuple[Ends, Repeats, list]:
    """Ends, repeats, and (prompt, winner, loser) of every pair, in one plain loop over rows with a kept pair."""
    names = [field.name for field in dataclasses.fields(Ends)]
    ends, prompts, full, pairs = dict.fromkeys(names, 0), [], set(), []
    for row in rows:
        prompt, short, kept, cut = plain_row(row)
        ends["rows"] += 1
        ends["prompts_cut"] += len(prompt) < len(row["prompt_ids"])
        begin = "two_bos" if prompt[:2] == [BOS, BOS] else "bos" if prompt[0] == BOS else None
        ends[f"begin_with_{begin}" if begin else "begin_without_bos"] += 1
        ends["completions_cut"] += cut
        for ids in [short[i] for i in {i for pair in kept for i in pair}]:
            ends["completions"] += 1
            ends["end_with_eos"] += ids[-1] == EOS
            ends["eos_inside"] += EOS in ids[:-1]
            ends["unknown_tokens"] += ids.count(UNKNOWN)
        ends["unknown_tokens"] += prompt.count(UNKNOWN)
        prompts.append(tuple(prompt))
        full.add(tuple(row["prompt_ids"]))
        pairs += [(tuple(prompt), tuple(short[w]), tuple(short[v])) for w, v in kept]
    different = len(set(prompts))
    opposites = sum((p, v, w) in pairs for p, w, v in pairs)
    repeated = len(pairs) - len(set(pairs))
    return Ends(**ends), Repeats(different, len(rows) - different, len(full) - different, repeated, opposites), pairs


@pytest.mark.parametrize("seed", range(4))
def test_summary_against_a_plain_loop(seed, tmp_path, monkeypatch):
    """Of training and of what is held out, read in blocks of seven rows."""
    monkeypatch.setattr(data_statistics, "blocks", functools.partial(token_rows.blocks, size=7))
    rows = random_rows(seed)
    source = SourceConfig(path=write_jsonl(tmp_path / "a.jsonl", rows), holdout=3)
    data = prepare_data(make_config(source, max_length=14, max_prompt_length=6), MODEL)
    for pair_set in (data.train, data.eval):
        mine = [rows[i] for i in np.unique(pair_set.row_of_pair)]
        ends, repeats, pairs = plain_summary(mine)
        found = summarize(pair_set, IDS)
        assert (found.pairs, found.ends, found.repeats) == (len(pairs), ends, repeats)
        values = {
            "prompt": [len(p) for p, _, _ in pairs],
            "chosen": [len(w) for _, w, _ in pairs],
            "rejected": [len(v) for _, _, v in pairs],
            "total": [len(p) + len(c) for p, *both in pairs for c in both],
        }
        for name, lengths in values.items():
            those, width = getattr(found.lengths, name), found.lengths.bin_width
            ordered = sorted(lengths)
            assert those.mean == pytest.approx(sum(lengths) / len(lengths), rel=1e-12)
            # the first value with p % of all at or below it is number ceil(p n / 100), from 1
            assert those.percentiles == tuple(ordered[max(-(-p * len(ordered) // 100), 1) - 1] for p in PERCENTS)
            bins = range(len(those.counts))
            assert those.counts == tuple(sum(k * width <= n < (k + 1) * width for n in lengths) for k in bins)
            assert those.over == sum(n >= len(bins) * width for n in lengths)
        differences = [len(w) - len(v) for _, w, v in pairs]
        assert found.bias.winner_longer == sum(d > 0 for d in differences)
        assert found.bias.equal == differences.count(0)
        assert found.bias.winner_shorter == sum(d < 0 for d in differences)
        assert found.bias.mean_difference == pytest.approx(sum(differences) / len(differences), abs=1e-12)


def test_random_rows_have_all_that_is_counted():
    """So that no count of the test above is compared as 0 with 0."""
    found = [plain_summary([row for row in random_rows(seed) if plain_row(row)[2]]) for seed in range(4)]
    counts = [dataclasses.astuple(ends) + dataclasses.astuple(repeats) for ends, repeats, _ in found]
    assert all(sum(parts) > 0 for parts in zip(*counts, strict=True))


def test_a_text_may_bring_its_own_bos(tmp_path):
    """The tokenizer puts BOS first; the second prompt has one in its text, which stands in its place. Every completion
    ends with the EOS that is appended; "a</s>b" has none inside: it stays text."""
    rows = [{"prompt": "p", "chosen": "a", "rejected": "b"}, {"prompt": "<s>p", "chosen": "a</s>b", "rejected": "b"}]
    make_tokenizer(bos=True).save_pretrained(tmp_path / "t")
    config = make_config(write_jsonl(tmp_path / "a.jsonl", rows), tokenizer=str(tmp_path / "t"))
    ends = summarize(prepare_data(config, MODEL).train, IDS).ends
    assert (ends.begin_without_bos, ends.begin_with_bos, ends.begin_with_two_bos) == (0, 2, 0)
    assert (ends.completions, ends.end_with_eos, ends.eos_inside, ends.completions_cut) == (4, 4, 0, 0)


def test_pairs_of_evaluation_whose_prompt_is_in_training(tmp_path):
    rows = [{"prompt_ids": [5 + i // 2], "chosen_ids": [6, i + 3], "rejected_ids": [7]} for i in range(6)]
    train, evaluation = (write_jsonl(tmp_path / name, part) for name, part in (("a", rows[:3]), ("b", rows[3:])))
    data = prepare_data(make_config(train, eval=[SourceConfig(path=evaluation)]), MODEL)
    assert shared_pairs(data.train, data.eval) == 1  # row 3 has the prompt of row 2; rows 4 and 5 have their own


def test_demonstrations_contradict_nothing(tmp_path):
    """Their pair is of the answer with itself."""
    rows = [{"prompt": "p", "completion": "a"}, {"prompt": "q", "completion": "b"}]
    make_tokenizer().save_pretrained(tmp_path / "t")
    config = make_config(write_jsonl(tmp_path / "a.jsonl", rows), tokenizer=str(tmp_path / "t"))
    data = prepare_data(dataclasses.replace(config, loss=LossConfig(name="sft")), MODEL)
    assert summarize(data.train, IDS).repeats == Repeats(2, 0, 0, 0, 0)


# --- lengths by hand --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("largest", "width"),
    [(0, 1), (23, 1), (24, 2), (47, 2), (48, 4), (512, 25), (1919, 80), (1920, 100), (48000, 2500)],
)
def test_bin_width(largest, width):
    """24 bins reach up to 24 widths, less one: 24 x 1 holds 23, 24 x 20 = 480 does not hold 512, 24 x 25 does."""
    assert bin_width(largest) == width


def test_histograms_share_their_bins_and_count_what_is_beyond():
    """150 pairs with prompts of 4 tokens and completions of 6, one of them of 996: totals are 10, and once 1,000.
    99 % of the 300 totals are 10 or less, so bins reach beyond 20, not 1,000: of width 1, 24 of them."""
    table = np.tile(np.array([[4, 6, 6]], np.int32), (150, 1))
    table[0, 2] = 996
    lengths = lengths_of(table)
    assert (lengths.bin_width, len(lengths.total.counts)) == (1, 24)
    assert (lengths.total.counts[10], lengths.total.over) == (299, 1)
    assert (lengths.prompt.counts[4], lengths.prompt.over) == (150, 0)
    assert (lengths.rejected.counts[6], lengths.rejected.over, lengths.rejected.percentiles[-1]) == (149, 1, 996)


def test_length_bias_by_deciles():
    """Differences +-1 .. +-10, one pair each in ten groups: odd ones are won by the longer, even ones by the shorter.
    Two ties stand in no group and count against the rule: it is right for 5 of 12. The mean is (25 - 30) / 12."""
    bias = length_bias(np.array([0, 1, -2, 3, -4, 5, -6, 7, -8, 9, -10, 0], np.int32))
    assert bias.groups == tuple(LengthGroup(d, d, 1, float(d % 2)) for d in range(1, 11))
    assert (bias.winner_longer, bias.equal, bias.winner_shorter) == (5, 2, 5)
    assert (bias.accuracy, bias.longer_share, bias.mean_difference) == (5 / 12, 0.5, -5 / 12)


def test_equal_differences_stay_together():
    """Of 20 pairs 18 differ by 3 tokens, one by 5 and one by 9: deciles end at 3 but for the last at 9 (with 5, the
    19th of 20: above the ninth decile). The longer one wins two thirds of the 18."""
    bias = length_bias(np.array([3, 3, -3] * 6 + [5, -9], np.int32))
    assert bias.groups == (LengthGroup(3, 3, 18, pytest.approx(2 / 3)), LengthGroup(5, 9, 2, 0.5))
    assert length_bias(np.zeros(4, np.int32)).groups == ()


# --- steps ------------------------------------------------------------------------------------------------------------


def test_tokens_of_a_step(tmp_path):
    """Two steps of two pairs in file order; the fifth pair is no whole step.

    1: prompt of 2, completions of 3 and 1, of the same 3 and 4. Padded 4 x (2 + 4) = 24; plain 5 + 3 + 5 + 6 = 19;
       shared 2 + 3 + 1 + 4 = 10 in one tree.
    2: prompt of 1, completions of 1 and 2; prompt of 3, completions of 5 and 1. Padded 4 x 8 = 32; plain
       2 + 3 + 8 + 4 = 17; shared (1 + 1 + 2) + (3 + 5 + 1) = 13 in two trees.
    """
    lengths = [([3] * 2, [4] * 3, [5]), ([3] * 2, [4] * 3, [6] * 4), ([7], [8], [8] * 2), ([9] * 3, [3] * 5, [4])]
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    rows = [dict(zip(names, parts, strict=True)) for parts in [*lengths, ([50], [51], [52])]]
    train = prepare_data(make_config(write_jsonl(tmp_path / "a.jsonl", rows)), MODEL).train
    order = PairOrder(train.prompt_of_pair, pairs_per_step=2, shuffled=False)
    expected = StepTokens(2, padded=28, unpadded=18, shared=11.5, minimum=10, maximum=13, trees=1.5, largest_tree=10)
    assert step_tokens(train, order, last_step=3) == expected
    assert expected.saved(expected.padded) == pytest.approx(1 - 11.5 / 28)
    assert step_tokens(train, order, last_step=1).shared == 10, "steps after the run's end are not counted"
