"""The cache of rows: its folder, the names of its files by content; calls of `datasets` that fail in one line.

`datasets` is imported where it is called, which takes a third of a second: a start whose rows are in the cache reads
them without it (`arrow_files.py`), and finds their folder without it.
"""

import functools
import hashlib
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import huggingface_hub

from dpo.base.errors import UserError
from dpo.base.files import naming
from dpo.base.full_disk import full_code
from dpo.command.exits import late_imports
from dpo.hub.snapshots import PREPARE

if TYPE_CHECKING:
    import datasets

FORMAT = 4
"""The version of the cached rows and token rows of a source. A change of their contents or meaning must raise it."""


def digest(parts: Iterable[str]) -> str:
    """Returns a hash of the parts, of FORMAT and of the version of `datasets`: 32 hex digits, as a fingerprint of
    `datasets` has.
    """
    return hashlib.sha256("\0".join([str(FORMAT), _version(), *parts]).encode()).hexdigest()[:32]


@functools.cache
def _version() -> str:
    return version("datasets")


def file_hashes(paths: Iterable[Path | str]) -> Iterator[str]:
    """Yields the sha256 of each file's content."""
    for path in paths:
        with Path(path).open("rb") as file:
            yield hashlib.file_digest(file, "sha256").hexdigest()


def cache_path(name: str) -> Path:
    """Returns the path of `name` in the cache of `datasets` (HF_DATASETS_CACHE, by default under HF_HOME)."""
    folder = datasets_cache() / "dpo"
    folder.mkdir(parents=True, exist_ok=True)
    return folder / name


def datasets_cache() -> Path:
    """Returns the folder in which `datasets` keeps rows, by the environment, as `datasets.config` finds it."""
    cache = os.environ.get("XDG_CACHE_HOME", "~/.cache")
    home = os.path.expanduser(os.environ.get("HF_HOME", f"{cache}/huggingface"))  # noqa: PTH111  # that one may raise
    return Path(os.environ.get("HF_DATASETS_CACHE", f"{home}/datasets"))


def import_datasets() -> None:
    """Imports `datasets`, without its progress bars where those of the hub are hidden; holds Ctrl-C back until then."""
    with late_imports():
        import datasets
    if huggingface_hub.utils.are_progress_bars_disabled():  # type: ignore[attr-defined]  # documented
        datasets.disable_progress_bars()


@contextmanager
def quiet_progress() -> Iterator[None]:
    """Hides the progress bars of `datasets`, which flicker for short work."""
    import datasets

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
    import datasets

    if isinstance(error, datasets.exceptions.DatasetGenerationError) and error.__cause__ is not None:
        return first_line(error.__cause__)
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def load(path: str, key: str, *args: Any, **options: Any) -> "datasets.Dataset":
    """Calls `load_dataset`. Raises one UserError for all of its failures (network, hub, split, files)."""
    import datasets

    with one_error(path, key):
        return datasets.load_dataset(*args, **options)


@contextmanager
def one_error(path: str, key: str) -> Iterator[None]:
    """Raises one UserError for all failures of `datasets` in the block, which then logs nothing, nor does the client of
    the hub: they log some errors that they raise as well, and each of their attempts to reach the hub.
    """
    import datasets

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
