"""The sink of a tracker, with a library that can fail: `tests/trackers` has the real ones."""

import dataclasses
import errno
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dpo.base.errors import Preempted, RunError, UserError
from dpo.board import sinks
from dpo.board.dashboard import Dashboard
from dpo.board.sink import Answer, Ending
from dpo.board.tracker import Opening, Tracker
from dpo.board.writer import MetricsWriter
from dpo.config import Config
from tests.support.runs import changed, make_config


@dataclasses.dataclass
class Service:
    """What a tracker was sent: (step, names) of each row, over all starts."""

    rows: list[tuple[int, list[str]]] = dataclasses.field(default_factory=list)
    openings: list[Opening] = dataclasses.field(default_factory=list)
    endings: list[Ending] = dataclasses.field(default_factory=list)
    fails_at: int | None = None
    """The step of the row that does not arrive."""
    knows: Callable[[], Mapping[str, int] | None] = lambda: None

    def connect(self, opening: Opening) -> "Library":
        """What `Tracker` calls."""
        self.openings.append(opening)
        return Library(self)


class Library:
    """A `Client` that appends to its service."""

    def __init__(self, service: Service):
        self.service = service

    def held(self) -> Mapping[str, int] | None:
        return self.service.knows()

    def send(self, step: int, row: Mapping[str, Any]) -> None:
        if step == self.service.fails_at:
            raise ConnectionError("the network\nis gone")
        self.service.rows.append((step, [*row]))

    def histogram(self, counts: np.ndarray, edges: np.ndarray) -> Any:
        return counts, edges

    def text(self, text: str) -> Any:
        return text

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Any:
        return columns, rows

    def close(self, ending: Ending) -> None:
        self.service.endings.append(ending)


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return make_config("model", "train.jsonl", tmp_path / "run")


def start(config: Config, service: Service, first: int, last: int, earlier: Sequence[Mapping[str, float]] = ()) -> None:
    """A start of a run that evaluates after 0, 3, 6, ... steps, and is killed after step `last`."""
    tracker = sinks._open_tracker("wandb", service.connect)(config, first, earlier)
    assert isinstance(tracker, Tracker)
    tracker.text("config", f"from {first}")
    for step in range(first if first > 1 else 0, last + 1):
        if step:
            tracker.metrics(step, {"train/loss": 1.0, "train/lr": 1.0})
        if step % 3 == 0:
            tracker.metrics(step, {"eval/loss": 1.0})
            tracker.histogram("eval/rewards/margins", np.zeros(2), step)
            tracker.answers(step, [Answer("", "", "")])
    kill(tracker)


def kill(tracker: Tracker) -> None:
    """Ends a tracker as a kill does, but for Python's warning of open files."""
    assert tracker.journal
    tracker.journal.close()


def steps_of(service: Service, name: str) -> list[int]:
    return [step for step, names in service.rows if name in names]


TRAIN = [{"step": step, "train/loss": 1.0, "train/lr": 1.0} for step in range(1, 10)]


def test_a_resumed_run_sends_each_row_once_to_the_same_run(config: Config) -> None:
    """Killed after step 8, goes on from the checkpoint of step 4. A line of the journal is cut off, as where a run is
    killed while it writes: the lines after it are read all the same.
    """
    service = Service()
    start(config, service, 1, 8)
    start(config, service, 5, 7)
    (journal,) = Path(str(config.train.run_dir), "trackers").iterdir()
    with journal.open("ab") as file:
        file.write(b'{"step": 9, "ro')
    start(config, service, 5, 9)
    start(config, service, 8, 9)
    assert steps_of(service, "train/loss") == [*range(1, 10)]
    for name in ("eval/loss", "values/eval/rewards/margins", "answers"):
        assert steps_of(service, name) == [0, 3, 6, 9]
    assert steps_of(service, "run/config") == [1, 5, 8]
    assert len({opening.id for opening in service.openings}) == 1
    assert [opening.num_rows for opening in service.openings] == [0, 18, 19, 23]


def test_an_evaluation_that_was_cut_short_is_sent_though_later_steps_were(config: Config) -> None:
    """Step 3 was sent and saved, its evaluation not: the next start evaluates it first."""
    service = Service()
    tracker = Tracker("wandb", config, 1, service.connect)
    tracker.metrics(3, {"train/loss": 1.0})
    kill(tracker)
    tracker = Tracker("wandb", config, 4, service.connect)
    tracker.metrics(3, {"eval/loss": 1.0})
    kill(tracker)
    assert service.rows == [(3, ["train/loss"]), (3, ["eval/loss"])]


