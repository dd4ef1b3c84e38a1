"""A micro-batch of trees -> tensors: one packed row of tokens, tree after tree.

A row has no padding between tokens; on CUDA it is padded at its end (`padded_length`). A packed row of two trees, a
prompt p with completions a and b and a prompt q with a completion c:

    place      0 1 2  3 4  5 6 7 | 8 9  10 11 12
    tokens     p p p  a a  b b b | q q   c  c  c    the prompt once, then its completions
    positions  0 1 2  3 4  3 4 5 | 0 1   2  3  4    every completion continues its prompt
    predicts   . . ab a .  b b . | . c   c  c  .    the completions whose tokens the place predicts

The last token of a prompt predicts the first token of each of its completions, and the last token of a completion
predicts nothing. Hence, with a preferred to b, and c in no pair:

    predict_idxs    2 3   2 5 6   9 10 11     rows of hidden states that the head computes
    targets         a a   b b b   c  c  c     the token ids that they predict
    lengths         2     3       3           rows per completion
    yw_idxs, yl_idxs    (0,), (1,)            completion 0 wins over completion 1
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from torch import Tensor

from dpo.batch.block_mask import BLOCK, Span, Window
from dpo.batch.costs import ForwardFlops
from dpo.batch.layout import Layout, make_layout
from dpo.batch.plan import StepPlan
from dpo.batch.trees import Tree

RefLogps = Callable[[np.ndarray, np.ndarray], float]
"""(prompt_ids, completion_ids) -> the completion's log-probability under the reference, nats."""

FILLER = Tree(np.zeros(1, np.int32), (np.zeros(1, np.int32),), ())
"""The tree of a lane that has no tree in a micro-batch: a prompt and a completion of one token each, and no pair.

Without it the lane would not join the collectives of the micro-batch, and the other lanes would hang. Without a pair it
adds exactly 0 to the loss, yet every parameter, the head's included, gets a gradient (of zeros) as on the other lanes.
"""


@dataclass(frozen=True)
class RowFormat:
    """The properties of a model and its device that packed rows depend on."""

    windows: tuple[Window, ...]
    """The attention windows of the model's layers."""
    device: torch.device
    """The device on which rows are used; they are made on the host."""
    dtype: torch.dtype = torch.float32
    """The dtype of log-probabilities."""
    row_length: Callable[[int], int] = int
    """Tokens of a row -> the length to which it is padded: `padded_length` on CUDA, so that there are few lengths to
    compile for; no padding on a CPU. The head does not compute padding."""


@dataclass(frozen=True)
class PackedBatch:
    """One micro-batch of one lane: L tokens, B completions, R scored tokens, T pairs.

    It is made in host memory, pinned for CUDA; `to` copies it to the device.
    """

    tokens: Tensor
    """(L,) token ids, tree after tree: the prompt, then its completions; zeros where the row is padded."""
    positions: Tensor
    """(L,) positions; a completion's positions begin at the length of its prompt; padding has position 0."""
    layout: Layout
    """The places of the trees, for attention."""
    predict_idxs: Tensor
    """(R,) places in `tokens` whose hidden state predicts a completion token, completion after completion; the prompt's
    last token predicts the first token of each completion."""
    targets: Tensor
    """(R,) the predicted token ids."""
    lengths: Tensor
    """(B,) scored tokens of each completion, EOS included."""
    ref_logps: Tensor | None
    """(B,) log-probabilities under the reference, nats; NaN for a tree without pairs; None where the packer has no
    reference."""
    yw_idxs: Tensor
    """(T,) the winner of each pair, an index into the B completions."""
    yl_idxs: Tensor
    """(T,) the loser of each pair, likewise."""
    pairs_in_step: int
    """Pairs of the whole step, all lanes and micro-batches: the denominator of the preference loss."""
    winner_tokens_in_step: int
    """Scored tokens of the winners of all pairs of the step, once per pair: the denominator of the SFT term."""
    forward_flops_in_step: ForwardFlops
    """FLOPs of a forward pass over the trees of the whole step, all lanes and micro-batches."""
    num_tokens: int
    """Tokens of this row's trees: L without padding, and 0 for a filler."""
    weights: Tensor | None = None
    """(T,) the weight of each pair, which multiplies its loss; None: all 1."""
    margins: Tensor | None = None
    """(T,) the margin of each pair, on the scale of beta h; None: all 0."""

    def to(self, device: torch.device) -> "PackedBatch":
        """Returns the batch on a device; the host does not wait for the copies."""
        tensors = {f.name: getattr(self, f.name) for f in fields(self) if isinstance(getattr(self, f.name), Tensor)}
        moved = {name: tensor.to(device, non_blocking=True) for name, tensor in tensors.items()}
        return replace(self, layout=self.layout.to(device), **moved)


