"""Control tokens that a message or an answer spells: they stay text, by hand, one token per character."""

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from dpo.config import SourceConfig
from dpo.encode.chat import encode_chat
from dpo.encode.encoder import text_encoder
from dpo.encode.text import encode_texts
from dpo.pairs.prepare import prepare_data
from tests.support.data_fixtures import (
    BOS,
    EOS,
    TinyModelConfig,
    all_pairs,
    ids,
    make_config,
    make_tokenizer,
    write_jsonl,
)
from tests.support.tokenizer_kinds import KINDS, SPECIAL, tokenizer_of

pytest_plugins = ["tests.support.data_plugin"]
CHATS, TEXTS = text_encoder(make_tokenizer()), text_encoder(make_tokenizer(bos=True))


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


# --- chats -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spelt", ["</s>", "a</s>", "</s>a", "<s></s>", "a </s>[user]b</s>", "<unk>", "</s></s>"])
def test_a_message_that_spells_a_control_token(spelt: str) -> None:
    """The template of the fixture: "[user]…</s>[assistant]…</s>"."""
    encoded = encode_chat(CHATS, [user(spelt)], [assistant("Yes"), assistant(spelt)], {})
    assert encoded.prompt_ids == [*ids("[user]" + spelt), EOS, *ids("[assistant]")]
    assert [one.ids for one in encoded.completions] == [[*ids("Yes"), EOS], [*ids(spelt), EOS]]
    assert encoded.has_control_text and not any(one.is_unclear for one in encoded.completions)


def test_the_texts_of_parts_tools_and_arguments() -> None:
    """Wherever the text stands that the template writes: `[user]</s>` is the part, `(</s>)` the argument."""
    template = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content[0].text }}{{ m.tool_calls[0] if m.tool_calls }}</s>"
        "{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    encoder = text_encoder(make_tokenizer(chat_template="({{ tools[0].about }}){{ day }}" + template))
    parts, answer = [{"type": "text", "text": "</s>"}], assistant([{"type": "text", "text": "Yes"}])
    calls = answer | {"tool_calls": ["call </s>"]}
    encoded = encode_chat(encoder, [user(parts)], [answer, calls], {"tools": [{"about": "</s>"}], "day": "<s>"})
    assert encoded.prompt_ids == [*ids("(</s>)<s>[user]</s>"), EOS, *ids("[assistant]")]
    assert [one.ids for one in encoded.completions] == [[*ids("Yes"), EOS], [*ids("Yescall </s>"), EOS]]


@pytest.mark.parametrize("kind", KINDS)
def test_other_rows_have_the_ids_of_apply_chat_template(kind: str) -> None:
    """With a spelt token in one row and none in the other, by the same tokenizer. A unigram model's tokens are words of
    its vocabulary, so that it makes them of text too.
    """
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    tokenizer = tokenizer_of(kind, True, eos_token="<|im_end|>", chat_template=template)
    encoder = text_encoder(tokenizer)
    for text in ("A sheep gives wool", "print('<s>')"):
        encoded = encode_chat(encoder, [user(text)], [assistant(text)], {})
        plain = tokenizer.apply_chat_template([user(text), assistant(text)], tokenize=True, return_dict=False)
        found = [*encoded.prompt_ids, *encoded.completions[0].ids]
        if text.startswith("A"):
            assert found == plain and not encoded.has_control_text
        else:
            assert encoded.has_control_text and SPECIAL.index("<s>") in plain
            assert encoded.completions[0].is_unclear == (kind == "unigram")
            if kind == "unigram":
                continue
            assert [number for number in found if number in range(1, len(SPECIAL))] == [3, 4, 3, 4]
            shown = tokenizer.decode(found).replace(" ", "")
            assert "<unk>" in shown or shown.count(text) == 2


@pytest.mark.parametrize(
    ("template", "text"),
    [
        # the template looks into the text: it splits it at what a control token spells
        ("{% for m in messages %}[{{ m.role }}]{{ m.content.split('</s>')[-1] }}</s>{% endfor %}{{ '[assistant]' if "
         "add_generation_prompt }}", "a</s>b"),
        (None, "a</s>b\U000f0001"),
        (None, "a</s>b\U00100001"),
    ],
)  # fmt: skip
def test_rows_that_cannot_be_read_with_certainty_are_dropped(template, text: str) -> None:
    encoder = text_encoder(make_tokenizer(chat_template=template)) if template else CHATS
    encoded = encode_chat(encoder, [user("Hi")], [assistant(text), assistant(f"{text}c")], {})
    assert all(one.is_unclear for one in encoded.completions)


