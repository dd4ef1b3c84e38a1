"""The FLOPs of a step by formula: plans are balanced by them, and `train/mfu` is computed from them.

A multiplication and an addition are two FLOPs. A forward pass costs (`CostModel`)

    per token of the body              2 FLOPs per parameter of the layers' matrix products
    per attended (query, key) pair     4 FLOPs per layer and element of its queries: the score, and the weighted sum
                                       of values
    per row of the head                2 H V FLOPs: hidden size H, vocabulary V

A step costs a multiple of it (`Units`). The forward pass is one unit. The backward pass is two, because each product
has two gradients. An operation that the backward pass recomputes costs its forward pass once more. Fused attention
keeps no scores: its backward pass recomputes them, which is one of its two products, half a unit. Norms, rotations,
softmax and the optimizer are left out: they are not matrix products, and `FlopCounterMode` does not count them either.
A layer with a sliding window is counted like full attention: an upper bound, exact where no tree is longer than the
window.

With adapters (`Trained`) a frozen product has one gradient, that of its input, and the two products of an adapter have
both. What comes before the first adapter has no gradient. A Llama of 2 layers with adapters of rank 4 on all products
of 8 x 8, 7 in a layer, in units of one of these: an adapter is 2 * 4 * 8 / (8 * 8) = 1 in a forward pass.

    forward      14 products and 14 adapters                                                                28
    inputs       the same, without q, k, v of the first layer and A of their adapters (half an adapter each)   28 - 4.5
    weights      14 adapters                                                                                14

DoRA multiplies each adapter with a unit matrix too, once in every micro-batch: as much as a forward pass of the adapter
over as many tokens as it has inputs. That is left out, and so are adapters of parameters that are no linear layers.
A product with a quantized weight counts as with the weight itself; dequantizing it, which is no product, is left out.

An example: a layer with H = 4 hidden and 4 query elements, one head, an ungated MLP of 16, V = 10, and a tree with a
prompt of 3 tokens and completions of 2 and 3. Its products have 4 * 4 * 4 + 2 * 4 * 16 = 192 parameters.

    body         2 * 192    = 384 FLOPs per token   * (3 + 2 + 3)             = 8 tokens   3,072
    attention    4 * 4      =  16 FLOPs per pair    * (6 + (6 + 3) + (9 + 6)) = 30 pairs     480
    head         2 * 4 * 10 =  80 FLOPs per row     * (2 + 3)                 = 5 rows       400
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from transformers import PretrainedConfig

from dpo.batch.trees import Tree


class ForwardFlops(NamedTuple):
    """FLOPs of a forward pass by part."""

    body: float
    attention: float
    head: float


@dataclass(frozen=True)
class CostModel:
    """FLOPs of a forward pass: per token of the body, per attended (query, key) pair, per row of the head."""

    per_token: float = 1.0
    per_attended: float = 0.0
    per_scored: float = 0.0
    per_token_last: float = 0.0
    """The part of `per_token` of the last product of every layer, which full checkpointing does not recompute."""

    def cost(self, tree: Tree) -> float:
        """Returns the FLOPs of the forward pass of one tree."""
        return sum(self.parts([tree]))

    def parts(self, trees: Sequence[Tree]) -> ForwardFlops:
        """Returns the FLOPs of the forward pass of trees, by part."""
        return ForwardFlops(
            body=self.per_token * sum(tree.num_tokens for tree in trees),
            attention=self.per_attended * sum(tree.num_attended for tree in trees),
            head=self.per_scored * sum(tree.num_scored for tree in trees),
        )


UNGATED = ("phi", "starcoder2", "nemotron", "gpt_bigcode")
"""Model types with grouped key and value heads whose MLP has two products (up, down) and no gate."""

MODEL_UNITS = 3.0
"""Units of a step of the whole model without recomputation, by which model FLOPs utilization (MFU) is defined; of a
step with adapters see `model_flops`."""


@dataclass(frozen=True)
class Trained:
    """What of a model has gradients, in multiples of the forward pass of its layers' products, adapters aside. By
    default the whole model; `dpo.estimate.parameters` finds it for a model with adapters.
    """

    adapters: float = 0.0
    """The forward pass of the adapters' products."""
    inputs: float = 1.0
    """The gradients of the inputs of all products."""
    weights: float = 1.0
    """The gradients of the weights of all products."""
    layers: float = 1.0
    """The share of the layers that have a backward pass: the first with an adapter and those above."""
    head: float = 1.0
    """1 where the head's weights are trained, else 0."""
    last: float = 1.0
    """What full checkpointing does not recompute, as a multiple of the last products of all layers."""


