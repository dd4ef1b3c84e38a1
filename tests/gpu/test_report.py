"""`python -m dpo.doctor --report` on CUDA: what is measured there alone, and that an estimate takes it."""

import os
from pathlib import Path
from unittest.mock import patch

import torch

from dpo.doctor import program, rates, steps
from dpo.estimate import program as estimate
from dpo.estimate.report_file import read_report
from tests.support.models import save_model, save_pairs
from tests.support.runs import exit_code_of


def test_a_report(device: torch.device, tmp_path: Path) -> None:
    """Steps on padded rows, through FlexAttention. On CUDA links to the host are measured, and rows without trees are
    not, since traffic overlaps.
    """
    save_model(tmp_path / "model", "llama")
    save_pairs(tmp_path / "pairs.jsonl", 8)
    keys = {
        "model.path": tmp_path / "model",
        "data.train": f"[{{path: {tmp_path / 'pairs.jsonl'}, format: tokens}}]",
        "train.run_dir": tmp_path / "run",
        "reference.cache_dir": tmp_path / "cache",
        "batch.pairs_per_step": 2,
    }
    words = [f"--{key}={value}" for key, value in keys.items()]
    file = tmp_path / "report.json"
    with patch.dict(os.environ):
        assert exit_code_of(program.main, "dpo.doctor", *words, "--report", str(file)) == 0
    report, on_cuda = read_report(str(file)), device.type == "cuda"
    assert report.outcome == "measured" and not report.failed and report.steps is not None
    assert (report.host_copies is not None) == (report.steps.gathering_seconds is None) == on_cuda
    assert {p.precision for p in report.products} == set(rates.PRECISIONS[device.type])
    assert len(report.updates) == len(steps.VARIANTS)
    if on_cuda:  # a rehearsal packs no emulated rows
        assert exit_code_of(estimate.main, "dpo.estimate", *words, "--measured", str(file)) == 0


def test_copies_to_and_from_the_host(cuda: torch.device) -> None:
    """A byte takes more than a terabyte's share of a second, and less than a megabyte's."""
    assert all(1e6 < rate < 1e12 for rate in rates.copy_rates(cuda, 2**24))
