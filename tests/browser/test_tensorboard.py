"""What a person sees of a run in TensorBoard: every tab in a real browser. `tests.browser.look` also takes pictures."""

import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from dpo.board.hparams import ENTRY
from launch import compare
from tests.browser.example_runs import ANSWERS, save_run
from tests.browser.look import look
from tests.browser.webdriver import PROGRAMS

MISSING = [name for name in PROGRAMS if not shutil.which(name)]
pytestmark = [
    pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}"),
    pytest.mark.xdist_group("browser"),
]

Seen = dict[str, Any]
SIDES = ("eval-chosen", "eval-rejected", "train-chosen", "train-rejected")


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> Seen:
    """Tab -> what it shows of one run."""
    root = tmp_path_factory.mktemp("board")
    save_run(root / "run", beta=0.1)
    return look(root / "run", root / "pictures")


def test_groups_stand_in_the_order_in_which_they_are_read(seen: Seen) -> None:
    groups = ["1 preference", "2 chosen and rejected", "3 optimization", "4 speed", "5 reference"]
    assert seen["scalars"]["groups"] == groups
    assert seen["timeseries"]["groups"] == ["Pinned", *groups, "6 distributions"]


def test_the_first_groups_are_open_and_what_belongs_together_shares_a_chart(seen: Seen) -> None:
    lines = {
        title: [run.removeprefix("tensorboard/") for run in runs] for title, runs in seen["timeseries"]["lines"].items()
    }
    assert {title: sorted(runs) for title, runs in lines.items()} == {
        "1 preference/loss": ["eval", "train"],
        "1 preference/rewards/accuracies": ["eval", "train"],
        "1 preference/rewards/margins": ["eval", "train"],
        "2 chosen and rejected/logps": list(SIDES),
        "2 chosen and rejected/rewards": list(SIDES),
    }


def test_the_lines_of_a_chart_have_different_colours(seen: Seen) -> None:
    """By the legend of each card, and by the strokes that are drawn in the other tabs."""
    for runs in seen["timeseries"]["lines"].values():
        assert len(set(runs.values())) == len(runs)
    for tab in ("scalars", "custom_scalars"):
        assert [len(colours) for colours in seen[tab]["lines"].values()] == [2, 2, 2, 4, 4]


def test_the_custom_charts(seen: Seen) -> None:
    assert seen["custom_scalars"]["groups"] == ["train against eval", "chosen against rejected"]
    titles = [title.split(":")[0] for title in seen["custom_scalars"]["lines"]]
    assert titles == ["loss", "accuracy", "margin", "rewards", "log-probabilities of a completion, nats"]


def test_the_distributions(seen: Seen) -> None:
    """Lengths once; margins at seven evaluations."""
    drawn = {
        "6 distributions/lengths tensorboard/train-chosen": 1,
        "6 distributions/lengths tensorboard/train-rejected": 1,
        "6 distributions/lengths/prompt tensorboard/train": 1,
        "6 distributions/rewards/margins tensorboard/eval": 7,
    }
    assert seen["histograms"] == drawn
    assert seen["distributions"].keys() == drawn.keys()


def test_answers_are_shown_as_they_are_beside_config_and_data(seen: Seen) -> None:
    text = seen["text"]
    assert text["pages"] == ["run/answers", "run/config", "run/data"]
    cells = [cell.replace("\N{NO-BREAK SPACE}", " ") for cell in text["cells"][:6]]
    expected = [part for answer in ANSWERS[:2] for part in (answer.prompt, answer.reference, answer.policy)]
    assert cells == [part.strip() for part in expected]
    assert "loss:\n  name: dpo\n  beta: 0.1\n" in text["code"][0]
    assert "1,794 pairs kept" in text["code"][1]


def test_hparams_have_keys_and_figures(seen: Seen) -> None:
    """The metrics are those of the last evaluation, as many digits as the tab shows."""
    table = seen["hparams"]["tensorboard/eval"]
    assert (table["loss.beta"], table["loss.name"], table["optim.lr"]) == ("0.10000", "dpo", "0.0000010000")
    for name in ("eval loss", "eval accuracy", "eval margin"):
        assert 0.3 < float(table[name]) < 0.9


def test_a_comparison_has_the_keys_that_differ_also_of_interrupted_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = [tmp_path / "runs" / "a", tmp_path / "runs" / "b"]
    save_run(runs[0], beta=0.1)
    save_run(runs[1], beta=0.5, until=43, seed=1, optim__max_grad_norm=None)
    (runs[1] / "tensorboard" / "eval" / ENTRY).unlink()
    monkeypatch.setattr(sys, "argv", ["compare", *map(str, runs)])
    compare.main()
    table = look(tmp_path / "runs", tmp_path / "pictures", ["hparams"])["hparams"]
    metrics = ["eval loss", "eval accuracy", "eval margin", "eval loss_sft"]
    assert {trial: list(row) for trial, row in table.items()} == {
        f"{name}/tensorboard/eval": ["loss.beta", "optim.max_grad_norm", *metrics] for name in "ab"
    }
    keys = {trial[0]: (row["loss.beta"], row["optim.max_grad_norm"]) for trial, row in table.items()}
    assert keys == {"a": ("0.10000", "10.0"), "b": ("0.50000", "null")}
