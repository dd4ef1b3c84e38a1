"""The names of a model's tensors without adapters, and the names of adapters in their file. For example, in a Llama:

in the model                                          in its folder, or in adapter_model.safetensors
model.layers.0.self_attn.q_proj.base_layer.weight     model.layers.0.self_attn.q_proj.weight
model.layers.0.self_attn.q_proj.lora_A.default.weight base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight
model.layers.0.self_attn.q_proj.lora_magnitude_vector.default.weight
                                                      base_model.model.…q_proj.lora_magnitude_vector
model.embed_tokens.weight, where it is trained whole  base_model.model.model.embed_tokens.weight

peft writes a magnitude without `.weight` at its end, and reads it with or without; transformers, from 5.0 on, reads it
with `.weight` alone, so that this is how it is written.
"""

import re

from dpo.adapters.spec import ADAPTER

_BASE = re.compile(r"\.base_layer(?=\.)")
_OF_ADAPTER = re.compile(r"\.lora_(A|B|embedding_A|embedding_B|magnitude_vector)\b")
_MAGNITUDE = re.compile(r"\.lora_magnitude_vector\.weight$")
PREFIX = "base_model.model."
"""Before the name of every tensor in a file of adapters, in peft's form."""

EMBEDDINGS = ("embed_tokens", "embed_in", "wte", "word_embeddings", "lm_head", "embed_out", "output_layer")
"""The last parts of the names of embeddings and heads, for errors about a model that is not built yet."""


def is_of_adapter(name: str) -> bool:
    """Returns whether a tensor of a model belongs to an adapter, by its name in the model."""
    return _OF_ADAPTER.search(name) is not None


def base_name(name: str) -> str:
    """Returns the name of a tensor as it is in the same model without adapters."""
    return _BASE.sub("", name)


def file_name(name: str) -> str:
    """Returns the name of a trained tensor in a file of adapters."""
    plain = name.replace(f".{ADAPTER}.", ".") if is_of_adapter(name) else base_name(name)
    return PREFIX + plain_name(plain)


def plain_name(name: str) -> str:
    """Returns a name in a file of adapters without the `.weight` of a magnitude."""
    return _MAGNITUDE.sub(".lora_magnitude_vector", name)


def written_name(name: str) -> str:
    """Returns the name under which a tensor is written, given its name by `file_name`."""
    return f"{name}.weight" if name.endswith(".lora_magnitude_vector") else name
