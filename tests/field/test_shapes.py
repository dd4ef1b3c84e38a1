"""Each shape of `shapes.py` as JSONL, JSON, CSV and Parquet: the ids of its pairs are those of plain transformers."""

import csv
import json
from pathlib import Path
from typing import Any

import datasets
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from dpo.base.errors import UserError
from dpo.config import SourceConfig
from dpo.pairs.prepare import prepare_data
from tests.field.shapes import REFUSED, SHAPES, Meaning, Shape
from tests.support.data_fixtures import TinyModelConfig, all_pairs, make_config

pytest_plugins = ["tests.support.data_plugin"]
pytestmark = pytest.mark.usefixtures("hf_cache")

END = "<|im_end|>"
TEMPLATE = """\
{% if tools %}<|im_start|>tools
{{ tools | tojson }}<|im_end|>
{% endif %}{% for m in messages %}<|im_start|>{{ m['role'] }}
{% if m.get('name') %}({{ m['name'] }}) {% endif %}{% if m.get('content') %}{{ m['content'] }}{% endif %}\
{% for c in m.get('tool_calls') or [] %}[call {{ c['function']['name'] }} {{ c['function']['arguments'] | tojson }}]\
{% endfor %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
THINKING = "{% if enable_thinking is defined %}[thinking {{ enable_thinking }}]{% endif %}"


def make_tokenizer() -> Any:
    """A token per byte, ChatML; the template writes tools, tool calls, names and `enable_thinking`."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<|im_start|>", END, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in ("<pad>", "<|im_start|>", END)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END, pad_token="<pad>", chat_template=THINKING + TEMPLATE
    )


TOKENIZER = make_tokenizer()
MODEL = TinyModelConfig(vocab_size=len(TOKENIZER), bos_token_id=None, eos_token_id=TOKENIZER.eos_token_id)


def plain_ids(meaning: Meaning) -> tuple[list[int], list[int], list[int]]:
    """The ids of prompt, winner and loser by plain transformers."""
    return prompt_ids(meaning), answer_ids(meaning, meaning.winner), answer_ids(meaning, meaning.loser)


def _encode(text: str) -> list[int]:
    return list(TOKENIZER(text, add_special_tokens=False)["input_ids"])


def _rendered(meaning: Meaning, messages: list[Any], **more: bool) -> str:
    return str(TOKENIZER.apply_chat_template(messages, tokenize=False, **meaning.template_args, **more))


def prompt_ids(meaning: Meaning) -> list[int]:
    if isinstance(meaning.prompt, str):
        return _encode(meaning.prompt)
    goes_on = meaning.prompt[-1]["role"] == "assistant"
    return _encode(
        _rendered(meaning, meaning.prompt, add_generation_prompt=not goes_on, continue_final_message=goes_on)
    )


def answer_ids(meaning: Meaning, answer: Any) -> list[int]:
    """The answer's ids: of a text and EOS; of a conversation the text after the prompt's, up to the end of the turn."""
    if isinstance(answer, str):
        return [*_encode(answer), TOKENIZER.eos_token_id]
    assert not isinstance(meaning.prompt, str)
    last = meaning.prompt[-1]
    if last["role"] == "assistant":
        joined = {"role": "assistant", "content": last["content"] + answer["content"]}
        full = _rendered(meaning, [*meaning.prompt[:-1], joined])
    else:
        full = _rendered(meaning, [*meaning.prompt, answer])
    rest = _encode(full)[len(prompt_ids(meaning)) :]
    return rest[: rest.index(TOKENIZER.eos_token_id) + 1]


def write(shape_rows: list[dict[str, Any]], folder: Path, suffix: str) -> str:
    path = folder / f"rows.{suffix}"
    if suffix == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in shape_rows))
    elif suffix == "json":
        path.write_text(json.dumps(shape_rows, indent=1))
    elif suffix == "parquet":
        datasets.Dataset.from_list(shape_rows).to_parquet(path)
    else:
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(shape_rows[0]), delimiter="\t" if suffix == "tsv" else ",")
            writer.writeheader()
            writer.writerows({key: _cell(value) for key, value in row.items()} for row in shape_rows)
    return str(path)


def _cell(value: Any) -> Any:
    return json.dumps(value) if isinstance(value, list | dict) else value


def read(shape_rows: list[dict[str, Any]], source: dict[str, Any], folder: Path, suffix: str) -> Any:
    TOKENIZER.save_pretrained(folder / "tokenizer")
    config = SourceConfig(write(shape_rows, folder, suffix), **source)
    return prepare_data(make_config(config, tokenizer=str(folder / "tokenizer")), MODEL)


@pytest.mark.parametrize("suffix", ["jsonl", "json", "parquet", "csv", "tsv"])
@pytest.mark.parametrize("name", SHAPES)
def test_a_shape_is_read_as_it_is_meant(name: str, suffix: str, tmp_path: Path) -> None:
    shape: Shape = SHAPES[name]
    data = read(shape.rows, shape.source, tmp_path, suffix)
    shown = [tuple(TOKENIZER.decode(part) for part in pair) for pair in all_pairs(data.train)]
    assert shown == [tuple(TOKENIZER.decode(part) for part in plain_ids(meaning)) for meaning in shape.meanings]
    assert all_pairs(data.train) == [plain_ids(meaning) for meaning in shape.meanings]


@pytest.mark.parametrize("name", REFUSED)
def test_rows_that_no_reading_fits_are_refused_with_the_reason(name: str, tmp_path: Path) -> None:
    rows, word = REFUSED[name]
    with pytest.raises(UserError, match=word):
        read(rows, {}, tmp_path, "jsonl")
