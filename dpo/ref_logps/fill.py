"""Reference log-probabilities: computed once by the policy's own forward, kept by content, never stale.

A row belongs to the reference by content, to the numerics that change the value, and to the tokens of prompt and
completion; nothing else is in its key.
"""

import json
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

from dpo.base.console import progress, say
from dpo.base.errors import Preempted, RunError, UserError
from dpo.base.files import default_cache_dir, write_atomically
from dpo.base.prefetch import prefetch
from dpo.batch.packer import Packer
from dpo.batch.packing import PackedBatch
from dpo.batch.plan import StepPlan
from dpo.batch.trees import Tree
from dpo.config import Config
from dpo.data.pair_set import PairSet
from dpo.data.tokens import completion_key
from dpo.distributed.collectives import all_gather, on_main, together
from dpo.distributed.preemption import StopRequest
from dpo.distributed.world import World, use_device
from dpo.model.parallelize import compute_dtype, is_compiled
from dpo.model.policy import Policy, completion_logps, free_memory
from dpo.ref_logps.blocks import Making, first_of_each, read_rows, reference_key, split_keys, write_making, write_rows
from dpo.ref_logps.making import difference, joined_making, making, numerics
from dpo.ref_logps.table import RefTable, find_table, open_table, table_makings, table_name, write_table

SECONDS_BETWEEN_BLOCKS = 30.0
"""A killed build loses at most about this much work."""

PAIRS_READ_TOGETHER = 1024

Completion = tuple[np.ndarray, np.ndarray]
"""(prompt_ids, completion_ids)."""


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
    def figures(self) -> dict[str, float]:
        """What metrics.jsonl has of it."""
        return {"rows_computed": self.rows_computed, "rows_reused": self.rows_reused, "seconds": self.seconds}


def lookup(rows: RefTable) -> Callable[[np.ndarray, np.ndarray], float]:
    """(prompt_ids, completion_ids) -> reference log-probability, for packing."""
    return lambda prompt_ids, completion_ids: rows.logp(completion_key(prompt_ids, completion_ids))


def check_shared(folder: Path, world: World) -> None:
    """Raises UserError where a file that rank 0 writes into the cache is not seen by every rank. Every rank must get
    here.
    """
    probe = on_main(world, lambda: _write_probe(folder))

    def look() -> None:
        if not probe.is_file():
            raise UserError(
                f"reference.cache_dir: rank {world.rank} does not see what rank 0 writes to {folder};"
                " valid: a folder that all nodes share"
            )

    together(look)
    on_main(world, lambda: probe.unlink(missing_ok=True))


def _write_probe(folder: Path) -> Path:
    """A file under a name that no other job uses, and that no node has looked for before."""
    probe = folder / f".probe-{uuid.uuid4().hex}"
    try:
        write_atomically(probe, b"")
    except OSError as failure:
        raise UserError(
            f"reference.cache_dir: cannot write to {folder}: {failure}; valid: a folder to write in"
        ) from failure
    return probe


