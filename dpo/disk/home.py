"""Tells that a cache of the run lies in a small home folder, as clusters have, before it is full.

HF_HOME     ~/.cache/huggingface    models and data of the hub, tokenized rows
DPO_CACHE   ~/.cache/dpo            reference log-probabilities, compiled kernels
"""

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import constants

from dpo.base.files import default_cache_dir, nearest_existing
from dpo.base.space import find_shortage
from dpo.base.units import shown_bytes

SMALL, LARGE = 100 * 2**30, 10 * 2**30
"""Bytes: a file system is small below SMALL; a model is large from LARGE on, in bfloat16: some 5 billion parameters."""

KERNELS = 2**30
"""Bytes that are set aside for compiled kernels and reference log-probabilities: 1 GiB holds 40 million rows."""


@dataclass(frozen=True)
class Cache:
    """Names a cache of the run and the bytes that it may still need."""

    folder: Path
    needed: int


def caches_of_run() -> list[Cache]:
    """Returns the caches of a run, in the default folders or those of HF_HOME and DPO_CACHE, with the bytes that it may
    still write there: its models are in the cache of the hub already.
    """
    return [Cache(Path(constants.HF_HOME), 0), Cache(default_cache_dir(), KERNELS)]


def describe_small_home(caches: Sequence[Cache], num_parameters: int) -> str | None:
    """Returns a line about the caches that lie in a home folder, or on its file system, with too little room; None
    where there is none. A file system has too little room where a cache may need more than it has, quotas included,
    and where it is small and the model is large.
    """
    try:
        home = Path.home()
    except RuntimeError:  # a container may run as a user without a home folder
        return None
    is_large = 2 * num_parameters >= LARGE
    small = [cache.folder for cache in caches if _lies_at(cache.folder, home) and _is_short(cache, is_large)]
    if not small:
        return None
    usage = shutil.disk_usage(nearest_existing(small[0]))
    room = f"{shown_bytes(usage.free)} of {shown_bytes(usage.total)} are free there by its file system"
    folders = " and ".join(map(str, small))
    return f"home folder: {folders}: {room}, and a quota may allow less; HF_HOME and DPO_CACHE name other folders"


def _lies_at(folder: Path, home: Path) -> bool:
    """Returns whether a folder lies in the home folder or on its file system."""
    present = nearest_existing(folder)
    return present.resolve().is_relative_to(home.resolve()) or present.stat().st_dev == _device_of(home)


def _device_of(home: Path) -> int:
    return nearest_existing(home).stat().st_dev


def _is_short(cache: Cache, is_large: bool) -> bool:
    present = nearest_existing(cache.folder)
    if not os.access(present, os.W_OK):
        return False  # it is complete, or the run fails with a message of its own
    total = shutil.disk_usage(present).total
    return (is_large and total < SMALL) or find_shortage(cache.folder, cache.needed) is not None
