"""Schedules by the contract's formulas, optimizers by one step on paper, the norm of the gradient by hand."""

import math
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from dpo.config import OptimConfig
from dpo.step.optim import clip_gradient, lr_at, make_optimizer, num_warmup_steps, set_lr, square_norm

# --- the learning rate -----------------------------------------------------------------------------------------------


def test_warm_up_of_the_paper_by_hand() -> None:
    """lr s / 151 up to step 150, so 1/151 at the first and 150/151 at the last step of it; then constant."""
    config = OptimConfig()
    assert (config.lr, config.warmup_steps, config.schedule) == (1e-6, 150, "constant")
    rates = [lr_at(step, 1000, config) for step in (1, 75, 150, 151, 152, 1000)]
    assert rates == pytest.approx([1e-6 / 151, 75e-6 / 151, 150e-6 / 151, 1e-6, 1e-6, 1e-6], rel=1e-14)


def test_linear_by_hand() -> None:
    """lr 1, W = 2, N = 7: 1/3, 2/3, then (8 - s) / 6: 5/6, 4/6, 3/6, 2/6, 1/6. The last step still moves."""
    config = OptimConfig(lr=1.0, warmup_steps=2, schedule="linear")
    rates = [lr_at(step, 7, config) for step in range(1, 8)]
    assert rates == pytest.approx([1 / 3, 2 / 3, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6])


def test_cosine_by_hand() -> None:
    """lr 2, W = 1, N = 4: 2 * 1/2, then 1 + cos(pi (s - 1) / 4): 1 + 1/sqrt 2, 1, 1 - 1/sqrt 2."""
    config = OptimConfig(lr=2.0, warmup_steps=1, schedule="cosine")
    rates = [lr_at(step, 4, config) for step in range(1, 5)]
    assert rates == pytest.approx([1, 1 + math.sqrt(0.5), 1, 1 - math.sqrt(0.5)])


@pytest.mark.parametrize(
    ("warmup", "last_step", "steps"),
    [
        *((0.1, 1000, 100), (0.1, 1001, 101), (0.07, 100, 7), (0.07, 101, 8), (0.5, 1, 1), (0.999, 7, 7)),
        *((3, 100, 3), (0, 100, 0), (150, 12, 150)),
    ],
)
def test_a_fraction_of_the_run_by_hand(warmup: float, last_step: int, steps: int) -> None:
    """ceil(f N) of the decimal number f: 100.1 -> 101; 0.07 * 100 is 7.000000000000001 in floating point, and 7 steps
    here. An integer is steps, whatever the run's length.
    """
    assert num_warmup_steps(last_step, OptimConfig(warmup_steps=warmup)) == steps


def test_warm_up_over_a_fraction_by_hand() -> None:
    """lr 1, a quarter of N = 7, so W = 2: 1/3, 2/3, then as of two steps."""
    config = OptimConfig(lr=1.0, warmup_steps=0.25, schedule="linear")
    rates = [lr_at(step, 7, config) for step in range(1, 8)]
    assert rates == pytest.approx([1 / 3, 2 / 3, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6])


def test_min_lr_ratio_by_hand() -> None:
    """lr 2, W = 1, N = 4, floor 1/10: 2 * 1/2, then 2 (1/10 + 9/10 f), f = 4/4, 3/4, 2/4 less a step's: linear 3/4,
    2/4, 1/4; cosine (1 + 1/sqrt 2)/2, 1/2, (1 - 1/sqrt 2)/2. The warm-up has no floor.
    """
    linear = OptimConfig(lr=2.0, warmup_steps=1, schedule="linear", min_lr_ratio=0.1)
    assert [lr_at(step, 4, linear) for step in range(1, 5)] == pytest.approx([1, 1.55, 1.1, 0.65])
    cosine = OptimConfig(lr=2.0, warmup_steps=1, schedule="cosine", min_lr_ratio=0.1)
    root = 0.9 * math.sqrt(0.5)
    assert [lr_at(step, 4, cosine) for step in range(1, 5)] == pytest.approx([1, 1.1 + root, 1.1, 1.1 - root])


