"""What to change where a step does not fit: found by trying, in the order of what a change costs in speed.

First each change alone. Where none is enough, all of them together; where these are not either, with more ranks, or
with the weights on the host.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from dpo.estimate.needs import Layout

MORE_RANKS = (2, 4, 8)  # times as many that are tried


Keys = dict[str, Any]
"""Values by key, `parallel.reshard_after_forward`; `ranks` is their number."""


@dataclass(frozen=True)
class Change:
    """A change and the peak it leaves."""

    keys: Keys
    bytes: float
    """Of a rank's device, all that must fit."""
    fits: bool

    @property
    def words(self) -> str:
        """The keys as on the command line."""
        return words_of(self.keys)


def find_changes(layout: Layout, largest_tree: int, needed: Callable[[Layout], float], memory: float) -> list[Change]:
    """The changes that help. `largest_tree`: tokens that a micro-batch cannot go below; `needed`: bytes of a layout
    that must fit into `memory`.
    """

    def tried(keys: Keys) -> Change:
        found = needed(with_keys(layout, keys))
        return Change(keys, found, found <= memory)

    singles = list(single_changes(layout, largest_tree))
    alone = [tried(keys) for keys in singles]
    if any(change.fits for change in alone):
        return _helpful(alone, needed(layout))
    together = {key: value for keys in singles for key, value in keys.items()}
    all_of_them = [tried(together)] if len(singles) > 1 else []
    if any(change.fits for change in all_of_them):
        return _helpful(alone, needed(layout)) + all_of_them
    larger = (tried(together | keys) for keys in more_ranks(layout))
    enough = [change for change in [next((c for c in larger if c.fits), None)] if change is not None]
    if not layout.config.parallel.cpu_offload:
        enough.append(tried(together | {"parallel.cpu_offload": True}))
    return _helpful(alone, needed(layout)) + all_of_them + enough


def _helpful(changes: Sequence[Change], before: float) -> list[Change]:
    """Those that are enough, or save more than a hundredth."""
    return [change for change in changes if change.fits or change.bytes < 0.99 * before]


def single_changes(layout: Layout, largest_tree: int) -> Iterator[Keys]:
    """Changes that need no more machines; of a key with several values the leanest stands last."""
    parallel, budget = layout.config.parallel, layout.config.batch.tokens_per_micro_batch
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


def more_ranks(layout: Layout) -> Iterator[Keys]:
    """Two, four, eight times as many, which share one copy."""
    for times in MORE_RANKS:
        keys: Keys = {"ranks": times * layout.num_ranks}
        if layout.config.parallel.shard is not None:
            keys["parallel.shard"] = times * layout.config.parallel.shard
        yield keys


def with_keys(layout: Layout, keys: Keys) -> Layout:
    """The layout with some keys changed."""
    config = layout.config
    for key, value in keys.items():
        section, _, name = key.partition(".")
        if name:
            config = replace(config, **{section: replace(getattr(config, section), **{name: value})})
    return Layout(config, keys.get("ranks", layout.num_ranks))


def words_of(keys: Keys) -> str:
    """Keys and values as on the command line."""
    return " ".join(f"--{key} {_shown(value)}" for key, value in keys.items())


def _shown(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
