"""What a person sees of a run in TensorBoard: every tab in a real browser. `tests.browser.look` also takes pictures."""

import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dpo.board.hparams import ENTRY
from launch import compare
from tests.browser.example_runs import ANSWERS, lines, save_run
from tests.browser.look import TABS, look
from tests.browser.webdriver import PROGRAMS

MISSING = [name for name in PROGRAMS if not shutil.which(name)]
pytestmark = [
    pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}"),
    pytest.mark.xdist_group("browser"),
]

Seen = dict[str, Any]
NUM_RUNS = 12
NUM_COLORS = 7
"""TensorBoard has no more; with another run a color comes again."""


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> Seen:
    """Tab -> what it shows of one run."""
    root = tmp_path_factory.mktemp("board")
    save_run(root / "run", beta=0.1)
    return look(root / "run", root / "pictures")


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Seen:
    """Tab -> what it shows of a sweep."""
    root = tmp_path_factory.mktemp("sweep")
    for number in range(NUM_RUNS):
        save_run(root / "runs" / f"{number:02}", beta=0.05 * (number + 1), seed=number)
    return look(root / "runs", root / "pictures")


def test_the_groups_with_what_is_learnt_stand_first(seen: Seen) -> None:
    assert seen["scalars"]["groups"] == ["eval", "train"]
    assert seen["timeseries"]["groups"] == ["Pinned", "eval", "train", "values"]


def test_the_first_groups_are_open_and_tags_are_those_of_the_metrics(seen: Seen) -> None:
    """The first page of each group."""
    metrics = {name for _, line in lines(0.1, 10, np.random.default_rng(0)) for name in line}
    shown = seen["scalars"]["lines"].keys()
    assert shown <= metrics
    assert {"eval/loss", "eval/rewards/accuracies", "eval/rewards/margins", "train/loss", "train/grad_norm"} <= shown
    assert {"eval/loss", "eval/rewards/accuracies"} <= seen["timeseries"]["lines"].keys()


def test_a_run_has_one_color(seen: Seen) -> None:
    assert len({color for runs in seen["timeseries"]["lines"].values() for color in runs.values()}) == 1
    for tab in ("scalars", "custom_scalars"):
        assert len({color for colors in seen[tab]["lines"].values() for color in colors}) == 1


def test_the_custom_charts(seen: Seen) -> None:
    assert [title.partition(" (")[0] for title in seen["custom_scalars"]["groups"]] == [
        "eval and train",
        "eval: chosen and rejected",
    ]
    titles = [title.split(":")[0] for title in seen["custom_scalars"]["lines"]]
    assert titles == ["loss", "accuracy", "margin", "rewards", "log-probabilities of a completion, nats"]


def test_the_distributions(seen: Seen) -> None:
    """Lengths once; margins at seven evaluations."""
    drawn = {
        "values/eval/rewards/margins tensorboard": 7,
        "values/train/lengths/chosen tensorboard": 1,
        "values/train/lengths/prompt tensorboard": 1,
        "values/train/lengths/rejected tensorboard": 1,
    }
    assert seen["histograms"] == drawn
    assert seen["distributions"].keys() == drawn.keys()


# --- a sweep: TensorBoard ticks the boxes of up to 40 runs -----------------------------------------------------------


@pytest.mark.parametrize("tab", TABS)
def test_every_tab_shows_a_sweep(sweep: Seen, tab: str) -> None:
    """On its first page; the texts that are blocks of code are on the next ones."""
    assert [what for what, shown in sweep[tab].items() if not shown] == (["code"] if tab == "text" else [])


def test_each_chart_of_a_sweep_has_all_runs_in_as_many_colors_as_there_are(sweep: Seen) -> None:
    for runs in sweep["timeseries"]["lines"].values():
        assert (len(runs), len(set(runs.values()))) == (NUM_RUNS, NUM_COLORS)
    for tab in ("scalars", "custom_scalars"):
        assert {len(colors) for colors in sweep[tab]["lines"].values()} == {NUM_COLORS}


def test_each_run_of_a_sweep_has_its_answers_and_its_distributions(sweep: Seen) -> None:
    """The first page of a tab has twelve cards; a card of answers has a table for each of the seven evaluations."""
    assert sweep["text"]["pages"] == ["run/answers"] * NUM_RUNS
    assert len(sweep["text"]["cells"]) == NUM_RUNS * 7 * 3 * len(ANSWERS)
    margins = {f"values/eval/rewards/margins {number:02}/tensorboard" for number in range(NUM_RUNS)}
    assert sweep["histograms"].keys() == sweep["distributions"].keys() == margins


def test_each_run_of_a_sweep_is_a_row_of_hparams(sweep: Seen) -> None:
    """With its own key, and the metrics of its last evaluation."""
    rows = {trial: (float(row["loss.beta"]), float(row["eval accuracy"])) for trial, row in sweep["hparams"].items()}
    assert {trial: beta for trial, (beta, _) in rows.items()} == {
        f"{number:02}/tensorboard": pytest.approx(0.05 * (number + 1)) for number in range(NUM_RUNS)
    }
    assert all(0.8 < accuracy < 1 for _, accuracy in rows.values())


# --- texts, hparams --------------------------------------------------------------------------------------------------


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
    table = seen["hparams"]["tensorboard"]
    assert (table["loss.beta"], table["loss.name"], table["optim.lr"]) == ("0.10000", "dpo", "0.0000010000")
    for name in ("eval loss", "eval accuracy", "eval margin"):
        assert 0.3 < float(table[name]) < 0.9


def test_a_comparison_has_the_keys_that_differ_also_of_interrupted_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = [tmp_path / "runs" / "a", tmp_path / "runs" / "b"]
    save_run(runs[0], beta=0.1)
    save_run(runs[1], beta=0.5, until=43, seed=1, optim__max_grad_norm=None)
    (runs[1] / "tensorboard" / ENTRY).unlink()
    monkeypatch.setattr(sys, "argv", ["compare", *map(str, runs)])
    compare.main()
    table = look(tmp_path / "runs", tmp_path / "pictures", ["hparams"])["hparams"]
    metrics = ["eval loss", "eval accuracy", "eval margin", "eval SFT loss"]
    assert {trial: list(row) for trial, row in table.items()} == {
        f"{name}/tensorboard": ["loss.beta", "optim.max_grad_norm", *metrics] for name in "ab"
    }
    keys = {trial[0]: (row["loss.beta"], row["optim.max_grad_norm"]) for trial, row in table.items()}
    assert keys == {"a": ("0.10000", "10.0"), "b": ("0.50000", "null")}
