"""A model.path that is a folder of adapters: base and adapters apart, said in one line, and what is refused."""

import functools
import json
from pathlib import Path
from typing import Any

import pytest

from dpo.base.errors import UserError
from dpo.config import Config, load_config, peft_folder, to_yaml
from dpo.hub.files import is_of_adapters


@pytest.fixture(autouse=True)
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """base/, a model, in the current folder; RANK is not set."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RANK", raising=False)
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text("{}")
    return tmp_path


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    lines = list[str]()
    monkeypatch.setattr(peft_folder, "_say_once", functools.cache(lines.append))
    return lines


def save(name: str, base: Any = "base", *files: str) -> None:
    Path(name).mkdir()
    for file in files:
        (Path(name) / file).write_text("{}")
    settings = {"peft_type": "LORA", "r": 4} | ({} if base is None else {"base_model_name_or_path": base})
    (Path(name) / "adapter_config.json").write_text(json.dumps(settings))


def load(*words: str, path: str = "sft") -> Config:
    return load_config([f"model.path={path}", "data.train=[{path: a.jsonl}]", *words], "dpo.train")


def test_base_and_adapters_are_taken_apart(said: list[str]) -> None:
    save("sft")
    config = load()
    assert (config.model.path, config.lora.path, config.model.tokenizer) == ("base", "sft", None)
    assert said == ["model.path sft holds adapters: taken as lora.path sft, model.path base"]


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model", "vocab.json"])
def test_its_tokenizer_is_taken(name: str, said: list[str]) -> None:
    """An SFT run may have added tokens, or a chat template."""
    save("sft", "base", name, "tokenizer_config.json")
    assert load().model.tokenizer == "sft"
    assert said == ["model.path sft holds adapters: taken as lora.path sft, model.path base, model.tokenizer sft"]
    assert load("model.tokenizer=own").model.tokenizer == "own"


def test_a_chat_template_alone_is_no_tokenizer(said: list[str]) -> None:
    save("sft", "base", "tokenizer_config.json", "chat_template.jinja")
    assert load().model.tokenizer is None


def test_what_is_written_is_the_base_and_the_adapters(tmp_path: Path, said: list[str]) -> None:
    """config.yaml of the run: it loads as what it says, though the folder is the same."""
    save("sft")
    config = load("lora.rank=4", "reference.adapter=base")
    Path("config.yaml").write_text(to_yaml(config))
    said.clear()
    assert load_config(["config.yaml"], "dpo.train") == config and not said


def test_the_same_folder_may_be_given_twice(said: list[str]) -> None:
    save("sft")
    assert load("lora.path=./sft").lora.path == "sft"


def test_a_base_of_the_hub_is_left_to_who_reads_it(said: list[str]) -> None:
    save("sft", "org/base")
    assert load().model.path == "org/base"


@pytest.mark.parametrize(("rank", "count"), [("0", 1), ("1", 0)])
def test_rank_0_alone_says_so(rank: str, count: int, said: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", rank)
    save("sft")
    assert load().lora.path == "sft" and len(said) == count


def test_a_program_that_reads_its_words_twice_says_it_once(said: list[str]) -> None:
    save("sft")
    assert load() == load() and len(said) == 1


def test_a_model_with_adapters_beside_it_is_a_model(said: list[str]) -> None:
    """config.json decides: transformers would load it as the whole model, too."""
    save("sft", "base", "config.json")
    assert not is_of_adapters(Path("sft"))
    assert load().model.path == "sft" and load().lora.path is None and not said


REMEDY = "the base as model.path, and lora.path sft"


@pytest.mark.parametrize(
    ("base", "words", "line"),
    [
        (None, [], f"sft holds adapters, and its adapter_config.json has no base_model_name_or_path; valid: {REMEDY}"),
        ("", [], f"sft holds adapters, and its adapter_config.json has no base_model_name_or_path; valid: {REMEDY}"),
        (3, [], f"sft holds adapters, and its adapter_config.json has no base_model_name_or_path; valid: {REMEDY}"),
        ("gone", [], f"sft holds adapters for the model gone, and there is no such folder; valid: {REMEDY}"),
        ("/x/y/z", [], f"sft holds adapters for the model /x/y/z, and there is no such folder; valid: {REMEDY}"),
        ("sft", [], f"sft holds adapters for sft, which holds adapters too; valid: {REMEDY}"),
        (
            "base",
            ["lora.path=other"],
            "sft holds adapters, and lora.path names others, other; valid: the base as model.path, or one of the two"
            " folders",
        ),
    ],
)
def test_a_base_that_is_not_there(base: Any, words: list[str], line: str) -> None:
    save("sft", base)
    with pytest.raises(UserError) as caught:
        load(*words)
    assert str(caught.value) == f"command line: model.path: {line}"


def test_the_file_that_names_the_folder_is_named() -> None:
    save("sft", None)
    Path("run.yaml").write_text("model: {path: sft}\ndata: {train: [{path: a.jsonl}]}\n")
    with pytest.raises(UserError, match=r"^run\.yaml: model\.path: sft holds adapters, "):
        load_config(["run.yaml", "train.steps=3"], "dpo.train")


@pytest.mark.parametrize("content", ["{", "", "[" * 100_000])
def test_a_broken_file_is_named(content: str) -> None:
    save("sft")
    Path("sft/adapter_config.json").write_text(content)
    with pytest.raises(UserError, match=r"^sft/adapter_config\.json: not readable as JSON: "):
        load()


@pytest.mark.parametrize("content", ["[]", "null", "3"])
def test_a_file_that_holds_no_mapping_names_no_base(content: str) -> None:
    save("sft")
    Path("sft/adapter_config.json").write_text(content)
    with pytest.raises(UserError, match="has no base_model_name_or_path"):
        load()
