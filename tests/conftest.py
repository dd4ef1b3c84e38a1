"""What every test finds ready: its own caches, the shared data, a tiny model, and ranks that run functions together."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.surroundings import leave_behind, spare_the_collector, spare_the_disk

leave_behind(os.environ)
spare_the_disk()
# Before datasets is imported, which reads them once: nothing of a test reaches the caches of the user.
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="dpo-tests-hf-")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# Before torch is imported: tests are of the CPU, but for tests/gpu when `make test-gpu` asks for it.
if not os.environ.get("DPO_TEST_GPU"):
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

import torch

from dpo.terminal.console import begin_log, set_quiet
from tests.quick import pytest_collection_modifyitems, pytest_runtest_protocol  # noqa: F401
from tests.support.ranks import Ranks
from tests.warning_rules import pytest_configure  # noqa: F401

torch.set_num_threads(1)


def pytest_collection_finish() -> None:
    """Every test module, and what it imports, is there."""
    spare_the_collector()


def pytest_unconfigure(config: pytest.Config) -> None:
    """Removes what the session's Hugging Face caches hold."""
    shutil.rmtree(os.environ["HF_HOME"], ignore_errors=True)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test has a reference cache of its own."""
    monkeypatch.setenv("DPO_CACHE", str(tmp_path / "reference-cache"))


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    """What a program under test sets for its whole process reaches no other test: --quiet, log, environment."""
    environment = dict(os.environ)
    yield
    set_quiet(False)
    begin_log()
    if environment != os.environ:
        os.environ.clear()
        os.environ.update(environment)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real weights, preferences and published metrics; tests that need it skip where it is absent."""
    folder = Path(os.environ.get("DPO_TEST_DATA", Path(__file__).parents[2] / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no test data at {folder}: set DPO_TEST_DATA")
    return folder.resolve()


@pytest.fixture(scope="session")
def ranks() -> Iterator[Ranks]:
    """Processes that run a function together as the ranks of a gloo group; started once, used by many tests."""
    pool = Ranks()
    yield pool
    pool.close()
