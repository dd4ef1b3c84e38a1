"""The torchrun of a node: its words, its environment, and what it leaves of ranks that failed."""

import json
from pathlib import Path

import pytest

from launch import torchrun
from launch.failures import failures_of_node
from launch.torchrun import Place, Program

PROGRAM = Program("dpo.train", ("--config", "my.yaml", "--loss.beta", "0.5"), ranks_per_node=8)
SECOND = Place(1, ("gpu07", "gpu09"), 29500)


def test_one_node_is_what_a_person_types() -> None:
    words = torchrun.command(PROGRAM, Place(0, ("gpu07",), 0), python="python")
    assert " ".join(words) == (
        "python -m torch.distributed.run --standalone --nproc-per-node 8 -m dpo.train --config my.yaml --loss.beta 0.5"
    )


def test_two_nodes_meet_at_the_first() -> None:
    words = torchrun.command(PROGRAM, SECOND, Path("/logs"), python="python")
    assert " ".join(words) == (
        "python -m torch.distributed.run --nnodes 2 --node-rank 1 --master-addr gpu07 --master-port 29500"
        " --nproc-per-node 8 --log-dir /logs -m dpo.train --config my.yaml --loss.beta 0.5"
    )


def test_the_line_for_people() -> None:
    program = Program("dpo.train", ("--config", "my file.yaml"), 8, (("A", "b c"),))
    assert torchrun.line(program, 2, "python") == (
        "A='b c' python -m torch.distributed.run --nnodes 2 --node-rank THIS_NODE --master-addr FIRST_NODE"
        " --master-port PORT --nproc-per-node 8 -m dpo.train --config 'my file.yaml'"
    )


def test_jobs_that_share_a_node_meet_at_different_ports() -> None:
    """Ports below 32768, where Linux begins to hand them out; 20000 jobs in a row differ."""
    ports = [torchrun.master_port(str(job)) for job in range(123456, 123456 + 20000)]
    assert len(set(ports)) == 20000 and min(ports) >= 10000 and max(ports) < 32768


def test_threads_share_the_cpus_of_the_job(monkeypatch: pytest.MonkeyPatch) -> None:
    """20 CPUs of 8 ranks are 2 each; with 4 there is still one; the user's number stays."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setenv("SLURM_CPUS_ON_NODE", "20")
    assert torchrun.environment(PROGRAM, {})["OMP_NUM_THREADS"] == "2"
    monkeypatch.setenv("SLURM_CPUS_ON_NODE", "4")
    assert torchrun.environment(PROGRAM, {})["OMP_NUM_THREADS"] == "1"
    program = Program("dpo.train", (), 8, (("OMP_NUM_THREADS", "5"),))
    assert torchrun.environment(program, {})["OMP_NUM_THREADS"] == "5"


# --- what it leaves ---------------------------------------------------------------------------------------------------

TABLE = """
Failures:
[1]:
  time      : 2026-01-31_10:15:01
  host      : gpu09
  rank      : 9 (local_rank: 1)
  exitcode  : -9 (pid: 124) (SIGKILL)
  error_file: <N/A>
  traceback : Signal 9 (SIGKILL) received by PID 124
[2]:
  time      : 2026-01-31_10:15:02
  host      : gpu09
  rank      : 10 (local_rank: 2)
  exitcode  : 3 (pid: 125)
  error_file: <N/A>
  traceback : To enable traceback see: https://pytorch.org/docs/stable/elastic/errors.html
Root Cause (first observed failure):
[0]:
  time      : 2026-01-31_10:15:00
  host      : gpu09
  rank      : 8 (local_rank: 0)
  exitcode  : 1 (pid: 123)
  error_file: /logs/none_x/attempt_0/0/error.json
  traceback : Traceback (most recent call last):
"""


def error_file(path: Path, message: str, **extra: object) -> None:
    """As torchelastic writes it."""
    path.parent.mkdir(parents=True)
    told = {"message": message, "extraInfo": {"py_callstack": "Traceback\n", "timestamp": "1769854500"}}
    told["extraInfo"] |= extra
    path.write_text(json.dumps({"message": told}))


def test_ranks_with_an_error_file_and_without(tmp_path: Path) -> None:
    error_file(tmp_path / "none_x/attempt_0/0/error.json", "ValueError: boom")
    found = failures_of_node(tmp_path, tmp_path / "torchrun.json", TABLE, "gpu09", first_rank=8)
    assert [(failure.rank, failure.message, failure.killed_by) for failure in found] == [
        (8, "ValueError: boom", 0),
        (9, "killed by SIGKILL, without a Python exception", 9),
        (10, "exit code 3", 0),
    ]


def test_the_clock_of_the_host_counts_not_that_of_the_file_server(tmp_path: Path) -> None:
    error_file(tmp_path / "none_x/attempt_0/0/error.json", "ValueError: boom", seconds=1769854500.25)
    (failure,) = failures_of_node(tmp_path, tmp_path / "torchrun.json", "", "gpu09", first_rank=8)
    assert failure.time == 1769854500.25


def test_a_rank_that_ended_before_it_could_say_why(tmp_path: Path) -> None:
    """An import that fails is a traceback on stderr alone, before torchrun's own."""
    said = [
        "some warning",
        "Traceback (most recent call last):",
        '  File "<frozen runpy>", line 198, in _run_module_as_main',
        "    import gone",
        "ModuleNotFoundError: No module named 'gone'",
        "E0131 10:15:02 api.py:9] failed (exitcode: 3) local_rank: 2 (pid: 125)",
        "Traceback (most recent call last):",
        '  File "run.py", line 1, in run',
        "torch.distributed.elastic.multiprocessing.errors.ChildFailedError: ",
        TABLE,
    ]
    found = failures_of_node(tmp_path, tmp_path / "torchrun.json", "\n".join(said), "gpu09", first_rank=8)
    assert [failure.message for failure in found if failure.rank == 10] == [
        "ModuleNotFoundError: No module named 'gone'"
    ]


def test_torchruns_own_failure(tmp_path: Path) -> None:
    """It copies its first rank's error to the same file, which says nothing new where that rank is known."""
    error_file(tmp_path / "own/torchrun.json", "RendezvousConnectionError: no route")
    (failure,) = failures_of_node(tmp_path / "logs", tmp_path / "own/torchrun.json", "", "gpu09", first_rank=8)
    assert str(failure) == "torchrun on gpu09: RendezvousConnectionError: no route"


def test_an_error_file_that_a_full_disk_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "none_x/attempt_0/0/error.json"
    error_file(path, "OSError: no space left")
    path.write_text(path.read_text()[:20])
    (failure,) = failures_of_node(tmp_path, tmp_path / "torchrun.json", "", "gpu09", first_rank=0)
    assert "is incomplete" in failure.message
