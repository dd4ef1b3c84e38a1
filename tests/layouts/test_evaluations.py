"""The file of an evaluation has each pair's own values, in the order of the set, on any ranks."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.lib.npyio import NpzFile

from dpo.batch import packer as batches
from dpo.config import Config, SourceConfig
from dpo.run_folder.evaluations import evaluation_path, evaluation_steps
from dpo.train.program import run_training
from tests.support.models import plain_logp, plain_model, save_pairs
from tests.support.ranks import Ranks
from tests.support.runs import eval_lines, save_six_steps, six_steps

pytestmark = pytest.mark.xdist_group("ranks")

BETA = 0.5
PREFERENCES = ((0, 1), (2, 3), (1, 3))
"""Pairs of four completions, each a row of its own."""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """model/, pairs.jsonl, and two files to evaluate: nine prompts with a pair each in three turns, and five pairs."""
    root = save_six_steps(tmp_path_factory.mktemp("evaluations"))
    rows = read(save_pairs(root / "grouped.jsonl", 9, seed=2, completions=4))
    turns = [
        {
            "prompt_ids": row["prompt_ids"],
            "completion_ids": [row["completion_ids"][w], row["completion_ids"][lo]],
            "pairs": [[0, 1]],
        }
        for w, lo in PREFERENCES
        for row in rows
    ]
    (root / "turns.jsonl").write_text("".join(json.dumps(row) + "\n" for row in turns))
    save_pairs(root / "single.jsonl", 5, seed=3)
    return root


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def config_of(root: Path, run_dir: Path, **changes: Any) -> Config:
    facts = {
        "data__eval": [SourceConfig(str(root / name)) for name in ("turns.jsonl", "single.jsonl")],
        "batch__tokens_per_micro_batch": 60,
        "loss__beta": BETA,
        "train__steps": 1,
    }
    return six_steps(root, run_dir, **(facts | changes))


def train_in_parts(config: Config) -> None:
    """A run whose evaluations are planned seven pairs at a time: five plans."""
    pairs_per_plan, batches.PAIRS_PER_EVALUATION_PLAN = batches.PAIRS_PER_EVALUATION_PLAN, 7
    try:
        run_training(config)
    finally:
        batches.PAIRS_PER_EVALUATION_PLAN = pairs_per_plan


def plain_values(root: Path, final: Path) -> dict[str, np.ndarray]:
    """The arrays by the plain models, pair by pair in the order of the files, each completion alone."""
    pi, ref = plain_model(final), plain_model(root / "model")
    columns: dict[str, list[float]] = {}
    for number, name in enumerate(("turns.jsonl", "single.jsonl")):
        for row in read(root / name):
            columns.setdefault("source", []).append(number)
            for side, ids in zip(("chosen", "rejected"), row["completion_ids"], strict=True):
                own, others = (plain_logp(model, row["prompt_ids"], ids).item() for model in (pi, ref))
                columns.setdefault(f"tokens_{side}", []).append(len(ids))
                columns.setdefault(f"logps_{side}", []).append(own)
                columns.setdefault(f"logratios_{side}", []).append(own - others)
                columns.setdefault(f"rewards_{side}", []).append(BETA * (own - others))
    return {name: np.array(column) for name, column in columns.items()}


def arrays_of(run_dir: Path, step: int) -> NpzFile:
    return np.load(evaluation_path(run_dir, step), allow_pickle=False)  # type: ignore[no-any-return]


@pytest.mark.parametrize("size", [1, 2, 3])
def test_every_pair_has_its_own_values_in_the_sets_order(ranks: Ranks, root: Path, tmp_path: Path, size: int) -> None:
    """32 pairs of two sources against the plain models: 1e-4 nats. The
    rows of a prompt are nine rows apart, so that no plan, lane or micro-batch has the pairs in the order of the files.
    The means are the metrics of the same evaluation.
    """
    ranks(size, train_in_parts, config_of(root, tmp_path / "run"))
    expected = plain_values(root, tmp_path / "run" / "final")
    assert np.abs(np.diff(expected["logratios_chosen"])).min() > 1e-4  # a pair for its neighbour is seen
    assert evaluation_steps(tmp_path / "run") == [0, 1]
    found = arrays_of(tmp_path / "run", 1)
    assert sorted(found.files) == sorted([*expected, "sources"])
    for name, column in expected.items():
        assert found[name].shape == (32,)
        assert found[name].dtype == (np.int32 if name in ("source", "tokens_chosen", "tokens_rejected") else np.float32)
        np.testing.assert_allclose(found[name], column, atol=1e-4, rtol=0, err_msg=name)
    assert found["sources"].tolist() == [
        f"data.eval[0] {root / 'turns.jsonl'}",
        f"data.eval[1] {root / 'single.jsonl'}",
        f"data.train[0] {root / 'pairs.jsonl'}",
    ]
    line = eval_lines(tmp_path / "run")[-1]
    for name in ("rewards", "logps"):
        for side in ("chosen", "rejected"):
            assert found[f"{name}_{side}"].mean() == pytest.approx(line[f"eval/{name}/{side}"], rel=1e-5)
    for side in ("chosen", "rejected"):
        per_token = (expected[f"logratios_{side}"] / expected[f"tokens_{side}"]).mean()
        assert line[f"eval/logratios_per_token/{side}"] == pytest.approx(per_token, abs=1e-5)
        assert abs(per_token) > 1e-4


@pytest.mark.parametrize(
    ("loss", "names"),
    [
        ("simpo", ["logps_chosen", "logps_rejected", "rewards_chosen", "rewards_rejected"]),
        ("sft", ["logps_chosen"]),
    ],
)
def test_arrays_that_a_loss_does_not_have_are_absent(
    ranks: Ranks, root: Path, tmp_path: Path, loss: str, names: list[str]
) -> None:
    """simpo has no reference; sft computes no losers either, so that it has no lengths of them."""
    ranks(1, run_training, config_of(root, tmp_path / "run", loss__name=loss))
    found = arrays_of(tmp_path / "run", 0)
    tokens = [f"tokens_{name.removeprefix('logps_')}" for name in names if name.startswith("logps_")]
    assert sorted(found.files) == sorted([*names, *tokens, "source", "sources"])
    if loss == "simpo":
        per_token = BETA * found["logps_rejected"] / found["tokens_rejected"]
        np.testing.assert_allclose(found["rewards_rejected"], per_token, rtol=1e-5)


def mixed_config(root: Path, run_dir: Path, loss: str) -> Config:
    """Pairs held out of a source to train on beside a file to evaluate, each with rows that are dropped before others
    that are kept.
    """
    empty = {"prompt_ids": [1, 5, 6], "completion_ids": [[2], [7, 2]], "pairs": [[0, 1]]}
    for name, count, seed in (("train.jsonl", 12, 4), ("eval.jsonl", 5, 3)):
        rows = read(save_pairs(root / name, count, seed=seed))
        long = {**rows[0], "prompt_ids": [1, *[9] * 60]}
        mixed = [long, *rows[:3], empty, long, *rows[3:]]
        (root / name).write_text("".join(json.dumps(row) + "\n" for row in mixed))
    return config_of(
        root,
        run_dir,
        data__train=[SourceConfig(str(root / "train.jsonl"), holdout=4)],
        data__eval=[SourceConfig(str(root / "eval.jsonl"))],
        data__max_length=50,
        data__max_prompt_length=None,
        loss__name=loss,
    )


@pytest.mark.parametrize("loss", ["dpo", "sft"])
def test_pairs_of_all_kinds_of_sources_know_their_source(ranks: Ranks, root: Path, tmp_path: Path, loss: str) -> None:
    """Five pairs of the file, then four that are held out, on two ranks, by the plain model: whose pairs they are is
    seen in their log-probabilities. `sft` has no losers. Every row of a source has other tokens.
    """
    config = mixed_config(root, tmp_path / "run", loss)
    ranks(2, train_in_parts, config)
    found, model = arrays_of(tmp_path / "run", 0), plain_model(root / "model")
    assert found["source"].tolist() == [0] * 5 + [1] * 4
    assert found["sources"].tolist() == [f"data.eval[0] {root / 'eval.jsonl'}", f"data.train[0] {root / 'train.jsonl'}"]
    sides = ("chosen",) if loss == "sft" else ("chosen", "rejected")
    for name, number in (("eval.jsonl", 0), ("train.jsonl", 1)):
        kept = [row for row in read(root / name) if len(row["prompt_ids"]) < 50 and len(row["completion_ids"][0]) > 1]
        for index, side in enumerate(sides):
            of_file = [plain_logp(model, row["prompt_ids"], row["completion_ids"][index]).item() for row in kept]
            of_set = found[f"logps_{side}"][found["source"] == number]
            nearest = np.abs(np.subtract.outer(of_set, of_file))
            assert nearest.min(axis=1).max() < 1e-4  # each is a pair of this file
            assert len(set(nearest.argmin(axis=1))) == len(of_set)  # and each another one
            if number == 0:
                np.testing.assert_allclose(of_set, of_file, atol=1e-4, rtol=0)
    assert ("tokens_rejected" in found.files) is (loss != "sft")
