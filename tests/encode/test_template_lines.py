"""What the data report says of chat templates, boundaries and tokens that the model lacks."""

import hashlib

import pytest

from dpo.config import SourceConfig
from dpo.pairs.prepare import prepare_data
from tests.support.data_fixtures import CHAT_TEMPLATE, TinyModelConfig, make_config, make_tokenizer, write_jsonl

pytest_plugins = ["tests.support.data_plugin"]
pytestmark = pytest.mark.usefixtures("hf_cache")
TEXTS = [{"prompt": "p", "chosen": "a", "rejected": "b"}, {"prompt": "q", "chosen": "a", "rejected": "b"}]
CHATS = [{"prompt": [{"role": "user", "content": "p"}]} | {side: [{"role": "assistant", "content": side}] for side in
         ("chosen", "rejected")}]  # fmt: skip
RENDERED = [{"prompt": "[user]p</s>[assistant]", "chosen": "a", "rejected": "b"}]
IDS = [{"prompt_ids": [5], "chosen_ids": [6], "rejected_ids": [7]}]
WARNING = (
    "  WARNING: 2 rows of texts do not go through the tokenizer's chat template; data.train[0].as_chat: true reads"
)
NONE = "  chat template: none, the rows are texts"
WITH_A = CHAT_TEMPLATE + "{% if a == 2 %}!{% endif %}"


def by_template(text: str) -> str:
    return f"  messages by the tokenizer's chat template {hashlib.sha256(text.encode()).hexdigest()[:8]} {text[:40]!r}…"


def lines_of(tmp_path, rows, template=CHAT_TEMPLATE, **source) -> list[str]:
    make_tokenizer(chat_template=template).save_pretrained(tmp_path / "t")
    entry = SourceConfig(write_jsonl(tmp_path / "a.jsonl", rows), **source)
    config = make_config(entry, tokenizer=str(tmp_path / "t"))
    first, second = (prepare_data(config, TinyModelConfig()).report.lines() for _ in range(2))
    assert first == second, "the second one is of the cache"
    return first


@pytest.mark.parametrize(
    ("rows", "template", "source", "expected"),
    [
        (TEXTS, CHAT_TEMPLATE, {}, f"{WARNING} them as conversations"),
        (TEXTS, None, {}, NONE),
        (RENDERED, CHAT_TEMPLATE, {}, NONE),
        (CHATS, CHAT_TEMPLATE, {}, by_template(CHAT_TEMPLATE)),
        (CHATS, WITH_A, {"template_args": {"a": 1}}, by_template(WITH_A) + ', template_args {"a": 1}'),
    ],
)
def test_the_template_of_a_source(rows, template, source, expected: str, tmp_path) -> None:
    lines = lines_of(tmp_path, rows, template, **source)
    assert [line for line in lines[2:] if "template" in line] == [expected], "after the line of the format"


def test_rows_of_tokens_have_no_template(tmp_path) -> None:
    assert not [line for line in lines_of(tmp_path, IDS)[1:] if "template" in line or "texts" in line]


def test_merges_and_surplus_tokens(tmp_path) -> None:
    """QZ is one token; the tokenizer has 100, of which the model has 99: its last is QZ."""
    rows = [{"prompt": "aQ", "chosen": "Zb", "rejected": "b"}, {"prompt": "aQ", "chosen": "b", "rejected": "Z"}]
    make_tokenizer(chat_template=None).save_pretrained(tmp_path / "t")
    config = make_config(write_jsonl(tmp_path / "a.jsonl", rows), tokenizer=str(tmp_path / "t"))
    report = prepare_data(config, TinyModelConfig(vocab_size=99)).report
    assert report.sources[0].boundary_merges == 2 and report.surplus_tokens == 1
    assert "  2 completions tokenized apart from their prompt: as one text, both share a token" in report.lines()
    assert "the tokenizer has 1 tokens that the model has not; no row has them" in report.lines()


def test_a_template_that_writes_the_date_is_told(tmp_path) -> None:
    """As Llama 3.1's does where it is given no date_string."""
    dated = "{% if date_string is not defined %}{% set date_string = strftime_now('%d') %}{% endif %}{{ date_string }}"
    told = [line for line in lines_of(tmp_path, CHATS, dated + CHAT_TEMPLATE) if "today's date" in line]
    assert len(told) == 1 and told[0].startswith("  WARNING:") and "data.train[0].template_args" in told[0]
    fixed = lines_of(tmp_path, CHATS, dated + CHAT_TEMPLATE, template_args={"date_string": "1 May"})
    assert not [line for line in fixed if "today's date" in line]
