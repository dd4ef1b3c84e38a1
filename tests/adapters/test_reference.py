"""The reference of a run with adapters: the base's rows, or those of the start, and the answers that belong to them."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from dpo.base.errors import UserError
from dpo.config import SourceConfig
from dpo.model import warm_up
from dpo.train import start
from tests.support.data_fixtures import make_tokenizer
from tests.support.models import plain_logp, save_model, save_pairs
from tests.support.peft_models import plain_peft, save_adapter
from tests.support.runs import make_config, reference_line, run, train_lines

PAIRS = 6
ROWS = 2 * PAIRS


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base/, pairs.jsonl, eval.jsonl with the same pairs; adapter/ with an effect, nothing/ with B = 0; and merged/,
    base and adapter in one model.
    """
    root = tmp_path_factory.mktemp("reference")
    base = save_model(root / "base", "llama")
    make_tokenizer().save_pretrained(base)
    save_pairs(root / "pairs.jsonl", PAIRS)
    shutil.copy(root / "pairs.jsonl", root / "eval.jsonl")
    save_adapter(root / "adapter", base)
    save_adapter(root / "nothing", base, spread=0.0)
    merged = plain_peft(base, root / "adapter", torch.float32).merge_and_unload()
    merged.save_pretrained(root / "merged")
    make_tokenizer().save_pretrained(root / "merged")
    return root


def trained_run(root: Path, tmp_path: Path, cache: str = "cache", **changes: Any) -> Path:
    """Two steps; the run folder."""
    facts: dict[str, Any] = {
        "data__max_length": None,
        "data__max_prompt_length": None,
        "batch__pairs_per_step": PAIRS,
        "train__steps": 2,
        "reference__cache_dir": str(tmp_path / cache),
    }
    run_dir = tmp_path / f"run-{len(list(tmp_path.iterdir()))}"
    return run(make_config(root / "base", root / "pairs.jsonl", run_dir, **(facts | changes)))


def test_runs_of_one_base_share_its_rows(root: Path, tmp_path: Path) -> None:
    """After a full run: fresh adapters of any rank, DoRA, B = 0, and `reference.adapter: base` compute no row."""
    assert reference_line(trained_run(root, tmp_path)) == (ROWS, 0)
    fresh: list[dict[str, Any]] = [
        {"lora__rank": 2},
        {"lora__rank": 5, "lora__train_embeddings": True},
        {"lora__rank": 2, "lora__dora": True},
        {"lora__path": str(root / "nothing")},
    ]
    for changes in fresh:
        folder = trained_run(root, tmp_path, **changes)
        assert reference_line(folder) == (0, ROWS)
        assert abs(train_lines(folder)[0]["train/rewards/margins"]) <= 1e-4
    base = trained_run(root, tmp_path, lora__path=str(root / "adapter"), reference__adapter="base")
    assert reference_line(base) == (0, ROWS)
    assert abs(train_lines(base)[0]["train/rewards/margins"]) > 0.01


