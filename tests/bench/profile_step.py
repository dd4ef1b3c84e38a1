"""One optimizer step under torch's profiler: `python -m tests.bench.profile_step [--workload hh] [--size 50m]`.

Prints what a step costs by operator, in time and in memory, and how the memory of the process grows up to its peak.
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from dpo.batch.costs import model_flops
from dpo.batch.packer import make_packer
from dpo.config import BatchConfig, Config, DataConfig, ModelConfig
from dpo.distributed.startup import open_world, start_devices
from dpo.model.build import load_policy
from dpo.step.optim import make_optimizer
from dpo.step.update import train_step
from tests.bench.memory import peak_bytes, reset_peak, resident_bytes
from tests.bench.worlds import SIZES, WORKLOADS, llama_config, save_llama, step_trees

PAIRS_PER_STEP = 16


def main() -> None:
    """Two steps to warm up, one timed, one under the profiler."""
    parser = argparse.ArgumentParser(prog="tests.bench.profile_step", description=__doc__)
    parser.add_argument("--workload", choices=WORKLOADS, default="hh")
    parser.add_argument("--size", choices=SIZES, default="50m")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tokens-per-micro-batch", type=int, default=BatchConfig.tokens_per_micro_batch)
    parser.add_argument("--work", type=Path, default=Path("bench/work"))
    wish = parser.parse_args()
    torch.set_num_threads(wish.threads)
    step = make_step(wish)
    for _ in range(2):
        told("a step", step)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    for key in ("self_cpu_time_total", "self_cpu_memory_usage"):
        print(profiler.key_averages().table(sort_by=key, row_limit=20, max_name_column_width=60))


def make_step(wish: argparse.Namespace) -> Callable[[], object]:
    """What runs one step on the first pairs of a workload; the same pairs each time."""
    told("imports", lambda: None)
    folder = save_llama(wish.work / f"model-{wish.size}", SIZES[wish.size])
    batch = BatchConfig(pairs_per_step=PAIRS_PER_STEP, tokens_per_micro_batch=wish.tokens_per_micro_batch)
    config = Config(model=ModelConfig(path=str(folder)), data=DataConfig(train=[]), batch=batch)
    trees = step_trees(WORKLOADS[wish.workload].pairs(PAIRS_PER_STEP), PAIRS_PER_STEP)[0]
    world = open_world(600).__enter__()
    start_devices(world, 600)
    model_config = llama_config(SIZES[wish.size])
    policy = told("weights", lambda: load_policy(config, world, model_config, folder))
    optimizer = make_optimizer(policy.model.parameters(), replace(config.optim, lr=0.0))
    packer = replace(make_packer(config, world, model_config), ref_logps=lambda *_: 0.0)
    plan = packer.plan(trees)
    batches = packer.pack(plan)
    tokens, rows = sum(tree.num_tokens for tree in trees), sum(tree.num_scored for tree in trees)
    print(f"{len(trees)} trees, {tokens} tokens, {rows} rows of the head, {len(batches)} micro-batches")
    print(f"{model_flops(plan.forward_flops) / 1e9:.0f} GFLOP in a step without recomputation")
    return lambda: train_step(policy, optimizer, batches, config, 0.0, lambda: False)


def told(name: str, work: Callable[[], object]) -> object:
    """Does it, and prints its seconds, and the process's memory after it and at its peak."""
    reset_peak()
    started = time.perf_counter()
    result = work()
    seconds = time.perf_counter() - started
    print(f"{name:12} {seconds:7.2f} s   {resident_bytes() / 2**20:7.0f} MiB now, {peak_bytes() / 2**20:7.0f} at most")
    return result


if __name__ == "__main__":
    main()
