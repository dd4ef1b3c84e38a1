"""`python -m tests.faults.storm --seed N --count 200`: prints what became of each damage, and a table.

The exit code is 1 where one was used in silence, left a traceback or a line that names nothing, or hung.
"""

import argparse
import os
import random
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}

import torch

from tests.faults.storm.damages import FOUND, KINDS, Damage, draw
from tests.faults.storm.judging import GOOD, judge, read_result
from tests.faults.storm.starts import config_of, make_runs, start
from tests.support.runs import exit_code


def main() -> int:
    """Runs the storm; the exit code."""
    parser = argparse.ArgumentParser("python -m tests.faults.storm", description=__doc__)
    parser.add_argument("--seed", type=int, default=0, help="of the damages (%(default)s)")
    parser.add_argument("--count", type=int, default=200, help="of the damages (%(default)s)")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS), help="damages of these kinds alone")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="dpo-storm-") as folder:
        outcomes = storm(Path(folder), random.Random(arguments.seed), arguments.count, arguments.kinds)
    print_table(outcomes)
    return int(any(outcome not in GOOD for _, outcome in outcomes))


def storm(folder: Path, rng: random.Random, count: int, kinds: Sequence[str]) -> list[tuple[str, str]]:
    """Damages copies of a run and starts them; (kind, what became of it) of each. Those of FOUND come
    first, beside the `count`.
    """
    root, whole = folder / "work", folder / "whole"
    root.mkdir()
    make_runs(root)
    root.rename(whole)
    usual = {}
    for run in ("dead", "finished"):
        shutil.copytree(whole, root)
        usual[run] = start(root, lambda run=run: exit_code(config_of(root, run))), read_result(root / run)
        shutil.rmtree(root)
    outcomes = []
    for damage in [*(found for found in FOUND if found.kind in kinds), *drawn(whole, rng, count, kinds)]:
        shutil.copytree(whole, root)
        damage.apply(root)
        ended = start(root, lambda run=damage.run: exit_code(config_of(root, run)))
        outcome = judge(damage, ended, read_result(root / damage.run), *usual[damage.run])
        print(f"{len(outcomes):3} {damage}: {outcome}", flush=True)
        outcomes.append((damage.kind, outcome))
        shutil.rmtree(root)
    return outcomes


def drawn(root: Path, rng: random.Random, count: int, kinds: Sequence[str]) -> list[Damage]:
    """Returns random damages of files below `root`, of these kinds alone."""
    found = list[Damage]()
    while len(found) < count:
        damage = draw(root, rng)
        found += [damage] if damage.kind in kinds else []
    return found


def print_table(outcomes: list[tuple[str, str]]) -> None:
    """Prints how many of each kind ended in which way."""
    counts = Counter((kind, outcome if outcome in GOOD else "FAIL") for kind, outcome in outcomes)
    print(f"{'':12}" + "".join(f"{name:>20}" for name in (*GOOD, "FAIL")))
    for kind in KINDS:
        print(f"{kind:12}" + "".join(f"{counts[kind, name]:20}" for name in (*GOOD, "FAIL")))


if __name__ == "__main__":
    sys.exit(main())
