"""A part of the examination: something that every rank measures, and what rank 0 says of it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from transformers import PretrainedConfig

from dpo.base.errors import RunError, UserError
from dpo.config import Config, ParallelConfig
from dpo.distributed.collectives import all_gather, first_on_each_node, together
from dpo.distributed.world import World
from dpo.model.parallelize import compute_dtype

T = TypeVar("T")


@dataclass(frozen=True)
class Sizes:
    """What a run keeps, of the model of a config."""

    num_weights: int
    state: int
    """Bytes of weights, gradients and optimizer of one copy of the model, on all its ranks together."""
    checkpoint: int
    """Bytes of one checkpoint: weights and optimizer."""
    final: int
    """Bytes of the exported model."""
    keep: int | None
    """Checkpoints that are kept; None: all."""
    num_saves: int | None
    """Checkpoints that the run writes; None where that depends on the number of pairs."""

    def disk_bytes(self, present: int) -> int:
        """Bytes that the run still writes where so many checkpoints lie already: those that are kept, and the one that
        is written before the oldest of them is removed, or the exported model. Where all of an unknown number are kept,
        one and the model.
        """
        bounds = [number for number in (self.keep, self.num_saves) if number is not None]
        kept = min(bounds, default=1)
        is_replaced = self.keep is not None and (self.num_saves is None or self.num_saves > self.keep)
        last = max(self.checkpoint, self.final) if is_replaced else self.final
        return max(kept - present, 0) * self.checkpoint + last


@dataclass(frozen=True)
class Subject:
    """What is examined: the layout, the folders and the models of a run, or the defaults."""

    parallel: ParallelConfig
    dtype: str
    """Of the master weights."""
    run_dir: Path
    cache_dir: Path | None
    """Of the reference; None where there is none."""
    models: tuple[PretrainedConfig, ...] = ()
    """The policy, and the reference where it is another model; empty where no config was given."""
    config: Config | None = None
    sizes: Sizes | None = None
    """Of the policy; None where no config was given."""

    def compute_dtype(self, device: torch.device) -> torch.dtype:
        """Of the forward and backward pass."""
        return compute_dtype(self.parallel, getattr(torch, self.dtype), device)


@dataclass(frozen=True)
class Finding:
    """What a part has to say, the same on every rank."""

    name: str
    lines: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()
    """Why a run would fail here, and what would help."""
    advice: tuple[str, ...] = ()
    """What makes it slow here, or is not as it should be."""


@dataclass(frozen=True)
class Part:
    """A part: `measure` runs on every rank, and what it gives by rank goes to `describe`."""

    name: str
    measure: Callable[[Subject, World], Any]
    """May raise anything; where it has collectives, what fails on one rank alone must be `agreed` on before them."""
    describe: Callable[[Subject, Sequence[Any]], Finding]
    remedy: str
    """What would help where it fails."""
    in_turns: bool = False
    """The first rank of each node goes before its other ranks, which find what it left in the node's caches."""
    notice: str = ""
    """What is told before it where it takes long."""


@dataclass(frozen=True)
class Failure:
    """Why a part failed on a rank."""

    reason: str


def examine(part: Part, subject: Subject, world: World) -> Finding:
    """Measures a part on all ranks. Every rank must get here, and no exception leaves it alone."""

    def measure() -> Any:
        return attempt(lambda: part.measure(subject, world))

    outcomes = all_gather(first_on_each_node(world, measure) if part.in_turns else measure())
    failures = [(rank, found.reason) for rank, found in enumerate(outcomes) if isinstance(found, Failure)]
    if not failures:
        return part.describe(subject, outcomes)
    rank, reason = failures[0]
    where = "every rank" if len(failures) == world.size else f"rank {rank}"
    more = f" (and {len(failures) - 1} more)" if 1 < len(failures) < world.size else ""
    return Finding(part.name, problems=(f"{where}{more}: {reason}; what helps: {part.remedy}",))


def attempt(work: Callable[[], T]) -> T | Failure:
    """The result of `work`, or why it failed: whatever it is, the other ranks must hear of it."""
    try:
        return work()
    except Exception as failure:
        first = next((line.strip() for line in str(failure).splitlines() if line.strip()), "")
        is_told = isinstance(failure, (RunError, UserError))
        return Failure(first if is_told else f"{type(failure).__name__}: {first}"[:200])


def agreed(work: Callable[[], T]) -> T:
    """The result of `work`; where it failed on any rank, RunError on all of them, so that none goes on into a
    collective that the others never join. Every rank must get here.
    """

    def told() -> T:
        found = attempt(work)
        if isinstance(found, Failure):
            raise RunError(found.reason)
        return found

    return together(told)


def by_host(hosts: Sequence[str], texts: Sequence[Sequence[str]]) -> tuple[str, ...]:
    """What ranks say, each line once and after the name of its host where there are several."""
    several = len(set(hosts)) > 1
    lines = [f"{host}: {t}" if several else t for host, said in zip(hosts, texts, strict=True) for t in said]
    return tuple(dict.fromkeys(lines))
