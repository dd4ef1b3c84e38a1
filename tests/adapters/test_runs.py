"""Whole runs with adapters where something is wrong with their base."""

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dpo.hub.files import ADAPTER_TENSORS
from dpo.run_folder.files import read_lines
from tests.faults.test_nonfinite import EVIL, config_of, report_of, write_pairs
from tests.support.models import save_model
from tests.support.ranks import Ranks
from tests.support.runs import changed, run, run_until

pytestmark = pytest.mark.xdist_group("ranks")


@pytest.mark.parametrize("size", [1, 2])
def test_pairs_of_a_step_that_is_not_finite_are_named(ranks: Ranks, tmp_path: Path, size: int) -> None:
    """A row of the frozen embedding is NaN, of a token that one pair has: its steps are skipped, and adapters, which
    stay finite, go on, also from a checkpoint.
    """
    file = save_model(tmp_path / "nan", "llama") / "model.safetensors"
    weights = load_file(file)
    weights["model.embed_tokens.weight"][EVIL] = math.nan
    save_file(weights, file, metadata={"format": "pt"})
    write_pairs(tmp_path / "pairs.jsonl", 8, evil=(6,))
    config = config_of(tmp_path, tmp_path / "run", lora__rank=2)
    ranks(size, run_until, config, 5)
    ranks(size, run, config)
    lines = read_lines(tmp_path / "run")
    assert [line.get("train/skipped") for line in lines] == [None, 1, None, 1, None, 1]
    assert all(math.isfinite(line["train/grad_norm"]) for line in lines[::2])  # type: ignore[arg-type]
    for step in (2, 4, 6):
        (pair,) = report_of(config, f"step-00000{step}.jsonl")
        assert (pair["pair"], pair["logp_chosen"]) == (5, "nan")
    adapters = load_file(tmp_path / "run" / "final" / ADAPTER_TENSORS)
    assert all(torch.isfinite(tensor).all() for tensor in adapters.values())
    assert any(tensor.any() for name, tensor in adapters.items() if "lora_B" in name)
    whole = changed(config, train__run_dir=str(tmp_path / "whole"))
    ranks(size, run, whole)
    assert (tmp_path / "whole/final" / ADAPTER_TENSORS).read_bytes() == (
        tmp_path / "run/final" / ADAPTER_TENSORS
    ).read_bytes()
