"""Weight and margin of a pair, from the column of a file to the packed batch."""

import math

import datasets
import numpy as np
import pytest
import torch

from dpo.base.errors import UserError
from dpo.batch.costs import CostModel
from dpo.batch.packer import Packer, evaluation_plans
from dpo.batch.packing import FILLER, RowFormat, pack
from dpo.batch.plan import plan_step
from dpo.batch.trees import grow_trees
from dpo.config import SourceConfig
from dpo.pairs.prepare import prepare_data
from tests.support.data_fixtures import TOKENS, TinyModelConfig, make_config, write_jsonl

pytest_plugins = ["tests.support.data_plugin"]
pytestmark = pytest.mark.usefixtures("hf_cache")
MODEL = TinyModelConfig()
BOTH = {"weight": "w", "margin": "gap"}
ROWS = [row | {"w": (i % 4) / 2, "gap": i % 3 - 1, "weight": 9, "margin": 9} for i, row in enumerate(TOKENS[:20])]
GROUPED = {"prompt_ids": [3], "completion_ids": [[5], [6], [7]], "pairs": [[0, 1], [2, 1], [1, 1 + 1]]}


def prepared(*sources, **fields):
    return prepare_data(make_config(*sources, **fields), MODEL)


def values_of(pairs):
    return [(pair.weight, pair.margin) for pair in pairs.pairs(np.arange(len(pairs)))]


def expected(rows):
    return [(row["w"], row["gap"]) for row in rows]


# --- from the file to the pair ---------------------------------------------------------------------------------------


def test_values_of_the_named_columns(tmp_path):
    """Named: both, one, none. A column that is called weight is not read unless it is named."""
    path = write_jsonl(tmp_path / "a.jsonl", ROWS)
    both = prepared(SourceConfig(path, columns=BOTH))
    assert values_of(both.train) == expected(ROWS)
    assert both.report.sources[0].ignored_columns == ("margin", "weight")
    one = prepared(SourceConfig(path, columns={"margin": "gap"})).train
    assert values_of(one) == [(1.0, row["gap"]) for row in ROWS] and one.weights is None
    none = prepared(path).train
    assert values_of(none) == [(1.0, 0.0)] * 20 and none.weights is None and none.margins is None
    assert values_of(prepared(SourceConfig(path, columns={"weight": "weight"})).train) == [(9.0, 0.0)] * 20


def test_values_of_a_mixture(tmp_path):
    """A source that names none has the neutral values beside one that does, and a repeated pair keeps its own; pairs
    that are held out keep theirs.
    """
    path, other = write_jsonl(tmp_path / "a.jsonl", ROWS), write_jsonl(tmp_path / "b.jsonl", TOKENS[20:30])
    data = prepared(SourceConfig(path, columns=BOTH, holdout=5, count=40), other)
    rows = np.asarray(data.train.row_of_pair)
    assert len(rows) == 50 and values_of(data.train)[:40] == expected([ROWS[i] for i in rows[:40]])
    assert values_of(data.train)[40:] == [(1.0, 0.0)] * 10
    assert values_of(data.eval) == expected([ROWS[i] for i in np.asarray(data.eval.row_of_pair)])
    is_heavy = np.asarray(data.train.weights) > 1
    assert values_of(data.train.select(is_heavy)) == [value for value in values_of(data.train) if value[0] > 1]


def test_a_row_of_several_pairs(tmp_path):
    """The value of the row holds for all its pairs; a row whose pair is dropped is no other row's."""
    same = {"prompt_ids": [4], "completion_ids": [[5], [5]], "pairs": [[0, 1]], "w": 3}
    rows = [GROUPED | {"w": 0.25}, same, GROUPED | {"prompt_ids": [8], "w": 0}]
    train = prepared(SourceConfig(write_jsonl(tmp_path / "a.jsonl", rows), columns={"weight": "w"})).train
    assert values_of(train) == [(0.25, 0.0)] * 3 + [(0.0, 0.0)] * 3


