"""metrics.jsonl of an interrupted run, cut where its checkpoint ends."""

import json
from pathlib import Path

import pytest

from dpo.run_folder.files import drop_metrics_after, read_metrics


def test_cutting_is_one_replacement(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A crash before the replacement leaves the file as it was."""
    lines = "".join(json.dumps({"step": step}) + "\n" for step in (0, 1, 2, 3))
    (tmp_path / "metrics.jsonl").write_text(lines)

    def crash(self: Path, target: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", crash)
        with pytest.raises(KeyboardInterrupt):
            drop_metrics_after(tmp_path, 2)
    assert (tmp_path / "metrics.jsonl").read_text() == lines
    drop_metrics_after(tmp_path, 2)
    assert [line["step"] for line in read_metrics(tmp_path)] == [0, 1, 2]


def test_numbers_survive_being_cut(tmp_path: Path) -> None:
    """Every float, and the NaN of an evaluation that went wrong, is the same number after a rewrite."""
    values = [0.1, 1 / 3, 1e-300, 123456789.123456789, -0.0]
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 1, "values": values, "nan": float("nan")}) + "\n")
    drop_metrics_after(tmp_path, 1)
    (line,) = read_metrics(tmp_path)
    assert line["values"] == values
    assert line["nan"] != line["nan"]
