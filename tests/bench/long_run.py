"""What grows in a long run: `python -m tests.bench.long_run --steps 3000`.

Two ranks train a tiny model with 120 checkpoints and 30 evaluations. Prints, every 500 steps, the private resident
memory (Private_Dirty and Private_Clean of smaps_rollup), the open descriptors and the threads of both ranks, and the
bytes of metrics.jsonl, of TensorBoard's files and of the log, per step. Ends with 1 where memory grows by 2 % or more,
or descriptors or threads by any, from step 1,000 on.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dpo.run_folder.files import LOG, METRICS, TENSORBOARD
from tests.faults.worlds import start_world, wait_for_step
from tests.support.runs import save_six_steps, six_steps

FLAT_FROM, GROWTH = 1000, 0.02


@dataclass(frozen=True)
class Look:
    """A run's ranks and files after a step."""

    step: int
    private: tuple[int, ...]
    """Bytes, by rank."""
    descriptors: tuple[int, ...]
    threads: tuple[int, ...]
    files: tuple[int, ...]
    """Bytes of metrics.jsonl, of TensorBoard's files, of the log."""


def look(step: int, pids: Sequence[int], run_dir: Path) -> Look:
    """Looks at the processes and files of a run, at descriptors and threads while no checkpoint is written."""
    boards = sum(path.stat().st_size for path in (run_dir / TENSORBOARD).rglob("*") if path.is_file())
    files = ((run_dir / METRICS).stat().st_size, boards, (run_dir / LOG).stat().st_size)
    return Look(
        step,
        tuple(private_bytes(pid) for pid in pids),
        tuple(fewest(Path(f"/proc/{pid}/fd")) for pid in pids),
        tuple(fewest(Path(f"/proc/{pid}/task")) for pid in pids),
        files,
    )


def fewest(folder: Path) -> int:
    """The fewest files in a folder of /proc within a third of a second: a checkpoint is written by a thread."""
    counts = []
    for _ in range(30):
        counts.append(len(list(folder.iterdir())))
        time.sleep(0.01)
    return min(counts)


def private_bytes(pid: int) -> int:
    """The bytes of the pages that a process alone maps."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii").splitlines()
    return sum(1024 * int(line.split()[1]) for line in lines if line.startswith("Private_"))


def row(found: Look, before: Look | None) -> str:
    """A row of the table; bytes of files are per step since the look before."""
    steps = found.step - (before.step if before else 0)
    per_step = [
        (now - then) / steps for now, then in zip(found.files, before.files if before else (0,) * 3, strict=True)
    ]
    memory = " ".join(f"{size / 2**20:7.1f}" for size in found.private)
    counts = " ".join(f"{count:4}" for count in (*found.descriptors, *found.threads))
    return f"{found.step:>6}  {memory}  {counts}  {' '.join(f'{size:7.0f}' for size in per_step)}"


def growth(looks: Sequence[Look]) -> list[str]:
    """What has grown since FLAT_FROM."""
    first, last = next(found for found in looks if found.step >= FLAT_FROM), looks[-1]
    found = [
        f"rank {rank}: private memory by {100 * (now / then - 1):.1f} %"
        for rank, (then, now) in enumerate(zip(first.private, last.private, strict=True))
        if now >= then * (1 + GROWTH)
    ]
    found += [f"descriptors {first.descriptors} -> {last.descriptors}"] * (last.descriptors > first.descriptors)
    return found + [f"threads {first.threads} -> {last.threads}"] * (last.threads > first.threads)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--every", type=int, default=500)
    words = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="dpo-long-") as folder:
        root = save_six_steps(Path(folder))
        each = {"checkpoint__save_every": words.steps // 120, "train__eval_every": words.steps // 30}
        more = 100  # so that the ranks are there when they are looked at for the last time
        config = six_steps(root, root / "run", train__steps=words.steps + more, checkpoint__keep=2, **each)
        started, world, looks = time.monotonic(), start_world(config), []
        pids = [int(process.pid or 0) for process in world.ranks]
        print("  step  MiB of rank 0, 1   fd 0, 1  thr 0, 1   bytes a step: metrics, board, log")
        for step in range(words.every, words.steps + 1, words.every):
            assert wait_for_step(world, root / "run", step), world.stderr.read_text()[-3000:]
            looks.append(look(step, pids, root / "run"))
            print(row(looks[-1], looks[-2] if len(looks) > 1 else None), flush=True)
        assert world.wait() == [0, 0], world.stderr.read_text()[-3000:]
    found = growth(looks)
    print(f"{words.steps} steps in {time.monotonic() - started:.0f} s: {'; '.join(found) or 'flat'}")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