COSINES = ((1 + math.cos(math.pi / 11)) / 2, (1 + math.cos(10 * math.pi / 11)) / 2)


@pytest.mark.parametrize(
    ("schedule", "ends"), [("constant", (1, 1)), ("linear", (10 / 11, 1 / 11)), ("cosine", COSINES)]
)
def test_without_warm_up(schedule: Any, ends: tuple[float, float]) -> None:
    """W = 0, N = 10, steps 1 and 10: linear (11 - s) / 11, cosine (1 + cos(pi s / 11)) / 2."""
    config = OptimConfig(lr=1.0, warmup_steps=0, schedule=schedule)
    assert (lr_at(1, 10, config), lr_at(10, 10, config)) == pytest.approx(ends)


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("last_step", [1, 149, 150, 151])
def test_runs_about_as_long_as_the_warm_up(schedule: Any, last_step: int) -> None:
    """No division by zero, and a rate above 0 at every step."""
    config = OptimConfig(schedule=schedule)
    rates = [lr_at(step, last_step, config) for step in range(1, last_step + 1)]
    assert all(0 < rate <= 1e-6 for rate in rates)
    assert rates[: min(last_step, 150)] == [1e-6 * step / 151 for step in range(1, min(last_step, 150) + 1)]


# --- optimizers ------------------------------------------------------------------------------------------------------


def stepped(config: OptimConfig, *gradients: float, start: float = 3.0) -> float:
    """A single weight after steps with these gradients at the configured learning rate."""
    weight = nn.Parameter(torch.tensor([start], dtype=torch.float64))
    optimizer = make_optimizer([weight], config)
    for gradient in gradients:
        weight.grad = torch.tensor([gradient], dtype=torch.float64)
        optimizer.step()
    return weight.item()


def test_rmsprop_by_hand() -> None:
    """v = 0.01 * 4 = 0.04 after a gradient of 2, so w = 3 - lr 2 / (0.2 + 1e-8); after a gradient of -1 v = 0.99 *
    0.04 + 0.01 = 0.0496 and w grows by lr / (sqrt 0.0496 + 1e-8). Not centered, no momentum.
    """
    first = 3 - 0.1 * 2 / (0.2 + 1e-8)
    config = OptimConfig(lr=0.1)
    assert stepped(config, 2.0) == pytest.approx(first, rel=1e-14)
    assert stepped(config, 2.0, -1.0) == pytest.approx(first + 0.1 / (math.sqrt(0.0496) + 1e-8), rel=1e-14)


def test_adamw_by_hand() -> None:
    """The first step is lr g / (|g| + eps) after weight decay w (1 - lr 0.5): bias correction undoes the betas."""
    config = OptimConfig("adamw", lr=0.1, weight_decay=0.5)
    assert stepped(config, 2.0) == pytest.approx(3 * 0.95 - 0.1 * 2 / (2 + 1e-8), rel=1e-14)


def test_sgd_by_hand() -> None:
    """lr 0.1, gradients 2 and 4: 3 - 0.2 - 0.4; with momentum 0.5 the second is 0.5 * 2 + 4 = 5: 3 - 0.2 - 0.5."""
    assert stepped(OptimConfig("sgd", lr=0.1), 2.0, 4.0) == pytest.approx(2.4)
    assert stepped(OptimConfig("sgd", lr=0.1, momentum=0.5), 2.0, 4.0) == pytest.approx(2.3)


