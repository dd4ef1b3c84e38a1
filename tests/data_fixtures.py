"""What the tests of the data files share: a tokenizer whose ids can be told by hand, small files, a cache of their own."""

import gzip
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from dpo.config import BatchConfig, Config, DataConfig, ModelConfig, SourceConfig, TrainConfig

FIXTURES = Path(__file__).parent / "fixtures"
SHARED = Path(os.environ.get("DPO_TEST_DATA", Path(__file__).parents[2] / "shared" / "data"))
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason=f"no test data at {SHARED} (DPO_TEST_DATA)")

UNK, BOS, EOS = 0, 1, 2
QZ = 99  # the one merge: "Q" and "Z" side by side
VOCAB_SIZE = 100
CHAT_TEMPLATE = (
    "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


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


@pytest.fixture
def hf_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A cache of `datasets` that is empty and this test's alone."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf" / "datasets")
    datasets.utils.disable_progress_bars()
    yield tmp_path / "hf"
    datasets.utils.enable_progress_bars()


@pytest.fixture
def tokenizer_folder(tmp_path: Path) -> str:
    make_tokenizer().save_pretrained(tmp_path / "tokenizer")
    return str(tmp_path / "tokenizer")


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
