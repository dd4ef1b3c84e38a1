"""The reference pass: which rows a run computes, which it finds, and what values they have."""

import gc
import json
import os
import shutil
import sys
import threading
import weakref
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from dpo.config import Config, SourceConfig
from dpo.distributed.program import run_program
from dpo.model.build import load_policy
from dpo.pairs.tokens import completion_key
from dpo.ref_logps import fill as reference_pass
from dpo.ref_logps.blocks import read_rows, split_keys
from dpo.ref_logps.circumstances import numerics
from dpo.reference import program as reference
from dpo.step.optim import make_optimizer
from dpo.train import setup
from tests.support.models import plain_logp, plain_model, save_model, save_pairs
from tests.support.runs import (
    afresh,
    cache_folders,
    changed,
    error_lines,
    exit_code,
    has_log_alone,
    make_config,
    reference_line,
    run,
    train_lines,
    without_clock,
)

NUM_PAIRS = 8
ALL = 2 * NUM_PAIRS
"""Every pair of `save_pairs` has a prompt and two completions of its own."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """model/, pairs.jsonl and eval.jsonl."""
    root = tmp_path_factory.mktemp("reference")
    save_model(root / "model", "llama")
    save_pairs(root / "pairs.jsonl", NUM_PAIRS)
    save_pairs(root / "eval.jsonl", 3, seed=1)
    return root


def config_of(folders: Path, root: Path) -> Config:
    """One step on four of the eight pairs, run in `root`."""
    return make_config(
        folders / "model", folders / "pairs.jsonl", root / "run", batch__pairs_per_step=4, train__steps=1
    )


@pytest.fixture
def config(folders: Path, tmp_path: Path) -> Config:
    return config_of(folders, tmp_path)


@pytest.fixture(scope="module")
def first_run(folders: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """The folder of the run of `config` with its cache, and the names of the threads that packed its reference pass."""
    root, packed_by, pack = tmp_path_factory.mktemp("first"), [], reference_pass._plan_and_pack

    def noted(*args: Any) -> Any:
        packed_by.append(threading.current_thread().name)
        return pack(*args)

    with (
        patch.object(reference_pass, "_plan_and_pack", noted),
        patch.dict(os.environ, {"DPO_CACHE": str(root / "reference-cache")}),
    ):
        return run(config_of(folders, root)).parent, packed_by


@pytest.fixture
def filled(config: Config, first_run: tuple[Path, list[str]], tmp_path: Path) -> Config:
    """The config, after a run of it: its folder and its cache are those of `first_run`."""
    shutil.copytree(first_run[0], tmp_path, dirs_exist_ok=True)
    return config


def rows_of(path: Path) -> list[dict[str, list]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def write_rows(path: Path, rows: list[dict[str, list]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


# --- values ----------------------------------------------------------------------------------------------------------


def test_values_are_those_of_plain_hugging_face(filled: Config, folders: Path, tmp_path: Path) -> None:
    """Each completion alone through `from_pretrained`; two float32 computations of some tens of nats: 1e-5 relative."""
    rows, model = read_rows(cache_folders(tmp_path)[0]), plain_model(folders / "model")
    assert len(rows) == ALL and reference_line(str(filled.train.run_dir)) == (ALL, 0)
    for row in rows_of(folders / "pairs.jsonl"):
        for ids in row["completion_ids"]:
            expected = plain_logp(model, row["prompt_ids"], ids).item()
            (place,) = rows.find(split_keys([completion_key(np.array(row["prompt_ids"]), np.array(ids))]))
            assert rows.logps[place] == pytest.approx(expected, rel=1e-5, abs=1e-5)


def test_another_reference_is_that_models_log_probabilities(config: Config, folders: Path, tmp_path: Path) -> None:
    """reference.path: another family, so that nothing of the policy's own shape can serve; first margins by hand."""
    save_model(tmp_path / "other", "gpt2", seed=5)
    config = afresh(config, reference__path=str(tmp_path / "other"), data__order="sequential")
    line = train_lines(run(config))[0]
    policy, other = plain_model(folders / "model"), plain_model(tmp_path / "other")
    margins = []
    for row in rows_of(folders / "pairs.jsonl")[:4]:
        ratios = [
            (plain_logp(policy, row["prompt_ids"], ids) - plain_logp(other, row["prompt_ids"], ids)).item()
            for ids in row["completion_ids"]
        ]
        margins.append(0.1 * (ratios[0] - ratios[1]))
    assert line["train/rewards/margins"] == pytest.approx(np.mean(margins), rel=1e-4)
    assert line["train/rewards/accuracies"] == np.mean(np.array(margins) > 0)
    expected = np.mean(np.log1p(np.exp(-np.array(margins))))
    assert line["train/loss"] == pytest.approx(expected, rel=1e-4)
    assert abs(line["train/loss"] - np.log(2)) > 1e-3  # the check of the first step rightly did not run