def test_a_control_token_that_is_a_word_of_the_vocabulary_too() -> None:
    """This tokenizer reads the word </s> as EOS, whether it looks for control tokens or not."""
    words = {word: i for i, word in enumerate(["<unk>", "<s>", "</s>", "say", "so", "user"])}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    template = "{% for m in messages %}{{ m.content }} </s>{% endfor %}{{ ' user' if add_generation_prompt }}"
    names = {"eos_token": "</s>", "bos_token": "<s>", "unk_token": "<unk>", "chat_template": template}
    encoder = text_encoder(PreTrainedTokenizerFast(tokenizer_object=backend, **names))
    for prompt, answer in (("say", "say </s> so"), ("say <s>", "user so")):
        encoded = encode_chat(encoder, [user(prompt)], [assistant(" user " + answer)], {})
        assert encoded.completions[0].is_unclear
    texts = encode_texts(encoder, "user", [" say </s> so", " say so", " say <s> so"])
    assert [one.is_unclear for one in texts.completions] == [True, False, True]


# --- texts -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "completion", "expected"),
    [
        ("Q:", " yes", [*ids(" yes"), EOS]),
        ("Q:", " yes</s>", [*ids(" yes"), EOS]),
        ("Q:", " yes</s> \n", [*ids(" yes"), EOS]),
        ("Q:", " use </s> here", [*ids(" use </s> here"), EOS]),
        ("Q:", " <s>old</s>", [*ids(" <s>old"), EOS]),
        ("<s>Q:", " </s>a</s></s>", [*ids(" </s>a"), EOS]),
        ("[user]hi</s>[assistant]", "yes</s>\n", [*ids("yes"), EOS]),
        ("[user]hi</s>[assistant]", "<s>yes", [BOS, *ids("yes"), EOS]),
        ("[user]hi</s>[assistant]", "use </s> so", None),
        ("Q:", "a</s>b\U00100001", None),
    ],
)
def test_texts(prompt: str, completion: str, expected: list[int] | None) -> None:
    found = encode_texts(TEXTS, prompt, [completion, "b"]).completions
    assert (found[0].is_unclear, found[0].ids) == (expected is None, expected or [])
    assert found[1].ids == [*ids("b"), EOS]


def test_prompts_of_texts() -> None:
    """A prompt that a template has written has control tokens; its BOS is not doubled; two that are written stay."""
    for text, expected in {
        "<s>Q:": [BOS, *ids("Q:")],
        "Q:": [BOS, *ids("Q:")],
        "<s><s>Q:": [BOS, BOS, *ids("Q:")],
        "<s>[user]hi</s>[assistant]": [BOS, *ids("[user]hi"), EOS, *ids("[assistant]")],
    }.items():
        assert encode_texts(TEXTS, text, []).prompt_ids == expected
        if text.startswith("<s>"):
            assert encode_texts(CHATS, text, []).prompt_ids == expected, "this tokenizer adds none by itself"


# --- counts ----------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("hf_cache")
def test_each_is_counted(tmp_path) -> None:
    rows = [
        {"prompt": "<s>p", "chosen": "a</s>b", "rejected": "b"},
        {"prompt": "<s><s>p", "chosen": "a", "rejected": "b"},
        {"prompt": "[user]hi</s>", "chosen": "a</s>b", "rejected": "b"},
        {"prompt": "[user]hi</s>", "chosen": "a</s>\n", "rejected": "b"},
    ]
    make_tokenizer(bos=True).save_pretrained(tmp_path / "t")
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    prepared = prepare_data(make_config(SourceConfig(path), tokenizer=str(tmp_path / "t")), TinyModelConfig())
    report = prepared.report.sources[0]
    assert (report.dropped, report.places) == ({"control_token": 1}, {"control_token": (":3",)})
    assert (report.written_bos, report.two_bos, report.control_texts, report.trimmed_ends) == (2, 1, 1, 1)
    assert (report.texts, report.rendered_chats, report.chats) == (1, 2, 0)
    assert all_pairs(prepared.train)[0] == ([BOS, *ids("p")], [*ids("a</s>b"), EOS], [*ids("b"), EOS])
    text = "\n".join(report.lines())
    for line in (
        "dropped, control_token: 1 (at :3)",
        "  2 prompts bring their BOS: the tokenizer's was left out",
        "  1 prompts begin with two BOS: a WARNING",
        "  2 prompts of texts spell control tokens, which are read as control tokens",
        "  1 rows spell a control token in a message or an answer, where it stays text",
        "  1 rows with text after the stop token that ends an answer, which was left out",
    ):
        assert line in text
