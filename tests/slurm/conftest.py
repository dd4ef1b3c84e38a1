"""These tests need a SLURM: `make test-slurm` gives them one."""

import os
import subprocess
from collections.abc import Iterator

import pytest

from tests.slurm.cluster import HOME


@pytest.fixture(autouse=True, scope="session")
def _inside_a_cluster() -> None:
    """Any other SLURM is left alone, and so is `make test`."""
    if os.environ.get("SLURM_CONF") != str(HOME / "slurm.conf"):
        pytest.skip("needs a SLURM: make test-slurm")


@pytest.fixture(autouse=True, scope="module")
def _no_job_stays(_inside_a_cluster: None) -> Iterator[None]:
    """What a test that failed has left in the queue is in nobody's way."""
    yield
    subprocess.run(["scancel", "--user=root"], check=True)
