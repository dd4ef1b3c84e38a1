"""Which code made a run: against git itself, in a repository and in none."""

import importlib.metadata
import json
import shutil
import subprocess
from pathlib import Path

import pytest

from dpo import DISTRIBUTION
from dpo.run import provenance as module
from dpo.run.provenance import git_state, provenance
from tests.support.models import save_model, save_pairs
from tests.support.runs import run, six_steps


def git(folder: Path, *arguments: str) -> str:
    identity = ("-c", "user.name=a", "-c", "user.email=a@b")
    command = ["git", *identity, "-C", str(folder), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository that holds the module, committed once."""
    if shutil.which("git") is None:
        pytest.skip("git is not installed")
    package = tmp_path / "repository" / "dpo"
    (package / "run").mkdir(parents=True)
    shutil.copy(module.__file__, package / "run")
    git(tmp_path / "repository", "init", "-q")
    git(package, "add", ".")
    git(package, "commit", "-qm", "first")
    return package


def test_a_checkout_has_its_commit(checkout: Path) -> None:
    """Clean; with a changed file; a new file that git does not know is no change of the code that git knows."""
    head = git(checkout, "rev-parse", "HEAD")
    assert git_state(checkout) == {"commit": head, "dirty": False}
    (checkout / "other.py").write_text("")
    assert git_state(checkout) == {"commit": head, "dirty": False}
    (checkout / "run" / "provenance.py").write_text("# changed")
    assert git_state(checkout) == {"commit": head, "dirty": True}


def test_a_package_inside_a_foreign_repository_is_not_of_its_commit(checkout: Path) -> None:
    """An environment inside of somebody's project: that project's commit says nothing about this code."""
    installed = checkout.parent / ".venv" / "dpo"
    shutil.copytree(checkout, installed)
    assert git_state(installed)["commit"] == module._installed_commit()


def test_a_run_folder_says_what_made_it(tmp_path: Path) -> None:
    save_model(tmp_path / "model", "llama")
    save_pairs(tmp_path / "pairs.jsonl", 4)
    save_pairs(tmp_path / "eval.jsonl", 1)
    folder = run(six_steps(tmp_path, tmp_path / "run", train__steps=1))
    [written] = json.loads((folder / "provenance.json").read_text())
    assert written["version"] == importlib.metadata.version(DISTRIBUTION)
    assert written["torch"] == importlib.metadata.version("torch")
    assert written["ranks"] == 1 and len(written["hosts"]) == 1
    assert written["last_step"] == 1  # which train.epochs alone does not tell


def test_hosts_stand_once() -> None:
    assert provenance(["b", "a", "b"], 1)["hosts"] == ["a", "b"]


def test_a_resume_with_other_code_is_said_and_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save_model(tmp_path / "model", "llama")
    save_pairs(tmp_path / "pairs.jsonl", 4)
    save_pairs(tmp_path / "eval.jsonl", 1)
    for steps, commit in ((1, "aaa"), (2, "aaa"), (3, "bbb")):
        monkeypatch.setattr(module, "git_state", lambda _, commit=commit: {"commit": commit, "dirty": False})
        folder = run(six_steps(tmp_path, tmp_path / "run", train__steps=steps))
    starts = json.loads((folder / "provenance.json").read_text())
    assert [(start["commit"], start["last_step"]) for start in starts] == [("aaa", 1), ("aaa", 2), ("bbb", 3)]
    said = [line for line in capsys.readouterr().err.splitlines() if "the code has changed" in line]
    assert said == ["the code has changed since this run's last start: commit aaa -> bbb"]
