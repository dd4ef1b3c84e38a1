"""Statistics of the pairs of a run: lengths, ends, repeats, and length bias.

Pure functions of a `PairSet`, the set that is trained on. Rows are read block by block; memory holds a few integers and
two keys per pair.
"""

from collections.abc import Iterator
from dataclasses import astuple, dataclass, replace

import numpy as np
import pyarrow as pa

from dpo.inspect.lengths import LengthBias, SetLengths, length_bias, lengths_of
from dpo.pairs.pair_set import PairSet
from dpo.pairs.token_rows import blocks, column_keys, keys16, lists, offsets, pairs_of

COLUMNS = [
    "prompt_ids",
    "completion_ids",
    "completion_keys",
    "pairs",
    "prompt_truncated",
    "completions_truncated",
]


@dataclass(frozen=True)
class EndIds:
    """The ids that begin and end a text: the tokenizer's, or the model's for rows of tokens."""

    bos: tuple[int, ...]
    eos: tuple[int, ...]
    unknown: tuple[int, ...] = ()
    """The token that stands for characters which the tokenizer lacks; empty where it has none of its own."""


@dataclass(frozen=True)
class Ends:
    """How prompts and completions begin and end, counted over the rows with a pair and their completions in a pair."""

    rows: int
    prompts_cut: int
    begin_without_bos: int
    begin_with_bos: int
    begin_with_two_bos: int
    completions: int
    completions_cut: int
    end_with_eos: int
    eos_inside: int
    """Completions with an EOS before their last token."""
    unknown_tokens: int = 0
    """Tokens of these prompts and completions that stand for characters which the tokenizer lacks."""

    @property
    def end_without_eos(self) -> int:
        """Returns the number of completions whose last token is not EOS: cut completions, and rows of tokens without
        EOS.
        """
        return self.completions - self.end_with_eos


@dataclass(frozen=True)
class Repeats:
    """Prompts and pairs that occur more than once in a set."""

    prompts: int
    """Different prompts, as the model sees them."""
    repeated_rows: int
    """Rows whose prompt is also the prompt of an earlier row."""
    prompts_made_equal: int
    """By how many truncation reduced the number of different prompts."""
    repeated_pairs: int
    """Pairs with the prompt, winner and loser of an earlier pair."""
    contradicted_pairs: int
    """Pairs whose winner loses to their loser in another pair."""


@dataclass(frozen=True)
class SetStatistics:
    """All statistics of the training or the evaluation pairs."""

    pairs: int
    lengths: SetLengths
    ends: Ends
    repeats: Repeats
    bias: LengthBias | None
    """None where the set has no losers."""


def summarize(pairs: PairSet, ids: EndIds) -> SetStatistics:
    """Returns the statistics of a set with at least one pair."""
    keys, ends = [], []
    for block in _blocks(pairs):
        keys.append(block.keys[block.pairs])
        ends.append(_ends_of(block, ids))
    table = pairs.lengths()
    return SetStatistics(
        pairs=len(pairs),
        lengths=lengths_of(table if pairs.has_losers else table[:, :2]),
        ends=Ends(*map(sum, zip(*map(astuple, ends), strict=True))),
        repeats=_repeats(pairs, np.concatenate(keys)),
        bias=length_bias(table[:, 1] - table[:, 2]) if pairs.has_losers else None,
    )


# --- blocks of rows --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Block:
    """Rows that were read together: R prompts, K completions, and N pairs as indices of shape (N, 2) into the
    completions.
    """

    prompt_at: np.ndarray  # (R + 1,) where each prompt begins in `prompt_ids`
    prompt_ids: np.ndarray
    completion_at: np.ndarray  # (K + 1,)
    completion_ids: np.ndarray
    keys: np.ndarray  # (K,) of prompt and completion
    row_of_pair: np.ndarray  # (N,)
    pairs: np.ndarray
    prompt_cut: np.ndarray  # (R,)
    completions_cut: np.ndarray  # (R,) how many


