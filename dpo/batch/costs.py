"""What a step costs by formula, in FLOPs, and what a device can do: the ground of the balance and of `train/mfu`.

A forward pass costs, a multiplication and an addition being two FLOPs (`CostModel`):

    tokens of the body          2 FLOPs a weight of the layers' matrix products
    attended (query, key) pairs 4 FLOPs a width of the queries and a layer: scores, and the values' weighted sum
    rows of the head            2 H V FLOPs: hidden size H, vocabulary V

A step costs a multiple of it (`Units`): forward is one unit and the backward pass two, since each product there gives
two gradients; what is computed again in the backward pass costs its forward once more. Fused attention keeps no
scores: its backward pass computes them again, one of its two products, half a unit. Norms, rotations, softmax and the
optimizer are left out: they are no matrix products, and no `FlopCounterMode` counts them. A layer with a sliding window
is counted as if it saw everything: an upper bound, exact where no tree is longer than the window.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PretrainedConfig

from dpo.batch.trees import Tree


@dataclass(frozen=True)
class CostModel:
    """FLOPs of a forward pass: of one token in the body, one attended (query, key) pair, one row of the head."""

    per_token: float = 1.0
    per_attended: float = 0.0
    per_scored: float = 0.0
    per_token_last: float = 0.0
    """Of `per_token`: the last product of every layer, which activation checkpointing need not compute again."""

    def cost(self, tree: Tree) -> float:
        """FLOPs of the forward pass of one tree."""
        return (
            self.per_token * tree.num_tokens + self.per_attended * tree.num_attended + self.per_scored * tree.num_scored
        )


UNGATED = ("phi", "starcoder2", "nemotron", "gpt_bigcode")
"""Model types with grouped heads whose MLP has two products, up and down, and no gate."""

MODEL_UNITS = 3.0
"""Units of a step that computes nothing twice: what model FLOPs utilization (MFU) counts."""


@dataclass(frozen=True)
class Units:
    """How often a step pays for the forward pass of the layers' products, of attention and of the head."""

    body: float = 3.0
    """3, and 4 where whole layers are checkpointed. Of selective checkpointing 3.5 is a rough middle."""
    attention: float = 3.5
    """3.5, and 4.5 where whole layers are checkpointed."""
    head: float = 3.0
    """3, and one more for the part of the rows whose logits are computed again."""
    spared: float = 0.0
    """1 where whole layers are checkpointed: the second forward pass of a layer ends where the backward pass has all
    that it needs, before the last product."""


def cost_model(config: PretrainedConfig) -> CostModel:
    """FLOPs of a forward pass by part, from the sizes of a model."""
    hidden, num_layers = config.hidden_size, config.num_hidden_layers
    num_heads = config.num_attention_heads
    width = num_heads * (getattr(config, "head_dim", None) or hidden // num_heads)
    kv_width = width * (getattr(config, "num_key_value_heads", None) or num_heads) // num_heads
    inner = getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None) or 4 * hidden
    is_gated = hasattr(config, "num_key_value_heads") and config.model_type not in UNGATED
    weights = hidden * (2 * width + 2 * kv_width) + (3 if is_gated else 2) * hidden * inner
    return CostModel(
        per_token=2.0 * num_layers * weights,
        per_attended=4.0 * num_layers * width,
        per_scored=2.0 * hidden * config.vocab_size,
        per_token_last=2.0 * num_layers * hidden * inner,
    )


def units(activation_checkpointing: str, recomputed_share: float) -> Units:
    """The units of a step under `parallel.activation_checkpointing` (none, selective, full), where the head computes
    that part of its rows twice (`log_probs.recomputed_share`).
    """
    head = 3.0 + recomputed_share
    match activation_checkpointing:
        case "none":
            return Units(head=head)
        case "selective":
            return Units(body=3.5, head=head)
        case "full":
            return Units(body=4.0, attention=4.5, head=head, spared=1.0)
    raise ValueError(f"parallel.activation_checkpointing: {activation_checkpointing!r}; valid: none, selective, full")


def step_flops(trees: Sequence[Tree], costs: CostModel, units: Units) -> float:
    """FLOPs of forward and backward over some trees, with prompts of P and completions of C_k tokens:

    (body units x per_token - spared units x per_token_last) x sum over trees (P + sum C_k)
    + attention units x per_attended x sum over trees (P(P+1)/2 + sum (C_k P + C_k(C_k+1)/2))
    + head units x per_scored x sum over trees (sum C_k).
    """
    return (
        (units.body * costs.per_token - units.spared * costs.per_token_last) * sum(tree.num_tokens for tree in trees)
        + units.attention * costs.per_attended * sum(tree.num_attended for tree in trees)
        + units.head * costs.per_scored * sum(tree.num_scored for tree in trees)
    )


# --- devices ---------------------------------------------------------------------------------------------------------
