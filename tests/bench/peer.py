"""This trainer against TRL's: `python -m tests.bench.peer [--steps 3] [--size tiny]`, into bench/peer.md and peer.png.

Both train from the same weights on the same pairs, given as token ids, with the same optimizer, threads and precision,
one after the other: four workloads, on one process with two threads and on two with one each; one workload with LoRA
too, from the same adapters. Every result is kept as it comes: run it again and it goes on where it stopped. `report.py`
says what the metrics mean.

Exit code 1 where the two did not train on the same ids, or their losses differ by more than 1e-4.
"""

import argparse
import itertools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from tests.bench.jobs import CACHED, FILL, LIVE, PRECOMPUTED, Job, hear, result_of, write_job
from tests.bench.report import disagreements, write_report
from tests.bench.worlds import SIZES, WORKLOADS, save_adapter, save_llama, save_pairs

PAIRS_PER_STEP = 16
THREADS = {1: 2, 2: 1}
"""Threads a rank by number of ranks: two cores in any case."""


@dataclass(frozen=True)
class Setting:
    """How much each trainer runs at a time."""

    micro_batch: int
    """TRL's per_device_train_batch_size, pairs."""
    keys: dict[str, str]
    """Config keys of ours."""
    ranks: dict[str, tuple[int, ...]]
    """Numbers of ranks by workload."""
    checkpointing: bool = False
    """Of both: activations are computed twice."""
    lora: bool = False
    """Both train adapters of `worlds.save_adapter`; TRL's reference is then its own model with these off."""


SETTINGS = {
    "usual": Setting(8, {"batch.tokens_per_micro_batch": "4096"}, dict.fromkeys(WORKLOADS, (1,))),
    "checkpointed": Setting(
        8,
        {"batch.tokens_per_micro_batch": "4096", "parallel.activation_checkpointing": "full"},
        {"hh": (1,)},
        checkpointing=True,
    ),
    "small": Setting(
        1,
        {"batch.tokens_per_micro_batch": "1024"},
        {"hh": (1, 2), "pandalm": (1, 2), "long-prompts": (2,), "long-answers": (2,)},
    ),
    "lora": Setting(8, {"batch.tokens_per_micro_batch": "4096"}, {"hh": (1,)}, lora=True),
}
"""TRL's default of 8 pairs and as much of ours; both with the checkpointing that TRL comes with; less at a time; and as
the first, with LoRA.

TRL is faster with less, since it pads to the longest: 8 HH pairs with the reference precomputed take it 17, 22, 23 and
30 CPU seconds with 1, 2, 4 and 8 pairs at a time, and 1.9, 2.9, 4.3 and 6.8 GiB at most. Ours is as fast and takes less
memory. Two ranks with 8 pairs each would need more memory than many a machine has.
"""
LORA_RATE = 10
"""Learning rate of adapters in units of that of whole models, with which their first steps, from B = 0, do nothing."""
IDENTITY = (
    "trainer",
    "mode",
    "setting",
    "workload",
    "ranks",
    "steps",
    "model",
    "pairs",
    "lr",
    "micro_batch",
    "keys",
    "adapter",
)
"""The fields of a job by which its result is found again."""


def main() -> None:
    """Runs what has no result yet, then writes the report."""
    wish = parse()
    results_file = wish.work / "peer.jsonl"
    for job in jobs(wish):
        known = {identity(result) for result in read_results(results_file)}
        if identity(asdict(job)) in known:
            continue
        print(
            f"{job.workload}, {job.ranks} x {job.threads} threads: {job.trainer}, {job.mode}, {job.setting}", flush=True
        )
        result = measure(job, wish)
        print(f"  seconds a step: {', '.join(f'{s:.2f}' for s in result['step_seconds'])}", flush=True)
        with results_file.open("a", encoding="utf-8") as file:
            print(json.dumps(result), file=file)
    known = {identity(result): result for result in read_results(results_file)}
    results = [known[identity(asdict(job))] for job in jobs(wish)]
    write_report(wish.out, results)
    sys.exit("\n".join(disagreements(results)) or None)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="tests.bench.peer", description=__doc__)
    parser.add_argument("--size", choices=SIZES, default="50m", help="the model; tiny is for trying this program")
    parser.add_argument("--steps", type=int, default=3, help="of each run; the first one is not counted")
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--ranks", nargs="+", type=int, choices=THREADS, default=list(THREADS))
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS), help="micro-batches")
    parser.add_argument("--lr", type=float, default=1e-5)
    parser.add_argument("--trl", type=Path, default=Path(".venv-trl/bin/python"), help="the python that has TRL")
    parser.add_argument("--work", type=Path, default=Path("bench/work"), help="folder of weights, pairs and results")
    parser.add_argument("--out", type=Path, default=Path("bench"), help="folder of the table and the plot")
    return parser.parse_args()


