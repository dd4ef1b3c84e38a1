"""The page of a run, and of several: what stands there, what is escaped, and what happens to broken folders."""

import errno
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dpo.config import SourceConfig
from dpo.report import program
from dpo.report.page import page_of_run, page_of_runs
from dpo.report.record import read_record
from dpo.run_folder.evaluations import evaluation_path
from tests.report.folders import PROMPT, eval_line, nats, pairs_of, save_run, train_line
from tests.support.runs import error_lines, exit_code_of

VOID = ("meta", "br")
LINES = [
    eval_line(0, 0.0, 0.0, accuracy=0.0),
    *(train_line(step) for step in range(1, 21)),
    eval_line(20, -0.6, -1.0, accuracy=0.5, **nats(-0.6, -2.0)),
]
PAIRS = {0: pairs_of([0, 0], [0, 0]), 20: pairs_of([-7, -5], [-8, -12])}


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    return save_run(tmp_path / "run", LINES, PAIRS)


class Reader(HTMLParser):
    """Checks that tags are closed in order; collects the text and all attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text = ""
        self.attributes: list[tuple[str, str]] = []
        self.tags: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}>"

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.text += f" {data}"


def read(page: str) -> Reader:
    """The page, whose tags are closed, and which has no script and loads nothing."""
    reader = Reader()
    reader.feed(page)
    assert not reader.open
    assert "script" not in reader.tags and not {"img", "link", "iframe", "object"} & reader.tags
    assert not [name for name, _ in reader.attributes if name in ("src", "href") or name.startswith("on")]
    reader.text = " ".join(reader.text.split())
    return reader


def test_the_page_of_a_run(run_dir: Path) -> None:
    """Numbers of the folder by hand: 20 steps of 2 s on 2 GPUs are 40 s and
    0.0222 GPU-hours; margins of 0.1 and 0.7 predict 52.5 and 66.8 %, in the mean 59.7, and both are right.
    """
    text = read(page_of_run(read_record(run_dir))).text
    for words in (
        "Run run",
        "20 of 20 steps: done",
        "40 s steps and reference pass on 2 × NVIDIA H100",
        "0.0222 GPU-hours of steps and reference pass",
        "10.0 k tokens trained on",
        "Winners went down by 0.600, losers went down by 1.00: the margin grew by 0.400",
        "Warning: winners are at −0.6 nats per token",
        "after step 20",
        "after step 0",
        "Margin against difference in length, 2 pairs",
        "right in 59.7% of pairs and is in 100.0%: 2 pairs are too few for a verdict",
        "data.eval[0] data/eval.jsonl",
        "Who is 5 < 6?",
        "step 20 Nobody, after 20.",
        "step 0 Nobody, after 0.",
        "reference I do not know.",
        "train.steps 20 null",
        "hosts [n1]",
    ):
        assert words in text, words
    for chart in (
        "Loss",
        "Accuracy",
        "Rewards, thin: training",
        "Log pi − log ref per token",
        "Gradient norm",
        "Learning rate",
        "Speed",
        "Calibration",
    ):
        assert chart in text, chart
    assert "optim.alpha" not in text.partition("all keys")[0]  # a default


def test_the_page_of_several_runs(tmp_path: Path) -> None:
    runs = [
        save_run(tmp_path / f"run{i}", LINES, PAIRS, loss__beta=beta, optim__lr=lr)
        for i, (beta, lr) in enumerate([(0.1, 1e-6), (0.1, 1e-5), (0.5, 1e-6), (0.5, 1e-5)])
    ]
    page = page_of_runs([read_record(run) for run in runs])
    text = read(page).text
    assert "They differ in loss.beta, optim.lr." in text
    assert "held-out accuracy optim.lr loss.beta 1e-6 1e-5 0.1 0.500 0.500 0.5 0.500 0.500" in text
    assert "run3 0.5 1e-5 20 of 20 0.500 0.500 0.400 −0.600 +1.00 −0.600 40 s" in text
    assert all(f"var(--run{i})" in page for i in range(4))


HOSTILE = "<script>alert(1)</script>\"'&\x1b[31m"


def test_everything_that_users_give_is_escaped(tmp_path: Path) -> None:
    """In the folder's name, config, answers, sources, provenance and names of runs. `read` finds the tags."""
    pairs = pairs_of([1], [0]) | {"sources": np.array([f"data.eval[0] {HOSTILE}"])}
    name = HOSTILE.replace("/", "")
    runs = [save_run(tmp_path / f"{name}{i}", LINES, {20: pairs}, loss__beta=0.1 + i) for i in range(2)]
    for run in runs:
        row = {"prompt": HOSTILE, "reference": HOSTILE, "policy": HOSTILE}
        (run / "answers" / "step-000020.jsonl").write_text(json.dumps(row) + "\n")
        (run / "config.yaml").write_text((run / "config.yaml").read_text().replace("models/sft", "'<b>bold</b>'"))
        (run / "provenance.json").write_text(json.dumps([{"version": HOSTILE, "layout": {"devices": {HOSTILE: 1}}}]))
    for page in (page_of_run(read_record(runs[0])), page_of_runs([read_record(run) for run in runs])):
        reader = read(page)
        assert HOSTILE.partition("\x1b")[0].replace("/", "") in reader.text.replace("/", "")
        assert "<b>bold</b>" not in page
    assert (
        "\x1b" not in page_of_run(read_record(runs[0])).partition("Answers over time")[2].partition("Config, code")[0]
    )


