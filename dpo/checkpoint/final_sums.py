"""SHA256SUMS of an exported model: written, and compared with its files, by all ranks together, each reading a part.

README.md is not in it: people write there.
"""

import errno
from collections.abc import Mapping
from pathlib import Path

from dpo.base.files import write_file
from dpo.base.sums import NO_SUMS, SUMS, find_change, find_unlisted, read_sums, sha256_of, sums_text
from dpo.distributed.collectives import all_gather, on_main, together
from dpo.distributed.world import World
from dpo.hub.files import exported_files

README = "README.md"


def write_sums_together(folder: Path, world: World) -> None:
    """Writes SHA256SUMS for all files in a folder and below but README.md. Every rank must get here, or the rest hang.

    Raises RunError, on every rank, where a rank cannot read a file.
    """
    names = on_main(world, lambda: _by_size(folder))
    own = names[world.rank :: world.size]
    parts = all_gather(together(lambda: {name: sha256_of(folder / name) for name in own}))
    sums = {name: digest for part in parts for name, digest in part.items()}
    text = sums_text(dict(sorted(sums.items())))
    on_main(world, lambda: write_file(folder / SUMS, text.encode()))


def find_fault_of_export(folder: Path, world: World) -> str | None:
    """Returns which file of an exported model is not as it was written, or not listed; None where all are whole.

    Every rank must get here, or the rest hang. Raises RunError, on every rank, where a rank cannot read a file for a
    reason that does not lie in the model.
    """
    sums = on_main(world, lambda: read_sums(folder))
    if sums is None:
        return NO_SUMS
    unlisted = on_main(world, lambda: find_unlisted(sums, exported_files([path.name for path in folder.iterdir()])))
    if unlisted:
        return unlisted
    own = {name: sums[name] for name in sorted(sums)[world.rank :: world.size]}
    return next((fault for fault in all_gather(together(lambda: _find_change(folder, own))) if fault), None)


def _find_change(folder: Path, sums: Mapping[str, str]) -> str | None:
    """Returns which of some files has changed, is missing, or lies on a bad part of a disk. Raises OSError for what may
    be gone at the next try, such as a stale handle of NFS.
    """
    try:
        return find_change(folder, sums)
    except OSError as failure:
        if failure.errno != errno.EIO:
            raise
        return f"a file cannot be read: {failure}"


def _by_size(folder: Path) -> list[str]:
    """Returns the names of the files to hash, the largest first, so that ranks get about as much."""
    paths = [path for path in folder.rglob("*") if path.is_file()]
    names = {path.relative_to(folder).as_posix(): path.stat().st_size for path in paths}
    return sorted(names.keys() - {README, SUMS}, key=lambda name: (-names[name], name))
