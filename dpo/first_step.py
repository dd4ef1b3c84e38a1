"""The check of a fresh run's first step: the policy, before its first update, is its own reference.

The step's log-probabilities are computed twice, in different packings, so that the model measures its own rounding;
`deviation.py` has the bounds.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch

from dpo.batches import Packer
from dpo.config import LossConfig
from dpo.deviation import Completions, Deviation, Verdict, judge, limits, loss_excess, measure, worst
from dpo.distributed import all_gather
from dpo.errors import RunError
from dpo.keys import completion_key
from dpo.plan import StepPlan, Tree
from dpo.policy import Policy, completion_logps, reshard
from dpo.progress import warn

KEY = "reference.first_step_check"


@dataclass(frozen=True)
class Terms:
    """What a run's first step is held to."""

    scale: float | None
    """See `rounding_scale`."""
    on_failure: Literal["stop", "warn"]
    """`reference.first_step_check`."""
    made_otherwise: str | None
    """How the reference's rows were made otherwise than this run would make them; None: not at all. Where they were,
    only the caps end the run."""


def verify_start(
    policy: Policy, packer: Packer, trees: Sequence[Tree], loss: LossConfig, terms: Terms, head_bytes: int
) -> Deviation:
    """Raises RunError unless the policy, before its first update, is its own reference on the first step's trees; gives
    how far it is from it. Where `terms` say so, rank 0 warns instead.

    The verdict is the same on every rank: it is over all completions of all of them. Every rank must get here, or the
    rest hang.
    """
    found, excess = _compute(policy, packer, trees, loss, head_bytes)
    verdict = judge(found, terms.scale)
    if excess > 0 and verdict < Verdict.BEYOND_BOUNDS:
        verdict, what = Verdict.BEYOND_BOUNDS, "the preference loss is not that of an indifferent policy"
    else:
        what = "the policy is not its own reference"
    if verdict == Verdict.PASSES:
        return measure(found)
    message = f"step 1: {what}: {worst(found, terms.scale)}; {_explain(found, terms)}"
    is_excused = verdict == Verdict.BEYOND_NOISE and terms.made_otherwise is not None
    if verdict == Verdict.NOT_FINITE or not (is_excused or terms.on_failure == "warn"):
        raise RunError(message)
    if packer.rank == 0:
        warn(message)
    return measure(found)


def _explain(found: Completions, terms: Terms) -> str:
    """The measured values, what they may be, and what can be done."""
    deviation = measure(found)
    text = f"{deviation} over {len(found.lengths)} completions"
    if terms.scale is None:
        text += ", of which each may differ by 1e-4 + 1e-5 |ref_logp|"
    else:
        most = limits(deviation.noise, found.lengths, terms.scale)
        text += f", at most spread {most.spread:.3g}, drift {most.drift:.3g}"
    if terms.made_otherwise:
        text += f"; the reference's rows were made otherwise: {terms.made_otherwise}"
    return f"{text}; the reference cache or the forward is at fault, or the model's rounding: {KEY}: stop | warn"


def _compute(
    policy: Policy, packer: Packer, trees: Sequence[Tree], loss: LossConfig, head_bytes: int
) -> tuple[Completions, float]:
    """The step's completions in two packings, and the excess of the loss, on every rank. Every rank must get here."""
    other = replace(packer, tokens_per_micro_batch=max(1, packer.tokens_per_micro_batch // 2))
    with torch.no_grad():
        rows, excess = _run(policy, packer, packer.plan(trees), loss, head_bytes)
        again, _ = _run(policy, other, moved_plan(other.plan(trees)), loss, head_bytes)
    reshard(policy)
    parts = all_gather((rows, again, excess))
    first = {key: row for rows, _, _ in parts for key, row in rows.items()}
    second = {key: row for _, rows, _ in parts for key, row in rows.items()}
    keys = sorted(first)  # the order of sums, so that they do not depend on the layout
    pi_logps, ref_logps, lengths, first_ids = zip(*(first[key] for key in keys), strict=True)
    moved = np.array([second[key][0] for key in keys])
    completions = Completions(np.array(pi_logps), moved, np.array(ref_logps), np.array(lengths), first_ids)
    return completions, sum(excess for *_, excess in parts)


_Row = tuple[float, float, int, list[int]]
"""pi_logp, ref_logp, tokens, first token ids."""


def _run(
    policy: Policy, packer: Packer, plan: StepPlan, loss: LossConfig, head_bytes: int
) -> tuple[dict[bytes, _Row], float]:
    """This rank's completions by key, fillers left out, and the excess of its pairs' losses."""
    rows: dict[bytes, _Row] = {}
    excess = 0.0
    for trees, batch in zip(plan.micro_batches[packer.rank], packer.pack(plan), strict=True):
        batch = batch.to(policy.device)
        pi_logps = completion_logps(policy, batch, head_bytes)
        if not trees:
            continue
        indices = (batch.lengths, batch.yw_idxs, batch.yl_idxs)
        excess += loss_excess(pi_logps, batch.ref_logps, *indices, loss).item()
        ids = [(tree.prompt_ids, ids) for tree in trees for ids in tree.completion_ids]
        for (prompt, own), pi, ref in zip(ids, pi_logps.tolist(), batch.ref_logps.tolist(), strict=True):
            rows[completion_key(prompt, own)] = (pi, ref, len(own), own[:8].tolist())
    return rows, excess


def moved_plan(plan: StepPlan) -> StepPlan:
    """The plan with the trees of each micro-batch, and the completions of each tree, in reverse order: where a tree is
    alone in its row, its completions still change their places.
    """
    moved = [[tuple(_turned(tree) for tree in reversed(micro)) for micro in rank] for rank in plan.micro_batches]
    return replace(plan, micro_batches=tuple(tuple(rank) for rank in moved))


def _turned(tree: Tree) -> Tree:
    last = len(tree.completion_ids) - 1
    pairs = tuple((last - winner, last - loser) for winner, loser in tree.pairs)
    return Tree(tree.prompt_ids, tree.completion_ids[::-1], pairs)
