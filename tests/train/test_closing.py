"""What the terminal shows at the end of a run, worked out by hand."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from dpo.board.dashboard import Answer
from dpo.config import LossConfig
from dpo.run_folder.fallen import fallen_warning
from dpo.train.closing import conclude, end_lines, points, sparkline


def test_what_improved() -> None:
    """Training: step 1 against the mean of the last ten (losses 0.59, 0.58, ... 0.50: 0.545); evaluation: the first
    against the last."""
    lines = [
        {"step": 0, "eval/loss": 0.69314, "eval/rewards/accuracies": 0.0, "eval/rewards/margins": -0.00001},
        {"step": 1, "train/loss": 0.7},
        *({"step": step, "train/loss": 0.61 - 0.01 * step} for step in range(2, 12)),
        {"step": 11, "eval/loss": 0.61, "eval/rewards/accuracies": 0.64, "eval/rewards/margins": 0.25},
    ]
    trained, held_out, loss, margin, charts = end_lines(Path("runs/x"), lines, LossConfig())
    assert trained == "trained   step 1 -> last 10: loss 0.7000 -> 0.5450"
    metrics = "loss 0.6931 -> 0.6100  acc 0.000 -> 0.640  margin 0.000 -> 0.250"
    assert held_out == f"held out  step 0 -> step 11: {metrics}"
    assert loss == "loss      █▄▄▃▃▃▂▂▂▁▁  0.700 to 0.500"  # 0.59 is 0.45 of the way from 0.5 to 0.7: block 3 of 0 to 7
    assert margin == "margin    ▁█  held out, 0.000 to 0.250"
    assert charts == "charts    tensorboard --logdir runs/x"


def test_a_sparkline_has_a_block_per_value_from_least_to_most() -> None:
    """Eight blocks: 0 to 7 each its own, in whatever unit; a constant is at the bottom."""
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7]) == "▁▂▃▄▅▆▇█"
    assert sparkline([-2e-9, 5e-9, -2e-9]) == "▁█▁"
    assert sparkline([3.0, 3.0]) == "▁▁"


def test_a_long_run_is_drawn_by_means() -> None:
    """Of 120 steps two a character: the mean of 0 and 1 is 0.5, of 118 and 119 118.5; of 61, one has two."""
    assert points([float(step) for step in range(120)]) == [2 * i + 0.5 for i in range(60)]
    found = points([float(step) for step in range(61)])
    assert len(found) == 60 and sum(value != round(value) for value in found) == 1
    assert points([]) == []


ANSWERS = [
    Answer("same", "yes", "yes"),
    Answer("<s>" + "long " * 40 + "Question?\n\nAssistant:", " [red]I\x1b[2J do\tnot\nknow[/red]", "x" * 200),
    Answer("later", "a", "b"),
]


def test_one_answer_is_shown_shortened_and_harmless() -> None:
    """The first that differs; of a prompt its end, of an answer its beginning, in at most 100 columns."""
    lines = end_lines(Path("runs/x"), [], LossConfig(), ANSWERS)
    prompt, reference, policy, charts = lines
    assert prompt.startswith("prompt     …") and prompt.endswith(" long Question?↵↵Assistant:") and len(prompt) == 100
    assert reference == "reference  [red]I␛[2J do⇥not↵know[/red]"
    assert policy == "policy     " + "x" * 88 + "…"
    assert charts.startswith("charts     tensorboard ")


def test_equal_and_empty_answers_are_shown_too() -> None:
    lines = end_lines(Path("runs/x"), [], LossConfig(), [Answer("a", "", "")])
    assert lines[1:3] == ["reference  (an empty answer)", "policy     (an empty answer)"]
    assert len(end_lines(Path("runs/x"), [], LossConfig(), [])) == 1


@pytest.mark.parametrize(
    ("loss", "margin", "told"),
    [
        (LossConfig(), 0.0099, True),
        (LossConfig(), -0.0099, True),
        (LossConfig(), 0.0101, False),
        (LossConfig(), -0.0101, False),
        (LossConfig("apo_zero"), 0.0, True),
        (LossConfig("simpo"), 0.0, False),
    ],
)
def test_a_margin_that_did_not_change_is_told(loss: LossConfig, margin: float, told: bool) -> None:
    """By less than 0.01 either way, in one line with what to try. The margin may be 3 from the first, as where the
    reference is another model than where training began. simpo's margin is not that to a reference.
    """
    for first in (0.0, 3.0):
        rewards = {"eval/loss": 0.7, "eval/rewards/accuracies": 1.0}
        lines = [{"step": step, "eval/rewards/margins": first + step * margin, **rewards} for step in (0, 1)]
        found = [line for line in end_lines(Path("runs/x"), lines, loss) if "hardly moved" in line]
        assert len(found) == told
        for line in found:
            assert line.startswith("advice    the margin is about where it was: the model has hardly moved; try ")


def test_a_curve_that_is_flat_as_shown_is_not_drawn() -> None:
    """0.69312 and 0.69314 are both 0.693: their picture would be one of rounding."""
    for last, is_drawn in ((0.69312, False), (0.6926, False), (0.6924, True)):
        lines = [{"step": step, "train/loss": loss} for step, loss in enumerate((0.69314, last), start=1)]
        assert any(line.startswith("loss ") for line in end_lines(Path("runs/x"), lines, LossConfig())) == is_drawn


def test_the_command_of_the_charts_can_be_pasted() -> None:
    assert end_lines(Path("runs/my run"), [], LossConfig()) == ["charts  tensorboard --logdir 'runs/my run'"]


def test_without_rewards_no_margin_is_told() -> None:
    lines = [{"step": 0, "eval/loss": 0.7}, {"step": 9, "eval/loss": 0.7}]
    assert len(end_lines(Path("runs/x"), lines, LossConfig("sft"))) == 2  # held out, charts
    assert len(end_lines(Path("runs/x"), lines[:1], LossConfig())) == 1


# --- winners that have fallen far ------------------------------------------------------------------------------------


def nats_line(step: int, group: str, nats: float) -> dict[str, float]:
    return {"step": step, f"{group}/loss": 0.5, f"{group}/pairs": 1794, f"{group}/logratios_per_token/chosen": nats}


def test_the_warning_says_what_is_averaged() -> None:
    """e^-0.6 is 55 %."""
    told = fallen_warning([nats_line(0, "eval", 0.0), nats_line(5, "train", 0.0), nats_line(9, "eval", -0.6)])
    assert told is not None
    assert told.startswith("winners are at −0.6 nats per token, below −0.5: the mean over 1,794 held-out pairs of ")
    assert "(log pi − log ref of the winner) / its tokens" in told and "55% as likely" in told


def test_without_evaluations_it_is_of_the_last_ten_steps() -> None:
    """Two steps at 0, then ten at -1.02 and 0 in turn, -0.51 in the mean; after another step at 0 the mean of the last
    ten is -0.408.
    """
    nats = [0.0, 0.0, *[-1.02, 0.0] * 5]
    steps = [nats_line(step, "train", value) for step, value in enumerate(nats, start=1)]
    told = fallen_warning(steps)
    assert told is not None and "at −0.51 nats per token" in told and "the pairs of the last 10 steps" in told
    assert fallen_warning([*steps, nats_line(13, "train", 0.0)]) is None


def test_there_is_no_warning_at_half_a_nat_or_without_a_reference() -> None:
    assert fallen_warning([nats_line(9, "eval", -0.5)]) is None
    assert fallen_warning([{"step": 9, "eval/loss": 0.7}]) is None and fallen_warning([]) is None


def told_at_the_end(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> list[str]:
    """The lines of a run that ends after 9 steps."""
    run = SimpleNamespace(
        world=SimpleNamespace(is_main=True),
        start=SimpleNamespace(step=0),
        inputs=SimpleNamespace(last_step=9, model=SimpleNamespace(adapters=None)),
        dir=run_dir,
        answers=None,
        config=SimpleNamespace(loss=LossConfig()),
    )
    conclude(run)  # type: ignore[arg-type]
    first, *others = capsys.readouterr().err.splitlines()
    assert first.endswith(f"done: 9 steps, the model is in {run_dir / 'final'}")
    return others


def test_metrics_that_are_damaged_do_not_fail_a_run_that_is_done(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rank 0 alone would end with an error, and the others would wait for it."""
    (tmp_path / "metrics.jsonl").write_text("no metrics\n")
    (line,) = told_at_the_end(tmp_path, capsys)
    assert line.startswith(f"WARNING: how the run went is not shown: {tmp_path / 'metrics.jsonl'}:1: ")


def test_the_terminal_warns_in_its_last_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "metrics.jsonl").write_text(json.dumps(nats_line(9, "train", -0.7)) + "\n")
    lines = told_at_the_end(tmp_path, capsys)
    assert lines[-1].startswith("WARNING: winners are at −0.7 nats per token")
