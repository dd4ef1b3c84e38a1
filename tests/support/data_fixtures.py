"""What the tests of the data share: a tokenizer whose ids can be told by hand, small files, a cache of their own."""

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from dpo.config import BatchConfig, Config, DataConfig, ModelConfig, SourceConfig, TrainConfig

FIXTURES = Path(__file__).parent / "fixtures"
UNK, BOS, EOS = 0, 1, 2
QZ = 99  # the one merge: "Q" and "Z" side by side
VOCAB_SIZE = 100
CHAT_TEMPLATE = (
    "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


ROWS = [
    {"prompt": f"p{i % 4}", "completions": [f"a{i}", "b", "c"], "pairs": [[0, 1], [2, 1]] if i % 3 else [[1, 2]]}
    for i in range(10)
]
TOKENS = [{"prompt_ids": [3 + i % 40], "chosen_ids": [5, i % 90], "rejected_ids": [6]} for i in range(80)]


def ids(text: str) -> list[int]:
    """The ids of a text in the tokenizer of `make_tokenizer`, by hand: a character's code − 29, line feed 98."""
    return [98 if character == "\n" else ord(character) - 29 for character in text]


def make_tokenizer(bos: bool = False, eos: bool = False, chat_template: str | None = CHAT_TEMPLATE) -> Any:
    """One token a printable ASCII character, but one for QZ; `bos`, `eos`: what it adds to a text by itself."""
    characters = [chr(code) for code in range(32, 127)] + ["\n"]
    vocabulary = {token: i for i, token in enumerate(["<unk>", "<s>", "</s>", *characters, "QZ"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[("Q", "Z")], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"QZ|[\s\S]"), "isolated")
    single = f"{'<s> ' if bos else ''}$A{' </s>' if eos else ''}"
    tokenizer.post_processor = processors.TemplateProcessing(single, special_tokens=[("<s>", BOS), ("</s>", EOS)])
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=chat_template, **names)


class TinyModelConfig:
    """Those fields of a model's config that data needs; rotary positions unless told otherwise."""

    def __init__(self, **fields: Any) -> None:
        defaults = {"vocab_size": VOCAB_SIZE, "max_position_embeddings": 2048, "rope_parameters": {"rope_theta": 1e4}}
        self.__dict__ |= defaults | {"bos_token_id": BOS, "eos_token_id": EOS} | fields


def write_jsonl(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def write_gzip(path: Path, content: bytes) -> str:
    with gzip.open(path, "wb") as file:
        file.write(content)
    return str(path)


def make_config(*sources: str | SourceConfig, tokenizer: str = "", pairs_per_step: int = 1, seed: int = 0, **data: Any):
    """A config of these training sources; further words are fields of `data`; no limits unless given."""
    train = [SourceConfig(path=source) if isinstance(source, str) else source for source in sources]
    limits = {"max_length": None, "max_prompt_length": None}
    return Config(
        model=ModelConfig(path=tokenizer),
        data=DataConfig(train=train, **(limits | data)),
        batch=BatchConfig(pairs_per_step=pairs_per_step),
        train=TrainConfig(seed=seed),
    )


def plain_pairs(rows):
    """(prompt, winner, loser) of every pair of `grouped` rows of texts, as ids told by hand."""
    return [
        (ids(row["prompt"]), [*ids(row["completions"][w]), 2], [*ids(row["completions"][v]), 2])
        for row in rows
        for w, v in row["pairs"]
    ]


def all_pairs(pair_set, order=None):
    order = np.arange(len(pair_set)) if order is None else order
    pairs = pair_set.pairs(np.asarray(order))
    return [tuple(ids.tolist() for ids in (p.prompt_ids, p.chosen_ids, p.rejected_ids)) for p in pairs]