def test_a_tracker_that_fails_ends_nothing_and_gets_what_it_lacks_from_the_next_start(
    config: Config, capsys: pytest.CaptureFixture[str]
) -> None:
    """The network goes at step 5, and the run is killed after step 8; its checkpoint is of step 7."""
    service = Service(fails_at=5)
    start(config, service, 1, 8)
    assert steps_of(service, "train/loss") == [1, 2, 3, 4]
    told = [line for line in capsys.readouterr().err.splitlines() if "wandb" in line]
    assert told == [
        "WARNING: wandb failed, and is sent no more: ConnectionError: the network is gone; "
        "the run does not end with it, and its next start sends the metrics that are missing"
    ]
    service.fails_at = None
    start(config, service, 8, 9, earlier=TRAIN[:7])
    assert steps_of(service, "train/loss") == [*range(1, 10)]


def test_what_the_tracker_holds_goes_before_what_it_was_sent(config: Config) -> None:
    """Its library had two rows in memory as the run was killed."""
    service = Service()
    start(config, service, 1, 4)
    del service.rows[-2:]
    service.knows = lambda: {name: step for step, names in service.rows for name in names}
    start(config, service, 5, 5, earlier=TRAIN[:4])
    assert steps_of(service, "train/loss") == [1, 2, 3, 4, 5]


def test_a_tracker_that_cannot_be_opened_ends_nothing(config: Config, capsys: pytest.CaptureFixture[str]) -> None:
    def refuse(opening: Opening) -> Library:
        raise PermissionError("no key")

    tracker = Tracker("wandb", config, 1, refuse)
    tracker.metrics(1, {"train/loss": 1.0})
    tracker.close()
    assert capsys.readouterr().err.count("WARNING: wandb failed") == 1


def test_the_config_is_sent_as_it_is_in_its_yaml(config: Config) -> None:
    service = Service()
    Tracker("wandb", config, 1, service.connect).close()
    (opening,) = service.openings
    assert (opening.name, opening.config["loss.beta"], opening.config["train.report_to"]) == (
        "run",
        0.1,
        '["tensorboard"]',
    )


def test_a_tracker_that_is_not_installed_is_told_with_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder of its name, which W&B leaves where it ran, is no package; a package is."""
    (tmp_path / "not_there").mkdir()
    (tmp_path / "there.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    sinks.check_installed(["tensorboard", "there"])
    with pytest.raises(UserError) as raised:
        sinks.check_installed(["tensorboard", "not_there"])
    valid = "after pip install 'exact-dpo[not_there]', or a list without not_there"
    assert str(raised.value) == f"train.report_to: not_there is not installed; valid: {valid}"


def test_sinks_are_those_of_the_config(config: Config) -> None:
    assert sinks.open_sinks(changed(config, train__report_to=[]), 1, []) == []
    (only,) = sinks.open_sinks(config, 1, [])
    assert isinstance(only, Dashboard)
    only.close()


# --- the end ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("failure", "ending"),
    [
        (None, "done"),
        (Preempted(3, is_saved=True), "preempted"),
        (RunError("the loss is nan"), "failed"),
        (MemoryError(), "failed"),
    ],
)
def test_a_tracker_is_told_how_the_start_ends(config: Config, failure: Exception | None, ending: Ending) -> None:
    service = Service()
    run_dir = Path(str(config.train.run_dir))
    tracker = Tracker("wandb", config, 1, service.connect)
    with pytest.raises(type(failure)) if failure else nullcontext(), MetricsWriter(run_dir, [tracker]):
        if failure:
            raise failure
    assert service.endings == [ending]


class FullDisk(Dashboard):
    """A sink whose disk is full."""

    def __init__(self) -> None:
        pass

    def text(self, name: str, text: str) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    def close(self, ending: Ending = "done") -> None:
        self.text("", "")


def test_a_sink_that_fails_at_its_end_leaves_no_other_open(config: Config) -> None:
    """And every write to a full disk names the run folder."""
    service, run_dir = Service(), Path(str(config.train.run_dir))
    first, last = (Tracker(name, config, 1, service.connect) for name in ("wandb", "trackio"))
    writer = MetricsWriter(run_dir, [first, FullDisk(), last])
    for fails in (lambda: writer.text("config", ""), writer.close):
        with pytest.raises(OSError, match=str(run_dir)):
            fails()
    assert service.endings == ["done", "done"] and writer.file.closed
