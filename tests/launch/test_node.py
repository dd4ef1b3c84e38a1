"""The job itself: two nodes on this machine, as submitit's tasks with SLURM's variables, each with a real torchrun."""

import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
from submitit.core.job_environment import JobEnvironment, SignalHandler
from submitit.core.utils import DelayedSubmission, JobPaths

from launch import node, slurm_job, squeue, supervise
from launch.decision import stopped
from launch.node import NodeJob
from launch.reports import Attempt, NodeReport, Outcome, add_to_history, history, read_outcome
from launch.slurm_job import SlurmJob, why_not_requeued
from launch.stops import Signals
from launch.supervise import Ended, Ending, Watch
from launch.torchrun import Place, Program
from tests.launch.conftest import FakeSlurm
from tests.launch.test_decision import LOST, killed, raised

ROOT = Path(__file__).parents[2]
JOB = str(os.getpid() % 20000)
"""By which its nodes find their port: tests that run beside this one need another."""
HOST = os.uname().nodename


class Job:
    """A job of some nodes whose ranks do `what` of `tests.launch.worker`."""

    def __init__(self, folder: Path, what: str, nodes: int):
        self.folder, self.nodes, self.starts = folder, nodes, 0
        program = Program("tests.launch.worker", (what, str(folder)), ranks_per_node=1)
        delayed = DelayedSubmission(SlurmJob(NodeJob(program, folder / "reports", signal_delay=40, max_crashes=1)))
        delayed.set_timeout(600, 3)
        delayed.dump(folder / f"{JOB}_submitted.pkl")

    def start(self) -> None:
        """Starts its tasks, as srun does."""
        self.tasks = [self._task(node) for node in range(self.nodes)]
        self.starts += 1

    def _task(self, node: int) -> subprocess.Popen[str]:
        variables = {
            "SUBMITIT_EXECUTOR": "slurm",
            "SLURM_JOB_ID": JOB,
            "SLURM_JOB_NUM_NODES": str(self.nodes),
            "SLURM_NTASKS": str(self.nodes),
            "SLURM_NODEID": str(node),
            "SLURM_PROCID": str(node),
            "SLURM_LOCALID": "0",
            "SLURM_JOB_NODELIST": ",".join(["localhost"] * self.nodes),
            "SLURM_RESTART_COUNT": str(self.starts),
        }
        words = [sys.executable, "-u", "-m", "submitit.core._submit", str(self.folder)]
        pipe = subprocess.PIPE
        return subprocess.Popen(words, env=os.environ | variables, cwd=ROOT, stdout=pipe, stderr=pipe, text=True)

    def signal(self, number: int) -> None:
        """Sends a signal to every task once all ranks are at work."""
        self.wait_for_ranks()
        for task in self.tasks:
            task.send_signal(number)

    def wait_for_ranks(self) -> None:
        """Until all ranks are at work."""
        deadline = time.monotonic() + 120
        while len(list(self.folder.glob("ready-*"))) < self.nodes:
            assert all(task.poll() is None for task in self.tasks) and time.monotonic() < deadline
            time.sleep(0.02)

    def end(self) -> tuple[Sequence[int], str]:
        """The tasks' exit codes, and what the first said on stderr."""
        said = [task.communicate(timeout=120)[1] for task in self.tasks]
        return [task.returncode for task in self.tasks], said[0]

    @property
    def state(self) -> str:
        """Of its outcome."""
        outcome = read_outcome(self.folder / "reports")
        assert outcome is not None
        return outcome.state


def requeues(slurm: FakeSlurm) -> int:
    """How often the job was requeued."""
    return list(slurm.calls("scontrol")).count(f"requeue {JOB}")


def test_the_true_exception_of_another_node_is_shown(tmp_path: Path, slurm: FakeSlurm) -> None:
    """Its traceback and one line are the last that the first node says."""
    job = Job(tmp_path, "one_raises", nodes=2)
    job.start()
    codes, said = job.end()
    assert codes == [1, 1]
    assert said.endswith(f"Traceback of 1\nerror: rank 1 on {HOST}: ValueError: boom\n")
    assert job.state == "failed" and not requeues(slurm)


