"""The numbers that a run logs, against numbers worked out by hand and against the plain model."""

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from dpo.batch import packer as batches
from dpo.batch.costs import ForwardFlops
from dpo.batch.packing import PackedBatch
from dpo.board.charts import has_chart
from dpo.board.words import PAIR_METRICS
from dpo.board.writer import MetricsWriter
from dpo.config import Config, LossConfig, SourceConfig
from dpo.config.loss_facts import LOSS_FACTS
from dpo.distributed.startup import open_world
from dpo.run_folder.files import read_metrics
from dpo.step.metrics import MEASURED, StepMetrics, pair_means, prefixed, step_metrics
from dpo.step.objective import pair_losses
from tests.support.boards import points_of
from tests.support.models import plain_logp, plain_model, save_model, save_pairs
from tests.support.ranks import Ranks
from tests.support.runs import eval_lines, make_config, run, train_lines, worst_relative

LN2 = math.log(2)
DPO = LOSS_FACTS["dpo"]


def make_batch(
    pi: list[float], ref: list[float], pairs: list[tuple[int, int]], **facts: int
) -> tuple[PackedBatch, torch.Tensor]:
    """A micro-batch of B completions of 2 tokens each and these (winner, loser) pairs, and its pi_logps."""
    winners, losers = (
        torch.tensor(side, dtype=torch.long) for side in (zip(*pairs, strict=True) if pairs else ([], []))
    )
    count = len(pi)
    batch = PackedBatch(
        tokens=torch.zeros(3 * count + 1, dtype=torch.long),
        positions=torch.zeros(0),
        layout=None,  # type: ignore[arg-type]  (no attention runs here)
        predict_idxs=torch.zeros(0),
        targets=torch.zeros(0),
        lengths=torch.full((count,), 2),
        ref_logps=torch.tensor(ref),
        yw_idxs=winners,
        yl_idxs=losers,
        pairs_in_step=facts.get("pairs_in_step", len(pairs)),
        winner_tokens_in_step=facts.get("winner_tokens_in_step", 2 * len(pairs)),
        forward_flops_in_step=ForwardFlops(0.0, 0.0, 0.0),
        num_tokens=3 * count,
    )
    return batch, torch.tensor(pi)


def sums_of(*parts: tuple[PackedBatch, torch.Tensor], loss: LossConfig) -> dict[str, float]:
    """What a rank that runs these micro-batches adds up."""
    metrics = StepMetrics(torch.device("cpu"))
    for batch, pi_logps in parts:
        metrics.add(*pair_losses(pi_logps, batch, loss), pi_logps, batch)
    return dict(zip(MEASURED, metrics.measured.tolist(), strict=True)) | metrics.counted


# --- by hand ---------------------------------------------------------------------------------------------------------


def test_the_means_of_three_pairs_by_hand() -> None:
    """beta 0.5; pi - ref of the four completions: 2, 0, 0, -4; pairs 0>1, 1>2 (a tie), 3>0.

    rewards: 1, 0, 0, -2. chosen (1 + 0 - 2)/3 = -1/3, rejected (0 + 0 + 1)/3 = 1/3, margins -2/3.
    accuracies: 1>0 right, 0>0 a tie and so wrong, -2>1 wrong: 1/3.
    h = 2, 0, -6, beta h = 1, 0, -3: losses ln(1+e^-1), ln 2, ln(1+e^3).
    per token, of 2 each: chosen (2 + 0 - 4)/2/3 = -1/3, rejected (0 + 0 + 2)/2/3 = 1/3.
    logps: pi = -8, -11, -12, -17: chosen (-8 - 11 - 17)/3 = -12, rejected (-11 - 12 - 8)/3 = -31/3.
    SFT: (8 + 11 + 17) / 6 winner tokens = 6 nats a token.
    """
    batch = make_batch([-8.0, -11.0, -12.0, -17.0], [-10.0, -11.0, -12.0, -13.0], [(0, 1), (1, 2), (3, 0)])
    means = pair_means(sums_of(batch, loss=LossConfig(beta=0.5)), DPO)
    losses = [math.log1p(math.exp(-1)), LN2, math.log1p(math.exp(3))]
    assert means == pytest.approx(
        {
            "loss": sum(losses) / 3,
            "loss_sft": 6.0,
            "logps/chosen": -12.0,
            "logps/rejected": -31 / 3,
            "logratios_per_token/chosen": -1 / 3,
            "logratios_per_token/rejected": 1 / 3,
            "rewards/chosen": -1 / 3,
            "rewards/rejected": 1 / 3,
            "rewards/margins": -2 / 3,
            "rewards/accuracies": 1 / 3,
            "pairs": 3,
        },
        rel=1e-6,
    )