WHOLE_MODEL = Trained()


@dataclass(frozen=True)
class Units:
    """The FLOPs of a step as multiples of the forward pass without adapters: of the layers' products, of attention, of
    the head. The numbers below are those of a step that trains the whole model.
    """

    body: float = 3.0
    """3; 4 with full checkpointing; 3.5 with selective checkpointing, a rough middle."""
    attention: float = 3.5
    """3.5; 4.5 with full checkpointing."""
    head: float = 3.0
    """3, plus the share of the rows whose logits are recomputed."""
    spared: float = 0.0
    """1 with full checkpointing: the recomputation of a layer stops before its last product, whose result the backward
    pass does not need."""


def cost_model(config: PretrainedConfig) -> CostModel:
    """Returns the FLOPs of a forward pass by part, from the sizes in a model's config."""
    hidden, num_layers = config.hidden_size, config.num_hidden_layers
    num_heads = config.num_attention_heads
    width = num_heads * (getattr(config, "head_dim", None) or hidden // num_heads)
    kv_width = width * (getattr(config, "num_key_value_heads", None) or num_heads) // num_heads
    inner = intermediate_size(config)
    is_gated = hasattr(config, "num_key_value_heads") and config.model_type not in UNGATED
    parameters = hidden * (2 * width + 2 * kv_width) + (3 if is_gated else 2) * hidden * inner
    return CostModel(
        per_token=2.0 * num_layers * parameters,
        per_attended=4.0 * num_layers * width,
        per_scored=2.0 * hidden * config.vocab_size,
        per_token_last=2.0 * num_layers * hidden * inner,
    )


def intermediate_size(config: PretrainedConfig) -> int:
    """Returns the width of the MLP."""
    size: int = getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None) or 4 * config.hidden_size
    return size


def units(activation_checkpointing: str, recomputed_share: float, trained: Trained = WHOLE_MODEL) -> Units:
    """Returns the units of a step.

    Args:
        activation_checkpointing: `parallel.activation_checkpointing`: none, selective or full.
        recomputed_share: the share of rows whose logits are computed twice (`log_probs.recomputed_share`).
        trained: what of the model has gradients.
    """
    body = 1.0 + trained.adapters + trained.inputs + trained.weights
    attention, head = 1.0 + 2.5 * trained.layers, 2.0 + trained.head + recomputed_share
    layer = trained.layers + trained.adapters  # a layer that is computed again
    match activation_checkpointing:
        case "none":
            return Units(body, attention, head)
        case "selective":
            return Units(body + 0.5 * layer, attention, head)
    assert activation_checkpointing == "full", activation_checkpointing
    return Units(body + layer, attention + trained.layers, head, spared=trained.last)


def model_flops(forward: ForwardFlops, trained: Trained = WHOLE_MODEL) -> float:
    """Returns the FLOPs of a step by which its MFU is defined: each product that the gradient needs once, without any
    recomputation. Of the whole model that is three forward passes; with adapters about two.

    Args:
        forward: the FLOPs of a forward pass over the trees of the step, without adapters.
        trained: what of the model has gradients.
    """
    needed = units("none", 0.0, trained)
    attention = 1.0 + 2.0 * trained.layers
    return needed.body * forward.body + attention * forward.attention + needed.head * forward.head


def step_flops(trees: Sequence[Tree], costs: CostModel, units: Units) -> float:
    """Returns the FLOPs of forward and backward over trees with prompts of P and completions of C_k tokens:

    (body units x per_token - spared units x per_token_last) x sum over trees (P + sum C_k)
    + attention units x per_attended x sum over trees (P(P+1)/2 + sum (C_k P + C_k(C_k+1)/2))
    + head units x per_scored x sum over trees (sum C_k).

    Args:
        trees: of a step, or of a part of it.
        costs: FLOPs of a forward pass.
        units: the FLOPs of a step as multiples of a forward pass, by part.
    """
    forward = costs.parts(trees)
    spared = units.spared * costs.per_token_last * sum(tree.num_tokens for tree in trees)
    return units.body * forward.body - spared + units.attention * forward.attention + units.head * forward.head
