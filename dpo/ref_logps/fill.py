"""Reference log-probabilities: computed once by the policy's own forward pass, kept by content, never stale."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

from dpo.base.console import progress, say
from dpo.base.errors import Preempted, RunError
from dpo.base.prefetch import prefetch
from dpo.batch.packer import Packer
from dpo.batch.packing import PackedBatch
from dpo.batch.trees import Tree
from dpo.data.pair_set import PairSet
from dpo.data.tokens import completion_key
from dpo.distributed.collectives import all_gather, gather_lanes, on_main, together
from dpo.distributed.preemption import StopRequest
from dpo.distributed.world import World, use_device
from dpo.model.policy import Policy, completion_logps, free_memory
from dpo.ref_logps.blocks import first_of_each, read_rows, split_keys, write_making, write_rows
from dpo.ref_logps.cache import RefCache, check_shared
from dpo.ref_logps.making import difference
from dpo.ref_logps.table import RefTable, find_table, open_table, table_makings, table_name, write_table

SECONDS_BETWEEN_BLOCKS = 30.0
"""A killed build loses at most about this much work."""

PAIRS_READ_TOGETHER = 1024

Completion = tuple[np.ndarray, np.ndarray]
"""(prompt_ids, completion_ids)."""


@dataclass(frozen=True)
class Missing:
    """Completions whose rows are not in the cache."""

    completions: Iterator[Completion]
    count: int


@dataclass(frozen=True)
class ReferencePass:
    """What one look into the cache, and the work after it, amounted to."""

    rows_computed: int
    rows_reused: int
    seconds: float
    made_otherwise: str | None = None
    """Where rows of this run were made by another torch, on another kind of GPU or with another `parallel.compile`:
    what differs, in a few words."""

    @property
    def metrics(self) -> dict[str, float]:
        """What metrics.jsonl has of it."""
        return {"rows_computed": self.rows_computed, "rows_reused": self.rows_reused, "seconds": self.seconds}


def lookup(rows: RefTable) -> Callable[[np.ndarray, np.ndarray], float]:
    """(prompt_ids, completion_ids) -> reference log-probability, for packing."""
    return lambda prompt_ids, completion_ids: rows.logp(completion_key(prompt_ids, completion_ids))


def fill(
    cache: RefCache,
    sets: Sequence[PairSet],
    reference: Callable[[], Policy],
    packer: Packer,
    world: World,
    stop_requested: StopRequest,
) -> tuple[RefTable, ReferencePass]:
    """Returns the rows of every completion of `sets`, and what the work was: rows in the cache are read, missing ones
    computed and added to it.

    `reference()` gives the model, and is called only where a row is missing. Raises Preempted, on every rank and with
    the rows so far in the cache, where a rank is asked to stop. Every rank must get here, or the rest hang.
    """
    started = time.monotonic()
    check_shared(cache.folder, world)
    name = table_name([pairs.content_hash for pairs in sets])
    table = on_main(world, lambda: find_table(cache.folder, name))
    num_missing = 0
    if table is None:
        missing = on_main(world, lambda: _missing(sets, cache.folder))
        num_missing = len(missing)
        if num_missing:
            on_main(world, cache.write_facts)
            todo = Missing(_select(sets, missing), num_missing)
            _compute(cache, todo, reference(), packer, world, stop_requested)
            free_memory()
        table = on_main(world, lambda: write_table(cache.folder, name, _wanted(sets)[0]))
    rows = together(lambda: open_table(table))
    other = on_main(world, lambda: difference(table_makings(cache.folder, name), cache.making))
    if world.is_main:
        num_reused = len(rows) - num_missing
        say(f"reference: {num_missing} log-probabilities computed, {num_reused} from the cache {cache.root}")
    return rows, ReferencePass(num_missing, len(rows) - num_missing, time.monotonic() - started, other)


def _wanted(sets: Sequence[PairSet]) -> tuple[np.ndarray, np.ndarray]:
    """The different keys of the sets' completions, (M, 2), sorted, and where each stands first, (M,): completion
    2 * pair is a pair's winner, 2 * pair + 1 its loser, and the pairs of all sets are numbered through.
    """
    keys = np.concatenate([np.asarray(pairs.keys) for pairs in sets]).view("<u8").reshape(-1, 2)
    first = first_of_each(keys)
    return keys[first], first


def _missing(sets: Sequence[PairSet], folder: Path) -> np.ndarray:
    """The numbers (see `_wanted`) of the completions that must be computed, rising."""
    keys, first = _wanted(sets)
    return np.sort(first[read_rows(folder).find(keys) < 0])


def _select(sets: Sequence[PairSet], numbers: np.ndarray) -> Iterator[Completion]:
    """The completions of these numbers (see `_wanted`), rising."""
    begin = 0
    for pairs in sets:
        mine = numbers[slice(*np.searchsorted(numbers, [begin, begin + 2 * len(pairs)]))] - begin
        for some in np.split(mine, range(PAIRS_READ_TOGETHER, len(mine), PAIRS_READ_TOGETHER)):
            for pair, is_loser in zip(pairs.pairs(some // 2), (some % 2).tolist(), strict=True):
                yield pair.prompt_ids, pair.rejected_ids if is_loser else pair.chosen_ids
        begin += 2 * len(pairs)


def _compute(
    cache: RefCache, missing: Missing, policy: Policy, packer: Packer, world: World, stop_requested: StopRequest
) -> None:
    """Runs the reference over completions, many at a time, and adds blocks of rows to the cache as it goes."""
    packer = replace(packer, row_format=policy.row_format, ref_logps=None)
    chunk_tokens = 4 * packer.tokens_per_micro_batch * packer.num_lanes
    block = _Block(cache)
    chunks = _chunks(missing.completions, chunk_tokens)
    ahead = prefetch(partial(_plan_and_pack, packer), chunks, partial(use_device, policy.device))
    with closing(ahead), progress("reference", missing.count, "completions", world.is_main) as bar:
        for trees, batches in ahead:
            rows = _run(policy, trees, batches)
            on_main(world, partial(block.add, rows))  # a full disk must end every rank
            bar.advance(len(rows[0]))
            if any(all_gather(stop_requested())):
                on_main(world, block.flush)
                raise Preempted(step=0)
    on_main(world, block.flush)


class _Block:
    """Rows on rank 0 that are not in the cache yet."""

    def __init__(self, cache: RefCache):
        self.cache = cache
        self.rows: list[tuple[np.ndarray, np.ndarray]] = []
        self.flushed = time.monotonic()

    def add(self, rows: tuple[np.ndarray, np.ndarray]) -> None:
        """Takes keys (N, 2) and log-probabilities (N,); writes what it holds where it holds that for long."""
        self.rows.append(rows)
        if time.monotonic() - self.flushed > SECONDS_BETWEEN_BLOCKS:
            self.flush()

    def flush(self) -> None:
        """Writes what it holds as one block of the cache."""
        if self.rows:
            keys, logps = (np.concatenate(column) for column in zip(*self.rows, strict=True))
            write_making(write_rows(self.cache.folder, keys, logps), self.cache.making)
        self.rows.clear()
        self.flushed = time.monotonic()


def _chunks(items: Iterator[Completion], num_tokens: int) -> Iterator[list[Completion]]:
    """Runs of items of about `num_tokens` tokens: enough for several micro-batches on every rank."""
    chunk: list[Completion] = []
    tokens = 0
    for item in items:
        chunk.append(item)
        tokens += len(item[0]) + len(item[1])
        if tokens >= num_tokens:
            yield chunk
            chunk, tokens = [], 0
    if chunk:
        yield chunk


def _plan_and_pack(packer: Packer, chunk: list[Completion]) -> tuple[Sequence[Sequence[Tree]], list[PackedBatch]]:
    """Returns this lane's trees and micro-batches of a chunk; no collective, since a thread runs it ahead."""
    plan = packer.plan(_trees(chunk))
    return packer.trees(plan), packer.pack(plan)


