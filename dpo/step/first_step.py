"""The check of a fresh run's first step: the policy, before its first update, is its own reference.

The step's log-probabilities are computed twice, in different packings, so that the model measures its own rounding;
`deviation.py` has the bounds.

The second packing has half the tokens per micro-batch, and reverses trees and completions. Three trees of one lane: a
prompt p of 4 tokens with completions a (3) and b (3), q of 2 with c (3) and d (2), r of 1 with e (1) and f (1):

    first packing, 20 tokens per micro-batch     p a b q c d r e f
    second packing, 10 tokens per micro-batch    p b a | r f e q d c     two micro-batches

Every completion has another place in its row and other neighbours. A correct policy gives it the same log-probability
in both packings up to rounding, the measured noise; the first is compared with the cached `ref_logps`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist

from dpo.base.errors import RunError
from dpo.batch.packer import Packer
from dpo.batch.packing import PackedBatch
from dpo.batch.plan import StepPlan
from dpo.batch.trees import Tree
from dpo.config import LossConfig
from dpo.distributed.collectives import gather_lanes
from dpo.model.policy import Policy, completion_logps, reshard
from dpo.pairs.tokens import completion_key
from dpo.step.deviation import (
    Completions,
    Deviation,
    PairLosses,
    Verdict,
    expected_losses,
    judge,
    limits,
    losses_at_zero,
    measure,
    worst,
    wrong_loss,
)
from dpo.step.objective import batch_preferences
from dpo.terminal.console import warn

KEY = "reference.first_step_check"


@dataclass(frozen=True)
class Terms:
    """The terms on which the first step passes."""

    scale: float | None
    """See `rounding_scale`."""
    on_failure: Literal["stop", "warn"]
    """`reference.first_step_check`."""
    made_differently: str | None
    """How the cached rows were computed differently from this run, or None. If set, a deviation above the noise only
    warns; above the caps it still ends the run."""


def verify_start(policy: Policy, packer: Packer, trees: Sequence[Tree], loss: LossConfig, terms: Terms) -> Deviation:
    """Checks that the policy, before its first update, is its own reference on the first step's trees.

    The verdict is over the completions of all ranks, and the same on each. Every rank must get here, or the rest hang.

    Args:
        policy: the sharded model, before its first update.
        packer: the packer of the run, with `ref_logps`.
        trees: the trees of the first step, all lanes, the same on every rank.
        loss: the loss, which must use a reference.
        terms: decides which deviations fail, and whether a failure ends the run.

    Returns:
        The deviation of the policy from its reference.

    Raises:
        RunError: on every rank, where the check fails; rank 0 warns instead where `terms` say so.
    """
    completions, losses = _compute(policy, packer, trees, loss)
    verdict, wrong = judge(completions, terms.scale), wrong_loss(losses)
    if verdict == Verdict.PASSES and wrong is None:
        return measure(completions)
    message = f"step 1: {_explain(completions, terms)}"
    if wrong is not None and verdict < Verdict.BEYOND_BOUNDS:
        verdict, message = Verdict.BEYOND_BOUNDS, f"step 1: {_explain_loss(*wrong)}"
    is_excused = verdict == Verdict.BEYOND_NOISE and terms.made_differently is not None
    if verdict == Verdict.NOT_FINITE:
        raise RunError(message)
    if not is_excused and terms.on_failure == "stop":
        raise RunError(f"{message}; to train all the same: --{KEY} warn")
    if dist.get_rank() == 0:
        warn(message)
    return measure(completions)


def _explain(completions: Completions, terms: Terms) -> str:
    """Returns the message for a failed check: the measured values, their limits, and the possible causes."""
    deviation = measure(completions)
    text = f"the policy is not its own reference: {worst(completions, terms.scale)}"
    text += f"; {deviation} over {len(completions.lengths)} completions"
    if terms.scale is None:
        text += ", of which each may differ by 1e-4 + 1e-5 |ref_logp|"
    else:
        maximum = limits(deviation.noise, completions.lengths, terms.scale)
        text += f", at most spread {maximum.spread:.3g}, drift {maximum.drift:.3g}"
    if terms.made_differently:
        text += f"; the cached rows of the reference were computed differently: {terms.made_differently}"
    return f"{text}; the reference cache, the forward or the model's rounding is at fault"


def _explain_loss(found: float, expected: float) -> str:
    what = f"a pair's loss is {found:.9g}, but {expected:.9g} by the log-ratios of its completions"
    return f"the preference loss is not that of an indifferent policy: {what}; the packed batch or the loss is at fault"


def _compute(policy: Policy, packer: Packer, trees: Sequence[Tree], loss: LossConfig) -> tuple[Completions, PairLosses]:
    """Returns the step's completions in two packings, and the losses of its pairs, the same on every rank.

    Every rank must get here, or the rest hang.
    """
    other = replace(packer, tokens_per_micro_batch=max(1, packer.tokens_per_micro_batch // 2))
    with torch.no_grad():
        first_packing = _run(policy, packer, packer.plan(trees), loss)
        second_packing = _run(policy, other, moved_plan(other.plan(trees)), loss)
    reshard(policy)
    parts = gather_lanes((first_packing, second_packing))
    first = {key: row for (rows, _), _ in parts for key, row in rows.items()}
    second = {key: row for _, (rows, _) in parts for key, row in rows.items()}
    keys = sorted(first)  # the order of sums, so that they do not depend on the layout
    pi_logps, ref_logps, lengths, first_ids = zip(*(first[key] for key in keys), strict=True)
    repacked = np.array([second[key][0] for key in keys])
    completions = Completions(np.array(pi_logps), repacked, np.array(ref_logps), np.array(lengths), first_ids)
    pairs = [losses_at_zero(loss), *(pair for packing in parts for _, losses in packing for pair in losses)]
    return completions, PairLosses(*np.array(pairs).reshape(-1, 2).T)


_Row = tuple[float, float, int, list[int]]
"""pi_logp, ref_logp, tokens, first token ids."""


def _run(
    policy: Policy, packer: Packer, plan: StepPlan, loss: LossConfig
) -> tuple[dict[bytes, _Row], list[tuple[float, float]]]:
    """Returns this lane's completions by key, fillers left out, and the losses of its pairs: found and expected."""
    rows: dict[bytes, _Row] = {}
    losses: list[tuple[float, float]] = []
    for trees, batch in zip(packer.trees(plan), packer.pack(plan), strict=True):
        batch = batch.to(policy.device)
        pi_logps = completion_logps(policy, batch)
        if not trees:
            continue
        assert batch.ref_logps is not None, "the first step is checked against a reference"
        measured = list(zip(pi_logps.tolist(), batch.ref_logps.tolist(), strict=True))
        ids = [(tree.prompt_ids, ids) for tree in trees for ids in tree.completion_ids]
        for (prompt, own), (pi, ref) in zip(ids, measured, strict=True):
            rows[completion_key(prompt, own)] = (pi, ref, len(own), own[:8].tolist())
        margins = None if batch.margins is None else batch.margins.double().cpu().numpy()
        expected = _expected_losses(trees, measured, loss, margins)
        losses += zip(_found_losses(pi_logps, batch, loss), expected, strict=True)
    return rows, losses


