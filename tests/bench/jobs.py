"""What the two trainers that are compared are told and tell: imports nothing that either environment may lack."""

import hashlib
import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

LIVE, PRECOMPUTED, CACHED, FILL = "live", "precomputed", "cached", "fill"


@dataclass(frozen=True)
class Job:
    """A short run of one trainer."""

    trainer: str
    """ours, trl"""
    mode: str
    """trl: live (the reference runs in every step) or precomputed; ours: cached, or fill, which fills the cache."""
    setting: str
    """usual, checkpointed, small, lora: what `micro_batch`, `checkpointing`, `keys` and `adapter` are."""
    workload: str
    ranks: int
    threads: int
    """Of each rank."""
    model: str
    """Folder of the weights."""
    pairs: str
    """JSONL of prompt_ids, chosen_ids, rejected_ids, in the order of training; the first of them are used."""
    group_by_prompt: bool
    steps: int
    pairs_per_step: int
    lr: float
    beta: float
    micro_batch: int
    """TRL's per_device_train_batch_size, pairs."""
    checkpointing: bool
    """TRL's gradient_checkpointing."""
    adapter: str | None = None
    """Folder of the LoRA adapters from which both start; None: both train all weights."""
    keys: dict[str, str] = field(default_factory=dict)
    """Further config keys of ours."""


def read_job(file: Path) -> Job:
    """The job of a file."""
    return Job(**json.loads(file.read_text(encoding="utf-8")))


def write_job(file: Path, job: Job) -> None:
    """The file that `read_job` reads."""
    file.write_text(json.dumps(asdict(job), indent=1), encoding="utf-8")


@dataclass(frozen=True)
class Told:
    """What one rank tells of its run; `losses`, the same on every rank, are those of the whole steps."""

    step_seconds: list[float]
    losses: list[float]
    seen: list[str]
    """Digests of the pairs that the rank trained on, step by step."""
    reference_seconds: float
    """What the reference's log-probabilities took before the first step."""
    import_bytes: int
    """Resident before any weights."""
    peak_bytes: int
    """The most that was resident during the steps."""


def tell(file: Path, told: Told) -> None:
    """Writes it beside the job's file; every rank has a file of its own."""
    _told_file(file, int(os.environ.get("RANK", "0"))).write_text(json.dumps(asdict(told)), encoding="utf-8")


def hear(file: Path, ranks: int) -> list[Told]:
    """What every rank told."""
    return [Told(**json.loads(_told_file(file, rank).read_text(encoding="utf-8"))) for rank in range(ranks)]


def _told_file(file: Path, rank: int) -> Path:
    return file.with_suffix(f".rank{rank}.json")


def digest(prompt_ids: list[int], chosen_ids: list[int], rejected_ids: list[int]) -> str:
    """What stands for the ids of a pair."""
    return hashlib.sha256(json.dumps([prompt_ids, chosen_ids, rejected_ids]).encode()).hexdigest()[:16]


def result_of(job: Job, told: list[Told]) -> dict[str, Any]:
    """A line of the results: the job, and what its ranks told together."""
    return {
        **asdict(job),
        "step_seconds": told[0].step_seconds,
        "losses": told[0].losses,
        "reference_seconds": told[0].reference_seconds,
        "seen": [
            sorted(name for one in told for name in _of_step(one.seen, step, job.steps)) for step in range(job.steps)
        ],
        "import_bytes": max(one.import_bytes for one in told),
        "peak_bytes": max(one.peak_bytes for one in told),
    }


def _of_step(seen: list[str], step: int, steps: int) -> list[str]:
    each = len(seen) // steps
    return seen[step * each : (step + 1) * each]
