"""`python -m dpo.push`: what it uploads and what it refuses, with the hub's client replaced."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled

from dpo.base.sums import SUMS
from dpo.command.exits import run_program
from dpo.push import program as push
from tests.support.sums import write_sums

Calls = list[tuple[str, tuple[Any, ...], dict[str, Any]]]


class Client:
    """A client of the hub that keeps its calls, and fails in the first one where it is given a failure."""

    def __init__(self, failure: Exception | None = None):
        self.calls: Calls = []
        self.failure = failure

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            if self.failure:
                raise self.failure
            self.calls.append((name, args, options))
            return Address("https://huggingface.co/me/x")

        return call


class Address(str):
    """The address of a repository, as the hub's client returns it."""

    repo_id = "me/x"


def refusal(status: int) -> HfHubHTTPError:
    response: Any = SimpleNamespace(status_code=status, headers={}, request=None)
    return HfHubHTTPError("a paragraph\nof the hub", response=response)


class ReadTimeout(Exception):
    """An exception of the http client, whose package has another name in other versions of the hub's client."""


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run folder with final/, 1,500 bytes in two files."""
    final = tmp_path / "run" / "final"
    final.mkdir(parents=True)
    (final / "config.json").write_text("{}".ljust(500))
    (final / "model.safetensors").write_bytes(bytes(1000))
    return tmp_path / "run"


@pytest.fixture
def pushed(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, Calls]]:
    """Runs the program; gives its exit code and the calls of the hub's client."""

    def run(*words: object, failure: Exception | None = None) -> tuple[int, Calls]:
        client = Client(failure)
        monkeypatch.setattr(push, "HfApi", lambda: client)
        monkeypatch.setattr("sys.argv", ["dpo.push", *map(str, words)])
        return run_program(push.main), client.calls

    return run


@pytest.mark.parametrize("what", ["run", "run/final"])
def test_the_model_of_a_run_is_uploaded(
    run_dir: Path, pushed: Any, what: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, calls = pushed(run_dir.parent / what, "me/x")
    assert code == 0
    assert calls == [
        ("create_repo", ("me/x",), {"private": False, "exist_ok": True}),
        (
            "upload_folder",
            (),
            {
                "repo_id": "me/x",
                "folder_path": run_dir / "final",
                "revision": None,
                "commit_message": "Upload a model trained by dpo",
            },
        ),
    ]
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        f"uploading 2 files of {run_dir / 'final'}, 1.5 KiB, to me/x",
        "the model is at https://huggingface.co/me/x",
    ]