def fill(
    sets: Sequence[PairSet],
    folder: Path,
    facts: Mapping[str, str],
    now: Making,
    reference: Callable[[], Policy],
    packer: Packer,
    head_bytes: int,
    world: World,
    stop_requested: StopRequest,
) -> tuple[RefTable, ReferencePass]:
    """The rows of every completion of `sets`: those in the cache `folder`, and the missing ones, computed and added to
    it.

    `facts` are those of the folder's key, `now` is how this run makes rows. `reference()` gives the model, and is
    called only where a row is missing. Raises Preempted, on every rank and with what was computed in the cache, where a
    rank is asked to stop. Every rank must get here.
    """
    started = time.monotonic()
    check_shared(folder, world)
    name = table_name([pairs.content_hash for pairs in sets])
    table = on_main(world, lambda: find_table(folder, name))
    num_missing = 0
    if table is None:
        missing = on_main(world, lambda: _missing(sets, folder))
        num_missing = len(missing)
        if num_missing:
            on_main(world, lambda: write_atomically(folder / "about.json", json.dumps(facts, indent=1).encode()))
            todo = _select(sets, missing)
            _compute(todo, num_missing, folder, reference(), packer, head_bytes, world, stop_requested, now)
            free_memory()
        table = on_main(world, lambda: write_table(folder, name, _wanted(sets)[0]))
    rows = together(lambda: open_table(table))
    other = on_main(world, lambda: difference(table_makings(folder, name), now))
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
    items: Iterator[Completion],
    total: int,
    folder: Path,
    policy: Policy,
    packer: Packer,
    head_bytes: int,
    world: World,
    stop_requested: StopRequest,
    now: Making,
) -> None:
    """Runs the reference over completions, many at a time, and adds blocks of rows to the cache as it goes."""
    packer = replace(packer, windows=policy.windows)
    chunk_tokens = 4 * packer.tokens_per_micro_batch * world.size
    block = _Block(folder, now)
    ahead = prefetch(partial(_plan_and_pack, packer), _chunks(items, chunk_tokens), partial(use_device, policy.device))
    with closing(ahead), progress("reference", total, "completions", world.is_main) as bar:
        for plan, batches in ahead:
            rows = _run(plan, batches, policy, head_bytes, world)
            on_main(world, partial(block.add, rows))  # a full disk must end every rank
            bar.advance(len(rows[0]))
            if any(all_gather(stop_requested())):
                on_main(world, block.flush)
                raise Preempted(step=0)
    on_main(world, block.flush)


class _Block:
    """Rows on rank 0 that are not in the cache yet."""

    def __init__(self, folder: Path, now: Making):
        self.folder, self.making = folder, now
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
            write_making(write_rows(self.folder, keys, logps), self.making)
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


def _plan_and_pack(packer: Packer, chunk: list[Completion]) -> tuple[StepPlan, list[PackedBatch]]:
    """The plan of a chunk and this rank's micro-batches of it; no collective, since a thread runs it ahead."""
    plan = packer.plan(_trees(chunk))
    return plan, packer.pack(plan)


def _run(
    plan: StepPlan, batches: Sequence[PackedBatch], policy: Policy, head_bytes: int, world: World
) -> tuple[np.ndarray, np.ndarray]:
    """Keys (N, 2) and log-probabilities (N,) of a chunk, on every rank. Every rank must get here."""
    mine: list[torch.Tensor] = []
    with torch.no_grad():
        for micro, batch in zip(plan.micro_batches[world.rank], batches, strict=True):
            logps = completion_logps(policy, batch.to(policy.device), head_bytes)
            mine += [logps.double()] if micro else []  # a filler's log-probability belongs to no completion
    values = torch.cat(mine).cpu().numpy() if mine else np.empty(0)
    trees = [tree for micro in plan.micro_batches[world.rank] for tree in micro]
    keys = split_keys([completion_key(tree.prompt_ids, ids) for tree in trees for ids in tree.completion_ids])
    parts = all_gather((keys, values))
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


def fill_cache(
    config: Config,
    world: World,
    reference_hash: str,
    sets: Sequence[PairSet],
    reference: Callable[[], Policy],
    packer: Packer,
    stop_requested: StopRequest,
) -> tuple[RefTable, ReferencePass]:
    """The rows of all pairs of `sets`, and what it took to have them. Every rank must get here.

    `reference()` gives the model, whose hash by content is `reference_hash`; it is called only where a row is missing.
    """
    compute = compute_dtype(config.parallel, packer.dtype, world.device)
    facts = {"model": reference_hash} | numerics(config.model.dtype, compute, world.device, config.parallel.tf32)
    root = cache_root(config)
    head_bytes = config.parallel.head_memory_mib * 2**20
    now = joined_making(all_gather(making(world.device, is_compiled(config.parallel, world.device))))
    rows, done = fill(
        sets, root / reference_key(facts), facts, now, reference, packer, head_bytes, world, stop_requested
    )
    if world.is_main:
        say(f"reference: {done.rows_computed} log-probabilities computed, {done.rows_reused} from the cache {root}")
    return rows, done


def cache_root(config: Config) -> Path:
    """The folder of the cached log-probabilities, those of all references."""
    return Path(config.reference.cache_dir).expanduser() if config.reference.cache_dir else default_cache_dir()
