"""What the benchmarks run on: a Llama with random weights, and files of preference pairs as token ids.

The same files go to every trainer that is compared, so that no tokenizer and no truncation can make a difference.
"""

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from dpo.batch.trees import Tree, grow_trees
from dpo.config import Config, DataConfig, ModelConfig, SourceConfig
from dpo.pairs.pair_set import Pair
from dpo.pairs.prepare import prepare_data

SHARED_DATA = Path(os.environ.get("DPO_TEST_DATA", Path(__file__).parents[3] / "shared" / "data")).resolve()
TOKENIZER = SHARED_DATA / "tok-smollm2"
HH = SHARED_DATA / "hh" / "public-0000-1799.jsonl.gz"
PANDALM = SHARED_DATA / "pandalm" / "grouped.jsonl"


# --- models ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ModelSize:
    """A Llama with tied embeddings."""

    hidden: int
    layers: int
    heads: int
    mlp: int


SIZES = {"50m": ModelSize(512, 8, 8, 1408), "tiny": ModelSize(32, 2, 2, 64)}
"""50m: 51.1 million weights with the 49,152 tokens of SmolLM2, half of them embeddings."""


def llama_config(size: ModelSize, vocab_size: int = 49152) -> LlamaConfig:
    """The config of a Llama for SmolLM2's tokenizer: BOS 0, EOS 0, 2048 positions."""
    return LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=size.hidden,
        intermediate_size=size.mlp,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
    )


def save_llama(folder: Path, size: ModelSize) -> Path:
    """A folder with random float32 weights (seed 0) and SmolLM2's tokenizer; made once."""
    if not (folder / "tokenizer.json").is_file():  # written last
        torch.manual_seed(0)
        LlamaForCausalLM(llama_config(size)).save_pretrained(folder)
        AutoTokenizer.from_pretrained(TOKENIZER).save_pretrained(folder)
    return folder


def save_adapter(folder: Path, model: Path) -> Path:
    """A folder of LoRA adapters of rank 16, alpha 32, on all linear layers of a model: A at random (seed 0), B zero;
    made once.
    """
    if not (folder / "adapter_config.json").is_file():
        torch.manual_seed(0)
        adapters = peft.LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
        peft.get_peft_model(LlamaForCausalLM.from_pretrained(model), adapters).save_pretrained(folder)
    return folder


# --- pairs -----------------------------------------------------------------------------------------------------------


def hh_pairs(count: int) -> list[Pair]:
    """The first pairs of the shared Anthropic HH file, cut to the paper's 256 and 512 tokens."""
    return _read(HH, "hh")[:count]


def pandalm_pairs(count: int) -> list[Pair]:
    """The first pairs of PandaLM's test set, three answers a prompt and a pair for each two and each annotator."""
    return _read(PANDALM, "grouped")[:count]


def long_prompts(count: int) -> list[Pair]:
    """Made: prompts of 416 to 480 tokens, answers of 24 to 40."""
    return _random_pairs(count, (416, 480), (24, 40))


def long_answers(count: int) -> list[Pair]:
    """Made: prompts of 24 to 40 tokens, answers of 416 to 480."""
    return _random_pairs(count, (24, 40), (416, 480))


@dataclass(frozen=True)
class Workload:
    """Pairs to train on, and how they are told apart in tables."""

    title: str
    pairs: Callable[[int], list[Pair]]
    group_by_prompt: bool = False


WORKLOADS = {
    "hh": Workload("HH", hh_pairs),
    "pandalm": Workload("PandaLM, grouped", pandalm_pairs, group_by_prompt=True),
    "long-prompts": Workload("long prompts", long_prompts),
    "long-answers": Workload("long answers", long_answers),
}
"""The issue's (a) to (d)."""


def save_pairs(path: Path, pairs: Sequence[Pair]) -> Path:
    """A JSONL of `format: tokens`, a line a pair in order."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(_row(pair)) + "\n" for pair in pairs), encoding="utf-8")
    return path


def step_trees(pairs: Sequence[Pair], pairs_per_step: int) -> list[list[Tree]]:
    """The trees of each step over pairs in order."""
    return [grow_trees(pairs[i : i + pairs_per_step]) for i in range(0, len(pairs), pairs_per_step)]


def _row(pair: Pair) -> dict[str, list[int]]:
    return {name: getattr(pair, name).tolist() for name in ("prompt_ids", "chosen_ids", "rejected_ids")}


def _read(path: Path, format: Any) -> list[Pair]:
    """All kept pairs of a file under SmolLM2's tokenizer, at the default lengths."""
    source = SourceConfig(path=str(path), format=format)
    config = Config(model=ModelConfig(path=str(TOKENIZER)), data=DataConfig(train=[source], num_proc=1))
    kept = prepare_data(config, llama_config(SIZES["tiny"])).train
    return kept.pairs(np.arange(len(kept)))


def _random_pairs(count: int, prompt: tuple[int, int], answer: tuple[int, int]) -> list[Pair]:
    """Random tokens (seed 0), lengths uniform with both bounds; the answers end with EOS."""
    rng = np.random.default_rng(0)

    def ids(bounds: tuple[int, int]) -> np.ndarray:
        return rng.integers(1000, 49152, rng.integers(bounds[0], bounds[1] + 1)).astype(np.int32)

    def ended(some: np.ndarray) -> np.ndarray:
        return np.append(some[:-1], np.int32(0))

    return [Pair(ids(prompt), ended(ids(answer)), ended(ids(answer))) for _ in range(count)]
