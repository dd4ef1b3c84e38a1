"""What stands under "worth a look": how texts were read, each with advice."""

import json

import pytest
from transformers import LlamaConfig

from dpo.config import SourceConfig
from dpo.encode.tokenizer import load_tokenizer
from dpo.inspect.findings import findings
from dpo.inspect.inspection import inspect_data
from dpo.pairs.prepare import prepare_data
from tests.support.data_fixtures import BOS, CHAT_TEMPLATE, EOS, VOCAB_SIZE, make_config, make_tokenizer, write_jsonl

pytest_plugins = ["tests.support.data_plugin"]
pytestmark = pytest.mark.usefixtures("hf_cache")


def findings_of(tmp_path, rows, template=None, stops=(EOS,), more=(), positions=256) -> list[str]:
    """The findings of a source, and of `more` sources; the model stops at `stops` by its generation_config.json, at EOS
    by its config.
    """
    folder = str(tmp_path / "model")
    make_tokenizer(bos=True, chat_template=template).save_pretrained(folder)
    (tmp_path / "model" / "generation_config.json").write_text(json.dumps({"eos_token_id": list(stops)}))
    ends = {"bos_token_id": BOS, "eos_token_id": stops[0]}
    model = LlamaConfig(vocab_size=VOCAB_SIZE, max_position_embeddings=positions, **ends)
    config = make_config(SourceConfig(write_jsonl(tmp_path / "a.jsonl", rows)), *more, tokenizer=folder)
    return findings(inspect_data(config, model, load_tokenizer(folder), prepare_data(config, model), 1))


def row(prompt, chosen="ab", rejected="cd"):
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


@pytest.mark.parametrize(
    ("rows", "template", "found", "advice"),
    [
        ([row("p"), row("q")], CHAT_TEMPLATE, "2 rows of texts do not go through the tokenizer's chat template",
         "for a chat model data.train[0].as_chat: true"),
        ([row("aQ", "Za", "ab")], None, "1 completions would share a token with their prompt as one text",
         "a prompt that ends before its last space or line feed"),
        ([row("<s>p")], None, "1 prompts bring their BOS", "prompts without it give the same tokens"),
        ([row("<s><s>p")], None, "1 prompts begin with two BOS", "remove it from the rows"),
        ([row("[user]p</s>")], None, "1 prompts are texts that spell control tokens", "rows of messages let"),
        ([row("p", "a</s>b")], None, "1 rows spell a control token in a message or an answer",
         "remove it from the rows"),
        ([row("[user]p</s>"), row("[user]q</s>", "a</s>b")], None, "1 pairs were dropped because an answer has a stop",
         "end it there, or leave the token out"),
    ],
)  # fmt: skip
def test_a_finding_has_advice(rows, template, found: str, advice: str, tmp_path) -> None:
    lines = [line for line in findings_of(tmp_path, rows, template) if found in line]
    assert len(lines) == 1 and lines[0].startswith("data.train[0]: ") and advice in lines[0]


MESSAGES = [{"role": "user", "content": "p"}]
CHAT = {"prompt": MESSAGES, "chosen": [{"role": "assistant", "content": "ab"}],
        "rejected": [{"role": "assistant", "content": "cd"}]}  # fmt: skip


def test_prompts_without_bos(tmp_path) -> None:
    """The tokenizer adds BOS to texts, the template of the fixture writes none."""
    (line,) = findings_of(tmp_path, [CHAT], CHAT_TEMPLATE)
    assert line.startswith("training: 1 prompts begin without BOS, which the tokenizer adds to texts; the chat")


def test_prompts_with_and_without_bos(tmp_path) -> None:
    """A model that is trained on chats without BOS, and on texts with it."""
    sources = [SourceConfig(write_jsonl(tmp_path / "b.jsonl", [row("p"), row("q", "ef", "gh")]))]
    lines = findings_of(tmp_path, [CHAT], CHAT_TEMPLATE, more=sources)
    found = [line for line in lines if "BOS" in line]
    assert found == [
        "training: 1 prompts begin without BOS, and 2 with it; a model is trained on one of the two: see how each"
        " source is read, above"
    ]


def test_characters_that_the_tokenizer_lacks(tmp_path) -> None:
    """Two in a prompt, three in an answer; none of them are in the fixture's vocabulary."""
    (line,) = findings_of(tmp_path, [row("pöä", "abäöü", "abcde"), row("q", "ef", "gh")])
    assert line.startswith("training: 5 tokens stand for characters that the tokenizer lacks: ")


def test_completions_after_the_last_position(tmp_path) -> None:
    """12 positions: BOS, 4 characters and 8 of the winner with its EOS are 13."""
    (line,) = findings_of(tmp_path, [row("pppp", "abababa", "cdcdcdc")], positions=12)
    assert line == (
        "data.train[0]: 2 completions end after the model's 12 positions (max_position_embeddings); data.max_length 12"
        " cuts them"
    )


def test_nothing_is_found_in_plain_rows(tmp_path) -> None:
    assert findings_of(tmp_path, [row("p"), row("q", "ef", "gh")]) == []


def test_an_eos_at_which_the_model_does_not_stop(tmp_path) -> None:
    """7 and 9 are the model's; with EOS among them nothing is said."""
    (line,) = findings_of(tmp_path, [row("p")], stops=(7, 9))
    assert line.startswith(
        f"texts end with the tokenizer's EOS, id {EOS}, but the model's config stops generating at id 7, 9"
    )
    assert findings_of(tmp_path, [row("p")], stops=(7, EOS)) == []