def test_a_killed_rank_is_named_and_does_not_restart_the_job_for_ever(tmp_path: Path, slurm: FakeSlurm) -> None:
    """One restart is allowed, and was made before."""
    add_to_history(tmp_path / "reports", Outcome("crashed"))
    job = Job(tmp_path, "one_is_killed", nodes=2)
    job.start()
    codes, said = job.end()
    assert codes == [1, 1] and job.state == "failed" and not requeues(slurm)
    assert said.splitlines()[-1] == (
        f"error: rank 1 on {HOST}: killed by SIGKILL, without a Python exception; --max-crashes 1 is used up"
    )


def test_a_preempted_job_saves_is_requeued_and_goes_on(tmp_path: Path, slurm: FakeSlurm) -> None:
    """Only the first node requeues; the second start ends the run."""
    job = Job(tmp_path, "stops_once", nodes=2)
    job.start()
    job.signal(signal.SIGUSR2)
    codes, said = job.end()
    assert codes[1] == 0 and "preempted: saved at step 4" in said
    assert "show config" not in slurm.calls("scontrol"), "SLURM is asked where nobody wants to know"
    assert {path.name for path in tmp_path.glob("saved-*")} == {"saved-0", "saved-1"}
    assert job.state == "preempted" and requeues(slurm) == 1
    job.start()
    codes, said = job.end()
    assert codes == [0, 0] and ": done\n" in said
    assert job.state == "done" and requeues(slurm) == 1
    assert history(tmp_path / "reports") == ["preempted", "done"]


def test_slurms_own_preemption_saves_too(tmp_path: Path, slurm: FakeSlurm) -> None:
    """With a time of grace SLURM sends SIGTERM at its beginning, and shows the job as RUNNING until its end."""
    slurm.answer("squeue", "RUNNING/None\n")
    job = Job(tmp_path, "stops_once", nodes=1)
    job.start()
    job.signal(signal.SIGTERM)
    _, said = job.end()
    assert "preempted: saved at step 4" in said
    assert job.state == "preempted" and requeues(slurm) == 1


def test_a_cancelled_job_is_not_requeued(tmp_path: Path, slurm: FakeSlurm) -> None:
    """scontrol would do it: a job that is COMPLETING goes back to the queue whatever it completes for."""
    slurm.answer("squeue", "COMPLETING/None\n")
    job = Job(tmp_path, "stops_once", nodes=2)
    job.start()
    job.signal(signal.SIGTERM)
    codes, said = job.end()
    assert codes == [143, 0]
    assert "SIGTERM: saving after the current step; a second signal ends the run at once" in said
    assert said.endswith("stopped: saved at step 4; ended by SIGTERM (scancel, a requeue, a lost node, kill)\n")
    assert job.state == "stopped" and set(slurm.calls("scontrol")) == {"show config"}


@pytest.mark.parametrize(("told", "seconds"), [("KillWait                = 45 sec\n", 45.0), ("", 30.0)])
def test_slurm_tells_how_long_an_end_takes(slurm: FakeSlurm, told: str, seconds: float) -> None:
    slurm.answer("scontrol", f"KillOnBadExit           = 0\n{told}")
    assert squeue.kill_wait() == seconds


def test_slurms_default_is_taken_where_scontrol_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As in most containers; nobody can do anything about it."""
    monkeypatch.setenv("PATH", str(tmp_path))
    assert squeue.kill_wait() == 30.0 and not capsys.readouterr().err


def test_a_node_that_says_nothing_does_not_cost_the_requeueing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the 60 seconds between SIGUSR2 and the end of the job a twelfth is left for it, by a clock of the test. The
    second node hangs, so the first one's ranks fail and it waits for the other's report.
    """
    now = [1000.0]
    clock = SimpleNamespace(monotonic=lambda: now[0], sleep=lambda seconds: now.append(now.pop() + seconds))
    monkeypatch.setattr(node, "time", clock)
    attempt, noted = Attempt(tmp_path, 0), Signals(lambda: None)
    attempt.folder.mkdir()
    noted.stop_since = now[0]
    own = NodeReport(1, (raised(0, 1.0, LOST),))
    attempt.write_report(0, own)
    job = NodeJob(Program("dpo.train", (), 1), tmp_path, signal_delay=60, max_crashes=1)
    assert job.conclude(Place(0, (HOST, "hung"), 0), attempt, noted, own).state == "preempted"
    assert 55 <= now[0] - 1000 < 55.5


