"""Models whose vocabulary, positions or tokenizer are not those of the data: refused before any weights are read."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from dpo.config import Config, SourceConfig, to_yaml
from dpo.prepare import program as prepare
from dpo.reference import program as reference
from dpo.score import program as score
from tests.support.data_fixtures import make_tokenizer, write_jsonl
from tests.support.models import VOCAB, save_model
from tests.support.runs import changed, exit_code, exit_code_of, make_config


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def unread(folder: Path, family: str = "llama", **changes: Any) -> Path:
    """A model folder whose weights cannot be read, with keys of its config changed."""
    save_model(folder, family)
    (folder / "model.safetensors").write_bytes(b"not read")
    edit(folder / "config.json", **changes)
    return folder


def row(prompt: list[int], chosen: list[int], rejected: list[int]) -> dict[str, list[int]]:
    return {"prompt_ids": prompt, "chosen_ids": [*chosen, 2], "rejected_ids": [*rejected, 2]}


SMALL = [row([5, 6], [7], [8]), row([9], [59], [3]), row([5], [4], [3, 4])]
"""Ids below 60."""
BEYOND = {
    "of a prompt": [row([3, 61, 80], [7], [8])],
    "of a winner": [row([3], [7, 90], [8])],
    "of a loser": [row([3], [7], [8, 60])],
}
IDS = {"of a prompt": 61, "of a winner": 90, "of a loser": 60}


@pytest.fixture
def config(tmp_path: Path) -> Config:
    """A run whose models cannot be read, on pairs with ids below 60."""
    pairs = write_jsonl(tmp_path / "pairs.jsonl", SMALL)
    model = unread(tmp_path / "model")
    other = unread(tmp_path / "other", vocab_size=60)
    facts = {"reference__path": str(other), "batch__pairs_per_step": 2, "train__steps": 1}
    return make_config(model, pairs, tmp_path / "run", **facts)


def error_of(config: Config, capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """The one line of a run that ends with exit code 2."""
    capsys.readouterr()
    assert exit_code(config, *words) == 2
    (error,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    return error


UNREAD = "model.safetensors: not a readable safetensors file"

# --- the vocabulary --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", BEYOND)
@pytest.mark.parametrize("part", ["train", "eval"])
def test_an_id_beyond_the_references_vocabulary(
    part: str, place: str, config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """The first such id, and its line; the rows are read two at a time."""
    monkeypatch.setattr("dpo.run.agreement.BLOCK", 2)
    path = write_jsonl(tmp_path / "more.jsonl", [*SMALL, *BEYOND[place], *BEYOND["of a prompt"]])
    config = changed(config, **{f"data__{part}": [SourceConfig(path)]})
    told = f"its vocabulary has 60 tokens, the policy's {VOCAB}, and data.{part} has id {IDS[place]}, first in row 4"
    assert f"reference.path: {tmp_path / 'other'}: {told}; valid: " in error_of(config, capsys)


def test_a_smaller_vocabulary_is_enough_for_ids_that_it_has(config: Config, capsys: pytest.CaptureFixture[str]) -> None:
    """As where one of two models pads its embedding: the next step is to read the weights."""
    assert UNREAD in error_of(config, capsys)


def test_ids_of_dropped_pairs_do_not_count(config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_jsonl(tmp_path / "more.jsonl", [*SMALL, row([70], [7], [7])])
    assert UNREAD in error_of(changed(config, data__train=[SourceConfig(path)]), capsys)


def test_no_reference_no_check(config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_jsonl(tmp_path / "more.jsonl", [*SMALL, *BEYOND["of a prompt"]])
    config = changed(config, data__train=[SourceConfig(path)], loss__name="sft")
    assert UNREAD in error_of(config, capsys)


@pytest.mark.parametrize("program", ["reference", "prepare", "score"])
def test_other_programs_check_too(
    program: str, config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_jsonl(tmp_path / "more.jsonl", [*SMALL, *BEYOND["of a prompt"]])
    (tmp_path / "my.yaml").write_text(to_yaml(changed(config, data__train=[SourceConfig(path)])))
    programs: dict[str, tuple[Callable[[], None], Sequence[str]]] = {
        "reference": (reference.main, ()),
        "prepare": (prepare.main, ()),
        "score": (score.main, ("--model", str(tmp_path / "model"))),
    }
    if program == "prepare":  # which reads the headers of all weights
        for name in ("model", "other"):
            save_model(tmp_path / name, "llama")
        edit(tmp_path / "other" / "config.json", vocab_size=60)
    main, words = programs[program]
    assert exit_code_of(main, f"dpo.{program}", "--config", str(tmp_path / "my.yaml"), *words) == 2
    assert "reference.path: " in (err := capsys.readouterr().err) and "its vocabulary has 60 tokens" in err


# --- positions -------------------------------------------------------------------------------------------------------


def test_a_pair_longer_than_the_references_learned_positions(
    config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """4 of the prompt, 5 of the loser with its EOS."""
    path = write_jsonl(tmp_path / "more.jsonl", [*SMALL, row([3, 4, 5, 6], [7], [8, 9, 10, 11])])
    short = unread(tmp_path / "short", "gpt2", n_positions=8)
    config = changed(config, data__train=[SourceConfig(path)], reference__path=str(short))
    told = "its positions end at 8, and a prompt with its completion has 9 tokens; valid: data.max_length up to 8"
    assert f"reference.path: {short}: {told}" in error_of(config, capsys)
    edit(short / "config.json", n_positions=9)
    assert UNREAD in error_of(config, capsys)


def test_a_pair_longer_than_the_references_rotary_positions_is_told(
    config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The longest of SMALL has 1 + 3 tokens."""
    edit(tmp_path / "other" / "config.json", max_position_embeddings=3)
    assert exit_code(config) == 2
    err = capsys.readouterr().err
    assert f"WARNING: reference.path: {tmp_path / 'other'}: its positions end at 3, and a prompt with its " in err
    assert UNREAD in err


