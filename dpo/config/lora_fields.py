"""The keys of `lora`, and those of `reference` that belong to it; see `fields`."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class LoraConfig:
    """lora: adapters, which are trained in place of the model's weights; these are stored once, in
    parallel.compute_dtype, sharded, without gradients and without optimizer state."""

    rank: int | None = None
    """Rank of the adapters; null: no adapters, or those of lora.path."""
    alpha: float | None = None
    """An adapter's product is multiplied by alpha / rank; null: 2 x rank, which makes it 2."""
    target_modules: str | list[str] | None = None
    """Linear layers that get an adapter: a name or a list of names, as they end ([q_proj, v_proj]); a text with other
    characters is a pattern of whole names ('.*\\.[0-3]\\.mlp\\..*'); null or all-linear: the linear layers of attention
    and dense MLPs. Routers of experts only by their names; the head and embeddings by train_embeddings."""
    target_parameters: list[str] | None = None
    """Parameters that get an adapter of their own, as they end: the weights of experts, [experts.gate_up_proj]."""
    exclude_modules: str | list[str] | None = None
    """Linear layers that get none, in the forms of target_modules."""
    rslora: bool | None = None
    """Multiply an adapter's product by alpha / sqrt(rank) (rsLoRA); null: false."""
    dora: bool | None = None
    """Train the norm of each row of an adapted weight too (DoRA); slower. null: false."""
    path: str | None = None
    """Folder or hub id of adapters to start from, such as those of an SFT run, in peft's form; its adapter_config.json
    gives rank, alpha, targets, rslora, dora. A model.path that is such a folder is taken as this, and its base as
    model.path. null: the adapters start at random, and change nothing."""
    train_embeddings: bool | None = None
    """Train the embeddings and the head too, whole, in model.dtype; null: false."""
    quantize: Literal["nf4"] | None = None
    """Store the frozen linear layers of decoder layers in 4 bits (QLoRA), as nf4 in blocks of 64 weights with a float32
    scale, 0.5625 bytes per weight; experts are not. The reference is the quantized model too, with log-probabilities of
    its own, and a run's adapters are merged into its dequantized weights. null: in parallel.compute_dtype."""
