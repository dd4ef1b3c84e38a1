"""Useful steps of a run that loses ranks: `python -m tests.bench.goodput --failures-every 200 --steps 2000`.

Two ranks train a tiny model with a checkpoint every `--save-every` steps. A random rank is killed by kill -9 at random
steps, `--failures-every` steps apart in the mean, at a random moment within a step, and the run is started again until
its steps are made. Prints, for each of `--seeds`, the steps that were made in all (those of the log, and those that
were lost with a rank), and how many of them were useful. Ranks are forked from a process that has imported everything.
Ends with 1 where the mean is below `--target`.

A failure is expected to cost half of `save_every` steps, the one that it interrupts, and the steps that are made while
a checkpoint is written. `--step-seconds` makes a step last that long, as on real models: against the steps of a tiny
model, which take 20 ms, even the writing of a tiny checkpoint is slow.
"""

import argparse
import random
import statistics
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

from dpo.config import Config
from dpo.run_folder.files import read_metrics
from tests.faults.worlds import last_step, start_world, wait_for_step
from tests.support.checkpoints import newest_checkpoint
from tests.support.runs import save_six_steps, six_steps


def slow_steps(seconds: float, rank: int) -> None:
    """Has each step last so many seconds at least: it sleeps before its update."""
    from dpo.train import loop

    step = loop.train_step

    def slow(*args: object) -> object:
        time.sleep(seconds)
        return step(*args)

    loop.train_step = slow  # type: ignore[assignment]


def run_through(config: Config, draw: random.Random, every: int, seconds: float) -> tuple[int, int]:
    """Runs to the end; (steps made in all, kills)."""
    run_dir, last = Path(str(config.train.run_dir)), int(config.train.steps or 0)
    made = kills = begun = 0
    made_in_all_at_kill = draw.expovariate(1 / every)
    while True:
        world = start_world(config, arrange=partial(slow_steps, seconds))
        target = begun + round(made_in_all_at_kill - made)
        if target >= last or not wait_for_step(world, run_dir, max(target, begun + 1)):
            assert world.wait() == [0, 0], world.stderr.read_text()[-3000:]
            return made + last - begun, kills
        time.sleep(draw.random() * seconds)
        world.kill(draw.randrange(2))
        newest, kills = newest_checkpoint(run_dir), kills + 1
        reached, saved = last_step(run_dir), int(newest.name[-6:]) if newest else 0
        made += reached + 1 - begun  # and the step that was interrupted
        begun = saved
        made_in_all_at_kill = made + draw.expovariate(1 / every)
        print(f"  kill {kills}: step {reached}, goes on from {saved}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--failures-every", type=int, default=200)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--save-every", type=int, default=10)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--step-seconds", type=float, default=0.05)
    parser.add_argument("--target", type=float, default=95.5, help="percent of useful steps in the mean")
    words = parser.parse_args()
    shares = []
    with tempfile.TemporaryDirectory(prefix="dpo-goodput-") as folder:
        root = save_six_steps(Path(folder))
        for seed in range(1, words.seeds + 1):
            facts = {"train__steps": words.steps, "checkpoint__save_every": words.save_every, "checkpoint__keep": 2}
            config = six_steps(root, root / f"run-{seed}", **facts, train__eval_every=None, optim__name="adamw")
            started = time.monotonic()
            made, kills = run_through(config, random.Random(seed), words.failures_every, words.step_seconds)
            steps = [line["step"] for line in read_metrics(root / f"run-{seed}") if "train/loss" in line]
            assert steps == list(range(1, words.steps + 1)), "the log has each step once"
            shares.append(100 * words.steps / made)
            lost = (made - words.steps) / max(1, kills)
            took = time.monotonic() - started
            facts_of_seed = f"{made:,} steps run, {kills} kills, {lost:.1f} lost each, {took:.0f} s"
            print(f"seed {seed}: {facts_of_seed}: {shares[-1]:.2f} % useful", flush=True)
    mean = statistics.fmean(shares)
    print(f"mean of {words.seeds} seeds: {mean:.2f} % useful; at least {words.target} % wanted")
    return 0 if mean >= words.target else 1


if __name__ == "__main__":
    sys.exit(main())
