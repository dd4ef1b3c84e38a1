"""The folder of a node's slots: in memory where there is room, else in the temporary folder; what is left of old ones.

A run removes its folder at its end. Where all of its processes were killed at once, as `scancel` or a full memory does
to a cgroup, nobody was left to do so: a later run does, once the folder is an hour old and none of its ranks is there.
Without torch.
"""

import os
import shutil
import stat
import struct
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from dpo.terminal.console import say
from dpo.watch.flight import DUMPS, Flight
from dpo.watch.slots import look

MEMORY = Path("/dev/shm")
_PREFIX = "dpo-slots-"
_BYTES_OF_A_SLOT = 4096
_OLD_SECONDS = 3600.0
_DUMPS_KEPT = 5


def make_folder(count: int) -> Path | None:
    """Makes the folder for the slots of so many ranks. Returns None where no place has room for them."""
    for place in _places():
        with suppress(OSError):
            folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=place))
            if _has_room(folder, count * _BYTES_OF_A_SLOT):
                return folder
            shutil.rmtree(folder, ignore_errors=True)
    return None


def _places() -> Iterator[Path]:
    yield MEMORY
    with suppress(OSError):  # Python finds no folder that takes files
        yield Path(tempfile.gettempdir())


def _has_room(folder: Path, num_bytes: int) -> bool:
    probe = folder / "probe"
    try:
        probe.write_bytes(bytes(num_bytes))
    except OSError:
        return False
    probe.unlink()
    return True


def remove_leftovers() -> None:
    """Removes the folders of this user's runs of which no process is left, and old files of the Flight Recorder."""
    for place in _places():
        for folder in place.glob(f"{_PREFIX}*"):
            with suppress(OSError, ValueError, TypeError, KeyError, struct.error):  # not of this version: it stays
                if _is_ours_and_old(folder) and all(rank.is_gone for rank in look(folder)):
                    Flight(folder).remove_if_empty()
                    shutil.rmtree(folder, ignore_errors=True)
    with suppress(OSError):
        _remove_old_dumps()


def _remove_old_dumps() -> None:
    """Removes the files of the Flight Recorder of this user's runs on this node but the newest: each run that a timeout
    ended leaves some.
    """
    there = Path(tempfile.gettempdir()).glob(f"{DUMPS}*")
    found = [path for path in there if _is_ours_and_old(path) and any(path.iterdir())]  # an empty one may be in use
    for folder in sorted(found, key=lambda path: path.lstat().st_mtime)[:-_DUMPS_KEPT]:
        say(
            f"removed {folder}, the collectives of a run that has ended; the newest {_DUMPS_KEPT} of this node are kept"
        )
        shutil.rmtree(folder, ignore_errors=True)


def _is_ours_and_old(folder: Path) -> bool:
    """Returns whether this user made the folder more than an hour ago: a run that is just starting has no ranks yet."""
    facts = folder.lstat()
    is_ours = stat.S_ISDIR(facts.st_mode) and facts.st_uid == os.getuid()
    return is_ours and time.time() - facts.st_mtime > _OLD_SECONDS
