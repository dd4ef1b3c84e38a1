"""Steps of a full-size model on the GPUs at hand: `[torchrun …] python -m tests.bench.device [--layers 24]`.

Weights are random and pairs made up, so nothing is downloaded. Rank 0 prints JSON lines: the first step's check against
log-probabilities of another packing; whether a step computed twice gives the same gradient to the bit; each step's
seconds, tokens per second, model FLOPs utilization and peak memory; and, last, the row of the README's table. Other
words are keys of the config. On a CPU, `--model tiny` tries this program.
"""

import argparse
import json
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import LlamaConfig

from dpo.base.spawned import in_own_process
from dpo.batch.costs import model_flops
from dpo.batch.packer import Packer, make_packer
from dpo.batch.plan import StepPlan
from dpo.batch.trees import Tree, grow_trees
from dpo.config import Config, load_config
from dpo.distributed.collectives import all_gather
from dpo.distributed.preemption import never
from dpo.distributed.program import exit_program
from dpo.distributed.startup import open_world, start_devices
from dpo.distributed.world import World, make_mesh
from dpo.estimate.lengths import largest_micro_batches
from dpo.estimate.memory import step_memory
from dpo.machine.data_sheets import GIB
from dpo.machine.peaks import peak_flops
from dpo.model.build import build_policy
from dpo.model.parallelize import compute_dtype
from dpo.model.policy import Policy, announce_backward, completion_logps
from dpo.model.warm_up import warm_up
from dpo.pairs.pair_set import Pair
from dpo.pairs.tokens import completion_key
from dpo.step.deviation import Deviation, rounding_scale
from dpo.step.first_step import Terms, verify_start
from dpo.step.objective import pair_losses
from dpo.step.optim import make_optimizer, set_lr
from dpo.step.update import train_step

PAIRS_PER_STEP = 64
Facts = dict[str, Any]


@dataclass(frozen=True)
class Size:
    """A Llama by its sizes, with a head of its own."""

    hidden: int
    mlp: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int


SIZES = {
    "llama-8b": Size(4096, 14336, 32, 32, 8, 128256),
    "llama-1b": Size(2048, 8192, 16, 32, 8, 128256),
    "tiny": Size(64, 128, 2, 4, 2, 512),
}


def model_config(size: Size, layers: int) -> LlamaConfig:
    """The model's config with so many layers."""
    return LlamaConfig(
        vocab_size=size.vocabulary,
        hidden_size=size.hidden,
        intermediate_size=size.mlp,
        num_hidden_layers=layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.kv_heads,
        tie_word_embeddings=False,
    )


def layers_that_fit(size: Size, world: World) -> int:
    """As many of the model's layers as the GPUs hold at 16 bytes a weight, with a third of their memory to spare."""
    if world.device.type != "cuda":
        return size.layers
    weights = 2 / 3 * world.size * torch.cuda.get_device_properties(world.device).total_memory / 16
    grouped = 2 * size.hidden**2 * (1 + size.kv_heads / size.heads)  # queries and output, keys and values
    layer = grouped + 3 * size.hidden * size.mlp
    return min(size.layers, max(1, int((weights - 2 * size.hidden * size.vocabulary) / layer)))


def made_up_pairs(count: int, seed: int, vocabulary: int) -> list[Pair]:
    """Pairs with lengths like UltraFeedback's: in the mean prompts of 182 tokens, answers of 373; none over 1,024."""
    rng = np.random.default_rng(seed)

    def ids(mean: float) -> np.ndarray:
        spread = 0.7
        length = int(np.clip(rng.lognormal(np.log(mean) - spread**2 / 2, spread), 2, 1024))
        return rng.integers(3, vocabulary, length).astype(np.int32)

    return [Pair(ids(182), ids(373), ids(373)) for _ in range(count)]


def parse() -> tuple[argparse.Namespace, Config]:
    """The command line: this program's own words, and keys of the config."""
    parser = argparse.ArgumentParser(prog="tests.bench.device", description=__doc__)
    parser.add_argument("--model", choices=SIZES, default="llama-8b")
    parser.add_argument("--layers", type=int, help="how many; without it, as many as fit")
    parser.add_argument("--steps", type=int, default=4, help="how many; the first is not counted")
    wish, rest = parser.parse_known_args()
    words = ["--model.path", wish.model, "--data.train", "[{path: made-up}]"]
    for key, value in {"activation_checkpointing": "selective", "sync_gradients": "last_micro_batch"}.items():
        if f"--parallel.{key}" not in rest:
            words += [f"--parallel.{key}", value]
    return wish, load_config([*words, *rest], prog="tests.bench.device")


