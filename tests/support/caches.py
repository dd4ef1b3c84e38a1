"""The cache of `datasets` elsewhere: it and the trainer find its folder each for itself."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import datasets


@contextmanager
def cache_of_datasets(folder: Path | str) -> Iterator[None]:
    """Has this process, and those that it starts, keep rows in `folder`."""
    with (
        patch.object(datasets.config, "HF_DATASETS_CACHE", Path(folder)),
        patch.dict(os.environ, HF_DATASETS_CACHE=str(folder)),
    ):
        yield
