"""What TensorBoard shows of a run, as its own reader and its own markdown show it; `tests/browser` looks at it."""

import re
import shutil
import socket
import time
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tensorboard.backend.event_processing import plugin_event_accumulator
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.plugin_util import markdown_to_safe_html
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.util.tensor_util import make_ndarray

from dpo.board import dashboard
from dpo.board.bins import NUM_BINS, bins
from dpo.board.dashboard import Dashboard, answers_table, fenced
from dpo.board.event_files import open_events, write_event
from dpo.board.hparams import ENTRY, METRICS
from dpo.board.sink import Answer
from dpo.config import Config, SourceConfig
from dpo.config.effects import CHANGING
from dpo.config.loss_facts import LOSS_FACTS
from dpo.step.metrics import SUMS, pair_means, prefixed, step_metrics
from tests.support.boards import board_of, hparams_entry, points_of, steps_of
from tests.support.runs import make_config

# --- where a metric is shown -----------------------------------------------------------------------------------------


def trainer_figures() -> dict[str, float]:
    """The names of all metrics of a run's metrics.jsonl, but those that it has once."""
    means = pair_means(dict.fromkeys(SUMS, 1.0), LOSS_FACTS["dpo"])
    timed = step_metrics(dict.fromkeys((*SUMS, "peak_memory_bytes"), 1.0), 1.0, 0.5) | {"grad_norm": 1.0, "lr": 1.0}
    return prefixed("train", means | timed) | prefixed("eval", means)


def test_every_figure_has_a_chart_by_its_name_but_those_that_a_run_has_once(tmp_path: Path) -> None:
    """A point at step 0 needs no chart, and its group would be open in place of `train`."""
    board = Dashboard(tmp_path, 1)
    board.metrics(0, {"reference/seconds": 1.0, "first_step/spread": 1.0})
    board.metrics(1, trainer_figures())
    board.close()
    assert points_of(tmp_path) == {name: [(1, value)] for name, value in trainer_figures().items()}


def test_the_custom_charts_have_two_or_three_lines_of_a_run(tmp_path: Path) -> None:
    """A run has one color: TensorBoard tells its lines in a chart apart by symbol."""
    board = Dashboard(tmp_path, 1)
    board.metrics(1, trainer_figures())
    board.close()
    content = board_of(tmp_path).Tensors("custom_scalars__config__")[0].tensor_proto
    layout = layout_pb2.Layout.FromString(make_ndarray(content).item())
    found = {
        chart.title.partition(":")[0].partition(" of")[0]: [
            tag for regex in chart.multiline.tag for tag in points_of(tmp_path) if re.match(regex, tag)
        ]
        for category in layout.category
        for chart in category.chart
    }
    assert found == {
        "loss": ["eval/loss", "train/loss"],
        "accuracy": ["eval/rewards/accuracies", "train/rewards/accuracies"],
        "margin": ["eval/rewards/margins", "train/rewards/margins"],
        "rewards": ["eval/rewards/chosen", "eval/rewards/rejected"],
        "log-probabilities": ["eval/logps/chosen", "eval/logps/rejected"],
    }
    assert all("smoothing" in category.title for category in layout.category)


# --- a run that was interrupted --------------------------------------------------------------------------------------


def write_steps(folder: Path, first: int, last: int) -> None:
    """The points of steps `first` to `last`, evaluations after 0, 3, 6, ...; values tell who wrote them."""
    board = Dashboard(folder, first)
    board.text("config", f"from {first}")
    for step in range(first if first > 1 else 0, last + 1):
        if step:
            board.metrics(step, {"train/loss": float(first), "train/rewards/chosen": float(first)})
        if step % 3 == 0:
            board.metrics(step, {"eval/loss": float(first), "eval/rewards/rejected": float(first)})
            board.histogram("eval/rewards/margins", np.array([first]), step)
            board.answers(step, [Answer("", "", str(first))])
    board.close()


