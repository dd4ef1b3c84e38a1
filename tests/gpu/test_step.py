"""How a step runs on CUDA: few graphs, no waiting, little memory, a fused optimizer."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from dpo.batch.costs import CostModel
from dpo.batch.packing import PackedBatch, RowFormat, pack, padded_length
from dpo.batch.plan import plan_step
from dpo.batch.trees import grow_trees
from dpo.config import LossConfig, OptimConfig
from dpo.distributed.world import World
from dpo.model.log_probs import Head, completion_log_probs
from dpo.model.policy import Policy, announce_backward, completion_logps, free_memory
from dpo.pairs.pair_set import Pair
from dpo.step.metrics import StepMetrics
from dpo.step.objective import pair_losses
from dpo.step.optim import make_optimizer
from tests.bench.estimate_check import CASES, config_of, estimated, two_steps
from tests.gpu.conftest import CUDA_ALONE
from tests.model.test_policy import load
from tests.support.live_bytes import allocated_peak
from tests.support.models import VOCAB, save_model

MIB = 2**20


def random_batches(policy: Policy, num_pairs: int, budget: int) -> list[PackedBatch]:
    """Micro-batches of at most `budget` tokens, of pairs whose prompts and completions are of any length up to 100."""
    rng = np.random.default_rng(budget)

    def ids() -> np.ndarray:
        return rng.integers(3, VOCAB, rng.integers(1, 100)).astype(np.int32)

    plan = plan_step(grow_trees([Pair(ids(), ids(), ids()) for _ in range(num_pairs)]), 1, budget, CostModel())
    return [
        pack(
            trees,
            plan,
            lambda p, c: -4.0 * len(c),
            RowFormat(policy.windows, policy.device, policy.dtype, padded_length),
        )
        for trees in plan.micro_batches[0]
    ]


def run_micro_batches(policy: Policy, batches: list[PackedBatch]) -> StepMetrics:
    """What `train_step` does before its exchange."""
    metrics = StepMetrics(policy.device)
    for number, batch in enumerate((batch.to(policy.device) for batch in batches), start=1):
        announce_backward(policy, number == len(batches))
        pi_logps = completion_logps(policy, batch)
        losses, rewards = pair_losses(pi_logps, batch, LossConfig())
        (losses.sum() / batch.pairs_in_step).backward()
        metrics.add(losses, rewards, pi_logps, batch)
    return metrics


@pytest.mark.parametrize(("family", "compile_layers"), [("mistral", False), ("mistral", True)])
def test_few_graphs(family: str, compile_layers: bool, world: World, tmp_path: Path) -> None:
    """Over more than 20 micro-batches of several lengths with gradients, then without: one graph for the first length,
    one with the length as an unknown, and that one once more without gradients. In mask and layers alike.
    """
    policy = load(world, save_model(tmp_path, family), compute_dtype="float32", compile=compile_layers)
    batches = [batch for budget in (128, 256, 384, 512, 640) for batch in random_batches(policy, 8, budget)]
    assert len(batches) > 20
    assert len({len(batch.tokens) for batch in batches}) >= 4
    counters.clear()
    run_micro_batches(policy, batches)
    with torch.no_grad():
        for batch in batches:
            completion_logps(policy, batch.to(policy.device))
    assert 1 <= counters["stats"]["unique_graphs"] <= 3
    assert not counters["graph_break"]


@pytest.mark.parametrize(
    "options",
    [
        {},
        pytest.param({"activation_checkpointing": "selective"}, marks=CUDA_ALONE),
        pytest.param({"reshard_after_forward": False}, marks=CUDA_ALONE),
    ],
)
@pytest.mark.parametrize("family", ["llama", pytest.param("gpt2", marks=CUDA_ALONE)])
def test_the_host_never_waits(family: str, options: dict[str, object], world: World, tmp_path: Path) -> None:
    """torch raises where a call waits for the stream, from the copy of the tensors to the sums of the metrics. On a
    CPU `tests/step/test_no_wait.py` looks for such calls.
    """
    policy = load(world, save_model(tmp_path, family), **options)
    batches = random_batches(policy, 12, budget=500)
    run_micro_batches(policy, batches)  # compiles
    try:
        if policy.device.type == "cuda":
            torch.cuda.set_sync_debug_mode("error")
        metrics = run_micro_batches(policy, batches)
    finally:
        if policy.device.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")
    assert metrics.reduce()["pairs"] == 12


def test_tensors_for_cuda_are_pinned(cuda: torch.device, tmp_path: Path) -> None:
    """Those of the mask too: a copy from pageable memory would wait."""
    plan = plan_step(grow_trees([Pair(*(np.arange(3, 9, dtype=np.int32) + i for i in range(3)))]), 1, 99, CostModel())
    batch = pack(plan.micro_batches[0][0], plan, lambda p, c: 0.0, RowFormat((None, 4), cuda, row_length=padded_length))
    masks = [mask.key_runs for mask in batch.layout.masks.values()]
    blocks = [tensor for mask in batch.layout.masks.values() for tensor in mask.blocks.values()]
    for tensor in [batch.tokens, batch.positions, batch.predict_idxs, batch.targets, batch.ref_logps, *masks, *blocks]:
        assert tensor.is_pinned()
    assert batch.to(cuda).tokens.device.type == "cuda"


def peak_over_start(device: torch.device, work: Callable[[], object]) -> int:
    """The most bytes that torch's allocator gave out at once, above those before."""
    if device.type == "cpu":
        return allocated_peak(work)
    work()  # what libraries keep for themselves
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    start = torch.cuda.memory_allocated()
    work()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - start