def _found_losses(pi_logps: torch.Tensor, batch: PackedBatch, loss: LossConfig) -> list[float]:
    """Returns the preference loss that training minimizes of each pair, in float64: rounding hides no difference."""
    assert batch.ref_logps is not None, "the first step is checked against a reference"
    return batch_preferences(pi_logps.double(), replace(batch, ref_logps=batch.ref_logps.double()), loss).tolist()


def _expected_losses(
    trees: Sequence[Tree], measured: Sequence[tuple[float, float]], loss: LossConfig, margins: np.ndarray | None
) -> list[float]:
    """Returns the losses of the trees' pairs, in the order of the trees.

    Args:
        measured: (pi_logp, ref_logp) of each completion, nats, in the order of the trees.
        margins: (T,) the margin of each pair, in the same order; None: all 0.
    """
    left, pairs = iter(measured), []
    for tree in trees:
        completions = [(*next(left), len(ids)) for ids in tree.completion_ids]
        pairs += [(completions[winner], completions[loser]) for winner, loser in tree.pairs]
    pi_logps, ref_logps, lengths = np.array(pairs).reshape(-1, 2, 3).T  # each (2, T)
    return [float(value) for value in expected_losses(pi_logps, ref_logps, lengths, loss, margins)]


def moved_plan(plan: StepPlan) -> StepPlan:
    """Returns the plan with the trees of each micro-batch, and the completions of each tree, in reverse order. So the
    completions move even where a tree is alone in its row.
    """
    moved = [[tuple(_turned(tree) for tree in reversed(micro)) for micro in lane] for lane in plan.micro_batches]
    return replace(plan, micro_batches=tuple(tuple(lane) for lane in moved))


def _turned(tree: Tree) -> Tree:
    last = len(tree.completion_ids) - 1
    pairs = tuple((last - winner, last - loser) for winner, loser in tree.pairs)
    return replace(tree, completion_ids=tree.completion_ids[::-1], pairs=pairs)
