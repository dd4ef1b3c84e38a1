"""Pairs token by token for a reader, with special tokens and control characters visible and cut ends marked."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dpo.pairs.pair_set import PairSet
from dpo.pairs.report import SourceReport
from dpo.terminal.console import visible

INCOMPLETE = "\N{REPLACEMENT CHARACTER}"


@dataclass(frozen=True)
class Token:
    """A token: its text with all characters visible, or its id as text where there is no tokenizer."""

    id: int
    text: str
    is_special: bool


@dataclass(frozen=True)
class Part:
    """A prompt or a completion. `is_cut`: whether truncation removed a prompt's beginning or a completion's end."""

    tokens: tuple[Token, ...]
    is_cut: bool


@dataclass(frozen=True)
class ShownPair:
    """A pair and the place of its row."""

    place: str
    prompt: Part
    chosen: Part
    rejected: Part | None = None
    """None where the pair has no loser."""


@dataclass(frozen=True)
class Speller:
    """Turns ids into tokens; without a tokenizer the text of a token is its id."""

    tokenizer: Any
    special: frozenset[int]

    def tokens(self, ids: Sequence[int]) -> tuple[Token, ...]:
        """Returns the tokens of these ids."""
        texts = [str(i) for i in ids] if self.tokenizer is None else token_texts(self.tokenizer, ids)
        return tuple(Token(i, visible(text), i in self.special) for i, text in zip(ids, texts, strict=True))


def make_speller(tokenizer: Any, end_ids: Iterable[int]) -> Speller:
    """Returns a speller. `tokenizer` is None where all data came as tokens and the model has none; `end_ids` are BOS
    and EOS.
    """
    special = {*end_ids}
    if tokenizer is not None:
        added = tokenizer.added_tokens_decoder
        special |= {*tokenizer.all_special_ids, *(number for number, token in added.items() if token.special)}
    return Speller(tokenizer, frozenset(special))


def token_texts(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """Returns the text that each token adds to the decoded text; INCOMPLETE for a token that does not complete a
    character.
    """

    def decode(some: Sequence[int]) -> str:
        after_eos = [tokenizer.eos_token_id, *some]  # the first token of a text would lose its leading space
        return str(tokenizer.decode(after_eos, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    texts = []
    begin, known = 0, 0  # ids[begin:known] are the context: the last tokens that decoded to whole characters
    for end in range(1, len(ids) + 1):
        text = decode(ids[begin:end])
        if text.endswith(INCOMPLETE):
            texts.append(INCOMPLETE)
        else:
            texts.append(text[len(decode(ids[begin:known])) :])
            begin, known = known, end
    return texts


# --- pairs -----------------------------------------------------------------------------------------------------------


def show_pairs(
    pairs: PairSet, ids: np.ndarray, speller: Speller, eos_ids: Sequence[int], sources: Sequence[SourceReport]
) -> list[ShownPair]:
    """Returns some pairs of a set token by token.

    Args:
        pairs: the set.
        ids: (N,) indices of its pairs.
        speller: turns ids into tokens.
        eos_ids: tokens that end a completion.
        sources: the sources of `pairs.rows`, in the order of the rows.
    """
    shown_pairs = []
    for number, pair in zip(ids.tolist(), pairs.pairs(ids), strict=True):
        row = int(pairs.row_of_pair[number])
        prompt_cut, cut = _cuts(pairs, row, eos_ids)
        parts = [Part(speller.tokens(pair.prompt_ids.tolist()), prompt_cut)]
        both = (pair.chosen_ids.tolist(), pair.rejected_ids.tolist())
        for completion in both if pairs.has_losers else both[:1]:
            parts.append(Part(speller.tokens(completion), tuple(completion) in cut))
        shown_pairs.append(ShownPair(_place(row, sources), *parts))
    return shown_pairs


def _cuts(pairs: PairSet, row: int, eos_ids: Sequence[int]) -> tuple[bool, set[tuple[int, ...]]]:
    """Returns whether the prompt of a row was cut, and the completions of the row that were cut and are in a kept pair.

    The row stores only their number. They are its longest completions; among completions of equal length, those without
    EOS come first.
    """
    fields = pairs.row(row)
    used = [tuple(fields["completion_ids"][i]) for i in sorted({i for pair in fields["pairs"] for i in pair})]
    used.sort(key=lambda ids: (-len(ids), ids[-1] in eos_ids))
    return fields["prompt_truncated"], set(used[: fields["completions_truncated"]])


def _place(row: int, sources: Sequence[SourceReport]) -> str:
    for source in sources:
        if row < source.rows:
            return f"{source.key} {source.path}, row {row} (from 0)"
        row -= source.rows
    raise AssertionError("a row of no source")