BEFORE_STEPS = [
    ("dpo.train", None, "ending, before the first step there is nothing to save", 0.0),
    ("dpo.reference", None, "keeping the rows that are computed; a second signal ends it at once", 10.0),
    ("dpo.prepare", None, "ending; downloads and rows so far are in the caches", 0.0),
]
FROM_STEPS_ON = [
    ("dpo.train", "training", "saving after the current step; a second signal ends the run at once", math.inf),
    ("dpo.train", "preempted", "saving after the current step; a second signal ends the run at once", math.inf),
    ("dpo.train", "done", "all is saved, the run ends; a second signal ends it at once", math.inf),
]


@pytest.mark.parametrize(("module", "state", "words", "seconds"), BEFORE_STEPS + FROM_STEPS_ON)
def test_what_a_signal_means_to_each_program(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str, state: str | None, words: str, seconds: float
) -> None:
    """Only a training has steps; what the others have made so far is in caches."""
    attempt = Attempt(tmp_path, 0)
    endings: list[Ending] = []

    def torchrun(
        words: Sequence[str], env: Mapping[str, str], noted: Signals, grace: float, watch: Watch, _: Path
    ) -> Ended:
        if state:
            attempt.status.write_text(json.dumps({"state": state, "step": 1, "saved": True}))
        endings.append(watch.ending())
        return Ended(0, "")

    monkeypatch.setattr(supervise, "run", torchrun)
    NodeJob(Program(module, (), 1), tmp_path, 120, 1).run(Place(0, (HOST,), 0), attempt, Signals(None))
    assert endings == [Ending(words, seconds)]


@pytest.mark.parametrize(
    ("module", "kept"),
    [
        ("dpo.train", "before the first step"),
        ("dpo.reference", "before the end of the reference pass"),
        ("dpo.prepare", "before all is prepared"),
    ],
)
def test_what_a_program_had_not_done_when_it_was_ended(tmp_path: Path, module: str, kept: str) -> None:
    attempt, noted = Attempt(tmp_path, 0), Signals(None)
    attempt.folder.mkdir()
    noted.on_end(signal.SIGTERM, None)
    own = NodeReport(1, (killed(0, 1.0, signal.SIGTERM),))
    job = NodeJob(Program(module, (), 1), tmp_path, 120, 1)
    outcome = job.conclude(Place(0, (HOST,), 0), attempt, noted, own)
    assert outcome.message == f"{kept}; ended by SIGTERM (scancel, a requeue, a lost node, kill)"


def concluded(tmp_path: Path, noted: Signals, exit_code: int = 0) -> str:
    """The state of a job of two nodes whose ranks have saved, or lost one, as the first node sees it."""
    attempt = Attempt(tmp_path / "run/jobs/x", 0)
    attempt.folder.mkdir(parents=True)
    if exit_code == 0:
        attempt.status.write_text(json.dumps({"state": "preempted", "step": 4, "saved": True}))
    own = NodeReport(exit_code, (killed(1, 1.0),) if exit_code else ())
    for place in (0, 1):
        attempt.write_report(place, own)
    job = NodeJob(Program("dpo.train", (), 1), attempt.submission, signal_delay=60, max_crashes=1)
    return job.conclude(Place(0, (HOST, "other"), 0), attempt, noted, own).state


@pytest.mark.parametrize(("exit_code", "restarts"), [(0, "preempted"), (1, "crashed")])
@pytest.mark.parametrize("goes_on", [True, False, None])
def test_a_signal_that_another_node_got_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, goes_on: bool | None, exit_code: int, restarts: str
) -> None:
    """scancel reaches the second node, whose ranks tell the others: the first asks SLURM before it starts again."""
    monkeypatch.setattr(node, "_OWN_SIGNAL_SECONDS", 0.0)
    noted = Signals(lambda: goes_on)
    assert concluded(tmp_path, noted, exit_code) == ("stopped" if goes_on is False else restarts)
    assert noted.in_question == (goes_on is None)


