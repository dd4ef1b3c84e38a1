"""The job itself: two nodes on this machine, as submitit's tasks with SLURM's variables, each with a real torchrun."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from submitit.core.job_environment import JobEnvironment, SignalHandler
from submitit.core.utils import DelayedSubmission, JobPaths

from launch.node import NodeJob
from launch.reports import Outcome, State, add_to_history, history, read_outcome
from launch.torchrun import Program
from tests.launch.conftest import FakeSlurm

ROOT = Path(__file__).parents[2]
JOB = "77"
HOST = os.uname().nodename


class Job:
    """A job of some nodes whose ranks do `what` of `tests.launch.worker`."""

    def __init__(self, folder: Path, what: str, nodes: int):
        self.folder, self.nodes, self.starts = folder, nodes, 0
        program = Program("tests.launch.worker", (what, str(folder)), ranks_per_node=1)
        delayed = DelayedSubmission(NodeJob(program, folder / "reports", grace=30, max_crashes=1))
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
        while len(list(self.folder.glob("ready-*"))) < self.nodes:
            assert all(task.poll() is None for task in self.tasks)
            time.sleep(0.1)
        for task in self.tasks:
            task.send_signal(number)

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


def test_the_true_exception_of_another_node_is_shown(tmp_path: Path, slurm: FakeSlurm) -> None:
    """Its traceback and one line are the last that the first node says."""
    job = Job(tmp_path, "one_raises", nodes=2)
    job.start()
    codes, said = job.end()
    assert codes == [1, 1]
    assert said.endswith(f"TRACEBACK OF 1\nerror: rank 1 on {HOST}: ValueError: boom\n")
    assert job.state == "failed" and not slurm.calls("scontrol")


def test_a_killed_rank_is_named_and_does_not_restart_the_job_for_ever(tmp_path: Path, slurm: FakeSlurm) -> None:
    """One restart is allowed, and was made before."""
    add_to_history(tmp_path / "reports", Outcome("crashed"))
    job = Job(tmp_path, "one_is_killed", nodes=2)
    job.start()
    codes, said = job.end()
    assert codes == [1, 1] and job.state == "failed" and not slurm.calls("scontrol")
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
    assert {path.name for path in tmp_path.glob("saved-*")} == {"saved-0", "saved-1"}
    assert job.state == "preempted" and slurm.calls("scontrol") == [f"requeue {JOB}"]
    job.start()
    codes, said = job.end()
    assert codes == [0, 0] and "done: step 9" in said
    assert job.state == "done" and len(slurm.calls("scontrol")) == 1
    assert history(tmp_path / "reports") == ["preempted", "done"]


# --- after the ranks have ended ---------------------------------------------------------------------------------------


@pytest.fixture
def ended(tmp_path: Path, slurm: FakeSlurm, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., NodeJob]]:
    """Makes the job of this process, a task under submitit's handler of SIGUSR2."""
    monkeypatch.setenv("SUBMITIT_EXECUTOR", "slurm")
    monkeypatch.setenv("SLURM_JOB_ID", JOB)
    before = signal.getsignal(signal.SIGUSR2)

    def make(minutes: int = 600, timeouts: int = 3) -> NodeJob:
        job = NodeJob(Program("dpo.train", (), 1), tmp_path / "reports", grace=30, max_crashes=1)
        delayed = DelayedSubmission(job)
        delayed.set_timeout(minutes, timeouts)
        handler = SignalHandler(JobEnvironment(), JobPaths(tmp_path, JOB), delayed)
        signal.signal(signal.SIGUSR2, handler.checkpoint_and_try_requeue)
        return job

    yield make
    signal.signal(signal.SIGUSR2, before)


def code_of(job: NodeJob, outcome: Outcome) -> int:
    """The exit code with which a job ends."""
    with pytest.raises(SystemExit) as end:
        job.conclude(outcome)
    assert isinstance(end.value.code, int)
    return end.value.code


@pytest.mark.parametrize("state", ["preempted", "crashed"])
def test_a_job_that_starts_again_is_requeued(ended: Callable[..., NodeJob], state: State, slurm: FakeSlurm) -> None:
    code_of(ended(), Outcome(state))
    assert slurm.calls("scontrol") == [f"requeue {JOB}"]


@pytest.mark.parametrize(("minutes", "requeues"), [(5, 0), (600, 1)])
def test_too_many_timeouts_end_the_job_but_preemptions_do_not(
    ended: Callable[..., NodeJob], minutes: int, requeues: int, slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    """No time-out is left; submitit takes every stop of a job of 10 minutes or less for one."""
    job = ended(minutes=minutes, timeouts=0)
    code = code_of(job, Outcome("preempted", "saved at step 4"))
    assert len(slurm.calls("scontrol")) == requeues
    if not requeues:
        assert code == 1 and read_outcome(job.folder) == Outcome(
            "failed", "its time was up too often (--max-timeouts); the same command goes on", 1
        )
        assert capsys.readouterr().err.endswith(
            "error: its time was up too often (--max-timeouts); the same command goes on\n"
        )


@pytest.mark.parametrize(("state", "requeues"), [("RUNNING", 1), ("COMPLETING", 0)])
def test_sigterm_leaves_the_job_to_slurm(
    ended: Callable[..., NodeJob], state: str, requeues: int, slurm: FakeSlurm
) -> None:
    """Cancelled or requeued by hand it is COMPLETING; RUNNING, it was preempted with a time of grace."""
    slurm.answer("squeue", f"{state}\n")
    job = ended()
    code_of(job, Outcome("stopped", "SIGTERM", 143))
    assert len(slurm.calls("scontrol")) == requeues
    outcome = read_outcome(job.folder)
    assert outcome is not None and outcome.state == "stopped"


def test_a_job_that_cannot_be_requeued_says_so(ended: Callable[..., NodeJob], slurm: FakeSlurm) -> None:
    slurm.refuse("scontrol", "Requested operation is presently disabled\n")
    job = ended()
    assert code_of(job, Outcome("preempted")) == 1
    outcome = read_outcome(job.folder)
    assert outcome is not None and outcome.state == "failed" and "cannot be requeued" in outcome.message


def test_the_users_mistake_is_exit_code_2(
    ended: Callable[..., NodeJob], slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    assert code_of(ended(), Outcome("failed", "my.yaml: data.train: too few", 2)) == 2
    assert capsys.readouterr().err == "error: my.yaml: data.train: too few\n" and not slurm.calls("scontrol")


def test_a_job_that_is_done_just_returns(ended: Callable[..., NodeJob], slurm: FakeSlurm) -> None:
    ended().conclude(Outcome("done"))
    assert not slurm.calls("scontrol")
