"""The tokens that end an answer: of the tokenizer, of config.json and of generation_config.json. Templates of the
shapes of Gemma, Llama 3 and Qwen against plain `apply_chat_template`.
"""

import json
from dataclasses import dataclass

import pytest

from dpo.base.errors import UserError
from dpo.encode.chat import encode_chat
from dpo.encode.encoder import encoder_content, ids_encoder, text_encoder
from dpo.encode.stops import model_stop_ids
from dpo.encode.text import encode_texts
from tests.support.data_fixtures import EOS, TinyModelConfig, make_tokenizer
from tests.support.tokenizer_kinds import SPECIAL, tokenizer_of

USER, YES = {"role": "user", "content": "hello there?"}, {"role": "assistant", "content": "well, hello"}
NO = {"role": "assistant", "content": "over the lazy dog"}


@dataclass(frozen=True)
class Family:
    """How the models of a family end a turn."""

    template: str
    eos_token: str
    config_stops: list[str]
    generation_stops: list[str]
    end: str
    """The token with which an answer ends."""


GEMMA = (
    "{{ bos_token }}{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{{ m.content | trim }}<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
LLAMA = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content | trim }}"
    "<|eot_id|>{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
QWEN = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
FAMILIES = {
    "Gemma": Family(GEMMA, "</s>", ["</s>"], ["</s>", "<end_of_turn>"], "<end_of_turn>"),
    "Gemma, config.json": Family(GEMMA, "</s>", ["</s>", "<end_of_turn>"], [], "<end_of_turn>"),
    "Llama 3": Family(LLAMA, "<|endoftext|>", ["<|endoftext|>"], ["<|endoftext|>", "<|eom_id|>", "<|eot_id|>"],
                      "<|eot_id|>"),
    "Qwen": Family(QWEN, "<|im_end|>", ["<|im_end|>"], ["<|im_end|>", "<|endoftext|>"], "<|im_end|>"),
    "Qwen, base's EOS": Family(QWEN, "<|endoftext|>", ["<|endoftext|>"], ["<|im_end|>"], "<|im_end|>"),
}  # fmt: skip


def numbers(names: list[str]) -> list[int]:
    return [SPECIAL.index(name) for name in names]


def stops_of(family: Family, folder) -> tuple[int, ...]:
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": numbers(family.generation_stops)}))
    return model_stop_ids(TinyModelConfig(eos_token_id=numbers(family.config_stops)), str(folder))


@pytest.mark.parametrize("kind", ["byte level", "prepend", "metaspace first"])
@pytest.mark.parametrize("name", FAMILIES)
def test_an_answer_ends_as_its_template_ends_a_turn(name: str, kind: str, tmp_path) -> None:
    family = FAMILIES[name]
    tokenizer = tokenizer_of(kind, True, eos_token=family.eos_token, chat_template=family.template)

    def plain(messages, **args):
        return tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False, **args)

    encoded = encode_chat(text_encoder(tokenizer, stops_of(family, tmp_path)), [USER], [YES, NO], {})
    assert encoded.prompt_ids == plain([USER], add_generation_prompt=True)
    for answer, found in zip([YES, NO], encoded.completions, strict=True):
        rest = plain([USER, answer])[len(encoded.prompt_ids) :]
        assert found.ids == rest[: rest.index(SPECIAL.index(family.end)) + 1]
        assert tokenizer.decode(found.ids).strip() == answer["content"] + family.end


def test_texts_end_with_the_tokenizers_eos_or_with_a_stop_token_of_their_own() -> None:
    """A rendered chat of Gemma: <end_of_turn> ends it, and the line feed behind is left out."""
    encoder = text_encoder(tokenizer_of("byte level"), numbers(["<end_of_turn>"]))
    prompt = "<start_of_turn>user\nhello<end_of_turn>\n<start_of_turn>model\n"
    encoded = encode_texts(encoder, prompt, ["well", "well<end_of_turn>\n", "well<end_of_turn>\n</s>", "well</s>"])
    ends = [completion.ids[-1] for completion in encoded.completions]
    assert ends == numbers(["</s>", "<end_of_turn>", "<end_of_turn>", "</s>"])
    bodies = [completion.ids[:-1] for completion in encoded.completions]
    assert bodies == [encoder.plain.inside("well")] * 4
    assert encoded.has_trimmed_end


def test_stops_of_a_folder(tmp_path) -> None:
    """Each once: config.json first; a model without any; a number in the place of a list."""
    assert model_stop_ids(TinyModelConfig(eos_token_id=None), str(tmp_path)) == ()
    assert model_stop_ids(TinyModelConfig(eos_token_id=3), None) == (3,)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 5}')
    assert model_stop_ids(TinyModelConfig(eos_token_id=[3, 4]), str(tmp_path)) == (3, 4, 5)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [4, 5, 3], "temperature": 1}')
    assert model_stop_ids(TinyModelConfig(eos_token_id=[3, 4]), str(tmp_path)) == (3, 4, 5)
    assert ids_encoder(TinyModelConfig(eos_token_id=[3, 4]), (9,)).stop_ids == (9,)
    assert text_encoder(make_tokenizer(), (9, EOS)).stop_ids == (EOS, 9)


@pytest.mark.parametrize("content", ["{", "[1]", "[" * 100_000, '{"eos_token_id": {}}', '{"eos_token_id": ["</s>"]}'])
def test_a_broken_generation_config_is_named(content: str, tmp_path) -> None:
    (tmp_path / "generation_config.json").write_text(content)
    with pytest.raises(UserError, match=r"generation_config\.json: (broken JSON: |no JSON object|eos_token_id is )"):
        model_stop_ids(TinyModelConfig(), str(tmp_path))


def test_other_stops_are_another_encoder() -> None:
    """Cached token rows belong to the stop tokens too."""
    one, two = (encoder_content(text_encoder(make_tokenizer(), stops)) for stops in ((EOS,), (EOS, 7)))
    assert one != two
