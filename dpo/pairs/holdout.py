"""Which prompts of a training source are held out for evaluation: a function of the seed and the prompts alone."""

import hashlib
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from dpo.base.errors import UserError
from dpo.pairs.token_rows import blocks, column_keys, pairs_of


@dataclass(frozen=True, eq=False)
class Split:
    """Which rows of a source are trained on, held out, or removed (neither of both)."""

    pairs: np.ndarray
    """(rows,) kept pairs of each row."""
    train: np.ndarray
    """(rows,) bool: the row's pairs are trained on."""
    held: np.ndarray
    """(rows,) bool: the row's pairs are held out for evaluation."""
    num_prompts: int
    """The number of prompts that are held out."""

    @property
    def num_train(self) -> int:
        """Returns the number of pairs to train on."""
        return int(self.pairs[self.train].sum())

    @property
    def removed(self) -> np.ndarray:
        """Returns which rows are removed from training without being evaluated, (rows,) bool."""
        removed: np.ndarray = ~self.train & ~self.held
        return removed


def split_sources(sources: list[tuple[str, pa.Table, int | float | None]], seed: int) -> list[Split]:
    """Divides all training sources so that no prompt is both trained on and evaluated.

    A prompt is chosen by its ids before truncation, so that other length limits hold out the same prompts. A row that
    is not held out is removed from training where its prompt, as the model sees it, is held out of any source.

    Args:
        sources: (key in the config, token rows, `holdout` of the config) of each source.
        seed: `train.seed`.

    Returns:
        The split of each source.

    Raises:
        UserError: no prompt of a source would be left to train on.
    """
    counts = [_pair_counts(rows) for _, rows, _ in sources]
    held, num_prompts = [], []
    for (key, rows, holdout), num in zip(sources, counts, strict=True):
        full = column_keys(rows, "full_prompt_key")
        chosen = choose_prompts(full[num > 0], holdout, seed, f"{key}.holdout")
        held.append((num > 0) & np.isin(full, chosen))
        num_prompts.append(len(chosen))
    truncated = [column_keys(rows, "prompt_key") for _, rows, _ in sources]
    held_keys = np.concatenate([keys[mask] for keys, mask in zip(truncated, held, strict=True)])
    return [
        Split(num, ~mask & ~np.isin(keys, held_keys), mask, prompts)
        for num, mask, keys, prompts in zip(counts, held, truncated, num_prompts, strict=True)
    ]


def choose_prompts(keys: np.ndarray, holdout: int | float | None, seed: int, where: str) -> np.ndarray:
    """Returns the keys of the prompts to hold out: those with the smallest hashes of (seed, prompt).

    Args:
        keys: S16, a key of 16 bytes per prompt; keys may repeat.
        holdout: a number of prompts, or a fraction of the distinct prompts (rounded, at least one); None holds out
            none.
        seed: `train.seed`.
        where: the key in the config, for errors.

    Raises:
        UserError: no prompt would be left to train on.
    """
    if holdout is None:
        return keys[:0]
    unique = np.unique(keys)
    num = holdout if isinstance(holdout, int) else max(1, round(holdout * len(unique)))
    if num >= len(unique):
        what = f"holding out {num} of {len(unique)} prompts leaves none to train on"
        raise UserError(where, what, "a smaller holdout")
    data, secret = unique.tobytes(), str(seed).encode()
    hashes = [hashlib.blake2b(data[i : i + 16], key=secret, digest_size=16).digest() for i in range(0, len(data), 16)]
    return unique[np.argsort(np.array(hashes, "S16"), kind="stable")[:num]]


def _pair_counts(rows: pa.Table) -> np.ndarray:
    """Returns the number of kept pairs of each row, (rows,)."""
    return np.concatenate([np.diff(pairs_of(table)[0]) for _, table in blocks(rows, ["pairs"])])
