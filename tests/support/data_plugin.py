"""Fixtures of the tests of the data, which name this module in `pytest_plugins`."""

from collections.abc import Iterator
from pathlib import Path

import datasets
import pytest

from tests.support.caches import cache_of_datasets
from tests.support.data_fixtures import make_tokenizer


@pytest.fixture
def hf_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A cache of `datasets` that is empty and this test's alone."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    datasets.utils.disable_progress_bars()
    with cache_of_datasets(tmp_path / "hf" / "datasets"):
        yield tmp_path / "hf"
    datasets.utils.enable_progress_bars()


@pytest.fixture
def tokenizer_folder(tmp_path: Path) -> str:
    make_tokenizer().save_pretrained(tmp_path / "tokenizer")
    return str(tmp_path / "tokenizer")