def main() -> None:
    """Checks the first step, computes one twice, times some, and prints the table's row."""
    wish, config = parse()
    size = SIZES[wish.model]
    steps = [grow_trees(made_up_pairs(PAIRS_PER_STEP, seed, size.vocabulary)) for seed in range(wish.steps)]
    with open_world(600) as world:
        start_devices(world, 600)
        sizes = model_config(size, wish.layers or layers_that_fit(size, world))
        policy = random_policy(config, sizes, world)
        packer = replace(make_packer(config, world, policy.config), ref_logps=lambda *_: 0.0)
        warm_up(policy, packer, world, (True, False))
        checked = check_first_step(policy, packer, steps[0], config)
        plans = [packer.plan(trees) for trees in steps]
        bench = Bench(config, world, policy, packer, plans)
        bench.tell(asdict(checked))
        bench.tell(compare_twice(bench))
        timed = [bench.tell(facts) for facts in measure_steps(bench)]
        if world.is_main:
            print(table_row(wish, bench, timed[1:], checked))


@dataclass(frozen=True)
class Bench:
    """What is measured."""

    config: Config
    world: World
    policy: Policy
    packer: Packer
    plans: Sequence[StepPlan]

    def tell(self, facts: Facts) -> Facts:
        """Prints a JSON line on rank 0, and gives it back."""
        if self.world.is_main:
            print(json.dumps(facts), flush=True)
        return facts


def random_policy(config: Config, sizes: LlamaConfig, world: World) -> Policy:
    """Weights as a Llama is made with: products of 0.02, norms of 1."""
    policy = build_policy(sizes, config.parallel, config.model.dtype, make_mesh(world, config.parallel))
    torch.manual_seed(world.rank)
    with torch.no_grad():
        for parameter in policy.model.parameters():
            numbers = local(parameter)
            numbers.fill_(1.0) if parameter.dim() == 1 else numbers.normal_(0.0, 0.02)
    return policy


