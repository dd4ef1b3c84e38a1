"""Losses that are no functions of the margin h train and are evaluated like any other; where they have a reference
their first step is checked, and where they have none they may have rewards.

The oracle is each completion alone through plain Hugging Face, and each loss written out again in plain arithmetic.
"""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from dpo.base.errors import RunError
from dpo.config import Config, SourceConfig
from dpo.config.loss_facts import LOSS_FACTS
from dpo.run_folder.files import read_metrics
from dpo.step.losses import LOSSES, Loss
from tests.support.models import plain_logp, plain_model, save_model, save_pairs
from tests.support.runs import eval_lines, make_config, run, train_lines

BETA, GAMMA, LAMBDA = 2.0, 0.75, 3.0
KEYS: dict[str, dict[str, object]] = {"simpo": {"loss__gamma": GAMMA}, "dpop": {"loss__dpop_lambda": LAMBDA}}

Side = tuple[Tensor, float, int]
"""(pi_logp, ref_logp, tokens) of a completion."""


def sigmoid(x: Tensor) -> Tensor:
    return 1 / (1 + torch.exp(-x))


def odds(side: Side) -> Tensor:
    p = torch.exp(side[0] / side[2])
    return p / (1 - p)


ORACLES: dict[str, Callable[[Side, Side], Tensor]] = {
    "apo_zero": lambda w, lo: 1 - sigmoid(BETA * (w[0] - w[1])) + sigmoid(BETA * (lo[0] - lo[1])),
    "apo_down": lambda w, lo: (
        sigmoid(BETA * (w[0] - w[1])) + 1 - sigmoid(BETA * (w[0] - w[1]) - BETA * (lo[0] - lo[1]))
    ),
    "dpop": lambda w, lo: -torch.log(sigmoid(BETA * (w[0] - w[1] - lo[0] + lo[1] - LAMBDA * max(0, w[1] - w[0])))),
    "simpo": lambda w, lo: torch.log(1 + torch.exp(GAMMA - BETA * (w[0] / w[2] - lo[0] / lo[2]))),
    "orpo": lambda w, lo: BETA * torch.log(1 + odds(lo) / odds(w)),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """model/ and reference/, and six prompts with two pairs of three completions each in pairs.jsonl, five in
    eval.jsonl.
    """
    root = tmp_path_factory.mktemp("loss-seam")
    save_model(root / "model", "llama")
    save_model(root / "reference", "llama", seed=1)
    save_pairs(root / "pairs.jsonl", 6, completions=3, pairs_each=2)
    save_pairs(root / "eval.jsonl", 5, seed=1, completions=3, pairs_each=2)
    return root


def make(folders: Path, run_dir: Path, name: str, **changes: object) -> Config:
    """Two updates on all pairs at a rate at which they show."""
    facts = {
        "loss__name": name,
        "loss__beta": BETA,
        "data__eval": [SourceConfig(str(folders / "eval.jsonl"))],
        "batch__pairs_per_step": 12,
        "batch__tokens_per_micro_batch": 100,
        "train__steps": 2,
        "optim__lr": 1e-4,
        "optim__warmup_steps": 0,
    } | KEYS.get(name, {})
    return make_config(folders / "model", folders / "pairs.jsonl", run_dir, **(facts | changes))


def mean_loss(name: str, policy: PreTrainedModel, reference: PreTrainedModel, path: Path) -> Tensor:
    """The mean of the oracle's loss over all pairs of a file, and for orpo the winners' cross-entropy per token."""
    losses, winners = [], []
    for row in map(json.loads, path.read_text().splitlines()):
        sides = []
        for ids in row["completion_ids"]:
            with torch.no_grad():
                ref = plain_logp(reference, row["prompt_ids"], ids).item()
            sides.append((plain_logp(policy, row["prompt_ids"], ids), ref, len(ids)))
        losses += [ORACLES[name](sides[winner], sides[loser]) for winner, loser in row["pairs"]]
        winners += [sides[winner] for winner, _ in row["pairs"]]
    sft = -sum(side[0] for side in winners) / sum(side[2] for side in winners)
    return torch.stack(losses).mean() + (sft if name == "orpo" else 0)


@pytest.mark.parametrize("name", ORACLES)
def test_it_trains_and_is_evaluated(folders: Path, tmp_path: Path, name: Any) -> None:
    """Loss and gradient of the first step, and the evaluations before it and after the last. The reference is another
    model: dpop has a kink where the policy is its own reference.
    """
    reference_path = str(folders / "reference") if LOSS_FACTS[name].uses_reference else None
    run_dir = run(make(folders, tmp_path / "run", name, reference__path=reference_path))
    before, after = plain_model(folders / "model"), plain_model(run_dir / "final")
    reference = plain_model(folders / "reference")
    loss = mean_loss(name, before, reference, folders / "pairs.jsonl")
    loss.backward()
    grad_norm = math.sqrt(sum(p.grad.square().sum().item() for p in before.parameters() if p.grad is not None))
    line = train_lines(run_dir)[0]
    assert line["train/loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert line["train/grad_norm"] == pytest.approx(grad_norm, rel=1e-4)
    wanted = [mean_loss(name, policy, reference, folders / "eval.jsonl").item() for policy in (before, after)]
    assert abs(wanted[0] - wanted[1]) > 1e-3
    assert [each["eval/loss"] for each in eval_lines(run_dir)] == pytest.approx(wanted, rel=1e-4)


def test_with_a_reference_its_first_step_is_checked(folders: Path, tmp_path: Path) -> None:
    """At log-ratios of 0 the loss is 1 - 1/2 + 1/2."""
    run_dir = run(make(folders, tmp_path / "run", "apo_zero", train__steps=1))
    assert any("first_step/spread" in line for line in read_metrics(run_dir))
    (line,) = train_lines(run_dir)
    assert line["train/loss"] == pytest.approx(1.0, abs=1e-5)
    assert line["train/rewards/margins"] == pytest.approx(0, abs=1e-4)


@pytest.mark.parametrize("name", ["simpo", "orpo"])
def test_without_a_reference_none_is_computed(folders: Path, tmp_path: Path, name: str) -> None:
    """Rewards of these losses are beta pi_logp / tokens."""
    run_dir = run(make(folders, tmp_path / "run", name))
    names = {name for line in read_metrics(run_dir) for name in line}
    assert not any(name.startswith(("reference/", "first_step/")) for name in names)
    assert not (tmp_path / "reference-cache").exists()
    policy, rows = plain_model(folders / "model"), (folders / "eval.jsonl").read_text().splitlines()
    rewards = []
    for row in map(json.loads, rows):
        with torch.no_grad():
            own = [BETA * plain_logp(policy, row["prompt_ids"], ids).item() / len(ids) for ids in row["completion_ids"]]
        rewards += [(own[winner], own[loser]) for winner, loser in row["pairs"]]
    chosen, rejected = (sum(side) / len(rewards) for side in zip(*rewards, strict=True))
    line = eval_lines(run_dir)[0]
    assert line["eval/rewards/chosen"] == pytest.approx(chosen, rel=1e-5)
    assert line["eval/rewards/rejected"] == pytest.approx(rejected, rel=1e-5)
    assert line["eval/rewards/margins"] == pytest.approx(chosen - rejected, rel=1e-3)
    assert line["eval/rewards/accuracies"] == sum(w > lo for w, lo in rewards) / len(rewards)


def test_another_value_at_zero_ends_the_run(folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """APO's loss with 2 in the place of 1: every pair's loss is that of its log-ratios, and none is the right one."""
    right = LOSSES["apo_zero"]
    wrong = Loss(lambda terms, config: 1 + right.losses(terms, config), right.at_zero)
    monkeypatch.setitem(LOSSES, "apo_zero", wrong)
    with pytest.raises(RunError, match=r"^step 1: the preference loss is not that of .*: a pair's loss is 2, but 1 by"):
        run(make(folders, tmp_path / "run", "apo_zero"))
