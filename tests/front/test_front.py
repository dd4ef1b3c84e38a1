"""The table of names, the ranks that a command line asks for, exit codes and last lines, the shipped configs."""

import importlib.util
import os
import re
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from dpo.base.blame import Failure
from dpo.base.errors import UserError
from dpo.config import load_config
from dpo.front import configs, parent
from dpo.front.ending import End, exit_code, stop_advice, untold_cause
from dpo.front.main import answer
from dpo.front.names import COMMANDS, Command, help_text
from dpo.front.ranks import Wanted, make_parser, number_of_ranks, read_wanted
from dpo.front.stops import noted_stops
from tests.support.runs import exit_code_of

# --- names -----------------------------------------------------------------------------------------------------------


def test_help_has_a_line_for_each_program() -> None:
    text = help_text()
    for name in (
        *("train", "prepare", "inspect", "estimate", "score", "sample", "export", "reference"),
        *("submit", "compare", "configs", "doctor", "report", "push"),
    ):
        assert re.search(rf"^  {name}  +\w", text, re.MULTILINE), name


@pytest.mark.parametrize("name", COMMANDS)
def test_each_name_has_a_program(name: str) -> None:
    """Found without importing it; a package needs a `__main__`."""
    spec = importlib.util.find_spec(COMMANDS[name].module)
    assert spec is not None
    if spec.submodule_search_locations:
        assert importlib.util.find_spec(f"{COMMANDS[name].module}.__main__") is not None


@pytest.mark.parametrize(("typo", "meant"), [("trane", "train"), ("expot", "export"), ("compaer", "compare")])
def test_an_unknown_name(typo: str, meant: str) -> None:
    with pytest.raises(UserError, match=f"did you mean {meant}"):
        answer(typo, [])


def test_an_unknown_name_that_is_near_to_none() -> None:
    with pytest.raises(UserError, match="valid: train, prepare") as failure:
        answer("xyzzy", [])
    assert "did you mean" not in str(failure.value)


def test_a_rank_of_torchrun_starts_no_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """`torchrun -m dpo train` is `torchrun -m dpo.train`."""
    monkeypatch.setenv("RANK", "0")
    answer("train", ["--los.beta", "1"])  # returns: the program itself reads its words


@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_the_help_of_ranks_stands_above_that_of_the_program(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    answer("doctor", ["--gpus", "8", flag])  # returns: the program itself prints its help
    assert re.search(r"^usage: dpo doctor.*--gpus N.*--ranks N", capsys.readouterr().out, re.DOTALL)


# --- how many ranks --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wanted", "visible", "size"),
    [
        (Wanted(None, None), 0, 1),
        (Wanted(None, None), 8, 8),
        (Wanted(2, None), 8, 2),
        (Wanted(8, None), 8, 8),
        (Wanted(None, 4), 0, 4),
        (Wanted(None, 4), 8, 4),
    ],
)
def test_the_number_of_ranks(wanted: Wanted, visible: int, size: int) -> None:
    assert number_of_ranks(wanted, visible, "no driver") == size


@pytest.mark.parametrize(
    ("visible", "line"),
    [
        (2, "command line: --gpus: 8 asked for, and torch finds 2; valid: up to 2"),
        (0, "command line: --gpus: 8 asked for, and torch finds none: a CPU build; valid: a CUDA build"),
    ],
)
def test_more_gpus_than_there_are(visible: int, line: str) -> None:
    with pytest.raises(UserError) as failure:
        number_of_ranks(Wanted(8, None), visible, "a CPU build")
    assert str(failure.value).startswith(line)


def test_the_words_of_the_ranks_are_taken_out() -> None:
    words = ["--config", "my.yaml", "--gpus", "8", "--loss.beta=0.5"]
    assert read_wanted(make_parser("train"), words) == (Wanted(8, None), ["--config", "my.yaml", "--loss.beta=0.5"])


@pytest.mark.parametrize("words", [["--gpus", "0"], ["--ranks", "two"], ["--gpus", "1", "--ranks", "1"], ["--gpus"]])
def test_wrong_numbers_of_ranks(words: list[str]) -> None:
    with pytest.raises(UserError, match=r"^command line: .*--(gpus|ranks)"):
        read_wanted(make_parser("train"), words)


def test_gpus_that_are_hidden_are_not_used() -> None:
    """Tests hide all GPUs of the machine by CUDA_VISIBLE_DEVICES."""
    with pytest.raises(UserError, match="8 asked for, and torch finds none: CUDA_VISIBLE_DEVICES hides all GPUs"):
        parent.run_ranks(COMMANDS["train"], (), Wanted(8, None))


def test_ranks_import_from_the_current_folder_only_where_dpo_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """`python -m dpo` has it in sys.path, and the script `dpo` has its own folder there."""
    monkeypatch.setattr(sys, "path", [str(Path.cwd()), "/usr/lib"])
    assert "-P" not in parent.python_flags()
    monkeypatch.setattr(sys, "path", ["/usr/bin", "/usr/lib"])
    assert "-P" in parent.python_flags()


