"""`python -m dpo.reference` for runs of adapters: whose rows it computes, and that the run finds them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dpo.config import Config, to_yaml
from dpo.ref_logps.blocks import read_rows
from dpo.reference import program as reference
from tests.support.models import plain_logp, plain_model, save_model, save_pairs
from tests.support.peft_folders import adapted_model, save_adapter
from tests.support.runs import cache_folders, changed, exit_code_of, make_config, reference_line, run

STEP = {"batch__pairs_per_step": 4, "train__steps": 1}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """model/, its adapters sft/, and those of zero/, whose B is 0; pairs.jsonl, 4 pairs."""
    root = tmp_path_factory.mktemp("reference")
    save_model(root / "model", "gpt-neox")
    save_adapter(root / "sft", root / "model")
    save_adapter(root / "zero", root / "model", has_effect=False)
    save_pairs(root / "pairs.jsonl", 4)
    return root


@pytest.fixture
def config(root: Path, tmp_path: Path) -> Config:
    return make_config(root / "model", root / "pairs.jsonl", tmp_path / "run", **STEP)


def fill(config: Config, tmp_path: Path) -> list[float]:
    """Fills the cache with the program; the log-probabilities in its only folder, sorted."""
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    assert exit_code_of(reference.main, "dpo.reference", "--config", str(tmp_path / "config.yaml")) == 0
    (folder,) = cache_folders(tmp_path)
    return sorted(read_rows(folder).logps.tolist())


def logps_of(model: Any, root: Path) -> list[float]:
    """The oracle: each completion alone."""
    rows = map(json.loads, (root / "pairs.jsonl").read_text().splitlines())
    return sorted(plain_logp(model, row["prompt_ids"], ids).item() for row in rows for ids in row["completion_ids"])


@pytest.mark.parametrize(
    "lora",
    [
        {"lora__rank": 4, "lora__dora": True},
        {"lora__path": "zero"},
        {"lora__path": "sft", "reference__adapter": "base"},
    ],
)
def test_the_rows_of_the_base(lora: dict[str, Any], config: Config, root: Path, tmp_path: Path) -> None:
    """Without the adapters: those that a run of the whole model reads, and the run of the adapters."""
    given = {key: str(root / value) if key.endswith("path") else value for key, value in lora.items()}
    found = fill(changed(config, **given), tmp_path)
    assert found == pytest.approx(logps_of(plain_model(root / "model"), root), rel=1e-5)
    run(changed(config, train__run_dir=str(tmp_path / "whole")))
    run(changed(config, **given))
    assert [reference_line(tmp_path / name) for name in ("whole", "run")] == [(0, 8)] * 2


def test_the_rows_of_the_start(config: Config, root: Path, tmp_path: Path) -> None:
    """With the adapters from which the run starts."""
    config = changed(config, lora__path=str(root / "sft"))
    found = fill(config, tmp_path)
    assert found == pytest.approx(logps_of(adapted_model(root / "model", root / "sft"), root), rel=1e-5)
    assert not np.allclose(found, logps_of(plain_model(root / "model"), root), rtol=1e-2)
    run(config)
    assert reference_line(tmp_path / "run") == (0, 8)
    assert len(cache_folders(tmp_path)) == 1