def test_a_tie_of_all_is_no_accuracy() -> None:
    """The first step: every reward is 0 and the share of right pairs is 0, not 1/2."""
    means = pair_means(sums_of(make_batch([-1.0, -2.0], [-1.0, -2.0], [(0, 1), (1, 0)]), loss=LossConfig()), DPO)
    assert means["rewards/accuracies"] == 0
    assert means["loss"] == pytest.approx(LN2)


def test_means_are_over_pairs_not_over_micro_batches() -> None:
    """Margins 1, 2 and 6 in micro-batches of two pairs and one: their mean is 3, not (1.5 + 6)/2."""
    two = make_batch([1.0, 0.0, 2.0], [0.0, 0.0, 0.0], [(0, 1), (2, 1)], pairs_in_step=3, winner_tokens_in_step=6)
    one = make_batch([6.0, 0.0], [0.0, 0.0], [(0, 1)], pairs_in_step=3, winner_tokens_in_step=6)
    means = pair_means(sums_of(two, one, loss=LossConfig(beta=1.0)), DPO)
    assert means["rewards/margins"] == pytest.approx(3.0)
    assert means["pairs"] == 3


def test_the_total_loss_has_the_weighted_sft_term() -> None:
    """-pi_w = 3 and 5 over 4 winner tokens is 2 nats a token, in one micro-batch or two; ln 2 + 0.25 * 2."""
    facts = {"pairs_in_step": 2, "winner_tokens_in_step": 4}
    parts = [make_batch([-3.0, -9.0], [-3.0, -9.0], [(0, 1)], **facts)]
    parts += [make_batch([-5.0, -9.0], [-5.0, -9.0], [(0, 1)], **facts)]
    means = pair_means(sums_of(*parts, loss=LossConfig(sft_weight=0.25)), DPO)
    assert means["loss_sft"] == pytest.approx(2.0)
    assert means["loss"] == pytest.approx(LN2 + 0.5)


def test_a_loss_that_compares_nothing_has_no_rewards_and_no_losers() -> None:
    means = pair_means(
        sums_of(make_batch([-3.0, -9.0], [0.0, 0.0], [(0, 1)]), loss=LossConfig(name="sft")), LOSS_FACTS["sft"]
    )
    assert sorted(means) == ["logps/chosen", "loss", "loss_sft", "pairs"]
    assert means["loss"] == means["loss_sft"] == pytest.approx(1.5)


def test_nats_per_token_are_a_mean_over_pairs() -> None:
    """-2 nats on 4 tokens and +1 on 2 are -1/2 and +1/2 per token: 0, not -1/6 as the sums of both pairs would give."""
    batch, pi_logps = make_batch([-2.0, 1.0, 3.0], [0.0, 0.0, 0.0], [(0, 2), (1, 2)])
    batch = dataclasses.replace(batch, lengths=torch.tensor([4, 2, 6]))
    means = pair_means(sums_of((batch, pi_logps), loss=LossConfig()), DPO)
    assert (means["logratios_per_token/chosen"], means["logratios_per_token/rejected"]) == (0, 0.5)


@pytest.mark.parametrize("name", LOSS_FACTS)
def test_every_metric_has_words(name: str) -> None:
    """simpo and orpo have no log-ratios, and no reference that could give them."""
    facts, batch = LOSS_FACTS[name], make_batch([-3.0, -9.0], [-3.0, -9.0], [(0, 1)])
    if not facts.uses_reference:
        batch = (dataclasses.replace(batch[0], ref_logps=None), batch[1])
    means = pair_means(sums_of(batch, loss=LossConfig(name=name)), facts)  # type: ignore[arg-type]
    assert means.keys() <= PAIR_METRICS.keys()
    assert ("logratios_per_token/chosen" in means) == facts.uses_reference
    assert name != "dpo" or means.keys() == PAIR_METRICS.keys()