def test_packing_runs_ahead_on_another_thread(first_run: tuple[Path, list[str]]) -> None:
    """As in training; the values are those of the test above, whichever thread packs."""
    assert first_run[1] and all(name.startswith("prefetch") for name in first_run[1])


def test_a_copy_of_the_model_as_reference_is_its_own_start(filled: Config, folders: Path, tmp_path: Path) -> None:
    shutil.copytree(folders / "model", tmp_path / "copy")
    own, copied = filled.train.run_dir, run(afresh(filled, reference__path=str(tmp_path / "copy")))
    assert reference_line(copied) == (0, ALL)
    assert without_clock(train_lines(own)) == without_clock(train_lines(copied))
    assert train_lines(copied)[0]["train/loss"] == pytest.approx(np.log(2), abs=1e-5)


def test_a_reference_that_is_not_finite_ends_the_run(
    config: Config, folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One weight is NaN: the reference pass says so, and no row reaches the cache."""
    edit_weights(folders / "model", tmp_path / "broken", "lm_head.weight", float("nan"))
    broken = afresh(config, model__path=str(tmp_path / "broken"))
    assert exit_code(broken) == 1
    assert "error: the reference gives a log-probability that is not finite" in capsys.readouterr().err
    assert not list((tmp_path / "reference-cache").rglob("rows-*"))
    assert has_log_alone(str(broken.train.run_dir))


def test_sft_has_no_reference(config: Config, tmp_path: Path) -> None:
    folder = run(afresh(config, loss__name="sft"))
    assert not (tmp_path / "reference-cache").exists()
    assert not [name for line in train_lines(folder) for name in line if "rewards" in name]
    assert not [line for line in without_clock(train_lines(folder)) if "reference/rows_computed" in line]


# --- found again -----------------------------------------------------------------------------------------------------

KEPT = {
    "optim__lr": 1e-3,
    "optim__name": "sgd",
    "loss__name": "ipo",
    "loss__beta": 0.5,
    "data__order": "sequential",
    "train__seed": 3,
    "batch__group_by_prompt": True,
    "batch__tokens_per_micro_batch": 40,
    "batch__pairs_per_step": 8,
    "parallel__head_memory_mib": 1,
    "parallel__activation_checkpointing": "full",
    "parallel__reshard_after_forward": False,
}
"""Keys of which the values in the cache are independent; all change at once."""
LIMITS = {
    "limits that cut nothing": {"data__max_length": 64, "data__max_prompt_length": 40},
    "no limits": {"data__max_length": None, "data__max_prompt_length": None},
}


def test_a_second_run_computes_nothing_whatever_else_changes(filled: Config) -> None:
    found = {name: reference_line(run(afresh(filled, **KEPT, **limits))) for name, limits in LIMITS.items()}
    assert found == dict.fromkeys(LIMITS, (0, ALL))


def test_a_second_run_looks_for_no_key(filled: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """The table of its data is there: neither the keys of all completions nor the blocks are read."""
    monkeypatch.setattr(reference_pass, "_wanted", None)
    monkeypatch.setattr(reference_pass, "read_rows", None)
    assert reference_line(run(afresh(filled))) == (0, ALL)


def test_the_model_may_be_renamed_moved_and_sharded_anew(filled: Config, folders: Path, tmp_path: Path) -> None:
    """The same tensors in several files, under another folder's name, with another `_name_or_path` and version."""
    shutil.copytree(folders / "model", tmp_path / "deep" / "other name")
    model = AutoModelForCausalLM.from_pretrained(folders / "model")
    model.save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    facts = json.loads((tmp_path / "sharded" / "config.json").read_text())
    facts |= {"transformers_version": "4.0.0", "_name_or_path": "somebody/else", "architectures": None}
    (tmp_path / "sharded" / "config.json").write_text(json.dumps(facts))
    for folder in (tmp_path / "deep" / "other name", tmp_path / "sharded"):
        assert reference_line(run(afresh(filled, model__path=str(folder)))) == (0, ALL)


def edit_weights(folder: Path, out: Path, name: str, value: float) -> None:
    """A copy of a model with one number of one tensor replaced."""
    shutil.copytree(folder, out)
    tensors = load_file(out / "model.safetensors")
    tensors[name].view(-1)[3] = value
    save_file(tensors, out / "model.safetensors", {"format": "pt"})


def test_one_byte_of_one_weight_makes_all_rows_new(filled: Config, folders: Path, tmp_path: Path) -> None:
    """The smallest change a float32 can have, in a norm that few would hash: nextafter of it."""
    name = "model.norm.weight"
    before = load_file(folders / "model" / "model.safetensors")[name][3]
    after = torch.nextafter(before, torch.tensor(torch.inf)).item()
    edit_weights(folders / "model", tmp_path / "changed", name, after)
    assert reference_line(run(afresh(filled, model__path=str(tmp_path / "changed")))) == (ALL, 0)
    assert len(cache_folders(tmp_path)) == 2


def test_the_rows_of_another_reference_under_the_name_of_this_one(
    filled: Config, folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The folder of one model was renamed to that of another: refused by both names. Damaged facts do not matter."""
    (own,) = cache_folders(tmp_path)
    edit_weights(folders / "model", tmp_path / "changed", "model.norm.weight", 2.0)
    other = afresh(filled, model__path=str(tmp_path / "changed"))
    run(other)
    (theirs,) = (folder for folder in cache_folders(tmp_path) if folder != own)
    shutil.rmtree(theirs)
    own.rename(theirs)
    capsys.readouterr()
    assert exit_code(afresh(other)) == 2
    (line,) = error_lines(capsys.readouterr().err)
    assert f"reference.cache_dir: {theirs} holds log-probabilities of another reference, {own.name} by " in line
    theirs.rename(own)
    for facts in ("", "[]", "{"):
        (own / "about.json").write_text(facts)
        assert reference_line(run(afresh(filled))) == (0, ALL)


@pytest.mark.parametrize("key", ["rope_theta", "rms_norm_eps"])
def test_a_changed_config_makes_all_rows_new(filled: Config, folders: Path, tmp_path: Path, key: str) -> None:
    shutil.copytree(folders / "model", tmp_path / "changed")
    path = tmp_path / "changed" / "config.json"
    facts = json.loads(path.read_text())
    owner = facts["rope_parameters"] if key == "rope_theta" else facts
    owner[key] = 2 * owner[key]
    path.write_text(json.dumps(facts))
    assert reference_line(run(afresh(filled, model__path=str(path.parent)))) == (ALL, 0)


def test_tf32_has_rows_of_its_own() -> None:
    """On CUDA, where it changes products; rows without it keep their key."""
    facts = {
        (device, tf32): numerics("float32", torch.float32, torch.device(device), tf32)
        for device in ("cpu", "cuda")
        for tf32 in (False, True)
    }
    assert facts["cuda", True] != facts["cuda", False]
    assert facts["cpu", True] == facts["cpu", False]
    assert facts["cuda", False]["compute_dtype"] == "torch.float32"


def test_the_float32_product_has_rows_of_its_own() -> None:
    """On CUDA in bfloat16, where logits were rounded before it was there; all other rows keep their key, to the bit."""
    kinds = {
        (device, dtype): numerics("float32", dtype, torch.device(device), False)
        for device in ("cpu", "cuda")
        for dtype in (torch.bfloat16, torch.float32)
    }
    assert [kind for kind, facts in kinds.items() if "head" in facts] == [("cuda", torch.bfloat16)]
    assert kinds["cuda", torch.bfloat16]["head"] == "float32 product"
    assert kinds["cpu", torch.bfloat16] == {
        "dtype": "float32",
        "compute_dtype": "torch.bfloat16",
        "device": "cpu",
        "attention": "dpo_tree/segments",
    }


def test_other_numerics_are_other_rows(filled: Config, tmp_path: Path) -> None:
    assert reference_line(run(afresh(filled, parallel__compute_dtype="bfloat16"))) == (ALL, 0)
    double = afresh(filled, model__dtype="float64", parallel__reduce_dtype="float64")
    assert reference_line(run(double)) == (ALL, 0)
    assert len(cache_folders(tmp_path)) == 3


# --- grown -----------------------------------------------------------------------------------------------------------


def test_more_data_computes_its_own_rows_alone(filled: Config, folders: Path, tmp_path: Path) -> None:
    """A ninth row: 2 new completions. A tenth that answers the first prompt again, once as before: 1 new completion."""
    rows = rows_of(folders / "pairs.jsonl")
    ninth = {"prompt_ids": [1, 50, 51], "completion_ids": [[60, 2], [61, 62, 2]], "pairs": [[0, 1]]}
    more = write_rows(tmp_path / "more.jsonl", [*rows, ninth])
    assert reference_line(run(afresh(filled, data__train=[SourceConfig(str(more))]))) == (2, ALL)
    tenth = rows[0] | {"completion_ids": [rows[0]["completion_ids"][0], [63, 2]]}
    write_rows(more, [*rows, ninth, tenth])
    assert reference_line(run(afresh(filled, data__train=[SourceConfig(str(more))]))) == (1, ALL + 2)


def test_cut_completions_alone_are_new(filled: Config, folders: Path) -> None:
    """max_length 24 and a prompt limit of 23, which no prompt exceeds: a completion is new iff prompt + it > 24.

    TRL 1.16 served the old value here.
    """
    lengths = [
        len(row["prompt_ids"]) + len(ids) for row in rows_of(folders / "pairs.jsonl") for ids in row["completion_ids"]
    ]
    num_cut = sum(length > 24 for length in lengths)
    assert 0 < num_cut < ALL
    assert all(len(row["prompt_ids"]) <= 23 for row in rows_of(folders / "pairs.jsonl"))
    shorter = afresh(filled, data__max_length=24, data__max_prompt_length=23)
    assert reference_line(run(shorter)) == (num_cut, ALL - num_cut)


def test_evaluation_pairs_are_in_the_cache_too(config: Config, folders: Path) -> None:
    """3 more prompts with 2 completions each; afterwards they are found, also as training pairs."""
    both = afresh(config, data__eval=[SourceConfig(str(folders / "eval.jsonl"))])
    run(both)
    assert reference_line(str(both.train.run_dir)) == (ALL + 6, 0)
    assert reference_line(run(afresh(both))) == (0, ALL + 6)
    swapped = [SourceConfig(str(folders / "eval.jsonl"))]
    assert reference_line(run(afresh(config, data__train=swapped, batch__pairs_per_step=3))) == (0, 6)


def test_a_completion_of_several_pairs_is_one_row(config: Config, tmp_path: Path) -> None:
    """4 answers ranked in full are 6 pairs and 4 rows a prompt; the same row of data twice adds none."""
    path = save_pairs(tmp_path / "ranked.jsonl", 4, completions=4, pairs_each=6)
    path.write_text(path.read_text() * 2)
    assert reference_line(run(afresh(config, data__train=[SourceConfig(str(path))]))) == (16, 0)


def test_the_program_fills_the_cache_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`python -m dpo.reference` leaves no run folder; the training that follows computes nothing. Without a reference
    there is nothing to fill: exit code 2."""
    model, pairs = save_model(tmp_path / "model", "llama"), save_pairs(tmp_path / "pairs.jsonl", 64)
    argv = ["dpo.reference", "--model.path", str(model), "--data.train", f"[{{path: {pairs}}}]"]
    monkeypatch.setattr(sys, "argv", [*argv, "--train.run_dir", str(tmp_path / "run")])
    assert run_program(reference.main) == 0
    assert not (tmp_path / "run").exists()
    assert sum(len(read_rows(folder)) for folder in (tmp_path / "reference-cache").iterdir()) == 128
    run(make_config(model, pairs, tmp_path / "run", train__steps=1))
    assert reference_line(tmp_path / "run") == (0, 128)
    monkeypatch.setattr(sys, "argv", [*argv, "--loss.name", "sft"])
    assert run_program(reference.main) == 2


def test_another_reference_is_freed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loaded, used, freed: a sharded model refers to itself, so only a collection frees it."""
    models: list[weakref.ref] = []

    def load(*args: Any) -> Any:
        loaded = load_policy(*args)
        models.append(weakref.ref(loaded.model))
        return loaded

    alive: list[bool] = []
    monkeypatch.setattr("dpo.model.warm_up.load_policy", load)
    monkeypatch.setattr(
        setup, "make_optimizer", lambda *args: (alive.append(models[1]() is not None), make_optimizer(*args))[1]
    )
    other = save_model(tmp_path / "other", "llama", seed=1)
    config = make_config(
        save_model(tmp_path / "model", "llama"), save_pairs(tmp_path / "p.jsonl", 64), tmp_path / "run"
    )
    gc.disable()  # no collection by chance
    try:
        run(changed(config, train__steps=1, reference__path=str(other)))
    finally:
        gc.enable()
    assert len(models) == 2
    assert alive == [False]
