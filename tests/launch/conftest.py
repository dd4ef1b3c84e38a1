"""SLURM's commands as scripts on PATH: they note how they were called, and answer what a test tells them to."""

import os
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from dpo.command.line import split_options, words_of

SCRIPT = """#!/bin/sh
cd {folder}
echo "$@" >> {name}.calls
calls=$(wc -l < {name}.calls)
[ {name} = sbatch ] && for word; do :; done && cp "$word" script-$calls
[ -e {name}.refusal ] && [ $calls -gt $(cat {name}.allowed) ] && cat {name}.refusal >&2 && exit 1
cat {name}.answer 2> /dev/null || true
"""


class FakeSlurm:
    """sbatch, srun, scontrol, sinfo and squeue."""

    def __init__(self, folder: Path):
        self.folder = folder
        folder.mkdir()
        for name in ("sbatch", "srun", "scontrol", "sinfo", "squeue"):
            (folder / name).write_text(SCRIPT.format(folder=folder, name=name))
            (folder / name).chmod(0o755)
        self.answer("sbatch", "Submitted batch job 4242\n")

    def answer(self, name: str, text: str) -> None:
        """What a command prints from now on."""
        (self.folder / f"{name}.answer").write_text(text)

    def refuse(self, name: str, text: str, after: int = 0) -> None:
        """A command fails from now on, or after so many calls, and prints this on stderr."""
        (self.folder / f"{name}.allowed").write_text(str(after))
        (self.folder / f"{name}.refusal").write_text(text)

    def calls(self, name: str) -> Sequence[str]:
        """The words of each call of a command."""
        path = self.folder / f"{name}.calls"
        return path.read_text().splitlines() if path.exists() else []

    def script(self, number: int) -> str:
        """What the sbatch of this number got, from 1."""
        return (self.folder / f"script-{number}").read_text()


def changed(usual: Sequence[str], words: Sequence[str]) -> list[str]:
    """The usual words of a command line with these in the place of those that give the same flags."""
    given = {option.key for option in split_options(words)}
    return [*words_of([option for option in split_options(usual) if option.key not in given]), *words]


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    """SLURM's commands, first on PATH."""
    fake = FakeSlurm(tmp_path / "slurm")
    monkeypatch.setenv("PATH", f"{fake.folder}{os.pathsep}{os.environ['PATH']}")
    return fake


@pytest.fixture(autouse=True)
def _closed_terminals_are_heard() -> Iterator[None]:
    """SIGHUP is not ignored, as it is where the tests were started with nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)
