"""A run that died, for the tests that ask what is made of it."""

from pathlib import Path

import pytest

from tests.support.runs import run_until, save_six_steps, six_steps


@pytest.fixture(scope="package")
def dead_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """model/, pairs.jsonl, eval.jsonl, cache/, and dead/, a run of six steps that died before step 6; to be copied."""
    root = tmp_path_factory.mktemp("dead-run")
    save_six_steps(root)
    run_until(six_steps(root, root / "dead"), 6)
    return root
