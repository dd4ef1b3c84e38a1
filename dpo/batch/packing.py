"""A micro-batch of trees to tensors: one packed row of tokens without padding between them; behind them on CUDA."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from torch import Tensor

from dpo.batch.block_mask import BLOCK, Span, Window
from dpo.batch.layout import Layout, make_layout
from dpo.batch.plan import StepPlan
from dpo.batch.trees import Tree

RefLogps = Callable[[np.ndarray, np.ndarray], float]
"""(prompt_ids, completion_ids) -> the completion's reference log-probability, nats."""

FILLER = Tree(np.zeros(1, np.int32), (np.zeros(1, np.int32),), ())
"""The tree of a lane that has none in a micro-batch: a prompt and a completion of one token, and no pair.

Without it the lane would leave the others waiting in their collectives; without pairs it adds exactly 0 to the loss,
yet every parameter, head included, gets a gradient (of zeros) as on the other lanes.
"""


@dataclass(frozen=True)
class RowFormat:
    """How packed rows are made for a model on a device."""

    windows: tuple[Window, ...]
    """The attention windows of the model's layers."""
    device: torch.device
    """The device that rows are meant for."""
    dtype: torch.dtype = torch.float32
    """Of log-probabilities."""
    row_length: Callable[[int], int] = int
    """Tokens of a row -> the length to which it is padded: `padded_length` on CUDA, where few compiled graphs serve few
    lengths; no padding on a CPU. The head sees no padding."""


@dataclass(frozen=True)
class PackedBatch:
    """One micro-batch of one lane, L tokens, B completions, R scored tokens, T pairs.

    Made in the memory of the host, pinned where it is meant for CUDA; `to` brings it to the device.
    """

    tokens: Tensor
    """(L,) token ids, tree after tree: the prompt, then its completions; zeros where the row is padded."""
    positions: Tensor
    """(L,) positions; each completion's begin at its prompt's length; padding stands at 0."""
    layout: Layout
    """The trees' places, for attention."""
    predict_idxs: Tensor
    """(R,) places in `tokens` whose hidden state predicts a completion token: a completion's first is predicted by
    the prompt's last token."""
    targets: Tensor
    """(R,) the predicted token ids, completion after completion."""
    lengths: Tensor
    """(B,) scored tokens of each completion, EOS included."""
    ref_logps: Tensor | None
    """(B,) log-probabilities under the reference, nats, NaN for a filler; None where the packer knows no reference."""
    yw_idxs: Tensor
    """(T,) each pair's winner, an index into the B completions."""
    yl_idxs: Tensor
    """(T,) each pair's loser."""
    pairs_in_step: int
    """Pairs of the whole step, all ranks and micro-batches: what the sum of losses is divided by."""
    winner_tokens_in_step: int
    """Scored tokens of the winners of the whole step, one count a pair: the SFT term's denominator."""
    forward_flops_in_step: float
    """FLOPs of a forward pass over the trees of the whole step, all ranks and micro-batches."""
    num_tokens: int
    """Tokens that belong to pairs of the step: L without fillers and padding."""

    def to(self, device: torch.device) -> "PackedBatch":
        """The batch on a device; the host does not wait for the copies."""
        tensors = {f.name: getattr(self, f.name) for f in fields(self) if isinstance(getattr(self, f.name), Tensor)}
        moved = {name: tensor.to(device, non_blocking=True) for name, tensor in tensors.items()}
        return replace(self, layout=self.layout.to(device), **moved)


def pack(trees: Sequence[Tree], plan: StepPlan, ref_logps: RefLogps | None, row_format: RowFormat) -> PackedBatch:
    """Makes the tensors of one micro-batch of one lane; without trees, of the filler."""
    trees, num_tokens = trees or (FILLER,), sum(tree.num_tokens for tree in trees)
    spans = make_spans(trees)
    tokens = np.concatenate([ids for tree in trees for ids in (tree.prompt_ids, *tree.completion_ids)])
    length = row_format.row_length(len(tokens))
    padding = (0, length - len(tokens))
    winners, losers = pair_indices(trees)
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
    )


def _references(trees: Sequence[Tree], ref_logps: RefLogps) -> list[float]:
    """Returns the reference's log-probability of each completion, nats; NaN where no pair needs it, as in a filler."""
    return [ref_logps(t.prompt_ids, ids) if t.pairs else math.nan for t in trees for ids in t.completion_ids]


def padded_length(num_tokens: int) -> int:
    """The length of a row on CUDA: the next multiple of 128, FlexAttention's block, and above 8,192 tokens of a 32nd of
    the power of two below: 95 lengths up to 16,384 tokens, 32 more with each doubling. At most a 32nd is padding from
    4,096 tokens on, a 64th in the mean. Two blocks at least: torch.compile makes every size of 1 a graph of its own.
    """
    step = max(BLOCK, 1 << max((num_tokens - 1).bit_length() - 6, 0))
    return max(2 * BLOCK, -(-num_tokens // step) * step)


def make_spans(trees: Sequence[Tree]) -> list[Span]:
    """The trees' places in the row."""
    starts = np.cumsum([0] + [tree.num_tokens for tree in trees])
    return [
        Span(int(start), len(tree.prompt_ids), tuple(len(ids) for ids in tree.completion_ids))
        for start, tree in zip(starts, trees, strict=False)
    ]


def make_positions(spans: Sequence[Span]) -> np.ndarray:
    """(L,) position ids; every completion continues its prompt."""
    parts = []
    for span in spans:
        parts.append(np.arange(span.prompt_len))
        parts += [np.arange(span.prompt_len, span.prompt_len + length) for length in span.completion_lens]
    return np.concatenate(parts)


def predict_places(spans: Sequence[Span]) -> np.ndarray:
    """(R,) the place that predicts each completion token: the prompt's last for the first, else the token before it."""
    parts = []
    for span in spans:
        place = span.start + span.prompt_len
        for length in span.completion_lens:
            parts.append(np.concatenate([[span.start + span.prompt_len - 1], np.arange(place, place + length - 1)]))
            place += length
    return np.concatenate(parts)


def pair_indices(trees: Sequence[Tree]) -> tuple[np.ndarray, np.ndarray]:
    """(T,) winners and (T,) losers as indices into all completions of the micro-batch."""
    starts = np.cumsum([0] + [len(tree.completion_ids) for tree in trees])
    pairs = [(start + w, start + lo) for start, tree in zip(starts, trees, strict=False) for w, lo in tree.pairs]
    table = np.array(pairs, dtype=np.int64).reshape(-1, 2)
    return table[:, 0], table[:, 1]
