"""Files beside a model's weights that change between two starts of a run: none is used, or exported, in silence."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from dpo.checkpoint.folders import checkpoint_path
from dpo.checkpoint.state import read_state
from dpo.config import Config, to_yaml
from dpo.export import program as export
from dpo.train import loop
from tests.support.data_fixtures import make_tokenizer
from tests.support.runs import (
    changed,
    error_lines,
    exit_code,
    exit_code_of,
    run,
    run_until,
    same_weights,
    save_six_steps,
    six_steps,
    snapshot,
)

pytestmark = pytest.mark.xdist_group("files-beside-the-weights")

FLIPS = {
    "config.json": ("transformers_version", "transformers_versioo"),
    "generation_config.json": ("transformers_version", "transformers_versioo"),
    "tokenizer.json": ('"truncation"', '"truncatioo"'),
    "tokenizer_config.json": ('"unk_token"', '"unk_tokeo"'),
    "chat_template.jinja": ("[assistant]", "[assistanu]"),
    "LICENSE": ("As is", "As ir"),
}
"""A flip of one bit in each file that an export copies; a reader of JSON does not notice them."""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `six_steps` runs on, with a tokenizer and a licence; dead/, a run that died before step 6; whole/."""
    root = save_six_steps(tmp_path_factory.mktemp("beside"))
    make_tokenizer().save_pretrained(root / "model")
    (root / "model" / "LICENSE").write_text("As is.")
    run_until(six_steps(root, root / "dead"), 6)
    run(six_steps(root, root / "whole"))
    return root


@pytest.fixture
def dead(root: Path, tmp_path: Path) -> Config:
    """The dead run, and the model, copied."""
    shutil.copytree(root / "dead", tmp_path / "run")
    shutil.copytree(root / "model", tmp_path / "model")
    return six_steps(root, tmp_path / "run", model__path=str(tmp_path / "model"))


def flip(path: Path) -> None:
    before, after = FLIPS[path.name]
    content = path.read_text()
    assert before in content, content
    path.write_text(content.replace(before, after, 1))


def refusal(config: Config, capsys: pytest.CaptureFixture[str]) -> str:
    """The line of a start that is refused and leaves the run folder as it was, after the checkpoint's name."""
    run_dir = Path(str(config.train.run_dir))
    before = snapshot(run_dir)
    capsys.readouterr()
    assert exit_code(config) == 2
    (line,) = error_lines(capsys.readouterr().err)
    assert snapshot(run_dir) == before
    assert line.endswith("; valid: the same as before, or another train.run_dir")
    return line


def test_every_file_of_an_export_is_tried(root: Path) -> None:
    model = {path.name for path in (root / "model").iterdir()} - {"model.safetensors"}
    exported = {path.name for path in (root / "whole" / "final").iterdir()}
    assert model == set(FLIPS) == exported - {"model.safetensors", "README.md", "SHA256SUMS"}


@pytest.mark.parametrize("name", FLIPS)
def test_a_flip_is_refused_by_name(name: str, dead: Config, capsys: pytest.CaptureFixture[str]) -> None:
    """As other weights are, with both hashes."""
    path = Path(dead.model.path, name)
    digests = [hashlib.sha256(path.read_bytes()).hexdigest()[:8]]
    flip(path)
    digests.append(hashlib.sha256(path.read_bytes()).hexdigest()[:8])
    key = "model.path" if name in ("config.json", "generation_config.json", "LICENSE") else "model.tokenizer"
    line = refusal(dead, capsys)
    checkpoint = checkpoint_path(Path(str(dead.train.run_dir)), 4)
    assert line.startswith(f"error: CONFIG: {key}: cannot resume from {checkpoint}: since the checkpoint was written, ")
    assert f" is not as it was: {name} has changed (SHA-256 {digests[0]}, now {digests[1]}); " in line


