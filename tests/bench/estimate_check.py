"""`python -m dpo.estimate` against two real processes: `python -m tests.bench.estimate_check [--out bench]`.

A Llama of 39 million weights on four trees a rank, under several settings. Beside the estimate of a rank's peak stand,
of rank 0 after two steps: what torch's allocator had given out at once; and beside the estimate with what it assumes of
the process itself, the greatest resident set of the process (VmHWM). Every process is a fresh one.
"""

import argparse
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch.distributed import Work
from torch.distributed.tensor import DTensor
from transformers import LlamaConfig

from dpo.adapters.choice import find_adapters
from dpo.adapters.inject import trained
from dpo.batch.costs import cost_model
from dpo.batch.packing import pack
from dpo.batch.plan import StepPlan, plan_step
from dpo.batch.trees import Tree
from dpo.config import Config
from dpo.distributed.startup import open_world, start_devices
from dpo.distributed.world import make_mesh
from dpo.estimate.devices import this_machine
from dpo.estimate.lengths import largest_micro_batches
from dpo.estimate.memory import Memory, step_memory
from dpo.model.build import build_policy
from dpo.step.optim import make_optimizer
from dpo.step.update import train_step
from tests.bench.memory import peak_bytes, reset_peak
from tests.support.live_bytes import allocated
from tests.support.ranks import Ranks
from tests.support.runs import make_config

MODEL = LlamaConfig(
    vocab_size=32768,
    hidden_size=384,
    intermediate_size=1024,
    num_hidden_layers=8,
    num_attention_heads=6,
    num_key_value_heads=2,
    tie_word_embeddings=False,
)
NUM_RANKS = 2
NEGLIGIBLE = 2**20  # bytes that may stay held; the smallest copy of gloo has six times as many
TREES = [Tree(np.zeros(64, np.int32), (np.full(64, 1, np.int32), np.full(64, 2, np.int32)), ((0, 1),))] * 8

CASES: dict[str, dict[str, Any]] = {
    "defaults": {},
    "one micro-batch": {"batch__tokens_per_micro_batch": 768},
    "full checkpointing": {"parallel__activation_checkpointing": "full"},
    "selective checkpointing": {"parallel__activation_checkpointing": "selective"},
    "gradients on every micro-batch": {"parallel__sync_gradients": "every_micro_batch"},
    "weights kept": {"parallel__reshard_after_forward": False},
    "head in chunks": {"parallel__head_memory_mib": 4},
    "all that saves memory": {
        "parallel__activation_checkpointing": "full",
        "parallel__sync_gradients": "every_micro_batch",
        "parallel__head_memory_mib": 4,
    },
    "two copies": {"parallel__replicate": 2},
    "AdamW": {"optim__name": "adamw"},
    "adapters": {"lora__rank": 16, "optim__name": "adamw"},
    "adapters, all that saves memory": {
        "lora__rank": 16,
        "optim__name": "adamw",
        "parallel__compute_dtype": "bfloat16",
        "parallel__activation_checkpointing": "full",
        "parallel__sync_gradients": "every_micro_batch",
        "parallel__head_memory_mib": 4,
    },
    "adapters and embeddings": {"lora__rank": 16, "lora__train_embeddings": True},
}


def config_of(case: Mapping[str, Any]) -> Config:
    """Two micro-batches of two trees where the case says nothing else."""
    facts = {
        "batch__tokens_per_micro_batch": 384,
        "parallel__compute_dtype": "float32",
        "parallel__activation_checkpointing": "none",
        "parallel__sync_gradients": "last_micro_batch",
    }
    return make_config("no model", "no data", "no run", **(facts | case))


def plan_of(config: Config, num_ranks: int) -> StepPlan:
    """The plan of a step."""
    return plan_step(TREES, num_ranks, config.batch.tokens_per_micro_batch, cost_model(MODEL))


def estimated(config: Config, num_ranks: int = NUM_RANKS, on_cuda: bool = False) -> Memory:
    """What `dpo.estimate` says of a step."""
    largest = largest_micro_batches([plan_of(config, num_ranks)])[0]
    return step_memory(config, MODEL, num_ranks, *largest, on_cuda)


# --- on a rank -------------------------------------------------------------------------------------------------------


