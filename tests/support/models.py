"""Tiny models of every supported family, tiny preference files, and the oracle: each completion alone through plain
Hugging Face."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

VOCAB = 97
_SMALL = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
_ENDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_GPT2 = {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256}

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", **_SMALL, "num_key_value_heads": 2, "tie_word_embeddings": False},
    "llama-tied": {"model_type": "llama", **_SMALL, "num_key_value_heads": 2, "tie_word_embeddings": True},
    "qwen3": {"model_type": "qwen3", **_SMALL, "num_key_value_heads": 2, "head_dim": 16, "tie_word_embeddings": False},
    "qwen3-tied": {
        "model_type": "qwen3",
        **_SMALL,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "tie_word_embeddings": True,
    },
    "gpt-neox": {"model_type": "gpt_neox", **_SMALL, "tie_word_embeddings": False},
    "gpt-neox-tied": {"model_type": "gpt_neox", **_SMALL, "tie_word_embeddings": True},
    "gpt2": {"model_type": "gpt2", **_GPT2, "tie_word_embeddings": True},
    "gpt2-untied": {"model_type": "gpt2", **_GPT2, "tie_word_embeddings": False},
    "mistral": {"model_type": "mistral", **_SMALL, "num_key_value_heads": 2, "sliding_window": 12},
}
"""Config of each family; GPT-2's tie_word_embeddings is set both ways too."""


def family_config(family: str) -> PretrainedConfig:
    """The config of a tiny model; 97 tokens, BOS 1, EOS 2, up to 256 positions."""
    facts = dict(FAMILIES[family])
    return AutoConfig.for_model(facts.pop("model_type"), **facts, **_ENDS)


def save_model(folder: Path, family: str, seed: int = 0, dtype: torch.dtype = torch.float32) -> Path:
    """A model folder with weights far enough from 0 that every part of the model matters."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(family_config(family), dtype=dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return folder


def save_pairs(path: Path, num_prompts: int, seed: int = 0, completions: int = 2, pairs_each: int = 1) -> Path:
    """A JSONL of `format: tokens`: random prompts of 3 to 24 tokens, completions of 2 to 16 that end with EOS."""
    rng = np.random.default_rng(seed)

    def ids(low: int, high: int) -> list[int]:
        return rng.integers(3, VOCAB, rng.integers(low, high)).tolist()

    rows = []
    for _ in range(num_prompts):
        answers = [[*ids(1, 16), 2] for _ in range(completions)]
        pairs = [[i, j] for i in range(completions) for j in range(i + 1, completions)][:pairs_each]
        rows.append({"prompt_ids": [1, *ids(2, 24)], "completion_ids": answers, "pairs": pairs})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def plain_model(folder: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The model as anyone would load it, dropout off."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa").eval()


def plain_logp(model: PreTrainedModel, prompt_ids: Sequence[int], completion_ids: Sequence[int]) -> Tensor:
    """The oracle: sum over the completion's tokens of log p(token | everything before), nats, in one plain forward."""
    ids = torch.tensor([[*map(int, prompt_ids), *map(int, completion_ids)]])
    logits = model(input_ids=ids).logits[0].to(torch.promote_types(model.dtype, torch.float32))
    logps = logits.log_softmax(-1)
    first = len(prompt_ids)
    return sum((logps[i - 1, ids[0, i]] for i in range(first, ids.shape[1])), start=logps.new_zeros(()))
