"""kill -9 at random moments: `python -m tests.faults.kills --seed 1 --count 20`.

A run of 60 steps on two ranks, AdamW, an asynchronous checkpoint every third step. A random rank is killed `count`
times, at a random moment of the start or of a random step, and the run is started again. At the end metrics and weights
must be those of a run that nobody disturbed, to the last bit. Ends with 1 where they are not.
"""

import argparse
import random
import sys
import tempfile
import time
from pathlib import Path

from dpo.config import Config
from dpo.run_folder.files import FINAL, read_metrics
from tests.faults.worlds import last_step, start_world, wait_for_step
from tests.support.checkpoints import newest_checkpoint
from tests.support.runs import same_weights, save_six_steps, six_steps, without_clock

STEPS, SAVE_EVERY = 60, 3
START_SECONDS = 2.0
"""About as long as a start takes."""
STEP_SECONDS = 0.2
"""A few steps."""


def stormy(root: Path, run_dir: Path) -> Config:
    """The run of the storm."""
    facts = {"train__steps": STEPS, "checkpoint__save_every": SAVE_EVERY, "optim__name": "adamw"}
    return six_steps(root, run_dir, **facts, train__eval_every=20, checkpoint__keep=2)


def disturb(config: Config, kills: list[tuple[int, int, float]]) -> int:
    """Runs to the end through the kills: (step that must be made, rank, moment after it from 0 to 1). The number of
    drafts that they left behind.
    """
    run_dir, drafts = Path(str(config.train.run_dir)), 0
    for step, rank, moment in kills:
        world = start_world(config)
        is_at_start = last_step(run_dir) >= step
        wait_for_step(world, run_dir, step)
        time.sleep(moment * (START_SECONDS if is_at_start else STEP_SECONDS))
        world.kill(rank)
        drafts += len(list((run_dir / "checkpoints").glob("*.tmp")))
        newest = newest_checkpoint(run_dir)
        print(f"killed rank {rank} after step {last_step(run_dir)}; {newest.name if newest else 'no checkpoint'}")
    assert start_world(config).wait() == [0, 0], run_dir.with_suffix(".stderr").read_text()[-3000:]
    return drafts


def faults(run_dir: Path, whole: Path) -> list[str]:
    """What is not as in the run that nobody disturbed."""
    mine, theirs = (
        [line for line in without_clock(read_metrics(folder)) if "reference/rows_computed" not in line]
        for folder in (run_dir, whole)
    )
    found = [f"line {i + 1}: {a} {b}" for i, (a, b) in enumerate(zip(mine, theirs, strict=False)) if a != b]
    if len(mine) != len(theirs):
        found.append(f"{len(mine)} lines of metrics, not {len(theirs)}")
    return found + ([] if same_weights(run_dir / FINAL, whole / FINAL) else ["other weights"])


def storm(root: Path, seed: int, count: int) -> list[str]:
    """The faults of a storm in a folder; none: all is well."""
    save_six_steps(root)
    assert start_world(stormy(root, root / "whole")).wait() == [0, 0], (root / "whole.stderr").read_text()[-3000:]
    draw = random.Random(seed)
    steps = sorted(draw.randrange(STEPS) for _ in range(count))
    drafts = disturb(stormy(root, root / "run"), [(step, draw.randrange(2), draw.random()) for step in steps])
    print(f"{count} kills, {drafts} of them left a draft")
    return faults(root / "run", root / "whole")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=1, help="of the ranks and moments (%(default)s)")
    parser.add_argument("--count", type=int, default=20, help="of the kills (%(default)s)")
    words = parser.parse_args()
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="dpo-kills-") as folder:
        found = storm(Path(folder), words.seed, words.count)
    for fault in found:
        print(f"FAULT: {fault}")
    verdict = f"{len(found)} differences" if found else "equal to the last bit"
    print(f"seed {words.seed}: {words.count} kills in {time.monotonic() - started:.0f} s: {verdict}")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