def test_a_filler_counts_for_nothing_but_padding() -> None:
    """A micro-batch without pairs adds no pair and no token; the body ran its tokens: 1 - 6/(7 + 2)."""
    real = make_batch([-3.0, -9.0], [-3.0, -9.0], [(0, 1)])
    filler = make_batch([-77.0], [0.0], [], pairs_in_step=1, winner_tokens_in_step=2)
    filler = (type(filler[0])(**{**vars(filler[0]), "num_tokens": 0, "tokens": torch.zeros(2)}), filler[1])
    sums = sums_of(real, filler, loss=LossConfig())
    assert pair_means(sums, DPO) == pair_means(sums_of(real, loss=LossConfig()), DPO)
    metrics = step_metrics(sums | {"peak_memory_bytes": 5.0}, seconds=2.0, best_seconds=0.5)
    assert metrics == {
        "mfu": 0.25,
        "tokens": 6,
        "padding_fraction": pytest.approx(1 - 6 / 9),
        "step_seconds": 2.0,
        "pairs_per_second": 0.5,
        "tokens_per_second": 3.0,
        "peak_memory_bytes": 5,
    }


# --- over ranks ------------------------------------------------------------------------------------------------------


def reduce_as_rank() -> dict[str, float]:
    """Rank r adds 2^r pairs' worth of each sum."""
    with open_world(60) as world:
        metrics = StepMetrics(torch.device("cpu"))
        metrics.measured += 2.0**world.rank
        metrics.counted = dict.fromkeys(metrics.counted, 2**world.rank)
        return metrics.reduce(torch.tensor(2.0**world.rank), stop_requested=world.rank == 1)


@pytest.mark.xdist_group("ranks")
def test_sums_are_over_all_ranks(ranks: Ranks) -> None:
    """1 + 2 + 4 = 7 on each of three; the peak memory is the greatest, and one number everywhere; where one rank was
    asked to stop, all know it."""
    answers = ranks(3, reduce_as_rank)
    assert answers[0] == answers[1] == answers[2]
    assert answers[0].pop("peak_memory_bytes") > 10**6
    assert answers[0].pop("stop_requested") == 1
    assert set(answers[0].values()) == {7.0}


# --- of a run --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """model/, pairs.jsonl, and eval.jsonl with 5 prompts of 4 ranked answers: 30 pairs."""
    root = tmp_path_factory.mktemp("metrics")
    save_model(root / "model", "llama")
    save_pairs(root / "pairs.jsonl", 6)
    save_pairs(root / "eval.jsonl", 5, seed=1, completions=4, pairs_each=6)
    return root


def make(folders: Path, run_dir: Path, **changes: object) -> Config:
    facts = {
        "data__eval": [SourceConfig(str(folders / "eval.jsonl"))],
        "data__order": "sequential",
        "batch__pairs_per_step": 6,
        "train__steps": 2,
        "optim__lr": 1e-3,
        "optim__warmup_steps": 0,
    }
    return make_config(folders / "model", folders / "pairs.jsonl", run_dir, **(facts | changes))


