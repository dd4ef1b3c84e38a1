"""Whether the holder of a run folder is over: the rules of `why_over`, and processes of this host."""

import json
import os
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from dpo.machine.job import requeued_job
from dpo.run_folder.holder import Holder, holder_in, is_running, this_process, why_over


@pytest.fixture(scope="module")
def here() -> Holder:
    return this_process({})


def elsewhere(one: Holder) -> Holder:
    """A process of another host, whose process id says nothing here."""
    return replace(one, host="node7", boot="another boot", pid=1, started=1)


def test_a_running_process_of_this_host_is_not_over(here: Holder) -> None:
    assert (here.pid, here.job, here.restarts) == (os.getpid(), None, 0)
    assert is_running(here.pid, here.started)
    assert why_over(here, here, age=0) is None


def test_an_ended_process_of_this_host_is_over_at_once(here: Holder) -> None:
    """Also while its parent has not waited for it: in a container nobody may."""
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        started = int(Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()[19])
        holder = replace(here, pid=child.pid, started=started)
        assert why_over(holder, here, age=0) is None
        child.kill()
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # it is a zombie now
        assert why_over(holder, here, age=0) == "that process has ended"
    assert why_over(holder, here, age=0) == "that process has ended"


def test_another_process_with_the_same_id_is_not_the_holder(here: Holder) -> None:
    assert why_over(replace(here, started=here.started - 1), here, age=0) == "that process has ended"


@pytest.mark.parametrize("name", ["host", "boot", "pid_namespace"])
def test_a_process_id_of_elsewhere_says_nothing(here: Holder, name: str) -> None:
    """A container on this host, or another boot of it: no process has this id here."""
    assert why_over(replace(here, pid=2**22 + 1, **{name: "another"}), here, age=599) is None


@pytest.mark.parametrize(("age", "reason"), [(599, None), (601, "nothing was heard of it for 10 minutes")])
def test_silence(here: Holder, age: float, reason: str | None) -> None:
    """Also of a process of this host that does not run on, and of one that nobody knows."""
    assert why_over(elsewhere(here), here, age) == reason
    assert why_over(here, here, age) == reason
    assert why_over(None, here, age) == reason


@pytest.mark.parametrize(
    ("job", "before", "now", "is_over"),
    [
        ("7", 0, 1, True),
        ("7", 2, 3, True),
        ("7", 1, 1, False),
        ("7", 2, 1, False),
        ("8", 0, 1, False),
        (None, 0, 1, False),
    ],
)
def test_this_job_before_it_was_requeued(here: Holder, job: str | None, before: int, now: int, is_over: bool) -> None:
    holder = replace(elsewhere(here), job=job, restarts=before)
    me = replace(here, job="7" if job else None, restarts=now)
    assert (why_over(holder, me, age=0) is not None) == is_over


@pytest.mark.parametrize(
    ("launches", "watched", "is_over"),
    [
        (("big", "big"), 50, True),
        (("big", "big"), 49, False),
        (("other", "big"), 599, False),
        (("none", "none"), 599, False),
        (("", ""), 599, False),
        ((None, None), 599, False),
    ],
)
def test_this_run_before_torchrun_started_it_again(
    here: Holder, launches: tuple[str | None, str | None], watched: float, is_over: bool
) -> None:
    """Rank 0 may come up on another node, with the same number of restarts where a node was lost. torchrun's own id,
    `none`, tells nothing.
    """
    first, second = (this_process({} if launch is None else {"TORCHELASTIC_RUN_ID": launch}) for launch in launches)
    reason = "that was this run before torchrun started it again, " if is_over else None
    found = why_over(elsewhere(first), second, 599, watched)
    assert (found or "").startswith(reason) if reason else found is None


def test_a_second_run_with_the_same_id_that_torchrun_restarts_is_refused() -> None:
    """`--rdzv-id=100` is torchrun's example. It was refused, torchrun starts it again, and the first one runs on."""
    runs = {"TORCHELASTIC_RUN_ID": "100", "TORCHELASTIC_MAX_RESTARTS": "3"}
    first = this_process(runs | {"TORCHELASTIC_RESTART_COUNT": "0"})
    second = this_process(runs | {"TORCHELASTIC_RESTART_COUNT": "1"})
    assert why_over(first, second, age=599) is None
    assert why_over(elsewhere(first), second, age=20) is None


def test_a_lock_of_an_older_version_names_its_holder(here: Holder) -> None:
    content = {name: value for name, value in asdict(here).items() if name != "launch"}
    assert holder_in(json.dumps(content).encode()) == here


def test_what_slurm_says_of_a_job() -> None:
    """Two clusters may have the same number, and a job that was not requeued has no count."""
    assert requeued_job({}) == (None, 0)
    assert requeued_job({"SLURM_RESTART_COUNT": "2"}) == (None, 0)
    assert requeued_job({"SLURM_JOB_ID": "7"}) == ("7", 0)
    assert requeued_job({"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "2"}) == ("7", 2)
    assert requeued_job({"SLURM_JOB_ID": "7", "SLURM_CLUSTER_NAME": "big"}) == ("7 of big", 0)
    assert this_process({"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "2"}).restarts == 2


def test_a_lock_is_read_as_it_was_written(here: Holder) -> None:
    assert holder_in(here.to_json()) == here
    assert this_process({}).token != here.token


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}", b"\xff", b'{"host": 1}', b"null"])
def test_a_damaged_lock_names_nobody(here: Holder, content: bytes) -> None:
    assert holder_in(content) is None
    assert holder_in(here.to_json().replace(b'"pid": ', b'"pid": "x", "none": ')) is None
    assert holder_in(here.to_json().replace(f'"pid": {here.pid}'.encode(), b'"pid": "x"')) is None
