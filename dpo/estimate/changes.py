"""Finds the changes that make a step fit by trying them, in the order of their cost in speed.

Each change is tried alone. If none is enough, all are tried together; if that is not enough, all together with more
ranks, and all together with the weights on the host.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from dpo.estimate.needs import Trial

MORE_RANKS = (2, 4, 8)  # multiples of the number of ranks that are tried


Keys = dict[str, Any]
"""Values by key, like `parallel.reshard_after_forward`; the key `ranks` holds the number of ranks."""


@dataclass(frozen=True)
class Change:
    """A change and the memory that the step needs with it."""

    keys: Keys
    bytes: float
    """Bytes that must fit into a rank's device."""
    fits: bool

    @property
    def words(self) -> str:
        """Returns the keys and values as they are typed on the command line."""
        return words_of(self.keys)


def find_changes(
    trial: Trial, before: float, largest_tree: int, needed: Callable[[Trial], float], memory: float
) -> list[Change]:
    """Returns the changes that help a step that does not fit.

    Args:
        trial: the step that does not fit.
        before: the bytes that it needs of a device's memory.
        largest_tree: tokens of the largest tree, the lower bound of `batch.tokens_per_micro_batch`.
        needed: returns the bytes that a trial needs of a device's memory.
        memory: the device's memory, bytes.
    """

    def tried(keys: Keys) -> Change:
        peak = needed(with_keys(trial, keys))
        return Change(keys, peak, peak <= memory)

    singles = list(single_changes(trial, largest_tree))
    alone = [tried(keys) for keys in singles]
    if any(change.fits for change in alone):
        return _helpful(alone, before)
    together = {key: value for keys in singles for key, value in keys.items()}
    all_of_them = [tried(together)] if len(singles) > 1 else []
    if any(change.fits for change in all_of_them):
        return _helpful(alone, before) + all_of_them
    larger = (tried(together | keys) for keys in more_ranks(trial))
    enough = [change for change in [next((c for c in larger if c.fits), None)] if change is not None]
    if not trial.config.parallel.cpu_offload:
        enough.append(tried(together | {"parallel.cpu_offload": True}))
    return _helpful(alone, before) + all_of_them + enough


def _helpful(changes: Sequence[Change], before: float) -> list[Change]:
    """Returns the changes that are enough, or that save more than 1 % of the bytes."""
    return [change for change in changes if change.fits or change.bytes < 0.99 * before]


def single_changes(trial: Trial, largest_tree: int) -> Iterator[Keys]:
    """Yields the changes that need no more machines. Of a key with several values, the value that needs the least
    memory comes last.
    """
    parallel, budget = trial.config.parallel, trial.config.batch.tokens_per_micro_batch
    if not parallel.reshard_after_forward:
        yield {"parallel.reshard_after_forward": True}
    if parallel.sync_gradients == "last_micro_batch":
        yield {"parallel.sync_gradients": "every_micro_batch"}
    kinds = ("none", "selective", "full")
    for kind in kinds[kinds.index(parallel.activation_checkpointing) + 1 :]:
        yield {"parallel.activation_checkpointing": kind}
    for tokens in (budget // 2, budget // 4):
        if tokens >= largest_tree:
            yield {"batch.tokens_per_micro_batch": tokens}


def more_ranks(trial: Trial) -> Iterator[Keys]:
    """Yields 2, 4 and 8 times as many ranks, over which each copy of the model is sharded."""
    for times in MORE_RANKS:
        keys: Keys = {"ranks": times * trial.num_ranks}
        if trial.config.parallel.shard is not None:
            keys["parallel.shard"] = times * trial.config.parallel.shard
        yield keys


def with_keys(trial: Trial, keys: Keys) -> Trial:
    """Returns the trial with some keys changed."""
    config = trial.config
    for key, value in keys.items():
        section, _, name = key.partition(".")
        if name:
            config = replace(config, **{section: replace(getattr(config, section), **{name: value})})
    return Trial(config, keys.get("ranks", trial.num_ranks))


def words_of(keys: Keys) -> str:
    """Returns keys and values as they are typed on the command line."""
    return " ".join(f"--{key} {_shown(value)}" for key, value in keys.items())


def _shown(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
