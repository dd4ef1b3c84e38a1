"""What many ranks cost: `python -m tests.bench.many_ranks 4 8 16 32 [--replicate 2] [--work FOLDER]`.

Trains a tiny model over gloo under torchrun with each number of ranks (`tests.bench.rank_counts`), and prints a table:
the file descriptors of the rank that has most beside those that `dpo.distributed.descriptors` computes; those of
torchrun likewise; the seconds in which all ranks made one more group, and the processor seconds of a rank in them; and
the private memory of a rank. The last lines are the formula's for ranks that no machine here has.

32 ranks take 11 GiB of memory and, on two cores, three minutes, most of which go into imports.
"""

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from dpo.config import to_yaml
from dpo.distributed.descriptors import need_of_agent, need_of_rank, sockets_of_rank
from dpo.distributed.timeouts import arrival_seconds, leave_seconds
from tests.bench.rank_counts import Counts
from tests.support.models import save_model, save_pairs
from tests.support.runs import make_config

ROOT = Path(__file__).parents[2]
"""The folder from which `python -m` finds the ranks' program."""
BEYOND = (64, 128, 256, 512, 1024)


def training(folder: Path, size: int, replicate: int) -> list[str]:
    """The command of a training on `size` ranks for four steps, with a checkpoint after the second, whose ranks count;
    its input is written to `folder`.
    """
    config = make_config(
        save_model(folder / "model", "llama"),
        save_pairs(folder / "pairs.jsonl", 64),
        folder / "run",
        train__steps=4,
        checkpoint__save_every=2,
        optim__warmup_steps=0,
        eval__samples=0,
        parallel__replicate=replicate,
        reference__cache_dir=str(folder / "cache"),
    )
    file = folder / "config.yaml"
    file.write_text(to_yaml(config), encoding="utf-8")
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(size)]
    return [*run, "-m", "tests.bench.rank_counts", str(folder), "--config", str(file)]


def read_counts(folder: Path, size: int) -> list[Counts]:
    """The counts of each rank of a training."""
    files = [folder / f"rank-{rank}.json" for rank in range(size)]
    return [Counts(**json.loads(file.read_text(encoding="utf-8"))) for file in files]


def count(folder: Path, size: int, replicate: int) -> list[Counts]:
    """Trains in an emptied folder; returns the counts of each rank."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    subprocess.run([*training(folder, size, replicate), "--quiet"], cwd=ROOT, check=True, stderr=subprocess.DEVNULL)
    return read_counts(folder, size)


HEAD = (
    "ranks",
    "sockets",
    "formula",
    "descriptors, most",
    "formula",
    "torchrun",
    "formula",
    "group, s",
    "group, CPU s per rank",
    "private MiB",
)


def row(size: int, replicate: int, counts: Sequence[Counts]) -> list[str]:
    """The row of a number of ranks; without counts the formula's."""
    measured = ["", "", "", "", "", ""]
    if counts:
        measured = [
            str(max(count.held["socket"] for count in counts)),
            str(max(count.most for count in counts)),
            str(max(sum(count.of_agent.values()) for count in counts)),
            f"{max(count.seconds['further'] for count in counts):.3f}",
            f"{sum(count.seconds['further_cpu'] for count in counts) / size:.4f}",
            f"{max(count.private_bytes for count in counts) / 2**20:.0f}",
        ]
    formula = [sockets_of_rank(size, replicate), need_of_rank(size, replicate), need_of_agent(size, 1)]
    pairs = [text for pair in zip(measured[:3], map(str, formula), strict=True) for text in pair]
    return [str(size), *pairs, *measured[3:]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sizes", type=int, nargs="+", metavar="RANKS")
    parser.add_argument("--replicate", type=int, default=1)
    parser.add_argument("--work", type=Path, default=Path("bench/many_ranks"))
    args = parser.parse_args()
    work = args.work.absolute()
    print(" | ".join(HEAD))
    for size in args.sizes:
        print(" | ".join(row(size, args.replicate, count(work, size, args.replicate))), flush=True)
    for size in BEYOND:
        print(" | ".join(row(size, args.replicate, ())))
    for size in (*args.sizes, *BEYOND):
        print(f"{size} ranks: arrival_seconds {arrival_seconds(size)}, leave_seconds {leave_seconds(size)}")


if __name__ == "__main__":
    main()