def _blocks(pairs: PairSet) -> Iterator[_Block]:
    """Yields the rows of a set block by block, without blocks that have no pair."""
    for start, table in blocks(pairs.rows, COLUMNS):
        begin, end = np.searchsorted(pairs.row_of_pair, [start, start + len(table)])
        if begin < end:
            block = _block(table, pairs.row_of_pair[begin:end] - start, pairs.pair_in_row[begin:end])
            yield block if pairs.has_losers else replace(block, pairs=block.pairs[:, [0, 0]])


def _block(table: pa.Table, row_of_pair: np.ndarray, pair_in_row: np.ndarray) -> _Block:
    prompt_at, prompt_ids = lists(table, "prompt_ids")
    first_of_row, completions = lists(table, "completion_ids")
    begins, listed = pairs_of(table)
    return _Block(
        prompt_at=prompt_at,
        prompt_ids=prompt_ids.to_numpy(),
        completion_at=offsets(completions),
        completion_ids=completions.flatten().to_numpy(),
        keys=keys16(lists(table, "completion_keys")[1]),
        row_of_pair=row_of_pair,
        pairs=listed[begins[row_of_pair] + pair_in_row] + first_of_row[row_of_pair][:, None],
        prompt_cut=table.column("prompt_truncated").to_numpy(),
        completions_cut=table.column("completions_truncated").to_numpy(),
    )


# --- ends and repeats ------------------------------------------------------------------------------------------------


def _ends_of(block: _Block, ids: EndIds) -> Ends:
    rows, used = np.unique(block.row_of_pair), np.unique(block.pairs)
    first, after = block.prompt_at[rows], block.prompt_at[rows + 1]
    is_bos = np.isin(block.prompt_ids, ids.bos)
    begins = is_bos[first]
    twice = begins & (after - first > 1) & is_bos[np.minimum(first + 1, after - 1)]
    is_eos = np.isin(block.completion_ids, ids.eos)
    start, stop = block.completion_at[used], block.completion_at[used + 1]
    at_end = is_eos[stop - 1]
    unknown = _count(np.isin(block.prompt_ids, ids.unknown), first, after).sum()
    unknown += _count(np.isin(block.completion_ids, ids.unknown), start, stop).sum()
    return Ends(
        rows=len(rows),
        prompts_cut=int(block.prompt_cut[rows].sum()),
        begin_without_bos=int((~begins).sum()),
        begin_with_bos=int((begins & ~twice).sum()),
        begin_with_two_bos=int(twice.sum()),
        completions=len(used),
        completions_cut=int(block.completions_cut[rows].sum()),
        end_with_eos=int(at_end.sum()),
        eos_inside=int((_count(is_eos, start, stop) > at_end).sum()),
        unknown_tokens=int(unknown),
    )


def _count(mask: np.ndarray, start: np.ndarray, stop: np.ndarray) -> np.ndarray:
    """Returns the number of true values in each slice of a mask."""
    before = np.concatenate([[0], np.cumsum(mask)])
    counts: np.ndarray = before[stop] - before[start]
    return counts


def _repeats(pairs: PairSet, keys: np.ndarray) -> Repeats:
    """Returns the repeats of the data, not those that a source's share of an epoch makes.

    Args:
        pairs: the set.
        keys: (N, 2) the keys of winner and loser of each pair; each depends on the prompt too.
    """
    keys = keys[pairs.is_first()]
    rows = np.unique(pairs.row_of_pair)
    seen, full = (np.unique(column_keys(pairs.rows, name)[rows]) for name in ("prompt_key", "full_prompt_key"))
    forward, backward = (np.ascontiguousarray(both).view("S32").ravel() for both in (keys, keys[:, ::-1]))
    repeated = len(forward) - len(np.unique(forward))
    contradicted = int((np.isin(forward, backward) & (forward != backward)).sum())  # equal: a demonstration
    return Repeats(len(seen), len(rows) - len(seen), len(full) - len(seen), repeated, contradicted)


def shared_pairs(train: PairSet, evaluation: PairSet) -> int:
    """Returns the number of evaluation pairs whose prompt, as the model sees it, is also in the training set."""
    asked, trained = (column_keys(pairs.rows, "prompt_key")[pairs.row_of_pair] for pairs in (evaluation, train))
    return int(np.isin(asked, trained).sum())
