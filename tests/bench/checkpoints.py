"""How long a checkpoint holds the training: `python -m tests.bench.checkpoints [--out bench]`, into checkpoints.md.

The 50M Llama on HH, the same 64 pairs in each of seven steps, a checkpoint after every second one, on one process with
two threads and on two with one each. *held*: the seconds that `Saver.save` keeps the training thread, of the first
checkpoint, for which the copies get their memory, and the most of the later ones; each beside the median step during
which nothing is written. *written in*: the most seconds from there until a checkpoint has its name, of the thread that
writes it; *step meanwhile*: the median step that follows a checkpoint. On CPUs that thread and the steps share the
cores.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

from dpo.checkpoint import saver as saving
from dpo.config import load_config
from dpo.run_folder.files import read_metrics
from dpo.train import program
from tests.bench.worlds import SIZES, hh_pairs, save_llama, save_pairs

STEPS, PAIRS_PER_STEP = 7, 64
THREADS = {1: 2, 2: 1}
"""Threads a rank by number of ranks."""
TITLES = (
    "processes",
    "s a step",
    "first held, s",
    "of a step",
    "later held, s",
    "of a step",
    "written in, s",
    "step meanwhile",
)

# --- on a rank -------------------------------------------------------------------------------------------------------


def timed(function: Callable[..., Any], seconds: list[float]) -> Callable[..., Any]:
    """The same, and what each call took is added to `seconds`."""

    def call(*args: Any, **named: Any) -> Any:
        started = time.perf_counter()
        result = function(*args, **named)
        seconds.append(time.perf_counter() - started)
        return result

    return call


def run(folder: Path) -> dict[str, list[float]]:
    """Trains on the model and the pairs in a folder; seconds of the steps, the saves and the writing."""
    words = {
        "model.path": folder / "model",
        "reference.cache_dir": folder / "cache",
        "data.train": json.dumps([{"path": str(folder / "pairs.jsonl"), "format": "tokens"}]),
        "train.steps": STEPS,
        "train.run_dir": folder / "run",
        "checkpoint.save_every": 2,
        "checkpoint.keep": 1,
    }
    config = load_config([w for key, value in words.items() for w in (f"--{key}", str(value))], "dpo.train", "")
    held: list[float] = []
    written: list[float] = []
    with (
        patch.object(saving.Saver, "save", timed(saving.Saver.save, held)),
        patch.object(saving, "write_checkpoint", timed(saving.write_checkpoint, written)),
    ):
        program.run_training(config)
    steps = [line["train/step_seconds"] for line in read_metrics(folder / "run") if "train/step_seconds" in line]
    return {"steps": steps, "held": held, "written": written}


# --- the table -------------------------------------------------------------------------------------------------------


def measure(ranks: int, folder: Path) -> dict[str, list[float]]:
    """What rank 0 of so many tells."""
    shutil.rmtree(folder / "run", ignore_errors=True)
    start = [sys.executable, "-m"]
    if ranks > 1:
        start += ["torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), "-m"]
    environment = os.environ | {"OMP_NUM_THREADS": str(THREADS[ranks])}
    subprocess.run([*start, "tests.bench.checkpoints", "--rank-of", str(folder)], env=environment, check=True)
    return json.loads((folder / "seconds.json").read_text(encoding="utf-8"))


def row(ranks: int, told: dict[str, list[float]]) -> str:
    """A line of the table."""
    first, later = told["held"][0], max(told["held"][1:])
    step = statistics.median(told["steps"][1::2])  # steps 3, 5 and 7 come after a checkpoint
    cells = [str(ranks), f"{step:.1f}"]
    for held in (first, later):
        cells += [f"{held:.2f}", f"{held / step:.1%}"]
    cells += [f"{max(told['written']):.1f}", f"{statistics.median(told['steps'][2::2]):.1f}"]
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    """Prints the table and writes it."""
    parser = argparse.ArgumentParser(prog="tests.bench.checkpoints", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("bench"))
    parser.add_argument("--rank-of", type=Path, help=argparse.SUPPRESS)
    wish = parser.parse_args()
    if wish.rank_of:
        told = run(wish.rank_of)
        if os.environ.get("RANK", "0") == "0":
            (wish.rank_of / "seconds.json").write_text(json.dumps(told), encoding="utf-8")
        return
    folder = (wish.out / "work" / "checkpoints").resolve()
    save_llama(folder / "model", SIZES["50m"])
    save_pairs(folder / "pairs.jsonl", hh_pairs(PAIRS_PER_STEP))
    lines = ["# What a checkpoint holds", "", "| " + " | ".join(TITLES) + " |", "|---" * len(TITLES) + "|"]
    lines += [row(ranks, measure(ranks, folder)) for ranks in THREADS]
    (wish.out / "checkpoints.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(*lines, sep="\n")
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