@pytest.mark.parametrize("lost_bytes", [0, 1, 30], ids=["all on the disk", "a torn record", "a lost record"])
def test_a_resumed_run_has_every_point_once(tmp_path: Path, lost_bytes: int) -> None:
    """Interrupted after step 8 with evaluations at 0, 3 and 6, goes on from the checkpoint of step 4 to step 9: points
    up to 4 are the first start's, 5 to 9 the second's.
    """
    write_steps(tmp_path, 1, 8)
    for path in tmp_path.rglob("events.out.tfevents.*"):
        path.write_bytes(path.read_bytes()[: path.stat().st_size - lost_bytes])
    write_steps(tmp_path, 5, 9)
    train = [(step, 1.0 if step < 5 else 5.0) for step in range(1, 10)]
    evaluations = [(0, 1.0), (3, 1.0), (6, 5.0), (9, 5.0)]
    assert points_of(tmp_path) == {
        "train/loss": train,
        "train/rewards/chosen": train,
        "eval/loss": evaluations,
        "eval/rewards/rejected": evaluations,
    }
    steps = [step for step, _ in evaluations]
    assert steps_of(tmp_path, "values/eval/rewards/margins") == steps
    assert steps_of(tmp_path, "run/answers") == steps
    assert steps_of(tmp_path, "run/config") == [1, 5]


def test_what_is_given_up_disappears_before_there_is_anything_new(tmp_path: Path) -> None:
    write_steps(tmp_path, 1, 8)
    write_steps(tmp_path, 5, 5)  # no evaluation yet
    assert [step for step, _ in points_of(tmp_path)["eval/loss"]] == [0, 3]
    assert [step for step, _ in points_of(tmp_path)["train/loss"]] == [1, 2, 3, 4, 5]


def test_a_tensorboard_that_is_open_forgets_what_is_given_up(tmp_path: Path) -> None:
    """It has read the file from which the points are removed, and does not read it again. Its own reader, not the one
    for scripts.
    """
    write_steps(tmp_path, 1, 8)
    reader = plugin_event_accumulator.EventAccumulator(str(tmp_path))
    reader.Reload()
    assert [event.step for event in reader.Tensors("eval/loss")] == [0, 3, 6]
    write_steps(tmp_path, 5, 5)
    reader.Reload()
    assert [event.step for event in reader.Tensors("eval/loss")] == [0, 3]


def test_a_run_of_an_older_version_goes_on_without_its_sub_runs(tmp_path: Path) -> None:
    """Its points up to the checkpoint are written again from metrics.jsonl; no line is shown twice, in two runs. A
    folder of the user's stays.
    """
    for folder in (".", "train", "eval-chosen", "mine"):
        file = open_events(tmp_path / folder, 1)
        write_event(file, Event(step=2, summary=Summary(value=[Summary.Value(tag="1 preference/loss")])))
        file.close()
    lines = [{"step": 0, "eval/loss": 0.75}, {"step": 1, "train/loss": 0.5}, {"step": 2, "train/loss": 0.25}]
    for first_step in (3, 4):
        board = Dashboard(tmp_path, first_step, lines)
        board.metrics(first_step, {"train/loss": float(first_step)})
        board.close()
    assert {path.parent.name for path in tmp_path.rglob("*tfevents*")} == {tmp_path.name, "mine"}
    shutil.rmtree(tmp_path / "mine")
    train = [(1, 0.5), (2, 0.25), (3, 3.0), (4, 4.0)]
    assert points_of(tmp_path) == {"eval/loss": [(0, 0.75)], "train/loss": train}


def test_two_starts_from_one_step_leave_the_config_of_the_last(tmp_path: Path) -> None:
    for _ in range(2):
        write_steps(tmp_path, 5, 5)
    assert steps_of(tmp_path, "run/config") == [5]


def test_a_point_is_on_the_disk_at_once(tmp_path: Path) -> None:
    board = Dashboard(tmp_path, 1)
    for step in range(1, 4):
        board.metrics(step, {"train/loss": 1.0, "train/rewards/chosen": 2.0})
        assert points_of(tmp_path)["train/loss"][-1] == (step, 1.0)
        assert points_of(tmp_path)["train/rewards/chosen"][-1] == (step, 2.0)
    board.close()


