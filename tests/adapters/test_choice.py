"""The adapters of a config: its keys, a folder, a repository of the hub, and keys that contradict a folder."""

import json
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants
from safetensors.torch import save_file

from dpo.adapters.choice import find_adapters, find_warnings
from dpo.adapters.spec import AdapterSpec
from dpo.base.errors import UserError
from dpo.config import Config, load_config

SFT = {
    "peft_type": "LORA",
    "r": 4,
    "lora_alpha": 8,
    "target_modules": ["q_proj", "v_proj"],
    "base_model_name_or_path": "m",
}


def config_of(*words: str) -> Config:
    return load_config(["model.path=m", "data.train=[{path: a.jsonl}]", *words], "dpo.train")


def save(folder: Path, **changes: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(SFT | changes))
    save_file({}, folder / "adapter_model.safetensors")
    return folder


def refused(*words: str) -> str:
    with pytest.raises(UserError) as caught:
        find_adapters(config_of(*words))
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- keys ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "spec"),
    [
        ([], None),
        (["lora.rank=8"], AdapterSpec(rank=8, alpha=16.0, target_modules="all-linear")),
        (["lora.rank=8", "lora.alpha=4"], AdapterSpec(rank=8, alpha=4.0)),
        (["lora.rank=2", "lora.target_modules=q_proj"], AdapterSpec(2, 4.0, "q_proj")),
        (["lora.rank=2", "lora.target_modules=[q_proj, v_proj]"], AdapterSpec(2, 4.0, ("q_proj", "v_proj"))),
        (["lora.rank=2", "lora.exclude_modules=[o_proj]"], AdapterSpec(2, 4.0, exclude_modules=("o_proj",))),
        (["lora.rank=2", "lora.target_parameters=[experts.w]"], AdapterSpec(2, 4.0, target_parameters=("experts.w",))),
        (["lora.rank=2", "lora.rslora=true", "lora.dora=true"], AdapterSpec(2, 4.0, rslora=True, dora=True)),
        (["lora.rank=2", "lora.train_embeddings=true"], AdapterSpec(2, 4.0, embeddings=True)),
    ],
)
def test_keys_are_adapters_that_start_at_random(words: list[str], spec: AdapterSpec | None) -> None:
    """Null alpha is twice the rank, as the help says."""
    assert find_adapters(config_of(*words)) == spec


# --- a folder --------------------------------------------------------------------------------------------------------

SAME: list[tuple[dict[str, Any], list[str]]] = [
    ({}, []),
    ({}, ["lora.rank=4", "lora.alpha=8", "lora.target_modules=[v_proj, q_proj]", "lora.rslora=false"]),
    ({"target_modules": ["q_proj"]}, ["lora.target_modules=q_proj"]),
    ({"target_modules": ".*q_proj"}, ["lora.target_modules=.*q_proj"]),
    ({"target_modules": "all-linear"}, ["lora.target_modules=all-linear"]),
    ({"use_dora": True, "use_rslora": True}, ["lora.dora=true", "lora.rslora=true"]),
    ({"exclude_modules": ["k_proj", "o_proj"]}, ["lora.exclude_modules=[o_proj, k_proj]"]),
    ({"target_parameters": ["experts.w"]}, ["lora.target_parameters=[experts.w]"]),
    ({"modules_to_save": ["embed_tokens", "lm_head"]}, ["lora.train_embeddings=true"]),
    ({"modules_to_save": ["model.embed_tokens"]}, ["lora.train_embeddings=true"]),
    ({"modules_to_save": ["wte"]}, []),
    ({"modules_to_save": ["norm"]}, ["lora.train_embeddings=false"]),
    ({"rank_pattern": {"q_proj": 2}}, ["lora.rank=4"]),
]


@pytest.mark.parametrize(("changes", "words"), SAME)
def test_equal_keys_beside_a_folder_change_nothing(changes: dict[str, Any], words: list[str], tmp_path: Path) -> None:
    folder = save(tmp_path / "sft", **changes)
    spec = find_adapters(config_of(f"lora.path={folder}", *words))
    assert spec is not None and spec == find_adapters(config_of(f"lora.path={folder}"))
    assert spec.folder == folder and spec.rank == 4 and spec.alpha == 8.0


def differs(key: str, given: str, has: str, valid: str | None = None) -> str:
    what = f"lora.{key}: {given} is given, and adapter_config.json of lora.path sft has {has}"
    return f"{what}; valid: null, which takes {valid or f'that of lora.path, or {has}'}"


