"""Adapters whose folder has another tokenizer than the data's: told or refused before any weights are read."""

from pathlib import Path

import pytest

from dpo.config import Config, SourceConfig
from tests.run.test_agreement import UNREAD, edit, error_of, unread, with_tokenizer
from tests.support.data_fixtures import make_tokenizer, write_jsonl
from tests.support.models import save_model
from tests.support.peft_folders import save_adapter
from tests.support.runs import changed, exit_code, make_config


@pytest.fixture
def config(tmp_path: Path) -> Config:
    """A run on texts from adapters; the weights of its model cannot be read."""
    save_adapter(tmp_path / "sft", save_model(tmp_path / "model", "llama"))
    unread(tmp_path / "model")
    edit(tmp_path / "model" / "config.json", vocab_size=100)
    with_tokenizer(tmp_path / "model")
    rows = [{"prompt": "ab~", "chosen": "c", "rejected": "d"}] * 2
    facts = {"lora__path": str(tmp_path / "sft"), "batch__pairs_per_step": 2, "train__steps": 1}
    return make_config(tmp_path / "model", write_jsonl(tmp_path / "texts.jsonl", rows), tmp_path / "run", **facts)


def test_a_folder_without_a_tokenizer(config: Config, capsys: pytest.CaptureFixture[str]) -> None:
    assert UNREAD in error_of(config, capsys)


def test_the_same_tokenizer(config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with_tokenizer(tmp_path / "sft")
    assert exit_code(config) == 2
    err = capsys.readouterr().err
    assert UNREAD in err and "WARNING: lora.path" not in err


def test_ids_that_are_other_tokens_for_the_adapters(
    config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """a and x have changed places; of the ids of the data (</s>, a, b, c, d, ~) that of a is another token."""
    with_tokenizer(tmp_path / "sft", ("a", "x"))
    told = f"1 of the 6 ids of the data are other tokens in its tokenizer: {ord('a') - 29} is 'x' there, and 'a' in "
    assert f"lora.path: {tmp_path / 'sft'}: {told}{tmp_path / 'model'}" in error_of(config, capsys)


@pytest.mark.parametrize("named", [False, True])
def test_another_chat_template_is_told(
    named: bool, config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Unless model.tokenizer names it, or the data is token ids."""
    make_tokenizer(chat_template="{{ messages }}!").save_pretrained(tmp_path / "sft")
    if named:
        config = changed(config, model__tokenizer=str(tmp_path / "sft"))
    assert exit_code(config) == 2
    told = (
        f"WARNING: lora.path: the tokenizer in {tmp_path / 'sft'} has another chat template than {tmp_path / 'model'}"
    )
    assert (told in capsys.readouterr().err) == (not named)


def test_token_ids_have_no_template(config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_tokenizer(chat_template="{{ messages }}!").save_pretrained(tmp_path / "sft")
    rows = [{"prompt_ids": [5], "chosen_ids": [7, 2], "rejected_ids": [8, 2]}] * 2
    assert exit_code(changed(config, data__train=[SourceConfig(write_jsonl(tmp_path / "ids.jsonl", rows))])) == 2
    err = capsys.readouterr().err
    assert UNREAD in err and "chat template" not in err
