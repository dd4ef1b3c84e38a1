"""The objective of a step: sums over micro-batches, whichever way the step is cut."""

import dataclasses

import numpy as np
import pytest
import torch
from torch import Tensor

from dpo.batch.costs import CostModel
from dpo.batch.packing import PackedBatch, RowFormat, pack
from dpo.batch.plan import StepPlan, plan_step
from dpo.batch.trees import Tree
from dpo.config import LossConfig
from dpo.step.objective import pair_losses
from tests.batch.test_packing import CPU, TREES

CONFIGS = [
    LossConfig(),
    LossConfig(label_smoothing=0.2),
    LossConfig("ipo", 0.4),
    LossConfig("hinge", length_normalized=True),
    LossConfig("robust", label_smoothing=0.1, sft_weight=0.5),
    LossConfig("apo_zero", length_normalized=True),
    LossConfig("apo_down", 0.4),
    LossConfig("dpop", 0.4),
    LossConfig("simpo", 2.0, sft_weight=0.5),
    LossConfig("orpo", 0.4),
    LossConfig("sft"),
]


def reference(prompt_ids: np.ndarray, completion_ids: np.ndarray) -> float:
    return -1.5 * len(completion_ids)


def policy_logp(prompt_ids: np.ndarray, completion_ids: np.ndarray) -> float:
    """Some number that depends on prompt and completion."""
    return -float(np.sin(prompt_ids).sum()) - float(np.cos(completion_ids).sum()) - len(completion_ids)


def packed(trees: tuple[Tree, ...], plan: StepPlan) -> tuple[PackedBatch, Tensor]:
    batch = pack(trees, plan, reference, RowFormat((None,), CPU, torch.float64))
    logps = [policy_logp(tree.prompt_ids, c) for tree in trees for c in tree.completion_ids] or [-5.0]
    return batch, torch.tensor(logps, dtype=torch.float64).requires_grad_()


def step_loss(num_ranks: int, budget: int, config: LossConfig) -> float:
    """train/loss of the step of TREES on so many ranks, the sum over all ranks and micro-batches."""
    plan = plan_step(TREES, num_ranks, budget, CostModel())
    parts = [packed(trees, plan) for rank in plan.micro_batches for trees in rank]
    return sum(pair_losses(logps, batch, config)[0].sum().item() / batch.pairs_in_step for batch, logps in parts)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.name)
def test_the_step_s_loss_does_not_depend_on_its_cut(config: LossConfig) -> None:
    """1 rank and one micro-batch; 1 rank and two; 2 ranks; 5 ranks, of which three run fillers."""
    losses = [step_loss(*cut, config) for cut in ((1, 100), (1, 9), (2, 100), (5, 100))]
    assert losses == pytest.approx([losses[0]] * 4, rel=1e-14)


def test_sft_by_hand() -> None:
    """Winners of the four pairs: completions of 2, 1, 2 and 2 tokens; a winner that stands twice counts twice. The mean
    over pairs is sum(-logp) / 7.
    """
    (first, second), logp = TREES, policy_logp
    winners = [(first, 0), (first, 2), (second, 1), (second, 1)]
    total = -sum(logp(tree.prompt_ids, tree.completion_ids[i]) for tree, i in winners)
    assert step_loss(2, 100, LossConfig("sft")) == pytest.approx(total / 7, rel=1e-14)


def test_dpo_with_sft_by_hand() -> None:
    """The mean of -log sigmoid(beta h) over four pairs, plus 0.3 times the SFT term."""
    margins = []
    for tree in TREES:
        ratio = [policy_logp(tree.prompt_ids, c) - reference(tree.prompt_ids, c) for c in tree.completion_ids]
        margins += [ratio[w] - ratio[lo] for w, lo in tree.pairs]
    dpo = np.mean([np.log1p(np.exp(-0.7 * h)) for h in margins])
    wanted = dpo + 0.3 * step_loss(1, 100, LossConfig("sft"))
    assert step_loss(1, 100, LossConfig("dpo", 0.7, sft_weight=0.3)) == pytest.approx(wanted, rel=1e-12)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.name)