def _run(
    policy: Policy, micro_batches: Sequence[Sequence[Tree]], batches: Sequence[PackedBatch]
) -> tuple[np.ndarray, np.ndarray]:
    """Returns keys (N, 2) and log-probabilities (N,) of a chunk, on every rank. Every rank must get here, or the rest
    hang.
    """
    mine: list[torch.Tensor] = []
    with torch.no_grad():
        for trees, batch in zip(micro_batches, batches, strict=True):
            logps = completion_logps(policy, batch.to(policy.device))
            mine += [logps.double()] if trees else []  # a filler's log-probability belongs to no completion
    values = torch.cat(mine).cpu().numpy() if mine else np.empty(0)
    own = [tree for trees in micro_batches for tree in trees]
    keys = split_keys([completion_key(tree.prompt_ids, ids) for tree in own for ids in tree.completion_ids])
    parts = gather_lanes((keys, values))
    logps_of_chunk = np.concatenate([values for _, values in parts])
    if not np.isfinite(logps_of_chunk).all():
        raise RunError(
            "the reference gives a log-probability that is not finite; its weights or its dtype are at fault"
        )
    return np.concatenate([keys for keys, _ in parts]), logps_of_chunk


def _trees(chunk: list[Completion]) -> list[Tree]:
    """Trees without pairs, one a prompt."""
    branches: dict[bytes, list[np.ndarray]] = {}
    trunks: dict[bytes, np.ndarray] = {}
    for prompt_ids, completion_ids in chunk:
        trunks.setdefault(prompt_ids.tobytes(), prompt_ids)
        branches.setdefault(prompt_ids.tobytes(), []).append(completion_ids)
    return [Tree(prompt_ids, tuple(branches[name]), ()) for name, prompt_ids in trunks.items()]