def jobs(wish: argparse.Namespace) -> Iterator[Job]:
    """All runs in their order: ours, then TRL's two, for each workload, number of ranks and setting."""
    model = save_llama(wish.work / f"model-{wish.size}", SIZES[wish.size]).resolve()
    adapter = save_adapter(wish.work / f"adapter-{wish.size}", model).resolve()
    num_pairs = wish.steps * PAIRS_PER_STEP
    for name in wish.workloads:
        file = wish.work / f"{name}-{num_pairs}.jsonl"
        if not file.exists():
            save_pairs(file, WORKLOADS[name].pairs(num_pairs))
        for ranks, setting in itertools.product(wish.ranks, wish.settings):
            chosen = SETTINGS[setting]
            if ranks not in chosen.ranks.get(name, ()):
                continue
            ours = Job(
                trainer="ours",
                mode=CACHED,
                setting=setting,
                workload=name,
                ranks=ranks,
                threads=THREADS[ranks],
                model=str(model),
                pairs=str(file.resolve()),
                group_by_prompt=WORKLOADS[name].group_by_prompt,
                steps=wish.steps,
                pairs_per_step=PAIRS_PER_STEP,
                lr=LORA_RATE * wish.lr if chosen.lora else wish.lr,
                beta=0.1,
                micro_batch=chosen.micro_batch,
                checkpointing=chosen.checkpointing,
                keys=chosen.keys,
                adapter=str(adapter) if chosen.lora else None,
            )
            yield ours
            yield replace(ours, trainer="trl", mode=LIVE)
            yield replace(ours, trainer="trl", mode=PRECOMPUTED)


def measure(job: Job, wish: argparse.Namespace) -> dict[str, Any]:
    """The job's result, from processes of its own; ours is run once before, to fill the cache of the reference."""
    folder = (wish.work / "run").resolve()
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    if job.trainer == "ours":
        filled = launch(replace(job, mode=FILL), folder, sys.executable)
        result = launch(job, folder, sys.executable) | {"reference_seconds": filled["reference_seconds"]}
    else:
        result = launch(job, folder, str(wish.trl.absolute()))
    shutil.rmtree(folder)
    return result


def launch(job: Job, folder: Path, python: str) -> dict[str, Any]:
    """Runs a job in this folder; what it says goes into a log there, which is shown where it fails."""
    file = folder / f"{job.mode}.json"
    write_job(file, job)
    start = [python, "-m"]
    if job.ranks > 1:
        start += ["torch.distributed.run", "--standalone", "--nproc-per-node", str(job.ranks), "-m"]
    environment = os.environ | {
        "OMP_NUM_THREADS": str(job.threads),
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(folder / "hf"),
        "PYTHONPATH": str(Path.cwd()),
    }
    done = subprocess.run([*start, f"tests.bench.peer_{job.trainer}", str(file)], env=environment, capture_output=True)
    if done.returncode:
        sys.exit(f"{job.trainer}, {job.mode} failed:\n{done.stderr.decode(errors='replace')[-8000:]}")
    return result_of(job, hear(file, job.ranks))


def identity(job: dict[str, Any]) -> str:
    """What a result is found by."""
    return json.dumps([job.get(name) for name in IDENTITY], sort_keys=True)


def read_results(file: Path) -> list[dict[str, Any]]:
    """The lines of the results so far."""
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.exists() else []


if __name__ == "__main__":
    main()