# --- the tokenizer ---------------------------------------------------------------------------------------------------


def with_tokenizer(folder: Path, swapped: tuple[str, str] | None = None, added: bool = False) -> Path:
    """Writes a tokenizer of one token per character, two of which may have changed places."""
    make_tokenizer().save_pretrained(folder)
    content = json.loads((folder / "tokenizer.json").read_text())
    if swapped:
        vocabulary, (one, other) = content["model"]["vocab"], swapped
        vocabulary[one], vocabulary[other] = vocabulary[other], vocabulary[one]
    if added:  # an ordinary place with another name that was added later, as models rename reserved tokens
        vocabulary = content["model"]["vocab"]
        vocabulary["<renamed>"] = vocabulary.pop("~")
        entry = content["added_tokens"][0] | {"id": vocabulary["<renamed>"], "content": "<renamed>"}
        content["added_tokens"].append(entry)
    (folder / "tokenizer.json").write_text(json.dumps(content))
    return folder


@pytest.fixture
def texts(config: Config, tmp_path: Path) -> Config:
    """The run on texts; both models have the vocabulary of the tokenizer."""
    rows = [{"prompt": "ab~", "chosen": "c", "rejected": "d"}] * 2
    for name in ("model", "other"):
        edit(tmp_path / name / "config.json", vocab_size=100)
        with_tokenizer(tmp_path / name)
    return changed(config, data__train=[SourceConfig(write_jsonl(tmp_path / "texts.jsonl", rows))])


def test_one_tokenizer_in_both_folders(texts: Config, capsys: pytest.CaptureFixture[str]) -> None:
    assert UNREAD in error_of(texts, capsys)


def test_ids_that_are_other_tokens_for_the_reference(
    texts: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """a and x have changed places; of the ids of the data (</s>, a, b, c, d, ~) that of a is another token."""
    with_tokenizer(tmp_path / "other", ("a", "x"))
    a = ord("a") - 29  # as `data_fixtures.ids` says
    told = f"1 of the 6 ids of the data are other tokens in its tokenizer: {a} is 'x' there, and 'a' in "
    assert f"reference.path: {tmp_path / 'other'}: {told}{tmp_path / 'model'}" in error_of(texts, capsys)


def test_tokens_that_the_data_does_not_have_may_differ(
    texts: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with_tokenizer(tmp_path / "other", ("y", "x"))
    assert UNREAD in error_of(texts, capsys)


def test_renamed_reserved_tokens_are_the_same_rows_of_weights(
    texts: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with_tokenizer(tmp_path / "other", added=True)
    assert UNREAD in error_of(texts, capsys)


def test_a_list_of_tokens_is_compared_by_place(
    texts: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As tokenizer.json of a Unigram model has it; one token more at the front moves all."""
    file = tmp_path / "other" / "tokenizer.json"
    content = json.loads(file.read_text())
    listed = [[token, -1.0] for token in content["model"]["vocab"]]
    for tokens, told in ((listed, UNREAD), ([["<more>", 0.0], *listed], "5 of the 6 ids of the data are other tokens")):
        file.write_text(json.dumps(content | {"model": {"type": "Unigram", "vocab": tokens}}))
        assert told in error_of(texts, capsys)


def test_a_tokenizer_that_is_not_the_models(texts: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """model.tokenizer names another folder: its ids are not those that the weights were trained with."""
    other = with_tokenizer(tmp_path / "tokenizer", ("a", "x"))
    error = error_of(changed(texts, model__tokenizer=str(other), reference__path=None), capsys)
    assert f"model.path: {tmp_path / 'model'}: 1 of the 6 ids" in error and f"'x' there, and 'a' in {other}" in error


def test_a_model_to_score_with_another_tokenizer(
    texts: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "my.yaml").write_text(to_yaml(texts))
    scored = with_tokenizer(unread(tmp_path / "scored", vocab_size=100), ("a", "x"))
    words = ("--config", str(tmp_path / "my.yaml"), "--model", str(scored))
    assert exit_code_of(score.main, "dpo.score", *words) == 2
    assert f"error: command line: --model: {scored}: 1 of the 6 ids" in capsys.readouterr().err