@pytest.mark.parametrize("vocab_size", [2**15, 2**17])
def test_the_head_s_memory_is_its_budget(vocab_size: int, device: torch.device) -> None:
    """R = 512 rows of H = 64 in bfloat16, a budget of 16 MiB. Beside the budget there are the gradient of the weights,
    V H numbers summed in float32 and then narrowed (4 + 2 bytes), and a handful of (R, H) and (R,) tensors, for which
    16 float32 numbers are allowed. Full logits would take 64 and 256 MiB in float32 alone.
    """
    rows, hidden_size, budget = 512, 64, 16 * MIB
    hidden = torch.randn(rows, hidden_size, device=device, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(vocab_size, hidden_size, device=device, dtype=torch.bfloat16, requires_grad=True)
    targets = torch.zeros(rows, dtype=torch.long, device=device)
    lengths = torch.full((8,), rows // 8, device=device)

    def work() -> tuple[Tensor, ...]:
        logps = completion_log_probs(hidden, Head(weight, None, budget), targets, lengths)
        return torch.autograd.grad(logps.sum(), (hidden, weight))

    bound = 1.1 * budget + 6 * vocab_size * hidden_size + 64 * rows * hidden_size
    assert peak_over_start(device, work) <= bound


@pytest.mark.parametrize("case", ["defaults", "full checkpointing", "weights kept", "AdamW"])
def test_the_estimate_is_what_cuda_gives_out(case: str, cuda: torch.device) -> None:
    """`dpo.estimate` of one rank in bfloat16, within 15 % of the allocator's peak over two steps. On a CPU
    `tests/layouts/test_estimate.py` does the like."""
    config = config_of(CASES[case] | {"parallel__compute_dtype": "bfloat16"})
    said = estimated(config, num_ranks=1, on_cuda=True).peak
    torch.compiler.reset()
    free_memory()  # of the test before
    torch.cuda.reset_peak_memory_stats()
    start = torch.cuda.memory_allocated()
    two_steps(config)
    assert said == pytest.approx(torch.cuda.max_memory_allocated() - start, rel=0.15)


@pytest.mark.parametrize("name", ["adamw", "rmsprop", "sgd"])
def test_optimizers_are_those_of_the_cpu(name: str, world: World, tmp_path: Path) -> None:
    """Three updates of sharded weights with gradients of their own, next to the plain optimizer on whole ones."""
    config = OptimConfig(name, lr=0.01, weight_decay=0.1, momentum=0.0 if name == "adamw" else 0.9)  # type: ignore[arg-type]
    policy = load(world, save_model(tmp_path, "llama"))
    sharded = list(policy.model.parameters())
    plain = [torch.nn.Parameter(p.detach().full_tensor().cpu().clone()) for p in sharded]
    optimizers = make_optimizer(sharded, config), make_optimizer(plain, config)
    is_fused = name == "adamw" and world.device.type == "cuda"
    assert bool(optimizers[0].param_groups[0].get("fused")) == is_fused
    for step in range(3):
        random = torch.Generator().manual_seed(step)
        for mine, other in zip(sharded, plain, strict=True):
            other.grad = torch.randn(other.shape, generator=random)
            mine.grad = torch.distributed.tensor.distribute_tensor(
                other.grad.to(policy.device), mine.device_mesh, mine.placements
            )
        for optimizer in optimizers:
            optimizer.step()
    for mine, other in zip(sharded, plain, strict=True):
        torch.testing.assert_close(mine.full_tensor().cpu(), other, rtol=1e-5, atol=1e-6)


def test_tf32_is_used_where_asked(world: World, tmp_path: Path) -> None:
    """On CUDA the products of float32 matrices then round to 10 bits; without the key they do not, also after it."""
    folder = save_model(tmp_path, "llama")
    product = {}
    a, b = (torch.randn(256, 256, generator=torch.Generator().manual_seed(i)).to(world.device) for i in range(2))
    for tf32 in (True, False):
        load(world, folder, compute_dtype="float32", tf32=tf32)
        product[tf32] = a @ b
    exact = (a.double() @ b.double()).float()
    errors = {tf32: ((found - exact).norm() / exact.norm()).item() for tf32, found in product.items()}
    assert errors[False] < 1e-6
    if world.device.type == "cuda" and torch.cuda.get_device_capability() >= (8, 0):
        assert 1e-5 < errors[True] < 1e-2