def test_a_host_whose_clock_is_behind_goes_on_where_the_other_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A requeued job may begin on another host: its files come after the first one's all the same."""
    write_steps(tmp_path, 1, 8)
    hour_ago = time.time() - 3600
    monkeypatch.setattr(time, "time", lambda: hour_ago)
    monkeypatch.setattr(socket, "gethostname", lambda: "a-host")
    write_steps(tmp_path, 5, 9)
    assert [step for step, _ in points_of(tmp_path)["eval/loss"]] == [0, 3, 6, 9]


# --- distributions ---------------------------------------------------------------------------------------------------


def test_a_histogram_counts_every_value_where_it_lies(tmp_path: Path) -> None:
    """-3, 0, 0 and 27 in 30 buckets of width 1: one in [-3, -2), two in [0, 1), one in the last, [26, 27]."""
    board = Dashboard(tmp_path, 1)
    board.histogram("eval/rewards/margins", np.array([[-3.0, 0.0], [0.0, 27.0]]), 1)
    board.close()
    (event,) = board_of(tmp_path).Tensors("values/eval/rewards/margins")
    buckets = {(left, right): count for left, right, count in make_ndarray(event.tensor_proto).tolist() if count}
    assert buckets == {(-3, -2): 1, (0, 1): 2, (26, 27): 1}


@pytest.mark.parametrize("longest", [1, 2, 30, 31, 47, 61, 512, 1000])
def test_lengths_are_no_comb(longest: int) -> None:
    """Each length from 1 on once: every bucket holds as many as the others, but the last, where the lengths end."""
    counts, edges = bins(np.arange(1, longest + 1, dtype=np.int32))
    assert len(set(counts[:-1].tolist())) <= 1 and 0 < counts[-1] <= counts[0] and counts.sum() == longest
    assert len(counts) <= NUM_BINS and len(edges) == len(counts) + 1
    assert len(set(np.diff(edges).tolist())) == 1


@pytest.mark.parametrize("value", [0, 7, 0.0, -1.5])
def test_values_that_are_all_equal_are_one_bucket(value: float) -> None:
    counts, edges = bins(np.full(5, value))
    assert counts.tolist() == [5] and edges.tolist() == [value - 0.5, value + 0.5]


# --- texts -----------------------------------------------------------------------------------------------------------


class Shown(HTMLParser):
    """What a browser shows of the cells of tables, or of blocks of code."""

    def __init__(self, tag: str):
        super().__init__()
        self.tag, self.inside, self.texts = tag, False, list[str]()

    def handle_starttag(self, tag: str, attrs: object) -> None:
        if tag == self.tag:
            self.inside = True
            self.texts.append("")
        elif tag == "br" and self.inside:
            self.texts[-1] += "\n"
        elif self.inside:
            self.texts[-1] += f"(the tag {tag})"

    def handle_endtag(self, tag: str) -> None:
        self.inside = self.inside and tag != self.tag

    def handle_data(self, data: str) -> None:
        if self.inside:
            data = data if self.tag == "code" else re.sub(" +", " ", data)
            self.texts[-1] += data.replace("\N{NO-BREAK SPACE}", " ")


def shown(markdown: str, tag: str) -> list[str]:
    """The texts of all elements `tag` after TensorBoard's own markdown and sanitizer."""
    parser = Shown(tag)
    parser.feed(markdown_to_safe_html(markdown))
    return parser.texts


def visible(text: str) -> str:
    """The text without what nobody sees: spaces at the ends of lines, newlines at the end."""
    return "\n".join(line.rstrip() for line in text.expandtabs(4).split("\n")).rstrip("\n")


HARD = [
    "a | b || c\n| d |\n| --- |",
    "`code` ``` fence\n```\n    indented\n\ttab\n\n\nblank lines",
    "<b>bold</b> <script>alert(1)</script>\n&amp; &lt; &#124; <br> <!-- no -->",
    "**bold** _it_ ~~no~~ [a](http://b) ![c](d)\nhttp://e\n# head\n1. one\n- two\n> three\n***",
    "\\| \\` \\\\ $x^2$ é 中文 🙂  two  spaces ",
    "",
]


