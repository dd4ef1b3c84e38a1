"""Finds the nodes of a run that do not see its folders.

Rank 0 writes a probe, an empty file, into each folder; the first rank of each other node looks for it. A folder that
does not exist yet is looked for in the nearest parent that exists on rank 0's node:

    folder               /shared/runs/new    rank 0 finds /shared/runs
    probe                /shared/runs/.probe-5c1e...
    node1, same mount    sees it
    node2, other mount   does not: `find_unseen` names node2

The name of a probe is new: no other job writes it, and no node has cached that it does not exist.
"""

import socket
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from dpo.base.errors import UserError
from dpo.base.files import nearest_existing
from dpo.base.space import describe_full
from dpo.distributed.collectives import all_gather, on_main
from dpo.distributed.world import World

HOSTS_SHOWN = 4


@dataclass(frozen=True)
class Probe:
    """Names an empty file that rank 0 wrote for a folder."""

    name: str
    levels: int
    """The file lies in the folder's parent of this level; 0: in the folder itself."""

    def path(self, folder: Path) -> Path:
        """Returns the path of the file, as this process resolves the folder."""
        return [folder.absolute(), *folder.absolute().parents][self.levels] / self.name


@dataclass(frozen=True)
class Unseen:
    """Describes a folder that some nodes do not see."""

    folder: Path
    writer: str
    """The host of rank 0, which wrote a file there."""
    hosts: tuple[str, ...]
    """The hosts that do not see it, sorted."""

    def __str__(self) -> str:
        """Returns the fact as a clause; of many hosts it names the first."""
        more = f" and {len(self.hosts) - HOSTS_SHOWN} more" if len(self.hosts) > HOSTS_SHOWN else ""
        names = f"{', '.join(self.hosts[:HOSTS_SHOWN])}{more} {'does' if len(self.hosts) == 1 else 'do'}"
        return f"{self.folder} is not shared: {names} not see a file that {self.writer} wrote there"


def find_unseen(folders: Mapping[str, Path], valid: Mapping[str, str], world: World) -> dict[str, Unseen]:
    """Returns the folders that some nodes do not see, by key; the same on every rank.

    On one node it only checks that rank 0 can write to the folders. Every rank must get here, or the rest hang.

    Args:
        folders: the folders by key, as each rank has them.
        valid: the folders that would be right, in words, by key.
        world: all ranks.

    Raises:
        UserError: with the key, on every rank: rank 0 cannot write to a folder.
    """
    probes = on_main(world, lambda: _write_probes(folders, valid))
    try:
        if world.local_size == world.size:
            return {}
        looks = world.local_rank == 0
        unseen = [key for key, probe in probes.items() if looks and not _sees(probe.path(folders[key]))]
        ranks = all_gather((socket.gethostname(), unseen))
    finally:
        if world.is_main:
            _remove_probes(folders, probes)
    hosts = {key: tuple(sorted({host for host, keys in ranks if key in keys})) for key in folders}
    return {key: Unseen(folders[key], ranks[0][0], names) for key, names in hosts.items() if names}


def _sees(file: Path) -> bool:
    """Returns whether this node sees a file; False also where it may not look, or where its mount is stale."""
    try:
        return file.exists()
    except OSError:
        return False


def _write_probes(folders: Mapping[str, Path], valid: Mapping[str, str]) -> dict[str, Probe]:
    probes: dict[str, Probe] = {}
    try:
        for key, folder in folders.items():
            probes[key] = _write_probe(key, folder, valid[key])
    except UserError:
        _remove_probes(folders, probes)
        raise
    return probes


def _write_probe(key: str, folder: Path, valid: str) -> Probe:
    levels = len(folder.absolute().parts) - len(nearest_existing(folder).parts)
    probe = Probe(f".probe-{uuid.uuid4().hex}", levels)
    try:
        probe.path(folder).touch()
    except OSError as failure:
        what = describe_full(failure, folder) or f"cannot write to {folder}: {failure.strerror}"
        raise UserError(key, what, valid) from failure
    return probe


def _remove_probes(folders: Mapping[str, Path], probes: Mapping[str, Probe]) -> None:
    for key, probe in probes.items():
        probe.path(folders[key]).unlink(missing_ok=True)
