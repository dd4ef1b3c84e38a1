"""The files beside the weights of a model, by which a run reads its data and which its exported model gets."""

import hashlib
import json
from pathlib import Path

import pytest
from huggingface_hub import constants

from dpo.run.model_files import added_files, find_change, hash_copied_files, hash_model_files
from tests.support.runs import changed, make_config

CONFIG = {"model_type": "llama"}
OWN = {"auto_map": {"AutoModelForCausalLM": "modeling_own.Own"}}


def make(folder: Path, *names: str, **settings: object) -> Path:
    """A folder with config.json and files whose content is their name."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG | settings))
    return folder


def digests(folder: Path, *names: str) -> dict[str, str]:
    return {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names}


def test_what_is_hashed(tmp_path: Path) -> None:
    """All that an export copies, and nothing else; the weights have their own hash."""
    copied = ("config.json", "generation_config.json", "LICENSE")
    words = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
    more = ("additional_chat_templates/rag.jinja",)
    others = ("README.md", "model.safetensors", "notes.txt", "scripts/run.py", "original/tokenizer.model")
    model = make(tmp_path / "model", *copied[1:], *words, *more, *others)
    found = hash_model_files(make_config(model, "", ""), model, model)
    tokenizer = digests(model, *words, *more)
    assert found == {"model.path": digests(model, *copied), "model.tokenizer": tokenizer, "reference.path": {}}
    without = hash_model_files(make_config(model, "", "", loss__name="sft"), model, model)
    assert without == {"model.path": digests(model, *copied), "model.tokenizer": tokenizer}


def test_code_and_a_tokenizer_elsewhere(tmp_path: Path) -> None:
    """Code of model, tokenizer and reference, below the folder too where the config names code."""
    model = make(tmp_path / "model", "modeling_own.py", "layers/attention.py", "tokenizer.json", **OWN)
    words = make(tmp_path / "words", "tokenizer.json", "words.py", "generation_config.json")
    reference = make(tmp_path / "reference", "modeling_own.py", "layers/attention.py", "tokenizer.json", **OWN)
    config = make_config(model, "", "", model__tokenizer=str(words))
    code = ("modeling_own.py", "layers/attention.py")
    assert hash_model_files(config, model, reference) == {
        "model.path": digests(model, "config.json", *code),
        "model.tokenizer": digests(words, "tokenizer.json", "words.py"),
        "reference.path": digests(reference, *code),
    }
    nowhere = changed(config, model__tokenizer="org/not-here")
    assert hash_copied_files(nowhere, model) == {
        "model.path": digests(model, "config.json", *code),
        "model.tokenizer": {},
    }


def test_code_of_another_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the newest revision in the hub's cache, where it may be run; a repository that is not there has no files."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    revision = tmp_path / "models--org--code" / "snapshots" / ("1" * 40)
    make(revision, "own.py", "words.py", "README.md")
    (tmp_path / "models--org--code" / "refs").mkdir()
    (tmp_path / "models--org--code" / "refs" / "main").write_text(revision.name)
    model = make(tmp_path / "model", auto_map={"AutoModel": "org/code--own.Own", "AutoConfig": "org/not--a.B"})
    code = {f"org/code/{name}": digest for name, digest in digests(revision, "own.py", "words.py").items()}
    config = make_config(model, "", "", loss__name="sft")
    assert hash_model_files(changed(config, model__trust_remote_code=True), model, model) == {
        "model.path": digests(model, "config.json"),
        "model.tokenizer": {},
        "model.trust_remote_code": code,
    }
    assert "model.trust_remote_code" not in hash_model_files(config, model, model)


def test_links_of_a_snapshot_are_followed(tmp_path: Path) -> None:
    """Also a link that leads nowhere, whose file is missing."""
    blobs, snapshot = make(tmp_path / "blobs", "tokenizer.json"), tmp_path / "snapshot"
    snapshot.mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (snapshot / name).symlink_to(Path("../blobs") / name)
    found = hash_copied_files(make_config(snapshot, "", ""), snapshot)
    assert found == {"model.path": digests(blobs, "config.json"), "model.tokenizer": digests(blobs, "tokenizer.json")}


A, B = "a" * 64, "b" * 64
TOKENIZER = "the tokenizer (of model.path where model.tokenizer is null)"


def test_a_change_is_named() -> None:
    """The first key with a change, and files by name; a file that was not there before is no change."""
    before = {"model.path": {"config.json": A}, "model.tokenizer": {"1": A, "2": A, "3": A, "4": A, "5": A}}
    is_not = f"{TOKENIZER} is not as it was:"
    changed_one = f"1 has changed (SHA-256 {A[:8]}, now {B[:8]})"

    def found(**tokenizer: str) -> tuple[str, str] | None:
        same = before["model.tokenizer"]
        files = {name: digest for name, digest in {**same, **tokenizer}.items() if digest}
        return find_change(before, {"model.path": {"config.json": A, "LICENSE": B}, "model.tokenizer": files})

    assert found() is None
    assert found(**{"1": B}) == ("model.tokenizer", f"{is_not} {changed_one}")
    assert found(**{"1": B, "2": ""}) == ("model.tokenizer", f"{is_not} {changed_one}, 2 is missing")
    assert find_change(before, {"model.path": before["model.path"]}) is None  # the other key is not compared
    gone = found(**dict.fromkeys(before["model.tokenizer"], ""))
    assert gone == ("model.tokenizer", f"{is_not} 1 is missing, 2 is missing, 3 is missing, 2 more")
    whose = find_change(before, {"model.path": {"config.json": B}})
    assert whose is not None and whose[0] == "model.path" and whose[1].startswith("the model is not as it was:")


def test_files_that_were_added_are_named() -> None:
    before = {"model.path": {"config.json": A}, "model.tokenizer": {}}
    assert added_files(before, before) == []
    now = {"model.path": {"config.json": B}, "model.tokenizer": {"2": A, "1": B}}
    assert added_files(before, now) == [f"new files of {TOKENIZER}: 1, 2"]