@pytest.mark.parametrize("text", HARD)
def test_an_answer_is_shown_as_it_is(text: str) -> None:
    table = answers_table([Answer("prompt", text, "policy"), Answer(text, "reference", text)])
    cells = [visible(cell) for cell in shown(table, "td")]
    assert cells == ["prompt", visible(text), "policy", visible(text), "reference", visible(text)]
    assert shown(table, "th") == ["prompt", "reference", "policy"]


@given(st.text(st.sampled_from("a1 \n\t|`*_<>&#[](){}!~\\$-+.:;'\"=/é中"), max_size=40))
@settings(max_examples=150, deadline=None)
def test_any_text_is_shown_as_it_is(text: str) -> None:
    cells = shown(answers_table([Answer("p", text, "q")]), "td")
    assert [visible(cell) for cell in cells] == ["p", visible(text), "q"]


def test_a_long_answer_is_broken_into_lines_and_loses_nothing() -> None:
    words = "A rather long answer of many words, and a_word_that_is_longer_than_any_line_of_a_table_may_ever_be. " * 5
    (_, cell, _) = shown(answers_table([Answer("p", words, "q")]), "td")
    assert cell.replace("\n", "").rstrip() == words.rstrip()
    assert max(map(len, cell.split("\n"))) == dashboard.COLUMN_WIDTH


@pytest.mark.parametrize("text", ["model:\n  path: a/b  # *x*\n\n  <b>: 1", "a\n```\nb\n````\nc"])
def test_a_block_of_code_is_shown_as_it_is(text: str) -> None:
    assert shown(fenced(text), "code") == [f"{text}\n"]


# --- HParams ---------------------------------------------------------------------------------------------------------


def make(tmp_path: Path, **changes: object) -> Config:
    return make_config("model", "train.jsonl", tmp_path, **({"loss__beta": 0.25, "train__steps": 7} | changes))


@pytest.mark.parametrize("part", ["eval", "train"])
def test_the_entry_has_the_config_and_the_figures_of_its_run(tmp_path: Path, part: str) -> None:
    """Without evaluation pairs the metrics are those of training; they are found in the entry's own folder, so that
    they show whatever folder TensorBoard is started on.
    """
    config = make(tmp_path, data__eval=[SourceConfig("eval.jsonl")] if part == "eval" else [])
    board = Dashboard(tmp_path, 1)
    board.hparams(config)
    board.metrics(1, trainer_figures())
    board.close()
    entry = hparams_entry(tmp_path)
    values = entry.values
    assert (values["loss.beta"], values["loss.name"], values["loss.length_normalized"]) == (0.25, "dpo", False)
    assert (values["train.steps"], values["model.path"]) == (7, "model")
    assert "train.epochs" not in values  # null
    assert entry.columns == [key for key in CHANGING if key in values]
    assert entry.columns[:3] == ["loss.name", "loss.beta", "optim.lr"]
    assert set(entry.metrics) <= points_of(tmp_path).keys()
    assert entry.metrics == [f"{part}/{name}" for name in METRICS]


def test_the_entry_is_written_again_not_twice(tmp_path: Path) -> None:
    """A resume with another learning rate, then one that no longer evaluates."""
    board = Dashboard(tmp_path, 1)
    board.hparams(make(tmp_path, data__eval=[SourceConfig("eval.jsonl")]))
    board.hparams(make(tmp_path, data__eval=[SourceConfig("eval.jsonl")], optim__lr=1e-3))
    assert hparams_entry(tmp_path).values["optim.lr"] == 1e-3
    board.hparams(make(tmp_path))
    board.close()
    assert list(tmp_path.rglob(ENTRY)) == [tmp_path / ENTRY]
    assert all(tag.startswith("train/") for tag in hparams_entry(tmp_path).metrics)


def test_a_start_keeps_the_entry(tmp_path: Path) -> None:
    """Points are given up from the first step on; the entry has step 0."""
    for _ in range(2):
        board = Dashboard(tmp_path, 1)
        board.hparams(make(tmp_path))
        board.metrics(1, trainer_figures())
        board.close()
    assert hparams_entry(tmp_path).values["loss.beta"] == 0.25
