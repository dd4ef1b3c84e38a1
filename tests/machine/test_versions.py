"""The tested range against the constraints files, installed versions against the range, and newer Pythons."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from dpo.distributed.program import run_program
from dpo.machine import versions
from dpo.machine.versions import TESTED, untested_versions
from tests.pythons import interpreter

ROOT = Path(__file__).parents[2]
PACKAGES = ("torch", "transformers")
SOURCES = [*sorted((ROOT / "dpo").rglob("*.py")), *sorted((ROOT / "launch").rglob("*.py"))]

COMPILE = """
import sys, pathlib
for name in sys.argv[1:]:
    compile(pathlib.Path(name).read_text(encoding="utf-8"), name, "exec", dont_inherit=True)
"""


def pinned(file: str) -> dict[str, str]:
    """Versions by package of a constraints file."""
    return dict(line.split("==") for line in (ROOT / file).read_text().split())


@pytest.mark.parametrize(("end", "file"), [(0, "constraints-oldest.txt"), (1, "constraints-newest.txt")])
def test_the_range_is_that_of_the_constraints(end: int, file: str) -> None:
    assert {name: TESTED[name][end] for name in PACKAGES} == {name: pinned(file)[name] for name in PACKAGES}


def test_the_package_allows_what_is_tested() -> None:
    """pyproject.toml's lower bounds are the oldest versions: neither narrower nor wider than what tests run with."""
    text = (ROOT / "pyproject.toml").read_text()
    bounds = {name: re.search(rf'"{name}>=([\d.]+),<', text) for name in PACKAGES}
    assert {name: f"{bound[1]}.0" for name, bound in bounds.items() if bound} == {
        name: TESTED[name][0] for name in PACKAGES
    }
    assert f'requires-python = ">={TESTED["Python"][0]}"' in text


def test_make_runs_the_tested_pythons() -> None:
    """`make test-python` has a target for each of the range after the oldest, which is that of `make test`."""
    targets = re.search(r"^test-python:((?: test-3\.\d+)+)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert targets is not None
    oldest, newest = (int(version.removeprefix("3.")) for version in TESTED["Python"])
    assert targets[1].split() == [f"test-3.{minor}" for minor in range(oldest + 1, newest + 1)]


@pytest.mark.parametrize(
    ("torch", "is_tested"),
    [
        ("2.10.1", False),
        ("2.11.0", True),
        ("2.11", True),
        ("2.11.0a0+git1234", True),
        ("2.13.0+cpu", True),
        ("2.14.1+cu130", True),
        ("2.14.2", False),
        ("2.100.0", False),  # numbers, not letters
        ("3.0.0", False),
    ],
)
def test_versions_outside_are_told(torch: str, is_tested: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versions, "_installed", {"torch": torch, "transformers": "5.20.0", "Python": "3.11.0"}.get)
    wanted = None if is_tested else f"not tested with torch {torch} (tested: 2.11.0 to 2.14.1)"
    assert untested_versions() == wanted


@pytest.mark.parametrize(
    ("python", "is_tested"),
    [("3.10.14", False), ("3.11.0", True), ("3.13.99", True), ("3.14.0rc1", False), ("3.100.0", False)],
)
def test_newer_pythons_are_told(python: str, is_tested: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every 3.13 is tested: bug fixes of Python change no behaviour."""
    monkeypatch.setattr(versions.platform, "python_version", lambda: python)
    wanted = None if is_tested else f"not tested with Python {python} (tested: 3.11 to 3.13)"
    assert untested_versions({"Python": TESTED["Python"]}) == wanted


@pytest.mark.parametrize(("rank", "num_lines"), [("0", 1), ("1", 0)])
def test_a_program_warns_once_and_goes_on(
    rank: str, num_lines: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On rank 0 alone, also with --quiet; both packages stand in one line."""
    monkeypatch.setattr(versions, "_installed", {"torch": "2.15.0", "transformers": "5.30.0"}.get)
    monkeypatch.setattr(sys, "argv", ["dpo.train", "--quiet"])
    monkeypatch.setenv("RANK", rank)
    assert run_program(lambda: None) == 0
    line = (
        "WARNING: not tested with torch 2.15.0 (tested: 2.11.0 to 2.14.1),"
        " transformers 5.30.0 (tested: 5.17.0 to 5.24.0)\n"
    )
    assert capsys.readouterr().err == line * num_lines


@pytest.mark.parametrize("version", ["3.12", "3.13"])
def test_newer_pythons_compile_every_file(version: str) -> None:
    """Without a warning, which is how a Python tells of what the next one refuses."""
    python = interpreter(version)
    if python is None:
        pytest.skip(f"no python{version} is installed")
    command = [python, "-I", "-W", "error", "-c", COMPILE, *map(str, SOURCES)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
