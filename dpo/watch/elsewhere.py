"""What is seen of the ranks of other nodes: each node publishes its own in the store of the run, every few seconds.

The live rank with the lowest number publishes, over a connection of its own: the program's may wait in the store, and
would keep the thread waiting with it. A set of a few KiB per node is little for a store, also of 64 nodes.

A rank that is to blame cannot know it where it lives and does not come on: the one that has waited in vain for it tells
so through the store (`blame`), and the watcher of its node ends it.
"""

import json
import socket
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

from dpo.base.files import write_atomically
from dpo.watch.slots import END_FILE, IN, NOT_HEARD, Seen, look, still_in

PUBLISH_SECONDS = 2.0
_PATIENCE_SECONDS = 8.0
_FRESH_SECONDS = 5.0
_CONNECT_SECONDS = 5
_PROBE_SECONDS = 2.0
_LOST_SECONDS = 15.0
"""Seconds of failures after which the store counts as gone: a connection may be reset once, and the next one holds."""


def publish(store: dist.Store, rank: int, first: int, folder: Path, stopped: threading.Event) -> None:
    """Publishes what is seen of the ranks of this node until `stopped`; tells the watcher where the ranks must end.

    Args:
        store: of the run.
        rank: of this process.
        first: the first rank of the node.
        folder: the files of the node's ranks.
        stopped: ends the thread.
    """
    line, number = _Line(store), 0
    while not stopped.wait(PUBLISH_SECONDS if number else 0):
        seen, number = look(folder), number + 1
        if not _is_speaker(rank, seen):
            continue
        end = line.tell(_key(first), json.dumps([number, [asdict(one) for one in seen]]))
        if end and not stopped.is_set():
            write_atomically(folder / END_FILE, end)
            return


class _Line:
    """A connection to the store, made anew where it is lost."""

    def __init__(self, store: dist.Store):
        self.store, self.is_own = store, False
        self.open: dist.Store | None = None
        self.failing_since: float | None = None
        """When the first of the failures came; None while there are none. A call may wait for long before it fails."""

    def tell(self, key: str, words: str) -> bytes:
        """Sets a key. Returns the rank that is to blame and why, as in END_FILE; empty: none is."""
        try:
            own = self.open = self.open or self._connect()
            own.set(key, words)
            end = own.get(_BLAMED) if own.check([_BLAMED]) else b""
        except dist.DistError:
            self.open, now = None, time.monotonic()
            self.failing_since = now if self.failing_since is None else self.failing_since
            is_gone = now - self.failing_since >= _LOST_SECONDS
            return json.dumps([-1, "the torchrun of the first node has ended"]).encode() if is_gone else b""
        self.failing_since = None
        return end

    def _connect(self) -> dist.Store:
        """Returns a connection. Those after the first are made with a timeout of seconds, which a clone inherits: the
        program's may be hours, and must not be changed.
        """
        new: dist.Store = self.store.clone()  # type: ignore[attr-defined]  # torch's stub lacks it
        if not self.is_own:
            new.set_timeout(timedelta(seconds=_CONNECT_SECONDS))
            self.store, self.is_own = new, True
        return new


def blame(store: dist.Store, rank: int, words: str) -> None:
    """Tells the watcher of another node that a rank there is to blame, and why."""
    with suppress(dist.DistError):
        store.set(_BLAMED, json.dumps([rank, words]))


_BLAMED = "the rank to blame"


def _is_speaker(rank: int, seen: Sequence[Seen]) -> bool:
    alive = [one.rank for one in still_in(seen) if one.silence < _FRESH_SECONDS]
    return alive[:1] == [rank]


def _key(first: int) -> str:
    return f"seen on the node of rank {first}"


def seen_elsewhere(store: dist.Store, nodes: Sequence[int]) -> list[Seen]:
    """Returns what is seen of the ranks of other nodes, as they have published it; nothing where the store does not
    answer within seconds. The ranks of a node that does not publish any more count as silent.

    Args:
        store: of the run.
        nodes: the first rank of each.
    """
    found: list[Seen] = []
    reader = threading.Thread(target=_read, args=(store, nodes, found), daemon=True)
    if nodes:
        reader.start()
        reader.join(_PATIENCE_SECONDS)
    return found[:]


def _read(store: dist.Store, nodes: Sequence[int], found: list[Seen]) -> None:
    """Adds the ranks to `found`; where nothing has happened to any of them yet, only once all nodes must have published
    anew. Those of the first node count as silent where the store is gone by then.
    """
    before: dict[int, tuple[int, list[Seen]]] = {}
    try:
        own = store.clone()  # type: ignore[attr-defined]  # torch's stub lacks it
        before = _published(own, nodes)
        if any(map(_tells, _ranks(before))):
            found += _ranks(before)
            return
        time.sleep(PUBLISH_SECONDS + 1)
        after = _published(own, nodes)
    except dist.DistError:  # meanwhile the torchrun of the first node has ended
        found += [_unheard(rank) for rank in before[0][1]] if 0 in before else []
        return
    for node, (number, seen) in after.items():
        is_quiet = node in before and before[node][0] == number
        found += [_unheard(rank) for rank in seen] if is_quiet else seen


def why_unreachable(environment: Mapping[str, str]) -> str | None:
    """Returns that the store of the run is gone, in words; None where it answers. The torchrun of the first node serves
    it, at the address that the environment of every rank names.
    """
    address = environment["MASTER_ADDR"], int(environment["MASTER_PORT"])
    try:
        socket.create_connection(address, _PROBE_SECONDS).close()
    except OSError as failure:
        where, why = ":".join(map(str, address)), failure.strerror or failure
        return f"the first node: its torchrun at {where} does not answer ({why})"
    return None


def _unheard(rank: Seen) -> Seen:
    return replace(rank, silence=rank.silence + PUBLISH_SECONDS + 1, process=NOT_HEARD)


def _published(store: dist.Store, nodes: Sequence[int]) -> dict[int, tuple[int, list[Seen]]]:
    """Returns the number of the newest publication of each node, and its ranks."""
    keys = {node: _key(node) for node in nodes if store.check([_key(node)])}
    read = {node: json.loads(store.get(key)) for node, key in keys.items()}
    return {node: (number, [Seen(**facts) for facts in seen]) for node, (number, seen) in read.items()}


def _ranks(published: Mapping[int, tuple[int, list[Seen]]]) -> list[Seen]:
    return [rank for _, seen in published.values() for rank in seen]


def _tells(rank: Seen) -> bool:
    return rank.end != IN or rank.is_gone or rank.silence > _FRESH_SECONDS
