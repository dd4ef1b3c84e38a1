"""--follow: the log of the first node until the end, told by the job itself or else by the queue; never by sacct."""

import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from dpo.base.errors import RunError, UserError
from launch import follow as following
from launch.follow import Followed, follow
from launch.reports import Outcome, Submission, write_outcome
from tests.launch.conftest import FakeSlurm


@pytest.fixture
def job(tmp_path: Path, slurm: FakeSlurm, monkeypatch: pytest.MonkeyPatch) -> Followed:
    """A job that runs, as squeue says, and has written one line."""
    monkeypatch.setattr(following, "_QUEUE_SECONDS", 0.05)
    monkeypatch.setattr(following, "_LOOK_SECONDS", 0.02)
    monkeypatch.setattr(following, "_LAST_REPORT_SECONDS", 0.3)
    slurm.answer("squeue", "RUNNING\n")
    log = tmp_path / "77_0_log.out"
    log.write_text("step 1\n")
    return Followed("mine", Submission("slurm", "77", str(log)), tmp_path / "reports")


def soon(work: Callable[[], object], seconds: float = 0.3) -> None:
    """Does something a little later."""
    threading.Timer(seconds, work).start()


def test_the_log_is_shown_to_the_end(job: Followed, capsys: pytest.CaptureFixture[str]) -> None:
    def finish() -> None:
        with Path(job.submission.log).open("a") as log:
            log.write("step 2\n")
        write_outcome(job.reports, Outcome("done"))

    soon(finish)
    follow([job])
    said = capsys.readouterr().err.splitlines()
    assert said == ["step 1", "mine (job 77): running", "step 2", "mine (job 77): done"]


def test_a_job_that_starts_again_is_followed_on(job: Followed, slurm: FakeSlurm) -> None:
    """What is said between two starts is no end."""
    write_outcome(job.reports, Outcome("preempted", "saved at step 4"))
    slurm.answer("squeue", "PENDING\n")
    soon(lambda: write_outcome(job.reports, Outcome("stopped")), 0.2)
    soon(lambda: write_outcome(job.reports, Outcome("done")), 0.8)
    started = time.monotonic()
    follow([job])
    assert time.monotonic() - started > 0.7


@pytest.mark.parametrize(("exit_code", "kind"), [(1, RunError), (2, UserError)])
def test_a_failure_is_shown(job: Followed, exit_code: int, kind: type[Exception]) -> None:
    write_outcome(job.reports, Outcome("failed", "rank 3 on gpu07: ValueError: boom", exit_code))
    with pytest.raises(kind, match="job 77: rank 3 on gpu07: ValueError: boom"):
        follow([job])


def test_a_cancelled_job_ends_without_a_word_of_its_own(job: Followed, slurm: FakeSlurm) -> None:
    write_outcome(job.reports, Outcome("running"))
    soon(lambda: slurm.answer("squeue", "CANCELLED\n"))
    with pytest.raises(RunError, match="job 77: ended as CANCELLED"):
        follow([job])


def test_last_words_may_come_after_the_job_has_left_the_queue(job: Followed, slurm: FakeSlurm) -> None:
    slurm.refuse("squeue", "slurm_load_jobs error: Invalid job id specified\n")
    soon(lambda: write_outcome(job.reports, Outcome("done")), 0.15)
    follow([job])


def test_a_controller_that_does_not_answer_is_no_end(job: Followed, slurm: FakeSlurm) -> None:
    slurm.refuse("squeue", "slurm_load_jobs error: Unable to contact slurm controller\n")
    soon(lambda: write_outcome(job.reports, Outcome("done")), 0.8)
    follow([job])


def test_of_several_jobs_the_changes_are_told(job: Followed, capsys: pytest.CaptureFixture[str]) -> None:
    other = Followed("other", Submission("slurm", "78", ""), job.reports.with_name("other"))
    soon(lambda: write_outcome(job.reports, Outcome("failed", "boom", 1)), 0.2)
    soon(lambda: write_outcome(other.reports, Outcome("done")), 0.4)
    with pytest.raises(RunError, match="job 77: boom"):
        follow([job, other])
    told = capsys.readouterr().err.splitlines()
    assert told[:2] == ["mine (job 77): running", "other (job 78): running"]
    assert told[2:] == ["mine (job 77): failed", "other (job 78): done"]
