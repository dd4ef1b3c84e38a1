"""Losses that are no functions of the margin h are entries of the tables like any other: they train, they are
evaluated, and where they have a reference their first step is checked.

The oracle is each completion alone through plain Hugging Face, and each loss written out again in plain arithmetic.
"""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from dpo.base.errors import RunError
from dpo.config import Config, LossConfig, SourceConfig
from dpo.config.loss_facts import LOSS_FACTS, LossFacts
from dpo.run.files import read_metrics
from dpo.step.losses import LOSSES, Loss
from tests.support.models import plain_logp, plain_model, save_model, save_pairs
from tests.support.runs import eval_lines, make_config, run, train_lines

BETA, GAMMA = 2.0, 0.5


def apo_zero(
    log_ratios: Tensor, pi_logps: Tensor, lengths: Tensor, yw_idxs: Tensor, yl_idxs: Tensor, config: LossConfig
) -> Tensor:
    """1 - sigmoid(u[w]) + sigmoid(u[l]), u = beta log_ratios: D'Oosterlinck et al. 2024, arXiv 2408.06266."""
    u = config.beta * log_ratios
    return 1 - torch.sigmoid(u[yw_idxs]) + torch.sigmoid(u[yl_idxs])


def simpo(
    log_ratios: Tensor, pi_logps: Tensor, lengths: Tensor, yw_idxs: Tensor, yl_idxs: Tensor, config: LossConfig
) -> Tensor:
    """-log sigmoid(beta (pi[w]/n[w] - pi[l]/n[l]) - gamma), without a reference: Meng et al. 2024, arXiv 2405.14734."""
    per_token = pi_logps / lengths
    return -F.logsigmoid(config.beta * (per_token[yw_idxs] - per_token[yl_idxs]) - GAMMA)


FACTS = {
    "apo_zero": LossFacts(uses_reference=True, smooths=False, normalizes=True),
    "simpo": LossFacts(uses_reference=False, smooths=False, normalizes=False),
}
ENTRIES = {"apo_zero": Loss(apo_zero, at_zero=lambda config: 1.0), "simpo": Loss(simpo, at_zero=None)}

Side = tuple[Tensor, float, int]
"""(pi_logp, ref_logp, tokens) of a completion."""
ORACLES: dict[str, Callable[[Side, Side], Tensor]] = {
    "apo_zero": lambda w, lo: 1 / (1 + torch.exp(BETA * (w[0] - w[1]))) + 1 / (1 + torch.exp(-BETA * (lo[0] - lo[1]))),
    "simpo": lambda w, lo: torch.log(1 + torch.exp(GAMMA - BETA * (w[0] / w[2] - lo[0] / lo[2]))),
}


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both losses as entries of the two tables."""
    for name in FACTS:
        monkeypatch.setitem(LOSS_FACTS, name, FACTS[name])
        monkeypatch.setitem(LOSSES, name, ENTRIES[name])


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """model/, and six prompts with four pairs of three completions each in pairs.jsonl, five in eval.jsonl."""
    root = tmp_path_factory.mktemp("loss-seam")
    save_model(root / "model", "llama")
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
    }
    return make_config(folders / "model", folders / "pairs.jsonl", run_dir, **(facts | changes))


def mean_loss(name: str, policy: PreTrainedModel, reference: PreTrainedModel, path: Path) -> Tensor:
    """The mean of the oracle's loss over all pairs of a file."""
    losses = []
    for row in map(json.loads, path.read_text().splitlines()):
        sides = []
        for ids in row["completion_ids"]:
            with torch.no_grad():
                ref = plain_logp(reference, row["prompt_ids"], ids).item()
            sides.append((plain_logp(policy, row["prompt_ids"], ids), ref, len(ids)))
        losses += [ORACLES[name](sides[winner], sides[loser]) for winner, loser in row["pairs"]]
    return torch.stack(losses).mean()


@pytest.mark.parametrize("name", FACTS)
def test_it_trains_and_is_evaluated(folders: Path, tmp_path: Path, name: str) -> None:
    """Loss and gradient of the first step, and the evaluations before it and after the last."""
    run_dir = run(make(folders, tmp_path / "run", name))
    before, after = plain_model(folders / "model"), plain_model(run_dir / "final")
    loss = mean_loss(name, before, before, folders / "pairs.jsonl")
    loss.backward()
    grad_norm = math.sqrt(sum(p.grad.square().sum().item() for p in before.parameters() if p.grad is not None))
    line = train_lines(run_dir)[0]
    assert line["train/loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert line["train/grad_norm"] == pytest.approx(grad_norm, rel=1e-4)
    wanted = [mean_loss(name, policy, before, folders / "eval.jsonl").item() for policy in (before, after)]
    assert abs(wanted[0] - wanted[1]) > 1e-3
    assert [each["eval/loss"] for each in eval_lines(run_dir)] == pytest.approx(wanted, rel=1e-4)


def test_with_a_reference_its_first_step_is_checked(folders: Path, tmp_path: Path) -> None:
    """At log-ratios of 0 the loss is 1 - 1/2 + 1/2."""
    run_dir = run(make(folders, tmp_path / "run", "apo_zero", train__steps=1))
    assert any("first_step/spread" in line for line in read_metrics(run_dir))
    (line,) = train_lines(run_dir)
    assert line["train/loss"] == pytest.approx(1.0, abs=1e-5)
    assert line["train/rewards/margins"] == pytest.approx(0, abs=1e-4)


def test_a_loss_may_include_the_sft_term(folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As ORPO does: 1 at log-ratios of 0, and the SFT term on top, which the check of the first step leaves aside."""
    monkeypatch.setitem(LOSS_FACTS, "apo_zero", replace(FACTS["apo_zero"], includes_sft=True))
    (line,) = train_lines(run(make(folders, tmp_path / "run", "apo_zero", train__steps=1)))
    assert line["train/loss"] == pytest.approx(1 + line["train/loss_sft"], rel=1e-5)
    assert line["train/loss_sft"] > 1


def test_without_a_reference_none_is_computed(folders: Path, tmp_path: Path) -> None:
    lines = read_metrics(run(make(folders, tmp_path / "run", "simpo")))
    names = {name for line in lines for name in line}
    assert not any(name.startswith(("reference/", "first_step/")) or "rewards" in name for name in names)
    assert not (tmp_path / "reference-cache").exists()


def test_another_value_at_zero_ends_the_run(folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """APO's loss with 2 in the place of 1: every pair's loss is that of its log-ratios, and none is the right one."""
    wrong = Loss(lambda *args: 1 + apo_zero(*args), ENTRIES["apo_zero"].at_zero)
    monkeypatch.setitem(LOSSES, "apo_zero", wrong)
    with pytest.raises(RunError, match=r"^step 1: the preference loss is not that of .*: a pair's loss is 2, but 1 by"):
        run(make(folders, tmp_path / "run", "apo_zero"))
