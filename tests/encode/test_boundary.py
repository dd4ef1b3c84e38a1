"""Where a prompt ends and its completion begins, against the tokenizer itself on prompt and completion as one text."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from dpo.encode.encoder import Encoded, text_encoder
from dpo.encode.text import encode_texts
from dpo.encode.tokenizer import load_tokenizer
from tests.support.tokenizer_kinds import ALPHABET, KINDS, SPECIAL, tokenizer_of

EOS = SPECIAL.index("</s>")
PLAIN = sorted(set(ALPHABET) - set("<"))
WORDS = ["Answer:", " ", "  ", "\n", "\n\n", "he", "sheep", " wool", "e", "12", "345", "?"]
texts = st.lists(st.sampled_from(WORDS) | st.text(PLAIN, max_size=6), max_size=12).map("".join)


def check(tokenizer, prompt: str, completion: str, is_exact: bool) -> Encoded:
    """Compares with one text; `is_exact`: the tokenizer decodes the ids of every text to that text."""
    found = encode_texts(text_encoder(tokenizer), prompt, [completion, "x", ""])
    alone, both = (tokenizer(text)["input_ids"] for text in (prompt, prompt + completion))
    ids, first = found.completions[0].ids, found.completions[0]
    assert found.prompt_ids == alone, "the prompt's ids do not depend on the completion"
    assert ids[-1] == tokenizer.eos_token_id
    assert first.is_merged == (both[: len(alone)] != alone)
    if not first.is_merged:
        assert ids[:-1] == both[len(alone) :]
    if is_exact:
        written = [number for number in [*alone, *ids[:-1]] if number != tokenizer.bos_token_id]
        assert tokenizer.decode(written, clean_up_tokenization_spaces=False) == prompt + completion
    return found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("adds_bos", [False, True])
@settings(max_examples=100, deadline=None)
@given(prompt=texts, completion=texts)
def test_any_texts(kind: str, adds_bos: bool, prompt: str, completion: str) -> None:
    """Prompts begin with a letter: SentencePiece drops a space before a text when it decodes."""
    is_exact = kind != "unigram" and kind != "byte level, prefix space"  # unigram joins spaces; the other adds one
    check(tokenizer_of(kind, adds_bos), "Q" + prompt, completion, is_exact)


@pytest.mark.parametrize("kind", ["metaspace always", "prepend"])
def test_a_completion_that_merges_gets_no_space_that_nobody_wrote(kind: str) -> None:
    """▁gives is a token, so that "A sheep gi" and "ves" share it; "ves" alone would begin with ▁."""
    tokenizer = tokenizer_of(kind)
    merged, apart = encode_texts(text_encoder(tokenizer), "A sheep gi", ["ves", " ves"]).completions
    assert (merged.is_merged, apart.is_merged) == (True, False)
    assert tokenizer.tokenize("ves") == ["▁", "ves"]
    assert tokenizer.convert_ids_to_tokens(merged.ids) == ["ves", "</s>"]
    assert tokenizer.convert_ids_to_tokens(apart.ids) == ["▁", "ves", "</s>"]


def test_a_token_that_goes_over_a_space() -> None:
    """As one text "ab cd" is a, b▁c, d, since b and ▁ merge first. From the space on it would be ▁cd: that "c" and "d"
    share a token is not so in the whole text.
    """
    pieces = ["<unk>", "</s>", "▁", "a", "b", "c", "d", "b▁", "b▁c", "▁c", "▁cd"]
    merges = [("b", "▁"), ("b▁", "c"), ("▁", "c"), ("▁c", "d")]
    backend = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, merges, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace("▁", "never", split=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")
    assert [tokenizer.tokenize(text) for text in ("ab c", "ab cd", " cd")] == [["a", "b▁c"], ["a", "b▁c", "d"], ["▁cd"]]
    (found,) = encode_texts(text_encoder(tokenizer), "ab c", ["d"]).completions
    assert (tokenizer.convert_ids_to_tokens(found.ids), found.is_merged) == (["d", "</s>"], False)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=60, deadline=None)
@given(prompt=texts, completion=texts)
def test_prompts_that_a_template_has_written(kind: str, prompt: str, completion: str) -> None:
    """Control tokens in a prompt are read as such, and what follows them as the tokenizer reads it."""
    found = check(tokenizer_of(kind, True), f"<|im_start|>user {prompt}<|im_end|>\n<|im_start|>", completion, False)
    assert found.kind == "rendered_chats" and found.prompt_ids[1] == SPECIAL.index("<|im_start|>")


@pytest.mark.parametrize("name", ["tok-smollm2", "stories260K"])
@pytest.mark.parametrize("completion", [" A sheep", "A sheep", "  two", "\nline", "s and more", "", "é 🦉", "日本"])
@pytest.mark.parametrize(
    "prompt",
    [
        "Which animal?\n\nAssistant:",
        "Answer: ",
        "The sheep",
        "Ends so.\n",
        "日本語",
        "日本語、これは何ですか？",
        "word " * 90 + "é",
    ],
)
def test_real_tokenizers(shared_data, name: str, prompt: str, completion: str) -> None:
    check(load_tokenizer(str(shared_data / name)), prompt, completion, is_exact=True)
