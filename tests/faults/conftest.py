"""A run that died, for the tests that ask what is made of it."""

from pathlib import Path

import pytest

from tests.models import save_model, save_pairs
from tests.runs import run_until, six_steps


@pytest.fixture(scope="package")
def dead_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """model/, pairs.jsonl, eval.jsonl, cache/, and dead/, a run of six steps that died before step 6; to be copied."""
    root = tmp_path_factory.mktemp("dead-run")
    save_model(root / "model", "llama")
    save_pairs(root / "pairs.jsonl", 8)
    save_pairs(root / "eval.jsonl", 2, seed=1)
    run_until(six_steps(root, root / "dead"), 6)
    return root
