"""Fills the cache: computes the rows that it lacks, by the forward pass that training uses.

    completions -> their different keys -> the keys that the cache lacks -> chunks -> trees -> rows -> blocks -> table

Rank 0 reads the cache and writes it; all ranks compute.
"""

import errno
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

from dpo.base.errors import Preempted, RunError
from dpo.base.prefetch import prefetch
from dpo.batch.packer import Packer
from dpo.batch.packing import PackedBatch
from dpo.batch.trees import Tree
from dpo.distributed.collectives import all_gather, gather_lanes, on_main, together
from dpo.distributed.preemption import StopRequest
from dpo.distributed.world import World, use_device
from dpo.model.policy import Policy, completion_logps, free_memory
from dpo.pairs.pair_set import Pair, PairSet
from dpo.pairs.tokens import completion_key
from dpo.ref_logps.blocks import first_of_each, read_rows, split_keys, write_circumstances, write_rows
from dpo.ref_logps.cache import RefCache
from dpo.ref_logps.circumstances import difference
from dpo.ref_logps.table import RefTable, find_table, open_table, table_circumstances, table_name, write_table
from dpo.terminal.console import progress, say
from dpo.watch.beats import stand

SECONDS_BETWEEN_BLOCKS = 30.0
"""A killed job loses at most about this many seconds of work."""

PAIRS_READ_TOGETHER = 1024
KEY_BYTES = 16
_CHANGED = "have changed after this start checked them; start again: damaged files of the caches are made again"

Completion = tuple[np.ndarray, np.ndarray]
"""(prompt_ids, completion_ids)."""


@dataclass(frozen=True)
class Missing:
    """Completions whose rows are not in the cache, and how many there are."""

    completions: Iterator[Completion]
    count: int


@dataclass(frozen=True)
class ReferencePass:
    """The result of `fill`: rows (completions with different keys) computed and reused, and the time that it took."""

    rows_computed: int
    rows_reused: int
    seconds: float
    made_differently: str | None = None
    """Describes the difference where rows were computed by another torch version, on another kind of GPU, or with
    another `parallel.compile`; else None."""

    @property
    def metrics(self) -> dict[str, float]:
        """Returns the metrics for metrics.jsonl."""
        return {"rows_computed": self.rows_computed, "rows_reused": self.rows_reused, "seconds": self.seconds}


def lookup(rows: RefTable) -> Callable[[np.ndarray, np.ndarray], float]:
    """Returns a function (prompt_ids, completion_ids) -> reference log-probability in nats, for the packer. It raises
    OSError where the table, which had a row for every completion, has none.
    """

    def logp(prompt_ids: np.ndarray, completion_ids: np.ndarray) -> float:
        try:
            return rows.logp(completion_key(prompt_ids, completion_ids))
        except KeyError as failure:
            what = f"a completion has no row, since its token ids or the table {_CHANGED}"
            raise OSError(errno.EIO, what, rows.rows.file.name) from failure

    return logp


def fill(
    cache: RefCache,
    sets: Sequence[PairSet],
    reference: Callable[[], Policy],
    packer: Packer,
    world: World,
    stop_requested: StopRequest,
) -> tuple[RefTable, ReferencePass]:
    """Computes the rows that the cache lacks, adds them to it, and opens the rows of every completion of `sets`.

    Every rank must get here, or the rest hang.

    Args:
        cache: where rows are looked up and added.
        sets: the data, the same on every rank.
        reference: returns the reference model; called only where a row is missing.
        packer: plans and packs the completions; its `ref_logps` and row format are not used.
        world: all ranks.
        stop_requested: asked after each chunk; whether this rank was asked to stop.

    Returns:
        The rows by key, and the counts and time of the work.

    Raises:
        Preempted: on every rank, where any rank was asked to stop; all rows so far are in the cache.
        RunError: on every rank, where a log-probability is not finite, or cached rows were removed meanwhile.
        OSError: on every rank, where a block cannot be written.
        UserError: on every rank, where the rows do not fit on the disk of `reference.cache_dir`, or its folder for this
            reference is that of another one.
    """
    started = time.monotonic()
    name = table_name([pairs.content_hash for pairs in sets])
    on_main(world, cache.check_own)
    table = on_main(world, lambda: find_table(cache.folder, name))
    num_missing = 0
    if table is None:
        missing = on_main(world, lambda: _missing(sets, cache.folder))
        num_missing = len(missing)
        if num_missing:
            num_rows = num_missing + 2 * sum(map(len, sets))  # those of the blocks and, at most, of the table
            on_main(world, lambda: cache.begin(num_rows))
            todo = Missing(_select(sets, missing), num_missing)
            _compute(cache, todo, reference(), packer, world, stop_requested)
            free_memory()
        table = on_main(world, lambda: write_table(cache.folder, name, _wanted(sets)[0]))
    rows = together(lambda: open_table(table))
    other = on_main(world, lambda: difference(table_circumstances(cache.folder, name), cache.circumstances))
    if world.is_main:
        num_reused = len(rows) - num_missing
        say(f"reference: {num_missing} log-probabilities computed, {num_reused} from the cache {cache.root}")
    return rows, ReferencePass(num_missing, len(rows) - num_missing, time.monotonic() - started, other)


def count_rows(sets: Sequence[PairSet]) -> int:
    """Returns the number of different completions of all sets, each of which has a row in the cache."""
    return len(_wanted(sets)[0])


