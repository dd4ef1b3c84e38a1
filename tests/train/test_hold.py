"""What decides how a start begins, while another start holds the folder."""

from pathlib import Path
from typing import Any

import pytest

from dpo.train import hold
from dpo.train.hold import contents_of
from tests.support.runs import make_config


def test_a_checkpoint_that_another_start_removes_meanwhile_is_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints = tmp_path / "run/checkpoints"
    for name in ("step-000002", "step-000004", "step-000006.tmp"):
        (checkpoints / name).mkdir(parents=True)
    listed = hold.checkpoints_of

    def then_remove(run_dir: Path) -> list[Path]:
        found = listed(run_dir)
        (checkpoints / "step-000002").rmdir()
        return found

    def here(_: Any, work: Any) -> Any:
        return work()

    monkeypatch.setattr(hold, "checkpoints_of", then_remove)
    monkeypatch.setattr(hold, "on_main", here)
    config = make_config(tmp_path / "model", tmp_path / "pairs.jsonl", tmp_path / "run")
    assert list(contents_of(config, None)) == [str(checkpoints / "step-000004")]  # type: ignore[arg-type]
