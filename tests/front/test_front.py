"""The table of names, the ranks that a command line asks for, the shipped configs."""

import importlib.util
import os
import re
import sys
from pathlib import Path

import pytest

from dpo.base.errors import UserError
from dpo.command.line import Parser
from dpo.config import load_config
from dpo.front import configs, parent
from dpo.front.main import answer
from dpo.front.names import COMMANDS, help_text
from dpo.front.ranks import Wanted, add_ranks, check_host, number_of_ranks, read_wanted
from dpo.train.words import make_parser
from tests.support.runs import exit_code_of

# --- names -----------------------------------------------------------------------------------------------------------


def test_help_has_a_line_for_each_program() -> None:
    text = help_text()
    for name in (
        *("train", "prepare", "inspect", "estimate", "score", "sample", "export", "replay", "reference"),
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
def test_the_help_names_the_ranks_beside_the_flags_of_the_program(
    flag: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        answer("doctor", ["--gpus", "8", flag])
    assert end.value.code == 0
    pattern = r"\Ausage: dpo doctor FILE.*--report FILE.*--gpus N.*--ranks N.*options of every program"
    assert re.search(pattern, capsys.readouterr().out, re.DOTALL)


@pytest.mark.parametrize("typo", ["--gpuz=8", "--rankz=2", "--gpuz", "--repotr=x"])
def test_a_typo_in_the_flags_of_ranks(typo: str) -> None:
    with pytest.raises(UserError, match=r"unknown flag; did you mean --(gpus|ranks|report)\?"):
        answer("doctor", [typo])


@pytest.mark.parametrize("word", ["--num_processes", "--nproc_per_node", "--nproc-per-node", "--num_gpus"])
def test_the_number_of_ranks_by_its_names_in_other_launchers(word: str) -> None:
    with pytest.raises(UserError, match=r"unknown flag; did you mean --gpus\?"):
        answer("train", ["my.yaml", word, "2"])


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


def test_more_ranks_than_the_memory_holds_are_refused() -> None:
    """Each takes 300 MiB for its libraries: 999 of them filled a machine of 24 GiB, which killed other programs."""
    with pytest.raises(UserError) as failure:
        check_host(999, 23 * 2**30)
    line = "command line: --ranks: 999 ranks need 292.7 GiB before they load a model, and 23.0 GiB are available"
    assert str(failure.value) == f"{line}; valid: up to 78"  # 23 * 1024 / 300 = 78.5
    check_host(1, 300 * 2**20)
    with pytest.raises(UserError, match=r"valid: up to 1$"):
        check_host(1, 300 * 2**20 - 1)


def test_ranks_that_share_a_cpu_are_told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    check_host(2, 2**40)
    assert capsys.readouterr().err == ""
    check_host(3, 2**40)
    assert capsys.readouterr().err.startswith("WARNING: 3 ranks share 2 CPUs: ")


def parser_of_ranks() -> Parser:
    """The parser of `dpo train`."""
    parser = make_parser("dpo train")
    add_ranks(parser)
    return parser


def test_the_words_of_the_ranks_are_taken_out() -> None:
    words = ["--config", "my.yaml", "--gpus", "8", "--loss.beta=0.5"]
    assert read_wanted(parser_of_ranks(), words) == (Wanted(8, None), ["--config", "my.yaml", "--loss.beta=0.5"])


@pytest.mark.parametrize("words", [["--gpus", "0"], ["--ranks", "two"], ["--gpus", "1", "--ranks", "1"], ["--gpus"]])
def test_wrong_numbers_of_ranks(words: list[str]) -> None:
    with pytest.raises(UserError, match=r"^command line: .*--(gpus|ranks)"):
        read_wanted(parser_of_ranks(), words)


def test_gpus_that_are_hidden_are_not_used() -> None:
    """Tests hide all GPUs of the machine by CUDA_VISIBLE_DEVICES."""
    with pytest.raises(UserError, match="8 asked for, and torch finds none: CUDA_VISIBLE_DEVICES hides all GPUs"):
        parent.run_ranks(COMMANDS["train"], (), Wanted(8, None), None)


def test_ranks_import_from_the_current_folder_only_where_dpo_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """`python -m dpo` has it in sys.path, and the script `dpo` has its own folder there."""
    monkeypatch.setattr(sys, "path", [str(Path.cwd()), "/usr/lib"])
    assert "-P" not in parent.python_flags()
    monkeypatch.setattr(sys, "path", ["/usr/bin", "/usr/lib"])
    assert "-P" in parent.python_flags()


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
    assert exit_code_of(configs.main, "dpo configs", "pythia-2.8b_hhh") == 2
    line = "pythia-2.8b_hhh: no shipped config has this name; did you mean pythia-2.8b_hh? valid: a name that"
    assert line in capsys.readouterr().err