def _wanted(sets: Sequence[PairSet]) -> tuple[np.ndarray, np.ndarray]:
    """Returns the M different keys of the sets' completions, (M, 2), sorted, and the number of the first completion
    with each key, (M,). Completion 2 p is the winner of pair p, 2 p + 1 its loser; pairs are numbered across the sets.
    """
    keys = np.concatenate([np.asarray(pairs.keys) for pairs in sets]).view("<u8").reshape(-1, 2)
    first = first_of_each(keys)
    return keys[first], first


def _missing(sets: Sequence[PairSet], folder: Path) -> np.ndarray:
    """Returns the numbers (see `_wanted`) of the completions that must be computed, ascending."""
    keys, first = _wanted(sets)
    return np.sort(first[read_rows(folder).find(keys) < 0])


def _select(sets: Sequence[PairSet], numbers: np.ndarray) -> Iterator[Completion]:
    """Yields the completions with these numbers (see `_wanted`), which ascend."""
    begin = 0
    for pairs in sets:
        in_set = numbers[slice(*np.searchsorted(numbers, [begin, begin + 2 * len(pairs)]))] - begin
        for part in np.split(in_set, range(PAIRS_READ_TOGETHER, len(in_set), PAIRS_READ_TOGETHER)):
            for pair, is_loser in zip(pairs.pairs(part // 2), (part % 2).tolist(), strict=True):
                completion = pair.prompt_ids, pair.rejected_ids if is_loser else pair.chosen_ids
                _check_key(pairs, pair, is_loser, completion)
                yield completion
        begin += 2 * len(pairs)


def _check_key(pairs: PairSet, pair: Pair, is_loser: int, completion: Completion) -> None:
    """Raises OSError where a completion's ids do not have the key under which its row is looked up: it would be
    computed at each start, and never be found. One rank may be alone with it.
    """
    assert pair.id is not None
    if completion_key(*completion) != pairs.keys[pair.id : pair.id + 1][0, is_loser].ljust(KEY_BYTES, b"\0"):
        what = f"the token ids of pair {pair.id} {_CHANGED}"
        raise OSError(errno.EIO, what, str(Path(pairs.token_files[0].name).parent))


def _compute(
    cache: RefCache, missing: Missing, policy: Policy, packer: Packer, world: World, stop_requested: StopRequest
) -> None:
    """Computes the rows of the missing completions chunk by chunk, and adds them to the cache in blocks."""
    packer = replace(packer, row_format=policy.row_format, ref_logps=None)
    chunk_tokens = 4 * packer.tokens_per_micro_batch * packer.num_lanes
    block = _Block(cache)
    chunks = _chunks(missing.completions, chunk_tokens)
    ahead = prefetch(partial(_plan_and_pack, packer), chunks, partial(use_device, policy.device))
    with closing(ahead), progress("reference", missing.count, "completions", world.is_main) as bar:
        for trees, batches in ahead:
            stand("the reference pass")
            rows = _run(policy, trees, batches)
            on_main(world, partial(block.add, rows))  # a full disk must end every rank
            bar.advance(len(rows[0]))
            if any(all_gather(stop_requested())):
                on_main(world, block.flush)
                raise Preempted(0, is_saved=False)
    on_main(world, block.flush)


class _Block:
    """Collects rows on rank 0 until they are written to the cache as a block."""

    def __init__(self, cache: RefCache):
        self.cache = cache
        self.rows: list[tuple[np.ndarray, np.ndarray]] = []
        self.flushed = time.monotonic()

    def add(self, rows: tuple[np.ndarray, np.ndarray]) -> None:
        """Adds keys (N, 2) and log-probabilities (N,); writes a block where the last is SECONDS_BETWEEN_BLOCKS old."""
        self.rows.append(rows)
        if time.monotonic() - self.flushed > SECONDS_BETWEEN_BLOCKS:
            self.flush()

    def flush(self) -> None:
        """Writes the collected rows, if any, as a block of the cache."""
        if self.rows:
            keys, logps = (np.concatenate(column) for column in zip(*self.rows, strict=True))
            write_circumstances(write_rows(self.cache.folder, keys, logps), self.cache.circumstances)
        self.rows.clear()
        self.flushed = time.monotonic()


def _chunks(items: Iterator[Completion], num_tokens: int) -> Iterator[list[Completion]]:
    """Yields lists of successive items of at least `num_tokens` tokens in all (the last may have fewer)."""
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
    """Returns this lane's trees and micro-batches of a chunk. No collective: a thread runs this ahead."""
    plan = packer.plan(_trees(chunk))
    return packer.trees(plan), packer.pack(plan)


def _run(
    policy: Policy, micro_batches: Sequence[Sequence[Tree]], batches: Sequence[PackedBatch]
) -> tuple[np.ndarray, np.ndarray]:
    """Computes this lane's micro-batches; returns keys (N, 2) and log-probabilities (N,) of the chunk, of all lanes.

    Every rank must get here, or the rest hang.
    """
    logps_by_batch: list[torch.Tensor] = []
    with torch.no_grad():
        for trees, batch in zip(micro_batches, batches, strict=True):
            logps = completion_logps(policy, batch.to(policy.device))
            logps_by_batch += [logps.double()] if trees else []  # a filler's log-probability belongs to no completion
    values = torch.cat(logps_by_batch).cpu().numpy() if logps_by_batch else np.empty(0)
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
    """Returns trees without pairs: one per prompt, with all completions of the chunk after it."""
    branches: dict[bytes, list[np.ndarray]] = {}
    trunks: dict[bytes, np.ndarray] = {}
    for prompt_ids, completion_ids in chunk:
        trunks.setdefault(prompt_ids.tobytes(), prompt_ids)
        branches.setdefault(prompt_ids.tobytes(), []).append(completion_ids)
    return [Tree(prompt_ids, tuple(branches[name]), ()) for name, prompt_ids in trunks.items()]
