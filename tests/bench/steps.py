"""Steps of made-up models on made-up trees, timed: `[torchrun …] python -m tests.bench.steps CASES.json OUT.json`.

Every rank runs the cases of the file in turn; rank 0 writes a result for each. A case is a step of equal trees on a
Llama with random weights; its FLOPs are those of `dpo/batch/costs.py`.
"""

import json
import resource
import statistics
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import LlamaConfig

from dpo.batch.costs import cost_model, step_flops, units
from dpo.batch.packing import pack
from dpo.batch.plan import plan_step
from dpo.batch.trees import Tree
from dpo.config import Config, ParallelConfig
from dpo.distributed.startup import open_world, start_devices
from dpo.distributed.world import World, make_mesh
from dpo.model.build import build_policy
from dpo.model.log_probs import recomputed_share
from dpo.model.parallelize import compute_dtype
from dpo.step.optim import make_optimizer
from dpo.step.update import train_step

HEAD_BYTES = 64 * 2**20


@dataclass(frozen=True)
class Case:
    """A step of `trees` equal trees, of one prompt and some completions with a pair between each two neighbours."""

    trees: int = 16
    prompt: int = 128
    completions: int = 2
    completion: int = 64
    tokens_per_micro_batch: int = 4096
    vocabulary: int = 8192
    hidden: int = 256
    layers: int = 4
    steps: int = 5


def make_trees(case: Case) -> list[Tree]:
    """Random tokens, the same ones on every rank."""
    rng = np.random.default_rng(0)

    def ids(length: int) -> np.ndarray:
        return rng.integers(3, case.vocabulary, length).astype(np.int32)

    pairs = tuple((k, k + 1) for k in range(case.completions - 1))
    completions = [tuple(ids(case.completion) for _ in range(case.completions)) for _ in range(case.trees)]
    return [Tree(ids(case.prompt), some, pairs) for some in completions]


def model_config(case: Case) -> LlamaConfig:
    """Heads of 64, an MLP of 8/3 the width, a head of its own."""
    return LlamaConfig(
        vocab_size=case.vocabulary,
        hidden_size=case.hidden,
        intermediate_size=8 * case.hidden // 3,
        num_hidden_layers=case.layers,
        num_attention_heads=case.hidden // 64,
        tie_word_embeddings=False,
    )


def measure(case: Case, world: World) -> dict[str, float]:
    """Median seconds of the case's steps after a first one, its FLOPs, and the process's peak memory so far, bytes."""
    parallel = ParallelConfig()
    policy = build_policy(model_config(case), parallel, "float32", make_mesh(world, parallel))
    _fill(policy.model)
    config = Config(model=None, data=None, parallel=parallel)  # type: ignore[arg-type]
    optimizer = make_optimizer(policy.model.parameters(), config.optim)
    trees, costs = make_trees(case), cost_model(policy.config)
    plan = plan_step(trees, world.size, case.tokens_per_micro_batch, costs)
    seconds = []
    for _ in range(case.steps + 1):
        batches = [pack(micro, plan, lambda *_: -700.0, policy.row_format) for micro in plan.micro_batches[world.lane]]
        started = time.perf_counter()
        train_step(policy, optimizer, batches, config, config.optim.lr, lambda: False)
        seconds.append(time.perf_counter() - started)
    rows = max(sum(tree.num_scored for tree in micro) for micro in plan.micro_batches[0])
    dtype = compute_dtype(parallel, policy.dtype, policy.device)
    paid = units("none", recomputed_share(rows, case.vocabulary, dtype, HEAD_BYTES, policy.device.type))
    return {
        "seconds": statistics.median(seconds[1:]),
        "flops": step_flops(trees, costs, paid),
        "micro_batches": plan.num_micro_batches,
        "tokens": sum(tree.num_tokens for tree in trees),
        "peak_bytes": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
    }


def _fill(model: nn.Module) -> None:
    """Weights as a Llama is made with: products of 0.02, norms of 1."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        assert isinstance(parameter, DTensor)
        local = parameter.to_local().detach()
        if parameter.dim() == 1:
            local.fill_(1.0)
        else:
            local.normal_(0.0, 0.02)


def main() -> None:
    """Measures the cases of a file."""
    cases, out = (Path(word) for word in sys.argv[1:])
    with open_world(600) as world:
        start_devices(world, 600)
        results = []
        for facts in json.loads(cases.read_text(encoding="utf-8")):
            case = Case(**facts)
            results.append({**asdict(case), **measure(case, world), "ranks": world.size})
            if world.is_main:
                out.write_text(json.dumps(results, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