def test_a_signal_that_comes_a_moment_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGUSR2 needs no answer of a controller; by a clock of the test."""
    noted, now = Signals(lambda: pytest.fail("asks")), [1000.0]

    def sleep(seconds: float) -> None:
        now[0] += seconds
        noted.on_stop(signal.SIGUSR2, None)

    monkeypatch.setattr(node, "time", SimpleNamespace(monotonic=lambda: now[0], sleep=sleep))
    assert concluded(tmp_path, noted) == "preempted"


def test_without_slurm_nothing_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank that SIGUSR2 reached without its launcher: the run starts again at once."""
    clock = SimpleNamespace(monotonic=time.monotonic, sleep=lambda seconds: pytest.fail("waits"))
    monkeypatch.setattr(node, "time", clock)
    assert concluded(tmp_path, Signals(None)) == "preempted"


# --- requeueing -------------------------------------------------------------------------------------------------------


@pytest.fixture
def requeueing(
    tmp_path: Path, slurm: FakeSlurm, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., Outcome | int]]:
    """Requeues the job of this process by submitit's handler: its exit code, or what becomes of it in place of that."""
    monkeypatch.setenv("SUBMITIT_EXECUTOR", "slurm")
    monkeypatch.setenv("SLURM_JOB_ID", JOB)
    monkeypatch.setattr(slurm_job, "_AGAIN_SECONDS", 0.1)
    monkeypatch.setattr(slurm_job, "_REQUEUE_SECONDS", 1.0)

    def requeue(
        minutes: int = 600, timeouts: int = 3, was_cancelled: bool = False, goes_on: bool | None = False
    ) -> Outcome | int:
        noted = Signals(lambda: goes_on)
        delayed = DelayedSubmission(SlurmJob(NodeJob(Program("dpo.train", (), 1), tmp_path / "reports", 120, 1)))
        delayed.set_timeout(minutes, timeouts)
        handler = SignalHandler(JobEnvironment(), JobPaths(tmp_path, JOB), delayed)
        if was_cancelled:
            noted.on_end(signal.SIGTERM, None)
        try:
            return why_not_requeued(handler.checkpoint_and_try_requeue, noted, "saved at step 4")
        except SystemExit as end:
            assert isinstance(end.code, int)
            return end.code

    return requeue


@pytest.mark.parametrize(("minutes", "times"), [(5, 0), (600, 1)])
def test_too_many_timeouts_end_the_job_but_preemptions_do_not(
    requeueing: Callable[..., Outcome | int], minutes: int, times: int, slurm: FakeSlurm
) -> None:
    """No time-out is left; submitit takes every stop of a job of 10 minutes or less for one."""
    end = requeueing(minutes=minutes, timeouts=0)
    assert requeues(slurm) == times
    if not times:
        told = "its time was up too often (--max-timeouts); the same command resumes the run"
        assert end == Outcome("failed", told, 1)


def test_a_job_that_was_cancelled_while_it_saved(requeueing: Callable[..., Outcome | int], slurm: FakeSlurm) -> None:
    assert requeueing(was_cancelled=True) == stopped(signal.SIGTERM, "saved at step 4")
    assert not requeues(slurm)


def test_a_job_that_may_be_cancelled_is_not_requeued_unasked(
    requeueing: Callable[..., Outcome | int], slurm: FakeSlurm
) -> None:
    """SIGTERM came, and squeue does not say why: scontrol would put a cancelled job back into the queue."""
    outcome = requeueing(was_cancelled=True, goes_on=None)
    assert isinstance(outcome, Outcome) and (outcome.state, outcome.exit_code) == ("failed", 1)
    assert "squeue does not tell whether it was cancelled" in outcome.message
    assert not requeues(slurm)


def test_a_controller_that_starts_anew_is_waited_for(
    requeueing: Callable[..., Outcome | int], slurm: FakeSlurm
) -> None:
    slurm.refuse("scontrol", "Unable to contact slurm controller\n")
    threading.Timer(0.5, lambda: (slurm.folder / "scontrol.refusal").unlink()).start()
    assert requeueing() != 1
    assert requeues(slurm) > 1


def test_a_job_that_cannot_be_requeued_says_so(requeueing: Callable[..., Outcome | int], slurm: FakeSlurm) -> None:
    slurm.refuse("scontrol", "Requested operation is presently disabled\n")
    outcome = requeueing()
    assert isinstance(outcome, Outcome) and (outcome.state, outcome.exit_code) == ("failed", 1)
    assert "cannot be requeued" in outcome.message