OTHER: list[tuple[dict[str, Any], str, str]] = [
    ({}, "rank=8", differs("rank", "8", "4")),
    ({}, "alpha=16", differs("alpha", "16", "8")),
    ({}, "alpha=0.5", differs("alpha", "0.5", "8")),
    ({}, "target_modules=[q_proj]", differs("target_modules", "[q_proj]", "[q_proj, v_proj]")),
    ({}, "target_modules=all-linear", differs("target_modules", "all-linear", "[q_proj, v_proj]")),
    ({"target_modules": "all-linear"}, "target_modules=[q_proj]", differs("target_modules", "[q_proj]", "all-linear")),
    ({}, "target_parameters=[experts.w]", differs("target_parameters", "[experts.w]", "[]")),
    ({}, "exclude_modules=o_proj", differs("exclude_modules", "o_proj", "[]")),
    ({}, "rslora=true", differs("rslora", "true", "false")),
    ({"use_dora": True}, "dora=false", differs("dora", "false", "true")),
    ({}, "train_embeddings=true", differs("train_embeddings", "true", "no modules_to_save", "what lora.path has")),
    (
        {"modules_to_save": ["norm"]},
        "train_embeddings=true",
        differs("train_embeddings", "true", "modules_to_save [norm]", "what lora.path has"),
    ),
    (
        {"modules_to_save": ["lm_head"]},
        "train_embeddings=false",
        differs("train_embeddings", "false", "modules_to_save [lm_head]", "what lora.path has"),
    ),
]


@pytest.mark.parametrize(("changes", "word", "line"), OTHER)
def test_a_key_that_contradicts_the_folder(
    changes: dict[str, Any], word: str, line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the key and both values."""
    monkeypatch.chdir(tmp_path)
    save(tmp_path / "sft", **changes)
    assert refused("lora.path=sft", f"lora.{word}") == line


def test_a_path_that_is_no_adapters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    valid = "a folder of adapters in peft's form, or its hub id"
    assert refused("lora.path=empty") == f"lora.path: empty has no adapter_config.json; valid: {valid}"
    assert refused("lora.path=./absent") == f"lora.path: no such folder: ./absent; valid: {valid}"
    (tmp_path / "file").touch()
    assert refused("lora.path=file").startswith("file/adapter_config.json: not readable as JSON: ")


# --- the hub ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The hub's cache, with a snapshot of org/sft. The tests run with HF_HUB_OFFLINE: a request fails."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    repository = tmp_path / "hub" / "models--org--sft"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("a" * 40)
    return save(repository / "snapshots" / ("a" * 40))


def test_adapters_of_the_hub_are_taken_from_the_cache(cache: Path) -> None:
    spec = find_adapters(config_of("lora.path=org/sft"))
    assert spec == AdapterSpec(4, 8.0, ("q_proj", "v_proj"), of_peft=True, folder=cache)


def test_an_incomplete_snapshot_is_asked_for(cache: Path) -> None:
    (cache / "adapter_model.safetensors").unlink()
    lacks = f"the cache {constants.HF_HUB_CACHE} lacks adapter_model.safetensors"
    assert refused("lora.path=org/sft").startswith(f"lora.path: org/sft: {lacks}, and the hub does not answer")


def test_adapters_that_are_not_in_the_cache(cache: Path) -> None:
    lacks = f"the cache {constants.HF_HUB_CACHE} lacks adapter_config.json"
    assert refused("lora.path=org/absent").startswith(f"lora.path: org/absent: {lacks}, and the hub does not answer")


# --- told ------------------------------------------------------------------------------------------------------------

RATE = (
    "optim.lr 1e-06 is that of whole models, with which adapters hardly move; usual for them: 5e-6 to 1e-4, as in"
    " --optim.lr 1e-5"
)


@pytest.mark.parametrize(
    ("words", "lines"),
    [
        ([], []),
        (["optim.lr=1e-6"], []),
        (["lora.rank=4"], [RATE]),
        (["lora.rank=4", "optim.lr=1e-6"], [RATE]),
        (["lora.rank=4", "optim.lr=5e-6"], []),
        (["lora.path=sft"], [RATE]),
        (["lora.path=sft", "optim.lr=2e-6"], []),
        (
            ["lora.path=other", "optim.lr=1e-5"],
            [
                "other/adapter_config.json: lora_dropout 0.1 is taken as 0: adapters have no dropout here",
                "other/adapter_config.json: the adapters are for n, and model.path is m: their tensors decide if they"
                " fit",
            ],
        ),
    ],
)
def test_what_is_told(words: list[str], lines: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save(tmp_path / "sft")
    save(tmp_path / "other", lora_dropout=0.1, base_model_name_or_path="n")
    assert find_warnings(config_of(*words)) == lines