@pytest.mark.parametrize("num_proc", [1, 3])
def test_values_of_every_kind_of_file(tmp_path, num_proc):
    """Parquet, also of float32 and integers, and a JSON row that has its numbers as texts, as a CSV file would."""
    datasets.Dataset.from_list(ROWS).cast_column("w", datasets.Value("float32")).to_parquet(str(tmp_path / "a.parquet"))
    texts = [row | {"w": str(row["w"]), "gap": f" {row['gap']:.1f} "} for row in ROWS]
    for path in (str(tmp_path / "a.parquet"), write_jsonl(tmp_path / "b.jsonl", texts)):
        train = prepared(SourceConfig(path, columns=BOTH), num_proc=num_proc).train
        assert values_of(train) == expected(ROWS)


BAD = [
    ("w", None, r"missing or null field w; the row has: "),
    ("gap", None, r"missing or null field gap; the row has: "),
    ("w", -0.5, r"w, the weight of the row's pairs, is a number \(-0\.5\); valid: a finite number >= 0"),
    ("w", True, r"w, the weight of the row's pairs, is a truth value"),
    ("w", [1], r"w, the weight of the row's pairs, is a list"),
    ("w", "heavy", r"w, the weight of the row's pairs, is a text \('heavy'\)"),
    ("gap", "nan", r"gap, the margin of the row's pairs, is a text \('nan'\); valid: a finite number"),
    ("gap", 10**400, r"gap, the margin of the row's pairs, is a number; valid: a finite number"),
    ("gap", 1e39, r"gap, the margin of the row's pairs, is a number \(1e\+39\)"),
]


@pytest.mark.parametrize(("column", "value", "line"), BAD)
def test_a_wrong_value_names_its_row(tmp_path, column, value, line):
    """In row 3 of the file, null or left out."""
    for row in ([ROWS[2] | {column: value}], [{k: v for k, v in ROWS[2].items() if k != column}])[
        : 1 + (value is None)
    ]:
        path = write_jsonl(tmp_path / "a.jsonl", [*ROWS[:2], *row, *ROWS[3:]])
        with pytest.raises(UserError, match=rf"^{path}:3: {line}"):
            prepared(SourceConfig(path, columns=BOTH))
        assert len(prepared(path).train) == 20


def test_a_broken_row_is_told_before_its_value(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [ROWS[0] | {"w": None, "chosen_ids": "x"}, ROWS[0]])
    with pytest.raises(UserError, match=rf"^{path}:1: chosen_ids is a text"):
        prepared(SourceConfig(path, columns=BOTH))


# --- what they belong to ---------------------------------------------------------------------------------------------


def test_content_hash(tmp_path):
    """Of the values where they are used: another weight is another set, and so is a margin in place of a weight; what
    is not named changes nothing.
    """

    def content(rows, **columns):
        return prepared(SourceConfig(write_jsonl(tmp_path / "a.jsonl", rows), columns=columns)).train.content_hash

    other = [*ROWS[:19], ROWS[19] | {"w": 1.25}]
    assert content(TOKENS[:20]) == content(ROWS) == content(other)
    assert content(ROWS, weight="w") == content(ROWS, weight="w")
    found = [content(ROWS), content(ROWS, weight="w"), content(other, weight="w")]
    found += [content(ROWS, margin="w"), content(ROWS, weight="w", margin="gap")]
    assert len(set(found)) == 5


@pytest.mark.parametrize("damage", ["gone", "cut"])
def test_damaged_values_are_made_again(tmp_path, hf_cache, capsys, damage):
    config = make_config(SourceConfig(write_jsonl(tmp_path / "a.jsonl", ROWS), columns=BOTH))
    prepare_data(config, MODEL)
    (file,) = hf_cache.rglob("pairs-*/*/train/margins.npy")
    if damage == "gone":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:-1])
    assert values_of(prepare_data(config, MODEL).train) == expected(ROWS)
    assert "is damaged and made again" in capsys.readouterr().err


# --- from the pair to the batch --------------------------------------------------------------------------------------


def packed(trees, dtype=torch.float32):
    plan = plan_step(trees, 1, 10**6, CostModel())
    return pack(trees, plan, None, RowFormat((None,), torch.device("cpu"), dtype))