def two_steps(config: Config, model: LlamaConfig = MODEL) -> None:
    """Builds the policy and trains it two steps: from the second on the optimizer has its state."""
    with open_world(120) as world:
        start_devices(world, 120)
        mesh = make_mesh(world, config.parallel)
        policy = build_policy(model, config.parallel, config.model.dtype, mesh, adapters=find_adapters(config))
        for parameter in policy.model.parameters():
            assert isinstance(parameter, DTensor)
            parameter.to_local().detach().normal_(0.0, 0.02)
        optimizer = make_optimizer(trained(policy.model.parameters()), config.optim)
        plan = plan_of(config, world.size)
        for _ in range(2):
            batches = [
                pack(trees, plan, lambda *_: -700.0, policy.row_format) for trees in plan.micro_batches[world.lane]
            ]
            train_step(policy, optimizer, batches, config, config.optim.lr, lambda: False)


def given_out(config: Config) -> tuple[int, int]:
    """The most bytes that torch's allocator had given out at once: tensors, and what kernels and gloo take. And those
    that it was not seen to take back.

    A pause after each collective lets gloo's thread let go of its copy first, so that this thread frees it: see
    `allocated`.
    """

    def wait_and_pause(work: Work, *how: Any) -> bool:
        done = wait(work, *how)
        time.sleep(0.005)
        return done

    wait = Work.wait
    with patch.object(Work, "wait", wait_and_pause):
        return allocated(lambda: two_steps(config))


def resident(config: Config) -> int:
    """The greatest resident set of this process in two steps, bytes."""
    reset_peak()
    two_steps(config)
    return peak_bytes()


# --- over the ranks --------------------------------------------------------------------------------------------------


def peaks_given_out(ranks: Ranks, config: Config) -> list[int]:
    """Per rank the first of up to 20 peaks at which the profiler saw all bytes come back; see `allocated`."""
    found: dict[int, int] = {}
    for _ in range(20):
        for rank, (peak, kept) in enumerate(ranks(NUM_RANKS, given_out, config)):
            if kept < NEGLIGIBLE:
                found.setdefault(rank, peak)
        if len(found) == NUM_RANKS:
            return [found[rank] for rank in range(NUM_RANKS)]
    raise AssertionError(f"of ranks {set(range(NUM_RANKS)) - set(found)} no measurement saw all bytes come back")


# --- the table -------------------------------------------------------------------------------------------------------


def measure(config: Config) -> tuple[float, ...]:
    """MiB: estimated and given out, estimated and resident of the whole process; the seconds that the estimate took."""
    started = time.perf_counter()
    peak = estimated(config).peak
    seconds = time.perf_counter() - started
    whole = peak + this_machine(NUM_RANKS).process_bytes(peak)
    given = _on_fresh_ranks(lambda ranks: peaks_given_out(ranks, config))
    found = (peak, given, whole, _on_fresh_ranks(lambda ranks: ranks(NUM_RANKS, resident, config)))
    return (*(number / 2**20 for number in found), seconds)


def _on_fresh_ranks(measured: Callable[[Ranks], list[int]]) -> int:
    """What is measured of rank 0."""
    ranks = Ranks()
    try:
        ranks(NUM_RANKS, load_code)
        return measured(ranks)[0]
    finally:
        ranks.close()


def load_code() -> None:
    """What a process loads when it first runs a model belongs to no step: a tiny one runs before."""
    model = LlamaConfig(vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1)
    two_steps(config_of({}), model)


def table(rows: Mapping[str, Sequence[float]]) -> list[str]:
    """The results as Markdown."""
    lines = [
        "# What `dpo.estimate` says of a rank's peak, against two real processes, MiB",
        "",
        "| | tensors, estimated | seen | ratio | process, estimated | seen | ratio | seconds of the estimate |",
        "|---|" + "---:|" * 7,
    ]
    for name, (said, given, whole, grown, seconds) in rows.items():
        cells = f"{said:.0f} | {given:.0f} | {said / given:.3f} | {whole:.0f} | {grown:.0f} | {whole / grown:.3f}"
        lines.append(f"| {name} | {cells} | {seconds:.1f} |")
    return lines


def main() -> None:
    """Writes estimate.md."""
    parser = argparse.ArgumentParser(prog="tests.bench.estimate_check", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("bench"))
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    lines = table({name: measure(config_of(case)) for name, case in CASES.items()})
    (out / "estimate.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(*lines, sep="\n")


if __name__ == "__main__":
    main()