def pack(trees: Sequence[Tree], plan: StepPlan, ref_logps: RefLogps | None, row_format: RowFormat) -> PackedBatch:
    """Makes the tensors of one micro-batch of one lane.

    Args:
        trees: the trees of the micro-batch; where there are none, `FILLER` is packed.
        plan: the plan of the step, for its denominators.
        ref_logps: looks up the reference's log-probabilities; None where the loss has no reference.
        row_format: the properties of the model and its device.
    """
    trees, num_tokens = trees or (FILLER,), sum(tree.num_tokens for tree in trees)
    spans = make_spans(trees)
    tokens = np.concatenate([ids for tree in trees for ids in (tree.prompt_ids, *tree.completion_ids)])
    length = row_format.row_length(len(tokens))
    padding = (0, length - len(tokens))
    winners, losers = pair_indices(trees)
    weights = _values_of_pairs(trees, [tree.weights for tree in trees], 1.0)
    margins = _values_of_pairs(trees, [tree.margins for tree in trees], 0.0)
    device = row_format.device

    def put(array: np.ndarray | list[float], dtype: torch.dtype = torch.long) -> Tensor:
        tensor = torch.as_tensor(array, dtype=dtype)
        return tensor.pin_memory() if device.type == "cuda" else tensor

    return PackedBatch(
        tokens=put(np.pad(tokens, padding)),
        positions=put(np.pad(make_positions(spans), padding)),
        layout=make_layout(spans, row_format.windows, length, device),
        predict_idxs=put(predict_places(spans)),
        targets=put(np.concatenate([ids for tree in trees for ids in tree.completion_ids])),
        lengths=put([len(ids) for tree in trees for ids in tree.completion_ids]),
        ref_logps=None if ref_logps is None else put(_references(trees, ref_logps), row_format.dtype),
        yw_idxs=put(winners),
        yl_idxs=put(losers),
        pairs_in_step=plan.pairs_in_step,
        winner_tokens_in_step=plan.winner_tokens_in_step,
        forward_flops_in_step=plan.forward_flops,
        num_tokens=num_tokens,
        weights=None if weights is None else put(weights, row_format.dtype),
        margins=None if margins is None else put(margins, row_format.dtype),
    )


def _references(trees: Sequence[Tree], ref_logps: RefLogps) -> list[float]:
    """Returns the reference's log-probability of each completion, nats; NaN where no pair needs it, as in a filler."""
    return [ref_logps(t.prompt_ids, ids) if t.pairs else math.nan for t in trees for ids in t.completion_ids]


def _values_of_pairs(trees: Sequence[Tree], values: Sequence[tuple[float, ...]], neutral: float) -> list[float] | None:
    """Returns the weight or the margin of each pair of the trees, (T,); None where all are neutral.

    Args:
        trees: the trees of the micro-batch.
        values: those of the pairs of each tree; empty where all are neutral.
        neutral: 1 as a weight, 0 as a margin.
    """
    if not any(values):
        return None
    return [x for tree, of_tree in zip(trees, values, strict=True) for x in of_tree or (neutral,) * len(tree.pairs)]


def padded_length(num_tokens: int) -> int:
    """Returns the length to which a row is padded on CUDA: 300 -> 384, 9,000 -> 9,216.

    Up to 8,192 tokens it is the next multiple of 128, FlexAttention's block; above, the next multiple of 2^k / 32, with
    2^k the largest power of two below the number of tokens. There are 95 lengths up to 16,384 tokens and 32 more per
    doubling. From 4,096 tokens on at most 1/32 of a row is padding, 1/64 on average. A row has at least two blocks,
    since torch.compile makes a graph of its own for a size of 1.
    """
    step = max(BLOCK, 1 << max((num_tokens - 1).bit_length() - 6, 0))
    return max(2 * BLOCK, -(-num_tokens // step) * step)


def make_spans(trees: Sequence[Tree]) -> list[Span]:
    """Returns the place of each tree in the row."""
    starts = np.cumsum([0] + [tree.num_tokens for tree in trees])
    return [
        Span(int(start), len(tree.prompt_ids), tuple(len(ids) for ids in tree.completion_ids))
        for start, tree in zip(starts, trees, strict=False)
    ]


def make_positions(spans: Sequence[Span]) -> np.ndarray:
    """Returns the position ids, (L,); every completion continues its prompt."""
    parts = []
    for span in spans:
        parts.append(np.arange(span.prompt_len))
        parts += [np.arange(span.prompt_len, span.prompt_len + length) for length in span.completion_lens]
    return np.concatenate(parts)


def predict_places(spans: Sequence[Span]) -> np.ndarray:
    """Returns the place that predicts each completion token, (R,): the prompt's last place for the first token of a
    completion, else the place before the token.
    """
    parts = []
    for span in spans:
        place = span.start + span.prompt_len
        for length in span.completion_lens:
            parts.append(np.concatenate([[span.start + span.prompt_len - 1], np.arange(place, place + length - 1)]))
            place += length
    return np.concatenate(parts)


def pair_indices(trees: Sequence[Tree]) -> tuple[np.ndarray, np.ndarray]:
    """Returns the winners (T,) and losers (T,) as indices into the B completions of the micro-batch."""
    starts = np.cumsum([0] + [len(tree.completion_ids) for tree in trees])
    pairs = [(start + w, start + lo) for start, tree in zip(starts, trees, strict=False) for w, lo in tree.pairs]
    table = np.array(pairs, dtype=np.int64).reshape(-1, 2)
    return table[:, 0], table[:, 1]