def test_a_lost_file_is_refused_until_it_is_back(dead: Config, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = Path(dead.model.path, "chat_template.jinja")
    path.unlink()
    assert "chat_template.jinja is missing; " in refusal(dead, capsys)
    shutil.copyfile(root / "model" / path.name, path)
    assert same_weights(root / "whole" / "final", run(dead) / "final")


def test_a_finished_run_too(root: Path, dead: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(root / "whole", tmp_path / "whole")
    flip(Path(dead.model.path, "tokenizer_config.json"))
    finished = changed(dead, train__run_dir=str(tmp_path / "whole"))
    assert "tokenizer_config.json has changed" in refusal(finished, capsys)


def test_the_same_tokenizer_elsewhere_goes_on(dead: Config, root: Path, tmp_path: Path) -> None:
    """By links, as in a snapshot of the hub; its own folder's files are then those of the model alone."""
    (tmp_path / "tokenizer").mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        Path(dead.model.path, name).rename(tmp_path / name)
        (tmp_path / "tokenizer" / name).symlink_to(tmp_path / name)
    final = run(changed(dead, model__tokenizer=str(tmp_path / "tokenizer"))) / "final"
    assert same_weights(root / "whole" / "final", final)


def test_a_new_file_is_told_and_recorded(dead: Config, capsys: pytest.CaptureFixture[str]) -> None:
    path = Path(dead.model.path, "NOTICE")
    path.write_text("new")
    run_dir = run(dead)
    line = f"{checkpoint_path(run_dir, 4)}: new files of the model: NOTICE"
    assert capsys.readouterr().err.splitlines().count(line) == 1
    path.unlink()
    assert "NOTICE is missing; " in refusal(dead, capsys)


def test_a_checkpoint_of_an_older_version_goes_on(dead: Config, capsys: pytest.CaptureFixture[str]) -> None:
    """And says that nothing is compared; its next checkpoint records the files."""
    run_dir = Path(str(dead.train.run_dir))
    state = checkpoint_path(run_dir, 4) / "state.json"
    content = json.loads(state.read_text())
    recorded = content["identity"].pop("model_files")
    state.write_text(json.dumps(content))
    marker, written = state.with_name("COMPLETE"), state.read_bytes()
    files = json.loads(marker.read_text()) | {state.name: [len(written), hashlib.sha256(written).hexdigest()]}
    marker.write_text(json.dumps(files))
    run(dead)
    line = "an older version wrote it, without the SHA-256 of the files beside the weights: they are not compared"
    assert capsys.readouterr().err.splitlines().count(f"{checkpoint_path(run_dir, 4)}: {line}") == 1
    assert read_state(checkpoint_path(run_dir, 6), "").identity["model_files"] == recorded


def exported_by_the_run(config: Config, monkeypatch: pytest.MonkeyPatch) -> Path:
    """final/ of a run while whose steps a file changes."""
    step_of_a_run = loop._step

    def step(*arguments: object) -> object:
        if not Path(config.model.path, "changed").exists():
            flip(Path(config.model.path, "tokenizer_config.json"))
            Path(config.model.path, "changed").touch()
        return step_of_a_run(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(loop, "_step", step)
    return run(config) / "final"


def exported_by_hand(config: Config, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The model of a checkpoint after which a file has changed."""
    run_dir, out = Path(str(config.train.run_dir)), Path(str(config.train.run_dir)).with_name("out")
    (run_dir / "config.yaml").write_text(to_yaml(config))
    flip(Path(config.model.path, "tokenizer_config.json"))
    words = ("--checkpoint", str(checkpoint_path(run_dir, 4)), "--out", str(out))
    assert exit_code_of(export.main, "dpo.export", *words) == 0
    return out


@pytest.mark.parametrize("way", [exported_by_the_run, exported_by_hand])
def test_an_export_tells_what_has_changed(
    way: Callable[[Config, pytest.MonkeyPatch], Path],
    dead: Config,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """It goes on: the weights are not at fault, and the file can be put back."""
    out = way(dead, monkeypatch)
    assert "unk_tokeo" in (out / "tokenizer_config.json").read_text()
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "the exported model gets" in line]
    begin = "WARNING: the exported model gets files that have changed: model.tokenizer: the tokenizer "
    assert line.startswith(begin) and "is not as it was: tokenizer_config.json has changed (SHA-256 " in line