def test_adapters_are_uploaded(run_dir: Path, pushed: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """They have no config.json; one without its tensors is no model."""
    final = run_dir / "final"
    (final / "config.json").rename(final / "adapter_config.json")
    assert pushed(run_dir, "me/x")[0] == 2
    assert f"{run_dir} has no final/ and no checkpoint" in capsys.readouterr().err
    (final / "model.safetensors").rename(final / "adapter_model.safetensors")
    write_sums(final)
    code, calls = pushed(run_dir, "me/x")
    assert code == 0 and calls[-1][2]["folder_path"] == final
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        content = (final / name).read_bytes()
        (final / name).write_bytes(content + b" ")
        assert pushed(run_dir, "me/x") == (2, [])
        assert "is not as it was exported: " in capsys.readouterr().err
        (final / name).write_bytes(content)
        sums = (final / SUMS).read_text()
        (final / SUMS).write_text("".join(line for line in sums.splitlines(keepends=True) if name not in line))
        assert pushed(run_dir, "me/x") == (2, [])
        assert f"{name} is not in {SUMS}" in capsys.readouterr().err
        (final / SUMS).write_text(sums)


def test_a_private_repository_and_a_branch(run_dir: Path, pushed: Any) -> None:
    code, calls = pushed(run_dir, "x", "--private", "--revision", "beta-0.1")
    assert code == 0 and [name for name, *_ in calls] == ["create_repo", "create_branch", "upload_folder"]
    assert calls[0][2]["private"] is True
    assert calls[1][2] == {"branch": "beta-0.1", "exist_ok": True}
    assert calls[2][2]["revision"] == "beta-0.1" and calls[2][2]["repo_id"] == "me/x"


def test_a_run_that_is_not_finished(run_dir: Path, pushed: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """By its folder or by its checkpoint; the line has the command that exports the newest checkpoint."""
    (run_dir / "final").rename(run_dir / "final.old")
    checkpoint = run_dir / "checkpoints" / "step-000100"
    checkpoint.mkdir(parents=True)
    for path in (run_dir, checkpoint):
        assert pushed(path, "me/x") == (2, [])
        assert capsys.readouterr().err == (
            f"error: command line: RUN: {path} has no final/: the run is not finished; valid: python -m dpo.export"
            f" --checkpoint {checkpoint} --out DIR, then python -m dpo.push DIR\n"
        )


def test_wrong_words(run_dir: Path, pushed: Any, capsys: pytest.CaptureFixture[str]) -> None:
    cases = {
        "RUN: no such folder: absent; valid: a run folder or a model folder": ("absent", "me/x"),
        f"RUN: {run_dir.parent} has no final/ and no checkpoint; valid: a run folder or a": (run_dir.parent, "me/x"),
        "REPO: not the name of a repository: a/b/c; valid: ORG/NAME, or NAME alone": (run_dir, "a/b/c"),
    }
    for line, words in cases.items():
        assert pushed(*words) == (2, [])
        assert capsys.readouterr().err.startswith(f"error: command line: {line}")


@pytest.mark.parametrize(
    ("failure", "code", "words"),
    [
        (LocalTokenNotFoundError("a paragraph"), 2, "there is no token; valid: HF_TOKEN, or `hf auth login`, with"),
        (refusal(401), 2, "the hub refused it (401: no valid token, or there is no such repository); valid: HF_TOKEN,"),
        (refusal(403), 2, "the hub refused it (403: the token has no right to it); valid: HF_TOKEN, or `hf auth"),
        (refusal(503), 1, "the hub does not answer (503)"),
        (OfflineModeIsEnabled("a paragraph"), 1, "the hub does not answer (HF_HUB_OFFLINE is set)"),
        (ReadTimeout("[Errno 111] Connection refused"), 1, "the hub does not answer (Connection refused)"),
        (ReadTimeout(""), 1, "the hub does not answer (ReadTimeout)"),
    ],
)
def test_failures_of_the_hub_are_one_line(
    run_dir: Path, pushed: Any, failure: Exception, code: int, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert pushed(run_dir, "me/x", failure=failure) == (code, [])
    _, error = capsys.readouterr().err.splitlines()
    assert error.startswith("error: ") and f"me/x: {words}" in error and "paragraph" not in error


def test_a_damaged_model_is_not_uploaded(
    run_dir: Path, pushed: Callable[..., tuple[int, Calls]], capsys: pytest.CaptureFixture[str]
) -> None:
    """By the hashes of its export. A folder without any is uploaded as it is, as the other tests do."""
    write_sums(run_dir / "final")
    assert pushed(str(run_dir), "me/x")[0] == 0
    (run_dir / "final" / "model.safetensors").write_bytes(bytes(999) + b"1")
    capsys.readouterr()
    code, calls = pushed(str(run_dir), "me/x")
    assert (code, calls) == (2, [])
    told = f"{run_dir / 'final'} is not as it was exported: model.safetensors"
    assert f"{told} has changed; valid: " in capsys.readouterr().err
    sums = run_dir / "final" / "SHA256SUMS"
    sums.write_text("".join(line for line in sums.read_text().splitlines(keepends=True) if "model.saf" not in line))
    assert pushed(str(run_dir), "me/x") == (2, [])
    assert f"{told} is not in SHA256SUMS; valid: " in capsys.readouterr().err
