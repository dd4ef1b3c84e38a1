"""Weights and margins of pairs, from the columns that a source names, in a whole run.

The oracle is each completion alone through plain Hugging Face, and the loss written out again in plain arithmetic.
"""

import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dpo.config import SourceConfig
from dpo.run_folder.files import read_metrics
from tests.support.models import plain_logp, plain_model, save_model
from tests.support.runs import make_config, run, train_lines

BETA, SFT_WEIGHT, COUNT = 0.5, 0.7, 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """model/, reference/, and six pairs with a weight w and a margin m each, none of which are equal."""
    root = tmp_path_factory.mktemp("pair-weights")
    save_model(root / "model", "llama")
    save_model(root / "reference", "llama", seed=1)
    random = torch.Generator().manual_seed(0)
    rows = []
    for number in range(COUNT):
        sizes = {"prompt_ids": 4, "chosen_ids": 3 + number, "rejected_ids": 5}
        row = {name: torch.randint(3, 97, (size,), generator=random).tolist() for name, size in sizes.items()}
        rows.append(row | {"w": 0.5 * number + 0.25, "m": 0.3 * number - 0.5})
    (root / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


def total_loss(folder: Path, policy: torch.nn.Module, reference: torch.nn.Module) -> Tensor:
    """The mean over the pairs of w (log(1 + exp(m - beta h)) + the pair's share of the SFT term)."""
    rows = [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]
    num_tokens = sum(len(row["chosen_ids"]) for row in rows)
    total = torch.zeros(())
    for row in rows:
        sides = [(row["prompt_ids"], row[name]) for name in ("chosen_ids", "rejected_ids")]
        pi_w, pi_l = (plain_logp(policy, *side) for side in sides)
        with torch.no_grad():
            ref_w, ref_l = (plain_logp(reference, *side).item() for side in sides)
        scaled = BETA * (pi_w - ref_w - pi_l + ref_l)
        preference = torch.log(1 + torch.exp(row["m"] - scaled)) / COUNT
        total = total + row["w"] * (preference - SFT_WEIGHT * pi_w / num_tokens)
    return total


@pytest.mark.parametrize("reference", ["model", "reference"])
def test_loss_and_gradient_of_weighted_pairs_with_margins(folder: Path, tmp_path: Path, reference: str) -> None:
    """Denominators count pairs and tokens, whatever the weights. Where the policy is its own reference the check of the
    first step knows the margins.
    """
    source = SourceConfig(str(folder / "pairs.jsonl"), columns={"weight": "w", "margin": "m"})
    config = make_config(
        folder / "model",
        folder / "pairs.jsonl",
        tmp_path / "run",
        data__train=[source],
        batch__pairs_per_step=COUNT,
        batch__tokens_per_micro_batch=40,
        train__steps=1,
        reference__path=str(folder / "reference") if reference == "reference" else None,
        loss__beta=BETA,
        loss__sft_weight=SFT_WEIGHT,
        optim__lr=1e-4,
        optim__warmup_steps=0,
    )
    run_dir = run(config)
    policy = plain_model(folder / "model")
    loss = total_loss(folder, policy, plain_model(folder / reference))
    loss.backward()
    grad_norm = math.sqrt(sum(p.grad.square().sum().item() for p in policy.parameters() if p.grad is not None))
    (line,) = train_lines(run_dir)
    assert line["train/loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert line["train/grad_norm"] == pytest.approx(grad_norm, rel=1e-4)
    checked = any("first_step/spread" in line for line in read_metrics(run_dir))
    assert checked == (reference == "model")
