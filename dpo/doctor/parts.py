"""A part of the examination: a measurement on every rank, and the description of all measurements."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from transformers import PretrainedConfig

from dpo.base.errors import RunError, UserError, render
from dpo.config import Config, ParallelConfig
from dpo.disk.sizes import Sizes
from dpo.distributed.collectives import all_gather, first_on_each_node, together
from dpo.distributed.world import World
from dpo.estimate.lengths import Lengths
from dpo.model.parallelize import compute_dtype

T = TypeVar("T")


@dataclass(frozen=True)
class Subject:
    """The layout, the folders and the models to examine, from a config or by default."""

    parallel: ParallelConfig
    dtype: str
    """The dtype of the master weights."""
    run_dir: Path
    cache_dir: Path | None
    """The reference cache; None where the loss has no reference."""
    models: tuple[PretrainedConfig, ...] = ()
    """The policy, and the reference where it is another model; empty where no config was given."""
    config: Config | None = None
    sizes: Sizes | None = None
    """The sizes of the policy; None where no config was given."""
    lengths: Lengths | None = None
    """The trees of some steps; None where no report is written."""

    def compute_dtype(self, device: torch.device) -> torch.dtype:
        """Returns the dtype of the forward and backward pass on a device."""
        return compute_dtype(self.parallel, getattr(torch, self.dtype), device)


@dataclass(frozen=True)
class Finding:
    """The description of a part, the same on every rank."""

    name: str
    lines: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()
    """Reasons why a run would fail here, each with a remedy."""
    advice: tuple[str, ...] = ()
    """Reasons why a run is slow here, and other remarks."""


def _no_notice(subject: Subject, world: World) -> str:
    return ""


@dataclass(frozen=True)
class Part:
    """A part: `measure` runs on every rank, and `describe` receives the results by rank."""

    name: str
    measure: Callable[[Subject, World], Any]
    """May raise anything. Where it calls collectives, work that may fail on one rank alone must go through `agreed`
    first.
    """
    describe: Callable[[Subject, Sequence[Any]], Finding]
    remedy: str
    """The remedy where the part fails."""
    in_turns: bool = False
    """Whether the first rank of each node runs before its other ranks, which reuse its results from the node's
    caches.
    """
    notice: Callable[[Subject, World], str] = _no_notice
    """Returns a message before a part that takes long; else an empty text."""


@dataclass(frozen=True)
class Failure:
    """The failure of a part on a rank."""

    reason: str


def examine(part: Part, subject: Subject, world: World) -> Finding:
    """Measures a part on all ranks and returns its finding. No exception of the measurement leaves this function. Every
    rank must get here, or the rest hang.

    Args:
        part: the part, with its measurement.
        subject: the config and models that are examined.
        world: the ranks.
    """
    return finding_of(part, subject, measured(part, subject, world))


def measured(part: Part, subject: Subject, world: World) -> list[Any]:
    """Returns the results of a part by rank, a Failure in the place of one that failed. Every rank must get here, or
    the rest hang.

    Args:
        part: the part, with its measurement.
        subject: the config and models that are examined.
        world: the ranks.
    """

    def measure() -> Any:
        return attempt(lambda: part.measure(subject, world))

    return all_gather(first_on_each_node(world, measure) if part.in_turns else measure())


def finding_of(part: Part, subject: Subject, results: Sequence[Any]) -> Finding:
    """Returns the description of the results, or of the failure of the lowest rank that failed."""
    failures = [(rank, result.reason) for rank, result in enumerate(results) if isinstance(result, Failure)]
    if not failures:
        return part.describe(subject, results)
    rank, reason = failures[0]
    where = "every rank" if len(failures) == len(results) else f"rank {rank}"
    more = f" (and {len(failures) - 1} more)" if 1 < len(failures) < len(results) else ""
    return Finding(part.name, problems=(with_remedy(f"{where}{more}: {reason}", part.remedy),))


def attempt(work: Callable[[], T]) -> T | Failure:
    """Returns the result of `work`, or its failure as a value, so that the other ranks can be told of it."""
    try:
        return work()
    except Exception as failure:
        first = next((line.strip() for line in str(failure).splitlines() if line.strip()), "")
        is_told = isinstance(failure, (RunError, UserError))
        return Failure(first if is_told else f"{type(failure).__name__}: {first}"[:200])


def agreed(work: Callable[[], T]) -> T:
    """Returns the result of `work`. Raises RunError on all ranks where it failed on any, so that no rank enters a
    collective that the others never join. Every rank must get here, or the rest hang.
    """

    def checked() -> T:
        result = attempt(work)
        if isinstance(result, Failure):
            raise RunError(result.reason)
        return result

    return together(checked)


def with_remedy(what: str, remedy: str) -> str:
    """Returns the line of a problem."""
    return render(what, remedy, label="what helps")


def by_host(hosts: Sequence[str], texts: Sequence[Sequence[str]]) -> tuple[str, ...]:
    """Returns the lines of all ranks, each line once, and after the name of its host where there are several hosts."""
    several = len(set(hosts)) > 1
    lines = [f"{host}: {t}" if several else t for host, lines in zip(hosts, texts, strict=True) for t in lines]
    return tuple(dict.fromkeys(lines))
