"""The folder of the cache, which is found without `datasets`."""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from dpo.sources import caching

ENVIRONMENTS: Sequence[dict[str, str]] = (
    {},
    {"HF_HOME": "~/there"},
    {"HF_HOME": "/there"},
    {"XDG_CACHE_HOME": "/cache"},
    {"XDG_CACHE_HOME": "/cache", "HF_HOME": "/there"},
    {"HF_DATASETS_CACHE": "/rows", "HF_HOME": "/there"},
)


def test_the_cache_lies_where_datasets_has_it() -> None:
    """Also the version in the names of its files is that of `datasets`."""
    code = f"""
import importlib, os, datasets
from dpo.sources import caching
for environment in {ENVIRONMENTS}:
    for name in ("HF_HOME", "XDG_CACHE_HOME", "HF_DATASETS_CACHE"):
        os.environ.pop(name, None)
    os.environ.update(environment)
    importlib.reload(datasets.config)
    assert caching.datasets_cache() == datasets.config.HF_DATASETS_CACHE, environment
assert caching._version() == datasets.__version__
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])


def test_the_cache_of_a_user_without_an_entry_in_passwd(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in some containers: `Path.expanduser` raises there, `datasets` leaves the text as it is."""
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.delenv("HF_HOME", raising=False)
    monkeypatch.setattr("os.getuid", lambda: 123456789)
    monkeypatch.setenv("HF_DATASETS_CACHE", "/rows")
    assert caching.datasets_cache() == Path("/rows")