def facts_of(batch):
    """(winner's tokens, loser's tokens, weight, margin) of each pair of a batch, by its tensors alone."""
    ends = np.cumsum(batch.lengths.tolist())
    answers = [
        tuple(batch.targets[end - n : end].tolist()) for end, n in zip(ends, batch.lengths.tolist(), strict=True)
    ]
    weights = [1.0] * len(batch.yw_idxs) if batch.weights is None else batch.weights.tolist()
    margins = [0.0] * len(batch.yw_idxs) if batch.margins is None else batch.margins.tolist()
    places = zip(batch.yw_idxs.tolist(), batch.yl_idxs.tolist(), weights, margins, strict=True)
    return sorted((answers[w], answers[v], *values) for w, v, *values in places)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_values_of_a_batch(tmp_path, dtype):
    """Each pair has its own value in (T,), also a pair that comes twice, and beside trees without any."""
    path, other = write_jsonl(tmp_path / "a.jsonl", ROWS), write_jsonl(tmp_path / "b.jsonl", TOKENS[20:60])
    train = prepared(SourceConfig(path, columns=BOTH), other).train
    ids = np.array([4, 59, 7, 4, 44, 13, 20, 0])
    batch = packed(grow_trees(train.pairs(ids)), dtype)
    rows = [(*ROWS, *TOKENS[20:60])[i] for i in ids]
    assert facts_of(batch) == sorted(
        (tuple(row["chosen_ids"]), tuple(row["rejected_ids"]), row.get("w", 1.0), row.get("gap", 0.0)) for row in rows
    )
    assert batch.weights.dtype == batch.margins.dtype == dtype and batch.weights.shape == batch.yw_idxs.shape
    assert batch.pairs_in_step == 8, "the denominator is the number of pairs, whatever their weights"
    moved = batch.to(torch.device("cpu"))
    assert torch.equal(moved.weights, batch.weights) and torch.equal(moved.margins, batch.margins)


def test_trees_that_share_a_prompt(tmp_path):
    """Pairs of one prompt with different values, of which two are the same pair: one tree, aligned with its pairs."""
    rows = [ROWS[0] | {"prompt_ids": [3], "w": w, "gap": w - 1} for w in (0.5, 2, 1)]
    train = prepared(SourceConfig(write_jsonl(tmp_path / "a.jsonl", rows), columns=BOTH)).train
    (tree,) = grow_trees(train.pairs(np.array([0, 1, 2, 1])))
    assert (tree.pairs, tree.weights, tree.margins) == (((0, 1),) * 4, (0.5, 2.0, 1.0, 2.0), (-0.5, 1.0, 0.0, 1.0))
    assert (tree.num_scored, len(tree.completion_ids)) == (len(rows[0]["chosen_ids"]) + 1, 2)


def test_neutral_values_are_left_out(tmp_path):
    """As if nothing were named: no tensors; a filler has none."""
    rows = [row | {"w": 1, "gap": 0} for row in TOKENS[:4]]
    train = prepared(SourceConfig(write_jsonl(tmp_path / "a.jsonl", rows), columns=BOTH)).train
    for trees in (grow_trees(train.pairs(np.arange(4))), [FILLER]):
        batch = packed(trees)
        assert batch.weights is None and batch.margins is None


def test_evaluation_gives_every_pair_weight_1(tmp_path):
    """Held-out pairs keep their margin, which is part of their loss; the mean over pairs has no weights."""
    data = prepared(SourceConfig(write_jsonl(tmp_path / "a.jsonl", ROWS), columns=BOTH, holdout=6))
    packer = Packer(0, 1, 10**6, CostModel(), RowFormat((None,), torch.device("cpu")))
    (plan,) = evaluation_plans(data.eval, packer)
    (batch,) = packer.pack(plan)
    held = [ROWS[i] for i in np.asarray(data.eval.row_of_pair)]
    assert sum(row["w"] != 1 for row in held) >= 2, "else nothing is tested"
    found = [
        (*row, 1.0, float(gap))
        for row, gap in (((tuple(r["chosen_ids"]), tuple(r["rejected_ids"])), r["gap"]) for r in held)
    ]
    assert batch.weights is None and facts_of(batch) == sorted(found)
    assert not math.isnan(sum(batch.margins.tolist())) and plan.pairs_in_step == len(held)