@pytest.mark.parametrize("name", ["rmsprop", "adamw", "sgd"])
def test_defaults_are_the_contract_s(name: Any) -> None:
    """alpha 0.99, eps 1e-8, momentum 0, not centered, betas (0.9, 0.999); weight decay 0, also for AdamW, where torch's
    own default is 0.01.
    """
    group = make_optimizer([nn.Parameter(torch.zeros(1))], OptimConfig(name)).param_groups[0]
    wanted = {"alpha": 0.99, "eps": 1e-8, "momentum": 0, "centered": False, "betas": (0.9, 0.999), "nesterov": False}
    assert {key: group[key] for key in wanted if key in group} == {k: v for k, v in wanted.items() if k in group}
    assert (group["weight_decay"], group["lr"], group["maximize"]) == (0, 1e-6, False)


@pytest.mark.parametrize(("device", "fused"), [("cuda", True), ("cpu", None)])
def test_adamw_is_fused_on_cuda(device: str, fused: bool | None) -> None:
    """On tensors that only say that they are on CUDA. None leaves torch its own choice, on CUDA all tensors at once."""
    with FakeTensorMode():
        weights = [nn.Parameter(torch.empty(2, device=device)) for _ in range(2)]
    assert make_optimizer(weights, OptimConfig("adamw")).param_groups[0]["fused"] is fused
    for name in ("rmsprop", "sgd"):
        group = make_optimizer(weights, OptimConfig(name)).param_groups[0]  # type: ignore[arg-type]
        assert (group["foreach"], group.get("fused")) == (None, None)


def test_every_key_reaches_the_optimizer() -> None:
    settings = {"lr": 0.5, "weight_decay": 0.25}
    weights = [nn.Parameter(torch.zeros(1))]
    rmsprop = OptimConfig("rmsprop", alpha=0.5, eps=0.1, momentum=0.3, **settings)
    adamw = OptimConfig("adamw", betas=(0.1, 0.2), eps=0.3, **settings)
    for config, keys in ((rmsprop, ("alpha", "eps", "momentum")), (adamw, ("betas", "eps"))):
        group = make_optimizer(weights, config).param_groups[0]
        assert {key: group[key] for key in (*keys, *settings)} == {
            key: getattr(config, key) for key in (*keys, *settings)
        }


def test_the_rate_is_set_for_the_next_step() -> None:
    weight = nn.Parameter(torch.tensor([3.0]))
    optimizer = make_optimizer([weight], OptimConfig("sgd", lr=7.0))
    set_lr(optimizer, 0.5)
    weight.grad = torch.tensor([2.0])
    optimizer.step()
    assert weight.item() == 2.0


# --- the gradient's norm ---------------------------------------------------------------------------------------------


def with_gradients() -> list[nn.Parameter]:
    """Gradients (2, 3), (6) and none: norm sqrt(4 + 9 + 36) = 7."""
    parameters = [nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(4))]
    parameters[0].grad, parameters[1].grad = torch.tensor([2.0, 3.0]), torch.tensor([6.0])
    return parameters


def test_the_square_of_the_norm_by_hand() -> None:
    """4 + 9 + 36 = 49, in float64."""
    assert square_norm(iter(with_gradients())).item() == pytest.approx(49)
    assert square_norm(with_gradients()).dtype == torch.float64


def test_clipping_by_hand() -> None:
    """Norm 7 scaled down to 3.5 halves every gradient."""
    parameters = with_gradients()
    clip_gradient(parameters, 7.0, 3.5)
    assert torch.cat([parameters[0].grad, parameters[1].grad]).tolist() == pytest.approx([1, 1.5, 3], rel=1e-5)


@pytest.mark.parametrize("max_norm", [None, 10.0])
def test_no_clipping_leaves_the_gradient(max_norm: float | None) -> None:
    """None is no limit; below the limit nothing changes, bit for bit."""
    parameters = with_gradients()
    clip_gradient(iter(parameters), 7.0, max_norm)
    assert torch.cat([parameters[0].grad, parameters[1].grad]).tolist() == [2, 3, 6]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_bad_gradient_shows_in_the_norm(bad: float) -> None:
    parameters = with_gradients()
    parameters[1].grad = torch.tensor([bad])
    assert not square_norm(parameters).isfinite()
