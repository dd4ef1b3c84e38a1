"""Which prompts of a training source are kept for evaluation: a function of the seed and the prompts alone."""

import hashlib
from dataclasses import dataclass

import datasets
import numpy as np

from dpo.base.errors import UserError
from dpo.data.token_rows import blocks, column_keys, pairs_of


@dataclass(frozen=True, eq=False)
class Split:
    """Of one source, by row (rows,): its pairs are trained on, held out, or neither (removed). `pairs` counts them."""

    pairs: np.ndarray
    train: np.ndarray
    held: np.ndarray
    num_prompts: int  # held out

    @property
    def removed(self) -> np.ndarray:
        removed: np.ndarray = ~self.train & ~self.held
        return removed


def split_sources(sources: list[tuple[str, datasets.Dataset, int | float | None]], seed: int) -> list[Split]:
    """Divide the (key in the config, token rows, holdout) of all training sources so that no prompt is on both sides.

    A prompt is chosen by its ids before truncation, so other limits hold out the same prompts. A row that is not held
    out but whose prompt, as the model sees it, is held out of any source, is removed from training.
    """
    counts = [_pair_counts(rows) for _, rows, _ in sources]
    held, num_prompts = [], []
    for (key, rows, holdout), num in zip(sources, counts, strict=True):
        full = column_keys(rows, "full_prompt_key")
        chosen = choose_prompts(full[num > 0], holdout, seed, f"{key}.holdout")
        held.append((num > 0) & np.isin(full, chosen))
        num_prompts.append(len(chosen))
    seen = [column_keys(rows, "prompt_key") for _, rows, _ in sources]
    elsewhere = np.concatenate([keys[mask] for keys, mask in zip(seen, held, strict=True)])
    return [
        Split(num, ~mask & ~np.isin(keys, elsewhere), mask, prompts)
        for num, mask, keys, prompts in zip(counts, held, seen, num_prompts, strict=True)
    ]


def choose_prompts(keys: np.ndarray, holdout: int | float | None, seed: int, where: str) -> np.ndarray:
    """Of the prompts (keys of 16 bytes, repeats allowed) those with the smallest hashes of (seed, prompt).

    `holdout`: a number of prompts, or a fraction of the different ones, rounded, at least one; null: none. Raises
    UserError if none would be left to train on.
    """
    if holdout is None:
        return keys[:0]
    unique = np.unique(keys)
    num = holdout if isinstance(holdout, int) else max(1, round(holdout * len(unique)))
    if num >= len(unique):
        raise UserError(where, f"{num} prompts of {len(unique)} leave none to train on", "fewer")
    data, secret = unique.tobytes(), str(seed).encode()
    hashes = [hashlib.blake2b(data[i : i + 16], key=secret, digest_size=16).digest() for i in range(0, len(data), 16)]
    return unique[np.argsort(np.array(hashes, "S16"), kind="stable")[:num]]


def _pair_counts(rows: datasets.Dataset) -> np.ndarray:
    """How many kept pairs each row has, (rows,)."""
    return np.concatenate([np.diff(pairs_of(table)[0]) for _, table in blocks(rows, ["pairs"])])