def test_a_filler_adds_exactly_nothing(config: LossConfig) -> None:
    """Its loss is 0 and so is its gradient, but there is one: without it the rank would miss its reduce-scatter."""
    plan = plan_step(TREES, 5, 100, CostModel())
    batch, logps = packed((), plan)
    losses, rewards = pair_losses(logps, batch, config)
    (losses.sum() / batch.pairs_in_step).backward()
    assert losses.shape == (0,)
    assert (rewards is None) == (config.name == "sft")
    assert logps.grad.tolist() == [0]


def test_rewards_are_summed_over_tokens_even_if_the_loss_is_normalized() -> None:
    plan = plan_step(TREES, 1, 100, CostModel())
    batch, logps = packed(TREES, plan)
    rewards = pair_losses(logps, batch, LossConfig(beta=0.3, length_normalized=True))[1]
    assert torch.equal(rewards, 0.3 * (logps - batch.ref_logps).detach())
    assert not rewards.requires_grad


@pytest.mark.parametrize("config", [c for c in CONFIGS if c.name in ("simpo", "orpo", "sft")], ids=lambda c: c.name)
def test_some_losses_need_no_reference(config: LossConfig) -> None:
    """Loss and rewards are the same where no reference is known."""
    batch, logps = packed(TREES, plan_step(TREES, 1, 100, CostModel()))
    losses, rewards = pair_losses(logps, batch, config)
    others = pair_losses(logps, dataclasses.replace(batch, ref_logps=None), config)
    assert torch.equal(losses, others[0])
    assert (rewards is None and others[1] is None) or torch.equal(rewards, others[1])


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.name)
def test_a_weight_scales_the_loss_of_its_pair(config: LossConfig) -> None:
    """The SFT term with it; denominators and rewards stay. Weights of 1 change nothing."""
    batch, logps = packed(TREES, plan_step(TREES, 1, 100, CostModel()))
    weights = torch.tensor([2.0, 0.0, 0.5, 1.0], dtype=torch.float64)
    losses, rewards = pair_losses(logps, batch, config)
    weighted, same = pair_losses(logps, dataclasses.replace(batch, weights=weights), config)
    assert weighted.tolist() == [2 * losses[0].item(), 0, losses[2].item() / 2, losses[3].item()]
    assert (rewards is None and same is None) or torch.equal(rewards, same)
    plain = pair_losses(logps, dataclasses.replace(batch, weights=torch.ones_like(weights)), config)[0]
    assert torch.equal(plain, losses)


def test_a_margin_is_taken_off_beta_h() -> None:
    """A margin of beta h leaves ln 2 of every pair; the SFT term and the rewards have none."""
    batch, logps = packed(TREES, plan_step(TREES, 1, 100, CostModel()))
    rewards = pair_losses(logps, batch, LossConfig(beta=0.3))[1]
    margins = rewards[batch.yw_idxs] - rewards[batch.yl_idxs]
    shifted = dataclasses.replace(batch, margins=margins)
    losses, same = pair_losses(logps, shifted, LossConfig(beta=0.3))
    assert losses.tolist() == pytest.approx([np.log(2)] * 4, rel=1e-12)
    assert torch.equal(rewards, same)
    with pytest.raises(AssertionError, match="hinge"):
        pair_losses(logps, shifted, LossConfig("hinge"))


def test_a_packer_without_a_reference_is_no_packer_of_zeros() -> None:
    """What was packed too early ends the run; it would else train against a reference of log-probability 0."""
    batch, logps = packed(TREES, plan_step(TREES, 1, 100, CostModel()))
    assert pack(TREES, plan_step(TREES, 1, 100, CostModel()), None, RowFormat((None,), CPU)).ref_logps is None
    with pytest.raises(AssertionError, match="before the reference"):
        pair_losses(logps, dataclasses.replace(batch, ref_logps=None), LossConfig())