def test_a_page_of_many_pairs_is_small(tmp_path: Path) -> None:
    """100,000 pairs and 10,000 steps: under 2 MB. Every third or so of the pairs is drawn, all are counted."""
    rng = np.random.default_rng(0)
    pairs = pairs_of(rng.normal(size=100_000), rng.normal(size=100_000) - 1)
    pairs["tokens_chosen"] = rng.integers(1, 500, 100_000).astype(np.int32)
    lines = [
        *(train_line(step) for step in range(1, 10_001)),
        *(eval_line(step, 1, 0) for step in range(0, 10_001, 100)),
    ]
    page = page_of_run(read_record(save_run(tmp_path / "run", lines, {0: pairs, 10_000: pairs})))
    assert len(page.encode()) < 2_000_000
    assert "3,000 of 100,000 pairs" in read(page).text


# --- less than a whole run --------------------------------------------------------------------------------------------


def test_a_run_with_adapters_is_finished(run_dir: Path) -> None:
    """Its final/ has adapter_config.json in place of config.json."""
    (run_dir / "final" / "config.json").rename(run_dir / "final" / "adapter_config.json")
    assert read_record(run_dir).is_done
    (run_dir / "final" / "adapter_config.json").unlink()
    assert not read_record(run_dir).is_done


def test_a_run_that_is_not_finished(run_dir: Path) -> None:
    shutil.rmtree(run_dir / "final")
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()[:11]
    (run_dir / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 11, "train/lo')
    evaluation_path(run_dir, 20).unlink()
    text = read(page_of_run(read_record(run_dir))).text
    assert "10 of 20 steps: not finished" in text
    assert "Neither reward has moved" in text  # by the evaluation before the first step


def test_a_run_without_evaluations(tmp_path: Path) -> None:
    """The split and the numbers are those of training; nothing is told of single pairs."""
    run = save_run(tmp_path / "run", [train_line(step) for step in range(1, 21)], data__eval=[])
    text = read(page_of_run(read_record(run))).text
    assert "0.750 training accuracy" in text and "Winners went up by 0.200, losers went down by 0.300" in text
    assert "Calibration" not in text and "Sources" not in text


@pytest.mark.parametrize(
    ("loss", "absent"), [("sft", ("rewards_", "logratios_", "logps_rejected")), ("simpo", ("logratios_",))]
)
def test_a_loss_without_rewards_or_without_a_reference(tmp_path: Path, loss: str, absent: tuple[str, ...]) -> None:
    keys = ("logratios", *(("rewards", "rejected") if loss == "sft" else ()))
    lines = [{name: value for name, value in line.items() if not any(key in name for key in keys)} for line in LINES]
    absent += ("tokens_rejected",) * (loss == "sft")
    pairs = {
        step: {name: a for name, a in arrays.items() if not name.startswith(absent)} for step, arrays in PAIRS.items()
    }
    text = read(page_of_run(read_record(save_run(tmp_path / "run", lines, pairs, loss__name=loss)))).text
    assert "Sources" in text and "Calibration" not in text and "Warning" not in text
    assert ("Winner up, or loser down?" in text) == ("Rewards of single pairs" in text) == (loss == "simpo")


@pytest.mark.parametrize(
    ("changes", "shown"),
    [
        ({"loss__name": "robust"}, True),
        ({"loss__name": "ipo"}, False),
        ({"loss__label_smoothing": 0.1}, False),
        ({"loss__length_normalized": True}, False),
        ({"data__train": [SourceConfig("a", columns={"weight": "w"}), SourceConfig("b")]}, True),
        ({"data__train": [SourceConfig("a"), SourceConfig("b", columns={"margin": "m"})]}, False),
    ],
)
def test_calibration_is_of_losses_that_fit_the_share_of_labels(
    tmp_path: Path, changes: dict[str, Any], shown: bool
) -> None:
    text = read(page_of_run(read_record(save_run(tmp_path / "run", LINES, PAIRS, **changes)))).text
    assert ("Calibration" in text) == ("by Bradley and Terry with probability" in text) == shown


def test_a_folder_with_a_config_alone(run_dir: Path) -> None:
    for path in run_dir.iterdir():
        if path.name != "config.yaml":
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    record = read_record(run_dir)
    text = read(page_of_run(record)).text
    assert "No step was logged yet." in text and "0 of 20 steps: not finished" in text
    assert not record.faults


BROKEN = {
    "config.yaml": b"loss: [",
    "metrics.jsonl": b"not a line\n",
    "provenance.json": b"{",
    "answers/step-000020.jsonl": b'{"prompt": 1}\n',
    "eval/step-000020.npz": b"PK\x03\x04 torn",
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_named_and_the_rest_is_shown(run_dir: Path, name: str) -> None:
    (run_dir / name).write_bytes(BROKEN[name])
    record = read_record(run_dir)
    assert [fault.startswith(f"{name} cannot be read: ") for fault in record.faults] == [True]
    text = read(page_of_run(record)).text
    assert f"{name} cannot be read" in text
    assert "Answers over time" in text and ("Loss" in text) == (name != "metrics.jsonl")


@pytest.mark.parametrize(
    ("what", "value"),
    [
        ("rewards_chosen", np.zeros(3)),
        ("source", np.array([0, 7], np.int32)),
        ("source", np.array([0.0, 0.0])),
        ("logps_chosen", np.array(["a", "b"])),
    ],
)
def test_arrays_that_do_not_fit_are_not_believed(run_dir: Path, what: str, value: np.ndarray) -> None:
    np.savez(evaluation_path(run_dir, 20), **(PAIRS[20] | {what: value}))
    record = read_record(run_dir)
    assert list(record.pairs) == [0] and "eval/step-000020.npz cannot be read" in record.faults[0]


def test_a_pickle_is_not_opened(run_dir: Path) -> None:
    """Loading one would run code of whoever wrote it."""
    np.savez(evaluation_path(run_dir, 20), allow_pickle=True, rewards_chosen=np.array([{}], object))
    assert "allow_pickle" in read_record(run_dir).faults[0]


def test_metrics_that_are_no_numbers_are_left_out(run_dir: Path) -> None:
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write('{"step": 21, "train/loss": NaN, "train/lr": "fast", "eval/loss": null}\n')
    assert read_record(run_dir).lines[-1] == {"step": 21}


# --- the command ------------------------------------------------------------------------------------------------------


def command(*words: str | Path) -> int:
    return exit_code_of(program.main, "dpo.report", *map(str, words))


def test_where_the_page_is_written(run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    other = save_run(tmp_path / "other", LINES, PAIRS)
    assert command(run_dir) == command(run_dir, other) == command(run_dir, "--out", tmp_path / "mine.html") == 0
    assert "Run run" in (run_dir / "report.html").read_text()
    assert "2 runs side by side" in (tmp_path / "report.html").read_text()
    assert (tmp_path / "mine.html").read_text() == (run_dir / "report.html").read_text()


def test_a_run_is_shown_once_and_other_folders_are_skipped(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "notes").mkdir()
    (tmp_path / "jobs").mkdir()
    (tmp_path / "link").symlink_to(run_dir)
    assert command(run_dir, tmp_path / "link", tmp_path / "notes", tmp_path / "jobs") == 0
    assert "Run run" in (run_dir / "report.html").read_text()
    assert f"skipped, without a config.yaml: {tmp_path / 'notes'}\n" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["nowhere"], "command line: RUN: no such folder: nowhere; valid: a run folder"),
        (["empty"], "command line: RUN: not a run folder: empty; valid: a run folder"),
        (["run", "--out", "nowhere/page.html"], "command line: --out: cannot be written: nowhere/page.html; valid: "),
        (["run", "--metric", "accuracy"], "command line: --metric: no run has 'accuracy'; valid: eval/log"),
    ],
)
def test_wrong_words_are_one_line(
    run_dir: Path,
    tmp_path: Path,
    words: list[str],
    error: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    assert command(*words) == 2
    (line,) = error_lines(capsys.readouterr().err)
    assert line.startswith(f"error: {error}")


def test_the_folder_of_the_page_is_read_only(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As a run folder on a disk that keeps finished runs."""

    def fail(dir: Path) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(program, "TemporaryFile", fail)
    assert command(run_dir) == 2
    page = run_dir / "report.html"
    (line,) = error_lines(capsys.readouterr().err)
    assert line.startswith(
        f"error: command line: --out: cannot be written: {page}: Read-only file system; valid: --out "
    )


def test_a_page_that_fails_does_not_fail_the_run(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> str:
        raise ZeroDivisionError("no pairs")

    monkeypatch.setattr(program, "page_of_run", fail)
    program.report_at_end(run_dir)
    expected = f"WARNING: {run_dir / 'report.html'} was not written: ZeroDivisionError: no pairs\n"
    assert capsys.readouterr().err == expected


def test_an_answer_may_hold_other_line_breaks_of_unicode(run_dir: Path) -> None:
    """U+2028, U+2029 and U+0085 stand unescaped in the file, and end no line of it."""
    row = {"prompt": "a\u2028b", "reference": "c\u2029d", "policy": "e\u0085f"}
    (run_dir / "answers" / "step-000020.jsonl").write_text(json.dumps(row, ensure_ascii=False) + "\n", encoding="utf-8")
    record = read_record(run_dir)
    assert record.answers[20] == (row,) and not record.faults


def test_prompts_stand_with_the_newest_answer_first(run_dir: Path) -> None:
    page = page_of_run(read_record(run_dir))
    assert [int(step) for step in re.findall(r'<td class="soft">step (\d+)</td>', page)] == [20, 0]
    assert PROMPT.replace("<", "&lt;") in page