# --- exit codes and last lines ---------------------------------------------------------------------------------------

INT, TERM = signal.SIGINT, signal.SIGTERM
SAVED: dict[str, Any] = {"first_step": 5, "status": {"state": "preempted", "step": 7}}
EMPTY: dict[str, Any] = {"first_step": 5, "status": {"state": "preempted", "step": 4}}
DONE: dict[str, Any] = {"first_step": 5, "status": {"state": "done"}}


def failed(rank: int, **changes: Any) -> Failure:
    """A failure of a rank."""
    return Failure(**({"host": "n1", "rank": rank, "time": 10.0 + rank, "message": "ValueError: x"} | changes))


USERS = failed(0, told="a.yaml: loss.beta: wrong", user_line="a.yaml: loss.beta: wrong", exit_code=2)


@pytest.mark.parametrize(
    ("end", "code"),
    [
        (End(status={"state": "done"}), 0),
        (End(failures=[USERS, failed(1, exit_code=2)]), 2),
        (End(failures=[failed(0)]), 1),
        (End(failures=[failed(1, killed_by=9)]), 1),
        (End((INT,), **SAVED), 130),
        (End((TERM,), **SAVED), 0),
        (End((signal.SIGHUP,), **SAVED), 0),
        (End((INT,), **EMPTY), 130),
        (End((TERM,), **EMPTY), 143),
        (End((INT,), killed=True), 130),
        (End((TERM,), killed=True), 143),
        (End((INT, INT), 5, {"state": "training", "step": 5}, killed=True), 130),
        (End((INT,), **DONE), 0),
        (End((TERM,), 5, {"state": "training", "step": 5}, [failed(0)]), 1),
    ],
)
def test_exit_codes(end: End, code: int) -> None:
    assert exit_code(end) == code


def test_what_a_stopped_run_has_kept() -> None:
    command = Command("m", "about", "AFTER", "BEFORE; ")
    assert stop_advice(End((INT,), **SAVED), command).startswith("step 7 is saved")
    assert stop_advice(End((INT,), killed=True), command) == stop_advice(End((TERM,), **EMPTY), command)
    assert stop_advice(End((INT,), killed=True), command) == "BEFORE; AFTER"
    assert stop_advice(End((INT, INT), 5, killed=True), command) == "the ranks were ended before they had saved: AFTER"


@pytest.mark.parametrize(
    ("failures", "line"),
    [
        ([], None),
        ([USERS, failed(1, told=USERS.told, exit_code=2)], None),  # rank 0 has said it for all
        ([failed(1, told="rank 1: out of memory"), failed(0, killed_by=15)], None),  # said, and nothing came after it
        (
            [
                failed(1, told="rank 1: out of memory"),
                failed(0, time=12.0, told="rank 0: lost", message="Connection closed by peer"),
            ],
            "rank 1: out of memory",
        ),
        ([failed(1, message="killed by SIGKILL", killed_by=9)], "rank 1 on n1: killed by SIGKILL"),
        ([failed(0, message="KeyError: 'x'", traceback="Traceback ...")], "rank 0 on n1: KeyError: 'x'"),
    ],
)
def test_the_line_that_the_ranks_have_not_said(failures: list[Failure], line: str | None) -> None:
    assert untold_cause(failures) == line


def test_what_is_ignored_before() -> None:
    """nohup and a shell's `&` are obeyed; SIGUSR2, which a training in the process above leaves ignored, is heard."""
    before = {number: signal.signal(number, signal.SIG_IGN) for number in (INT, signal.SIGHUP, signal.SIGUSR2)}
    try:
        with noted_stops() as noted:
            for number in before:
                os.kill(os.getpid(), number)
            assert noted == [signal.SIGUSR2]
        assert [signal.getsignal(number) for number in before] == [signal.SIG_IGN] * 3
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# --- configs ---------------------------------------------------------------------------------------------------------


def test_the_shipped_configs_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code_of(configs.main, "dpo configs") == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(configs.named_configs()) > 20
    (ours,) = (line for line in lines if line.startswith("pythia-2.8b_hh "))
    assert "The paper's dialogue run" in ours


@pytest.mark.parametrize(("words", "file"), [([], "hh.yaml"), (["my.yaml"], "my.yaml"), (["folder"], "folder/hh.yaml")])
def test_a_config_is_copied(
    words: list[str], file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "folder").mkdir()
    monkeypatch.chdir(tmp_path)
    assert exit_code_of(configs.main, "dpo configs", "data/hh", *words) == 0
    assert capsys.readouterr().out == f"{file}\n"
    assert (tmp_path / file).read_bytes() == configs.named_configs()["data/hh"].read_bytes()
    assert load_config(["--config", file, "--model.path", "x"], prog="dpo.train").model.path == "x"
    assert exit_code_of(configs.main, "dpo configs", "data/hh", *words) == 2  # it is not overwritten
    assert f"error: {file}: is there already" in capsys.readouterr().err


def test_an_unknown_config(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code_of(configs.main, "dpo configs", "pythia") == 2
    assert "pythia-2.8b_hh" in capsys.readouterr().err
