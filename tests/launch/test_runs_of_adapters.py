"""What `launch.submit` knows of a run of adapters before it is queued: its folder, and the work that runs share."""

from pathlib import Path

import pytest

from dpo.base.errors import UserError
from dpo.config import Config
from launch.checks import check_paths
from launch.containers import bound_folders
from launch.sweep import prepare_passes, reference_passes
from tests.launch.test_sweep import CONFIG, plan
from tests.support.runs import changed, make_config


@pytest.fixture
def config(tmp_path: Path) -> Config:
    for name in ("model", "sft", "data"):
        (tmp_path / name).mkdir()
    config = make_config(tmp_path / "model", tmp_path / "data", "runs/my")
    return changed(config, lora__path=str(tmp_path / "sft"))


def test_adapters_that_are_not_there(config: Config, tmp_path: Path) -> None:
    """Those that may be a hub id are left to the run."""
    check_paths(config, ())
    check_paths(changed(config, lora__path="org/sft"), ())
    (tmp_path / "sft").rmdir()
    with pytest.raises(UserError, match=rf"lora.path: no such file or folder: {tmp_path}/sft; valid: a path that"):
        check_paths(config, ())


def test_a_container_sees_the_adapters(config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    assert {str(bound.path): bound.reason for bound in bound_folders([config], (), {})}[str(tmp_path / "sft")] == (
        "lora.path"
    )


@pytest.mark.parametrize(
    ("choice", "passes", "prepares"),
    [
        ("lora.rank=null,8,16", 1, 1),
        ("lora.alpha=8,16", 1, 1),
        ("lora.path=sft,other", 2, 2),
        ("reference.path=base,null", 2, 2),
    ],
)
def test_ranks_share_the_rows_of_the_base(tmp_path: Path, choice: str, passes: int, prepares: int) -> None:
    """Adapters that start without effect have the base as their reference, given ones themselves."""
    file = tmp_path / "mine.yaml"
    file.write_text(CONFIG)
    given = ("--lora.rank", "4") if "alpha" in choice else ()
    runs = plan(file, *given, "--sweep", choice)
    assert (len(reference_passes(runs)), len(prepare_passes(runs))) == (passes, prepares)


def test_a_named_reference_needs_no_adapters(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(CONFIG)
    for words in (("--reference.adapter", "base"), ("--reference.path", "base")):
        assert len(reference_passes(plan(file, *words, "--sweep", "lora.path=sft,other"))) == 1