@pytest.fixture(scope="module")
def two_steps(folders: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of `make`, in several micro-batches a step."""
    root = tmp_path_factory.mktemp("two-steps")
    changes = {"batch__tokens_per_micro_batch": 64, "reference__cache_dir": str(root / "cache")}
    return run(make(folders, root / "run", **changes))


def test_a_first_step_against_the_plain_model(folders: Path, two_steps: Path) -> None:
    """logps and the SFT term of the six pairs, each completion alone; tokens: prompt once, completions once."""
    line = train_lines(two_steps)[0]
    rows = [json.loads(text) for text in (folders / "pairs.jsonl").read_text().splitlines()]
    model = plain_model(folders / "model")
    logps = np.array([[plain_logp(model, r["prompt_ids"], c).item() for c in r["completion_ids"]] for r in rows])
    assert line["train/logps/chosen"] == pytest.approx(logps[:, 0].mean(), rel=1e-5)
    assert line["train/logps/rejected"] == pytest.approx(logps[:, 1].mean(), rel=1e-5)
    winner_tokens = sum(len(r["completion_ids"][0]) for r in rows)
    assert line["train/loss_sft"] == pytest.approx(-logps[:, 0].sum() / winner_tokens, rel=1e-5)
    assert line["train/tokens"] == sum(len(r["prompt_ids"]) + sum(map(len, r["completion_ids"])) for r in rows)
    assert line["train/pairs"] == 6
    assert line["train/lr"] == 1e-3
    assert line["train/padding_fraction"] == 0
    assert line["train/pairs_per_second"] == pytest.approx(6 / line["train/step_seconds"])


def test_the_gradient_norm_is_before_clipping_and_without_it(folders: Path, tmp_path: Path) -> None:
    """The same metric whether a limit far below it is set, one far above, or none."""
    norms = []
    for limit in (1e-3, 1e3, None):
        changes = {"train__steps": 1, "data__eval": []}
        run_dir = run(make(folders, tmp_path / f"run-{limit}", optim__max_grad_norm=limit, **changes))
        norms.append(train_lines(run_dir)[0]["train/grad_norm"])
    assert norms[0] == norms[1] == norms[2] > 1e-2


EVAL = ["eval/loss", "eval/loss_sft", "eval/logps/chosen", "eval/logps/rejected"]


@pytest.fixture(scope="module")
def whole(folders: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, float]]:
    """The evaluations of a run with the SFT term, each of all 30 pairs planned at once."""
    root = tmp_path_factory.mktemp("whole")
    assert batches.PAIRS_PER_EVALUATION_PLAN >= 30
    return eval_lines(run(make(folders, root / "run", loss__sft_weight=0.5, reference__cache_dir=str(root / "cache"))))


@pytest.mark.parametrize("pairs_a_part", [1, 7])
def test_an_evaluation_in_parts_is_that_of_the_whole(
    folders: Path, whole: list[dict[str, float]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pairs_a_part: int
) -> None:
    """30 pairs planned 1 or 7 at a time. The SFT term's denominators are those of the whole set: were they those of a
    part, the loss of 30 parts would be 30 times too large in it.
    """
    monkeypatch.setattr(batches, "PAIRS_PER_EVALUATION_PLAN", pairs_a_part)
    parts = eval_lines(run(make(folders, tmp_path / "parts", loss__sft_weight=0.5)))
    assert worst_relative(whole, parts, EVAL) < 1e-5
    assert whole[1]["eval/rewards/accuracies"] == parts[1]["eval/rewards/accuracies"]  # at step 0 rounding decides
    assert whole[0]["eval/loss"] == pytest.approx(LN2 + 0.5 * whole[0]["eval/loss_sft"], rel=1e-5)
    assert whole[0]["eval/pairs"] == 30


def test_an_evaluation_against_the_plain_model(folders: Path, two_steps: Path) -> None:
    """Before the first step and, through final/, after the last: margins and accuracies from log-probabilities."""
    first, last = eval_lines(two_steps)
    rows = [json.loads(text) for text in (folders / "eval.jsonl").read_text().splitlines()]
    before, after = plain_model(folders / "model"), plain_model(two_steps / "final")
    margins = []
    for row in rows:
        ratio = [
            (plain_logp(after, row["prompt_ids"], c) - plain_logp(before, row["prompt_ids"], c)).item()
            for c in row["completion_ids"]
        ]
        margins += [0.1 * (ratio[w] - ratio[lo]) for w, lo in row["pairs"]]
    assert (first["step"], last["step"]) == (0, 2)
    assert first["eval/loss"] == pytest.approx(LN2, abs=1e-5)
    assert last["eval/rewards/margins"] == pytest.approx(np.mean(margins), rel=1e-3, abs=1e-6)
    assert last["eval/rewards/accuracies"] == pytest.approx(np.mean(np.array(margins) > 0))
    assert last["eval/loss"] == pytest.approx(np.mean(np.log1p(np.exp(-np.array(margins)))), rel=1e-5)


# --- written ---------------------------------------------------------------------------------------------------------


def test_a_line_is_flat_and_on_the_disk_at_once(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path, sinks=[])
    writer.write(3, prefixed("train", {"loss": 0.5, "rewards/margins": 1.25}))
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 3, "train/loss": 0.5, "train/rewards/margins": 1.25}\n'
    assert read_metrics(tmp_path) == [{"step": 3, "train/loss": 0.5, "train/rewards/margins": 1.25}]
    writer.close()


def test_the_charts_show_the_same_numbers(two_steps: Path) -> None:
    """TensorBoard keeps float32; every metric of metrics.jsonl is a point at its step, in the chart of its name, but
    those that a run has once.
    """
    points = {(tag, step): value for tag, line in points_of(two_steps / "tensorboard").items() for step, value in line}
    metrics = [(name, line["step"], value) for line in read_metrics(two_steps) for name, value in line.items()]
    lines = {(name, step): value for name, step, value in metrics if name != "step" and has_chart(name)}
    assert points.keys() == lines.keys()
    assert points == pytest.approx(lines, rel=1e-6)