def local(tensor: Tensor) -> Tensor:
    """This rank's part."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


# --- exactness -------------------------------------------------------------------------------------------------------


def check_first_step(policy: Policy, packer: Packer, trees: Sequence[Tree], config: Config) -> Deviation:
    """How far the policy is from itself in rows of a third of the tokens, by the check of a run's first step."""
    rows: dict[bytes, float] = {}
    smaller = replace(packer, tokens_per_micro_batch=max(1, packer.tokens_per_micro_batch // 3))
    plan = smaller.plan(trees)
    with torch.no_grad():
        for some, batch in zip(smaller.trees(plan), smaller.pack(plan), strict=True):
            logps = completion_logps(policy, batch.to(policy.device)).tolist()
            keys = [completion_key(tree.prompt_ids, ids) for tree in some for ids in tree.completion_ids]
            rows |= dict(zip(keys, logps, strict=False))  # a row without trees holds a filler
    of_all = {key: logp for part in all_gather(rows) for key, logp in part.items()}
    checked = replace(packer, ref_logps=lambda prompt, ids: of_all[completion_key(prompt, ids)])
    compute = compute_dtype(config.parallel, policy.dtype, policy.device)
    scale = rounding_scale(compute, config.parallel.tf32 and policy.device.type == "cuda")
    return verify_start(policy, checked, trees, config.loss, Terms(scale, "warn", None))


def compare_twice(bench: Bench) -> Facts:
    """Whether a micro-batch that is computed twice gives the same log-probabilities and gradients, bit for bit."""
    first, second = (_logps_and_bits(bench) for _ in range(2))
    differing = [name for name, bits in first[1].items() if second[1][name] != bits]
    return {"same_logps": torch.equal(first[0], second[0]), "gradients": len(first[1]), "that_differ": differing}


def _logps_and_bits(bench: Bench) -> tuple[Tensor, dict[str, int]]:
    """Log-probabilities of the first micro-batch, and of each gradient the sum of its bits as integers."""
    policy, batch = bench.policy, bench.packer.pack(bench.plans[0])[0].to(bench.policy.device)
    announce_backward(policy, is_last=True)
    logps = completion_logps(policy, batch)
    losses, _ = pair_losses(logps, batch, bench.config.loss)
    (losses.sum() / batch.pairs_in_step).backward()
    bits = {
        name: int(local(parameter.grad).view(torch.int32).sum(dtype=torch.int64))
        for name, parameter in policy.model.named_parameters()
        if parameter.grad is not None
    }
    policy.model.zero_grad(set_to_none=True)
    return logps.detach().clone(), bits


# --- speed and memory ------------------------------------------------------------------------------------------------


def measure_steps(bench: Bench) -> Iterator[Facts]:
    """A row of facts for each plan."""
    optimizer = make_optimizer(bench.policy.model.parameters(), bench.config.optim)
    set_lr(optimizer, 1e-7)
    on_cuda = bench.world.device.type == "cuda"
    if on_cuda:
        torch.cuda.reset_peak_memory_stats()
    for step, plan in enumerate(bench.plans):
        batches = bench.packer.pack(plan)
        started = time.perf_counter()
        train_step(bench.policy, optimizer, batches, bench.config, bench.config.optim.lr, never)
        if on_cuda:
            torch.cuda.synchronize()
        seconds = max(all_gather(time.perf_counter() - started))
        yield {"step": step, "seconds": seconds, "micro_batches": len(batches)} | _rates(bench, plan, seconds)


def _rates(bench: Bench, plan: StepPlan, seconds: float) -> Facts:
    compute = compute_dtype(bench.config.parallel, bench.policy.dtype, bench.world.device)
    peaks = all_gather(peak_flops(bench.world.device, compute))
    best = sum(peak for peak in peaks if peak)
    tokens = sum(tree.num_tokens for rank in plan.micro_batches for trees in rank for tree in trees)
    held = torch.cuda.max_memory_allocated() if bench.world.device.type == "cuda" else 0
    return {
        "tokens_per_second": tokens / seconds,
        "mfu": model_flops(plan.forward_flops) / best / seconds if all(peaks) else None,
        "allocated_gib": max(all_gather(held)) / GIB,
    }


def estimated_gib(bench: Bench) -> float:
    """The peak by `dpo.estimate`, GiB: of the micro-batches that were run. Computed in a process of its own."""
    return float(in_own_process(_estimate, bench.config, bench.policy.config, bench.world.size, list(bench.plans)))


def _estimate(config: Config, sizes: LlamaConfig, num_ranks: int, plans: list[StepPlan]) -> float:
    with_dtype = replace(config, parallel=replace(config.parallel, compute_dtype=_compute_name(config)))
    found = [step_memory(with_dtype, sizes, num_ranks, *one, on_cuda=True).peak for one in largest_micro_batches(plans)]
    return max(found) / GIB


def _compute_name(config: Config) -> Any:
    named = compute_dtype(config.parallel, getattr(torch, config.model.dtype), torch.device("cuda"))
    return str(named).removeprefix("torch.")


HEADER = "| GPU | model | tokens a second | MFU | peak GiB, estimated | first step: spread, noise | versions |"


def table_row(wish: argparse.Namespace, bench: Bench, timed: Sequence[Facts], checked: Deviation) -> str:
    """The README's table of one row, from the medians of the steps after the first."""
    on_cuda = bench.world.device.type == "cuda"
    device = torch.cuda.get_device_name() if on_cuda else "CPU"
    tokens, mfus = ([facts[name] for facts in timed] for name in ("tokens_per_second", "mfu"))
    mfu = "-" if None in mfus else f"{statistics.median(mfus):.1%}"
    numbers = sum(parameter.numel() for parameter in bench.policy.model.parameters())
    cells = [
        f"{bench.world.size} x {device}",
        f"{wish.model}, {bench.policy.config.num_hidden_layers} layers, {numbers / 1e9:.2f} billion weights",
        f"{statistics.median(tokens):,.0f}",
        mfu,
        f"{timed[-1]['allocated_gib']:.1f}, {estimated_gib(bench):.1f}" if on_cuda else "-",
        f"{checked.spread:.3f}, {checked.noise:.3f}",
        f"torch {torch.__version__}, transformers {transformers.__version__}",
    ]
    return "\n".join([HEADER, "|" + "---|" * len(cells), f"| {' | '.join(cells)} |"])


if __name__ == "__main__":
    exit_program(main)
