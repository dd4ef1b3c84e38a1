"""Tiny tokenizers of the kinds that people have, trained on a few lines; `</s>` is EOS, and none adds BOS by itself."""

import functools
from collections.abc import Callable
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

SPECIAL = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|endoftext|>", "<start_of_turn>", "<end_of_turn>",
           "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|eom_id|>"]  # fmt: skip
LINES = [
    "Question: Which animal gives wool? Answer: A sheep gives wool.",
    "The quick brown fox jumps over the lazy dog, 1234567890 times.",
    "user: hello\n\nassistant: well, hello there\n",
    "if x < 3 and y > 4: print('<s>', \"</s>\", x | y)  # [end] <|im_end|>",
] * 3
ALPHABET = sorted({character for line in LINES for character in line})


def byte_level(add_prefix_space: bool = False) -> Tokenizer:
    """GPT-2, Llama 3, Qwen: BPE of bytes, cut by a regular expression."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    return _trained(tokenizer, trainers.BpeTrainer(vocab_size=430, special_tokens=SPECIAL, initial_alphabet=alphabet))


def metaspace(scheme: str) -> Tokenizer:
    """SentencePiece BPE as newer files say it: ▁ before every part of a text, before the first part, or nowhere."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", scheme, split=False)
    tokenizer.decoder = decoders.Metaspace("▁", scheme, split=False)
    return _trained(tokenizer, _sentencepiece())


def prepend() -> Tokenizer:
    """Llama 2: SentencePiece BPE as older files say it, ▁ before every part of a text by a normalizer."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    return _trained(tokenizer, _sentencepiece())


def unigram() -> Tokenizer:
    """T5, XGLM: SentencePiece unigram, words apart."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", "always")
    tokenizer.decoder = decoders.Metaspace("▁", "always")
    trainer = trainers.UnigramTrainer(
        vocab_size=130,
        special_tokens=SPECIAL,
        unk_token="<unk>",
        initial_alphabet=[*ALPHABET, "▁"],
        show_progress=False,
    )
    return _trained(tokenizer, trainer)


KINDS: dict[str, Callable[[], Tokenizer]] = {
    "byte level": byte_level,
    "byte level, prefix space": functools.partial(byte_level, True),
    "metaspace always": functools.partial(metaspace, "always"),
    "metaspace first": functools.partial(metaspace, "first"),
    "metaspace never": functools.partial(metaspace, "never"),
    "prepend": prepend,
    "unigram": unigram,
}


@functools.lru_cache
def tokenizer_of(kind: str, adds_bos: bool = False, **settings: str) -> Any:
    """A tokenizer of a kind of KINDS; `settings` are arguments of PreTrainedTokenizerFast."""
    tokenizer = Tokenizer.from_str(_built(kind))
    if adds_bos:
        bos = ("<s>", SPECIAL.index("<s>"))
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[bos])
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names | settings)


@functools.lru_cache
def _built(kind: str) -> str:
    return str(KINDS[kind]().to_str())


def _sentencepiece() -> Any:
    alphabet = [*ALPHABET, "▁"]
    return trainers.BpeTrainer(
        vocab_size=210, special_tokens=SPECIAL, initial_alphabet=alphabet, max_token_length=8, show_progress=False
    )


def _trained(tokenizer: Tokenizer, trainer: Any) -> Tokenizer:
    tokenizer.train_from_iterator(LINES, trainer)
    return tokenizer
