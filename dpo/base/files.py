"""Files and folders that are never seen half-written."""

import os
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path


def write_atomically(target: Path, content: bytes | memoryview) -> None:
    """Writes a file in one step for all who look, whoever else writes it, even across a crash of the machine."""
    target.parent.mkdir(parents=True, exist_ok=True)
    draft = target.with_name(f".{uuid.uuid4().hex}.draft")  # without the target's name, by which readers would find it
    with draft.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    draft.replace(target)


def make_folder_atomically(target: Path, fill: Callable[[Path], None]) -> None:
    """Makes a folder that is there as a whole or not at all: `fill(draft)` writes its files. One that another job made
    meanwhile stays.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    draft = target.with_name(f".{uuid.uuid4().hex}.draft")
    draft.mkdir()
    try:
        fill(draft)
        for path in (*draft.rglob("*"), draft):
            _sync(path)
        draft.rename(target)
        _sync(target.parent)
    except OSError:
        if not target.is_dir():
            raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _sync(path: Path) -> None:
    """Waits until a file, or what a folder lists, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def default_cache_dir() -> Path:
    """$DPO_CACHE, or ~/.cache/dpo."""
    return Path(os.environ.get("DPO_CACHE") or "~/.cache/dpo").expanduser()
