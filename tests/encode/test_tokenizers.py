"""Tokenizers as they are loaded, keys, and real data against the plain `tokenizers` library."""

import gzip
import hashlib
import itertools
import json
import pickle
import struct

import numpy as np
import pytest
import tokenizers

from dpo.base.errors import UserError
from dpo.encode.encoder import encoder_content, surplus_tokens, text_encoder
from dpo.encode.tokenizer import load_tokenizer
from dpo.pairs.tokens import Limits, completion_key, prompt_key, tokenize
from dpo.sources.formats.examples import to_example
from tests.support.data_fixtures import VOCAB_SIZE, make_tokenizer


def test_load_tokenizer(tmp_path):
    make_tokenizer(bos=True).save_pretrained(tmp_path / "good")
    assert encoder_content(text_encoder(load_tokenizer(str(tmp_path / "good")))) == encoder_content(
        text_encoder(make_tokenizer(bos=True))
    )
    without = make_tokenizer()
    without.eos_token = None
    without.save_pretrained(tmp_path / "without")
    with pytest.raises(UserError, match=r"^model.tokenizer: .*/without: the tokenizer has no EOS token; valid: "):
        load_tokenizer(str(tmp_path / "without"))
    (tmp_path / "empty").mkdir()
    for path, what in (("absent", "no such folder"), ("empty", "cannot be loaded")):
        with pytest.raises(UserError, match=rf"^model.tokenizer: {tmp_path / path}: {what}.*; valid: .+$") as error:
            load_tokenizer(str(tmp_path / path))
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("content", ["", "null", "[[1]]", "[" * 100_000, '{"model_max_length": "x"}'])
def test_a_broken_tokenizer_is_one_line(name: str, content: str, tmp_path) -> None:
    """Of a file that transformers or tokenizers cannot read, or can read and not use."""
    make_tokenizer().save_pretrained(tmp_path)
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=rf"^model.tokenizer: {tmp_path}: ") as error:
        load_tokenizer(str(tmp_path))
    assert len(str(error.value)) < 500 and "\n" not in str(error.value)


def test_a_tokenizer_of_another_kind_is_one_line(tmp_path) -> None:
    """tokenizers raises `Exception` itself where a part of the file has no type that it knows, as where it has more
    merges than it can build.
    """
    make_tokenizer().save_pretrained(tmp_path)
    path = tmp_path / "tokenizer.json"
    path.write_text(path.read_text().replace('"Split"', '"Splid"'))
    with pytest.raises(Exception, match="PreTokenizer") as error:
        tokenizers.Tokenizer.from_file(str(path))
    assert type(error.value) is Exception
    with pytest.raises(UserError, match=rf"^model.tokenizer: {tmp_path}: cannot be loaded: .*PreTokenizer"):
        load_tokenizer(str(tmp_path))


def test_surplus_tokens():
    sizes = (VOCAB_SIZE + 3, VOCAB_SIZE, VOCAB_SIZE - 2)
    assert [surplus_tokens(text_encoder(make_tokenizer()), size) for size in sizes] == [0, 0, 2]


def test_encoder_content_is_of_what_decides_the_ids():
    """Not of the path: a copy of a tokenizer is the same tokenizer."""
    variants = [
        make_tokenizer(),
        make_tokenizer(bos=True),
        make_tokenizer(eos=True),
        make_tokenizer(chat_template="{{ messages }}"),
        make_tokenizer(chat_template=None),
    ]
    contents = [encoder_content(text_encoder(tokenizer)) for tokenizer in variants]
    assert len(set(contents)) == len(contents)
    variants[0].name_or_path = "elsewhere"
    assert encoder_content(text_encoder(variants[0])) == contents[0]
    assert encoder_content(text_encoder(pickle.loads(pickle.dumps(variants[0])))) == contents[0]


def test_keys():
    prompt, completion = np.array([1, 300], np.int32), np.array([7], np.int64)
    by_hand = struct.pack("<qq", 2, 1) + struct.pack("<iii", 1, 300, 7)
    assert completion_key(prompt, completion) == hashlib.blake2b(by_hand, digest_size=16).digest()
    assert prompt_key(prompt) == hashlib.blake2b(struct.pack("<ii", 1, 300), digest_size=16).digest()
    assert completion_key(prompt, completion) != completion_key(prompt[:1], np.array([300, 7]))


# --- real data against a plain computation ----------------------------------------------------------------------------


def test_hh_against_plain_tokenizers(shared_data):
    """Every row whose prompts agree: tokenizer.json encodes prompt and answer as one text, whose ids begin with the
    prompt's; limits 128 and 64 by two lines of slicing.
    """
    plain = tokenizers.Tokenizer.from_file(str(shared_data / "stories260K" / "tokenizer.json"))
    encoder = text_encoder(load_tokenizer(str(shared_data / "stories260K")))
    with gzip.open(shared_data / "hh" / "public-0000-1799.jsonl.gz", "rt") as file:
        rows = [json.loads(line) for line in itertools.islice(file, 300)]
    for row in rows:
        texts = [row[key] for key in ("chosen", "rejected")]
        cuts = [text.rindex("\n\nAssistant:") + len("\n\nAssistant:") for text in texts]
        prompt = plain.encode(texts[0][: cuts[0]]).ids
        wholes = [plain.encode(texts[0][: cuts[0]] + t[c:]).ids for t, c in zip(texts, cuts, strict=True)]
        answers = [[*whole[len(prompt) :], 2] for whole in wholes]
        assert prompt[0] == 1, "BOS as this tokenizer adds it"
        assert all(whole[: len(prompt)] == prompt for whole in wholes)
        short = prompt if len(prompt) <= 64 else [1, *prompt[-63:]]
        tokenized = tokenize(to_example("hh", row), encoder, Limits(128, 64, 512, 512, False))
        if tokenized.pairs:
            assert tokenized.prompt_ids == short
            assert list(tokenized.completion_ids) == [answer[: 128 - len(short)] for answer in answers]


def test_chat_against_a_hand_written_template(shared_data):
    """dpo-en-demo (system messages, up to 13 turns) in the ChatML of SmolLM2, written without its template."""
    plain = tokenizers.Tokenizer.from_file(str(shared_data / "tok-smollm2" / "tokenizer.json"))
    encoder = text_encoder(load_tokenizer(str(shared_data / "tok-smollm2")))
    roles = {"human": "user", "gpt": "assistant", "system": "system"}
    default = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
    for row in json.loads((shared_data / "dpo-en-demo" / "dpo_en_demo.json").read_text())[::10]:
        turns = [(roles[m["from"]], m["value"]) for m in row["conversations"]]
        turns = turns if turns[0][0] == "system" else [("system", default), *turns]
        text = "".join(f"<|im_start|>{role}\n{value}<|im_end|>\n" for role, value in turns) + "<|im_start|>assistant\n"
        tokenized = tokenize(to_example("sharegpt", row), encoder, Limits(None, None, 49152, 512, False))
        assert tokenized.prompt_ids == plain.encode(text, add_special_tokens=False).ids
        for key, answer in zip(("chosen", "rejected"), tokenized.completion_ids, strict=True):
            assert answer == plain.encode(row[key]["value"] + "<|im_end|>", add_special_tokens=False).ids
