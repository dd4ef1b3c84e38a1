"""These tests need a SLURM: `make test-slurm` gives them one."""

import os

import pytest

from tests.slurm.cluster import HOME


@pytest.fixture(autouse=True, scope="session")
def _inside_a_cluster() -> None:
    """Any other SLURM is left alone, and so is `make test`."""
    if os.environ.get("SLURM_CONF") != str(HOME / "slurm.conf"):
        pytest.skip("needs a SLURM: make test-slurm")
