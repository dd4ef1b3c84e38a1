"""How long a resumed run took to its first step, by phase."""

import re
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from dpo.train import phases
from dpo.train.phases import Phases, process_start
from tests.support.runs import logged, run, run_until, save_six_steps, six_steps

PHASES = ["imports", "ranks", "data", "model", "reference", "checkpoint", "run folder", "first step"]


def test_each_phase_lasts_from_the_end_of_the_one_before(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(phases, "time", SimpleNamespace(monotonic=lambda: now[0]))
    start = Phases(begun=98.0)
    for name, now[0] in (("imports", 102.1), ("data", 102.9), ("first step", 103.4)):
        start.end(name)
    assert start.line() == "5.4 s: imports 4.1, data 0.8, first step 0.5"


def test_a_process_knows_when_it_was_started() -> None:
    """The kernel counts in hundredths of a second."""
    start = process_start()
    assert start == pytest.approx(process_start(), abs=0.02) and start < time.monotonic()


def test_a_resumed_run_tells_its_phases(tmp_path: Path) -> None:
    """A fresh one does not. The line has one decimal of each; they sum up to its total."""
    save_six_steps(tmp_path)
    config = six_steps(tmp_path, tmp_path / "run")
    run_until(config, 5)
    assert not [line for line in logged(tmp_path / "run") if line.startswith("resumed at")]
    (line,) = [line for line in logged(run(config)) if line.startswith("resumed at")]
    told = re.fullmatch(r"resumed at step 4 after (\d+\.\d) s: (.*)", line)
    assert told
    found = [part.rpartition(" ") for part in told[2].split(", ")]
    assert [name for name, _, _ in found] == PHASES
    assert sum(float(seconds) for _, _, seconds in found) == pytest.approx(float(told[1]), abs=0.05 * (len(PHASES) + 1))
