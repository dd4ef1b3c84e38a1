"""A short run of this project's trainer: `[torchrun ...] python -m tests.bench.peer_ours JOB.json`.

The job is a `jobs.Job`; each rank tells what it saw. A job of mode `fill` is a run of one step that computes the
reference of all pairs, so that a later one finds it in the cache.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from dpo.config import load_config
from dpo.run_folder.files import read_metrics
from dpo.train import program
from dpo.train.setup import Run
from tests.bench.jobs import FILL, Job, Told, digest, read_job, tell
from tests.bench.memory import peak_bytes, reset_peak, resident_bytes


def words(job: Job, folder: Path) -> list[str]:
    """The command line of `python -m dpo.train` for a job: pairs as they are and in order."""
    keys = {
        "model.path": job.model,
        "reference.cache_dir": folder / "cache",
        "data.train": json.dumps([{"path": job.pairs, "format": "tokens"}]),
        "data.order": "sequential",
        "data.on_bad_row": "stop",
        "data.max_length": "null",
        "data.max_prompt_length": "null",
        "batch.pairs_per_step": job.pairs_per_step,
        "batch.group_by_prompt": str(job.group_by_prompt).lower(),
        "loss.beta": job.beta,
        "optim.lr": job.lr,
        "optim.warmup_steps": 0,
        "train.steps": 1 if job.mode == FILL else job.steps,
        "train.run_dir": folder / job.mode,
        **({"lora.path": job.adapter} if job.adapter else {}),
        **job.keys,
    }
    return [word for key, value in keys.items() for word in (f"--{key}", str(value))]


def run(job: Job, folder: Path) -> Told:
    """Trains, as `python -m dpo.train` does."""
    imports, seen, peaks = resident_bytes(), [], []
    train = program.train

    def watched(run: Run, *others: Any) -> None:
        seen.extend(name for step in range(1, run.inputs.last_step + 1) for name in digests(run, step))
        reset_peak()
        train(run, *others)
        peaks.append(peak_bytes())

    with patch.object(program, "train", watched):
        program.run_training(load_config(words(job, folder), prog="dpo.train"))
    lines = read_metrics(folder / job.mode)
    steps = [line for line in lines if "train/loss" in line]
    seconds = [line["train/step_seconds"] for line in steps]
    reference = sum(line.get("reference/seconds", 0.0) for line in lines)
    return Told(seconds, [line["train/loss"] for line in steps], seen, reference, imports, peaks[0])


def digests(run: Run, step: int) -> list[str]:
    """Of the pairs of a step, all told by rank 0: which rank runs what is the plan's affair."""
    if not run.world.is_main:
        return []
    pairs = run.inputs.data.train.pairs(run.inputs.order.items(step, run.inputs.last_item))
    return [digest(*(ids.tolist() for ids in (p.prompt_ids, p.chosen_ids, p.rejected_ids))) for p in pairs]


def main() -> None:
    """`JOB.json`, in whose folder it may write."""
    file = Path(sys.argv[1])
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    tell(file, run(read_job(file), file.parent))


if __name__ == "__main__":
    main()