def test_adapters_that_do_not_fit_are_refused_before_rows_are_computed(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also where the reference is the base, which needs no adapters: its rows may take hours."""
    other = shutil.copytree(root / "adapter", tmp_path / "other")
    tensors = load_file(other / "adapter_model.safetensors")
    save_file(dict(list(tensors.items())[1:]), other / "adapter_model.safetensors")
    with pytest.raises(UserError, match="1 tensors of the adapters are missing"):
        trained_run(root, tmp_path, lora__path=str(other), reference__adapter="base")
    assert not (tmp_path / "cache").exists()


def values_of(cache: Path) -> list[tuple[int, int, float]]:
    """The rows of a cache of one reference, sorted."""
    (folder,) = cache.iterdir()
    return sorted(
        tuple(row) for block in folder.glob("rows-*.bin") for row in np.fromfile(block, "<u8,<u8,<f8").tolist()
    )


def test_rows_of_the_base_are_those_of_a_full_run(root: Path, tmp_path: Path) -> None:
    """To the last bit, though adapters are there when they are computed."""
    trained_run(root, tmp_path, "full")
    expected = values_of(tmp_path / "full")
    assert len(expected) == ROWS
    sft = {"lora__path": str(root / "adapter"), "reference__adapter": "base"}
    changes: dict[str, dict[str, Any]] = {"dora": {"lora__rank": 2, "lora__dora": True}, "sft": sft}
    for cache, change in changes.items():
        trained_run(root, tmp_path, cache, **change)
        assert values_of(tmp_path / cache) == expected


def test_a_start_with_an_effect_has_rows_of_its_own(root: Path, tmp_path: Path) -> None:
    """Those of the start, so that the first margins are 0 and the first step is checked; found again in another folder,
    and computed again with another alpha.
    """
    trained_run(root, tmp_path)
    folder = trained_run(root, tmp_path, lora__path=str(root / "adapter"))
    assert reference_line(folder) == (ROWS, 0)
    assert abs(train_lines(folder)[0]["train/rewards/margins"]) <= 1e-4
    model = plain_peft(root / "base", root / "adapter", torch.float64)
    rows = [json.loads(line) for line in (root / "pairs.jsonl").read_text().splitlines()]
    chosen = [plain_logp(model, row["prompt_ids"], row["completion_ids"][0]).item() for row in rows]
    assert train_lines(folder)[0]["train/logps/chosen"] == pytest.approx(np.mean(chosen), rel=1e-5)
    moved = shutil.copytree(root / "adapter", tmp_path / "moved")
    assert reference_line(trained_run(root, tmp_path, lora__path=str(moved))) == (0, ROWS)
    settings = json.loads((moved / "adapter_config.json").read_text())
    (moved / "adapter_config.json").write_text(json.dumps(settings | {"lora_alpha": 6}))
    assert reference_line(trained_run(root, tmp_path, lora__path=str(moved))) == (ROWS, 0)


@pytest.mark.parametrize(
    ("adapter", "checked"), [({"lora__rank": 2}, True), ({"reference__adapter": "base"}, False), ({}, True)]
)
def test_the_base_is_loaded_once(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, adapter: dict[str, Any], checked: bool
) -> None:
    """No other model is in memory, whatever the reference; the first step is checked where it is the start."""
    loaded, checks = [], []
    load_policy = warm_up.load_policy
    monkeypatch.setattr(warm_up, "load_policy", lambda *args: loaded.append(1) or load_policy(*args))
    verify_start = start.verify_start
    monkeypatch.setattr(start, "verify_start", lambda *args: checks.append(1) or verify_start(*args))
    path = {} if "lora__rank" in adapter else {"lora__path": str(root / "adapter")}
    trained_run(root, tmp_path, **(path | adapter))
    assert len(loaded) == 1
    assert bool(checks) == checked


def answers_of(root: Path, tmp_path: Path, base: str = "base", **changes: Any) -> list[dict[str, str]]:
    """The reference's answers of a run on a model."""
    sampled = {"data__eval": [SourceConfig(str(root / "eval.jsonl"))], "eval__samples": 3, "eval__max_new_tokens": 6}
    folder = trained_run(root, tmp_path, model__path=str(root / base), **sampled, **changes)
    return json.loads((folder / "answers" / "reference.json").read_text())["answers"]


@pytest.mark.parametrize("loss", ["dpo", "orpo"])
def test_answers_are_those_of_the_reference(root: Path, tmp_path: Path, loss: str) -> None:
    """As whole models give them: the base, or base and adapter merged."""
    base, merged = (answers_of(root, tmp_path, name, loss__name=loss) for name in ("base", "merged"))
    assert base != merged
    path = {"lora__path": str(root / "adapter"), "loss__name": loss}
    assert answers_of(root, tmp_path, **path) == merged
    assert answers_of(root, tmp_path, reference__adapter="base", **path) == base
    assert answers_of(root, tmp_path, lora__rank=2, loss__name=loss) == base
