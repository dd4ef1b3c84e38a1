"""The cache of rows: its folder, the names of its files by content; calls of `datasets` that fail in one line."""

import hashlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import datasets
import huggingface_hub

from dpo.base.errors import UserError
from dpo.base.files import naming
from dpo.base.full_disk import full_code
from dpo.hub.snapshots import PREPARE

FORMAT = 4
"""The version of the cached rows and token rows of a source. A change of their contents or meaning must raise it."""


def digest(parts: Iterable[str]) -> str:
    """Returns a hash of the parts, of FORMAT and of the version of `datasets`: 32 hex digits, as a fingerprint of
    `datasets` has.
    """
    return hashlib.sha256("\0".join([str(FORMAT), datasets.__version__, *parts]).encode()).hexdigest()[:32]


def file_hashes(paths: Iterable[Path | str]) -> Iterator[str]:
    """Yields the sha256 of each file's content."""
    for path in paths:
        with Path(path).open("rb") as file:
            yield hashlib.file_digest(file, "sha256").hexdigest()


def cache_path(name: str) -> Path:
    """Returns the path of `name` in the cache of `datasets` (HF_DATASETS_CACHE, by default under HF_HOME)."""
    folder = Path(datasets.config.HF_DATASETS_CACHE) / "dpo"
    folder.mkdir(parents=True, exist_ok=True)
    return folder / name


@contextmanager
def quiet_progress() -> Iterator[None]:
    """Hides the progress bars of `datasets`, which flicker for short work."""
    was_enabled = datasets.utils.is_progress_bar_enabled()
    datasets.utils.disable_progress_bars()
    try:
        yield
    finally:
        if was_enabled:
            datasets.utils.enable_progress_bars()


def first_line(error: BaseException) -> str:
    """Returns the first line of an error's message, or its class where the message is empty; of its cause where the
    error only says that generating failed.
    """
    if isinstance(error, datasets.exceptions.DatasetGenerationError) and error.__cause__ is not None:
        return first_line(error.__cause__)
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def load(path: str, key: str, *args: Any, **options: Any) -> datasets.Dataset:
    """Calls `load_dataset`. Raises one UserError for all of its failures (network, hub, split, files)."""
    with one_error(path, key):
        return datasets.load_dataset(*args, **options)


@contextmanager
def one_error(path: str, key: str) -> Iterator[None]:
    """Raises one UserError for all failures of `datasets` in the block, which then logs nothing, nor does the client of
    the hub: they log some errors that they raise as well, and each of their attempts to reach the hub.
    """
    try:
        with _silent(datasets.logging), _silent(huggingface_hub.logging):
            yield
    except Exception as error:  # the hub, its http client, fsspec and arrow raise classes without a common base
        with naming(Path(datasets.config.HF_DATASETS_CACHE)):
            _raise_full(error)
        valid = PREPARE if isinstance(error, ConnectionError) else ""
        raise UserError(f"{key}.path", f"{path}: cannot be loaded: {first_line(error)}", valid) from error


def _raise_full(error: BaseException) -> None:
    """Raises the error, or the first of its causes, to which the disk is full; returns where there is none."""
    cause: BaseException | None = error
    while cause is not None:
        if full_code(cause) is not None:
            raise cause
        cause = cause.__cause__


@contextmanager
def _silent(logging: ModuleType) -> Iterator[None]:
    """Has a library of Hugging Face, by its module of logging, log critical messages alone in the block."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
