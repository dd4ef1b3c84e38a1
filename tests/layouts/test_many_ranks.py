"""Real runs with few file descriptors to spare, and ranks that do not come."""

import json
import os
import resource
import subprocess
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

import pytest
import torch.distributed as dist

from dpo.base.errors import UserError
from dpo.distributed.descriptors import need_of_agent, need_of_rank, sockets_of_rank
from dpo.distributed.program import run_program
from dpo.distributed.startup import open_world
from tests.bench.many_ranks import ROOT, read_counts, training
from tests.support.ranks import Ranks

pytestmark = pytest.mark.xdist_group("ranks")


def limited(folder: Path, size: int, replicate: int, soft: int, hard: int) -> subprocess.CompletedProcess[str]:
    """A training under torchrun whose processes start with these limits of open file descriptors."""
    words = training(folder, size, replicate)
    return subprocess.run(
        words, cwd=ROOT, check=False, capture_output=True, text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard)),
    )  # fmt: skip


def test_a_run_goes_on_above_its_soft_limit_and_the_formula_holds(tmp_path: Path) -> None:
    """Four ranks, two copies of two shards: up to 53 descriptors a rank, where 40 are allowed at first."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    done = limited(tmp_path, 4, 2, 40, hard)
    assert done.returncode == 0, done.stderr
    says = f"open files: rank 0 needs up to 53; its limit was raised from 40 to the hard limit, {hard:,}"
    assert done.stderr.count("open files: ") == done.stderr.count(says) == 1
    counts = read_counts(tmp_path, 4)
    assert {count.held["socket"] for count in counts} == {sockets_of_rank(4, 2)} == {13}
    most, of_agent = max(count.most for count in counts), max(sum(count.of_agent.values()) for count in counts)
    assert 40 < most <= need_of_rank(4, 2) <= most + 15
    assert of_agent <= need_of_agent(4, 1) <= of_agent + 15


def test_a_hard_limit_below_the_need_is_an_error_on_every_rank(tmp_path: Path) -> None:
    """Two ranks need up to 45; a file less is allowed."""
    done = limited(tmp_path, 2, 1, 44, 44)
    assert done.returncode == 1
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, done.stderr
    assert errors[0].startswith("error: ulimit -Hn: rank ")
    assert "may open 44 files and sockets, and needs up to 45; valid: a higher hard limit on every node" in errors[0]
    assert not (tmp_path / "run").exists()


def exit_code_and_error_file(folder: str, short_rank: int) -> tuple[int, str]:
    """The exit code of a rank, and its recorded error; rank `short_rank` alone may open too few files."""
    file = Path(folder, os.environ["RANK"])
    os.environ["TORCHELASTIC_ERROR_FILE"] = str(file)
    other = 10**9 if os.environ["RANK"] == str(short_rank) else 40

    def main() -> None:
        with open_world(60):
            raise AssertionError("a rank was let in")

    with patch("dpo.distributed.descriptors.OTHER_OF_RANK", other):
        code = run_program(main)
    return code, json.loads(file.read_text())["message"]["extraInfo"]["user_line"]


def test_one_node_with_a_low_limit_ends_all_ranks_alike(ranks: Ranks, tmp_path: Path) -> None:
    (code, line), *others = ranks(3, exit_code_and_error_file, str(tmp_path), 2)
    assert code == 2 and line.startswith("ulimit -Hn: rank 2 on ")
    assert others == [(code, line)] * 2


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The environment of rank 1 of two; rank 0 never starts. The store is served as torchrun would."""
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    environment = {
        "RANK": "1",
        "LOCAL_RANK": "1",
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(server.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    yield
    del server


@pytest.mark.usefixtures("alone")
def test_ranks_that_do_not_start_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dpo.distributed.startup.arrival_seconds", lambda size: 1)
    with pytest.raises(ConnectionError, match=r"^rank 1: 1 of 2 ranks did not start within 1 seconds: 0; "):
        with open_world(60):
            raise AssertionError("it was let in")


@pytest.mark.usefixtures("alone")
def test_an_error_that_one_rank_meets_before_the_others_start_is_printed_by_it(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """As a config that this node does not see: rank 0, which prints errors, has none."""
    monkeypatch.setattr("dpo.distributed.program.leave_seconds", lambda size: 1)

    def main() -> None:
        raise UserError("--config", "no such file: a.yaml")

    assert run_program(main) == 2
    assert "error: --config: no such file: a.yaml" in capfd.readouterr().err
