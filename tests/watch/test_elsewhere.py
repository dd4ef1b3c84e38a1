"""A connection to the store that is reset: the run goes on; a store that is gone ends it."""

import json
import socket
import threading
from collections.abc import Iterator
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from dpo.watch import elsewhere
from dpo.watch.causes import find_cause
from dpo.watch.slots import END_FILE, Slot, look

KEY = "seen on the node of rank 0"


class Resetting:
    """A store, or a connection to it, of which so many calls of `set` lose the connection."""

    def __init__(self, faults: Iterator[bool], store: Any):
        self.faults, self.store = faults, store

    def __getattr__(self, name: str) -> Any:
        return getattr(self.store, name)

    def clone(self) -> "Resetting":
        return Resetting(self.faults, self.store)

    def set_timeout(self, timeout: timedelta) -> None:
        assert timeout < timedelta(seconds=15)

    def set(self, key: str, words: str) -> None:
        if next(self.faults):
            raise dist.DistNetworkError("Connection reset by peer")
        self.store.set(key, words)


@pytest.fixture(autouse=True)
def _soon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Slot:
    monkeypatch.setattr(elsewhere, "PUBLISH_SECONDS", 0.01)
    return Slot(tmp_path, {"rank": 0, "host": "n1", "error_file": ""}, 20.0)


def test_a_reset_connection_is_made_anew(tmp_path: Path) -> None:
    """The third publication comes after two that were lost; one rank is then blamed, which ends the thread."""
    store = dist.HashStore()
    faults = iter([False, True, True, False])

    def then_blame() -> Iterator[bool]:
        yield from faults
        elsewhere.blame(store, 3, "no sign of life")
        yield False

    elsewhere.publish(Resetting(then_blame(), store), 0, 0, tmp_path, threading.Event())  # type: ignore[arg-type]
    assert json.loads((tmp_path / END_FILE).read_text()) == [3, "no sign of life"]
    assert json.loads(store.get(KEY))[0] == 5


def test_a_store_that_stays_away_ends_the_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(elsewhere, "_LOST_SECONDS", 0.1)
    store = Resetting(iter(lambda: True, False), dist.HashStore())
    elsewhere.publish(store, 0, 0, tmp_path, threading.Event())  # type: ignore[arg-type]
    assert json.loads((tmp_path / END_FILE).read_text()) == [-1, "the torchrun of the first node has ended"]


def test_one_failure_after_a_long_wait_ends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The network was away for a minute, in which a call waited, and then reset the connection: the next one holds."""
    clock, faults = [0.0], [True, False, True, True]
    monkeypatch.setattr(elsewhere.time, "monotonic", lambda: clock[0])
    line = elsewhere._Line(Resetting(iter([False, *faults]), dist.HashStore()))  # type: ignore[arg-type]
    ends = [line.tell(KEY, "")]
    for clock[0] in (60.0, 62.0, 80.0, 95.0):
        ends.append(line.tell(KEY, ""))
    assert ends[:4] == [b""] * 4 and json.loads(ends[4])[0] == -1


class GoneAfter:
    """A store, or a connection to it, that takes so many calls of `check`."""

    def __init__(self, calls: int, store: Any):
        self.calls, self.store = calls, store

    def clone(self) -> "GoneAfter":
        return self

    def get(self, key: str) -> bytes:
        return bytes(self.store.get(key))

    def check(self, keys: list[str]) -> bool:
        self.calls -= 1
        if self.calls < 0:
            raise dist.DistNetworkError("Broken pipe")
        return bool(self.store.check(keys))


@pytest.mark.parametrize(("calls", "lost"), [(0, []), (2, [0])])
def test_the_first_node_is_lost_where_its_store_is_gone(
    calls: int, lost: list[int], _soon: Slot, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its rank was killed, and its torchrun ended before a second look at the ranks could tell that."""
    monkeypatch.setattr(elsewhere.time, "sleep", lambda _: None)
    store = dist.HashStore()
    for first, rank in ((0, _soon), (2, Slot(tmp_path, {"rank": 2, "host": "n3", "error_file": ""}, 20.0))):
        rank.stand("the forward pass", 4, 0)
        seen = [one for one in look(tmp_path) if one.rank == first]
        store.set(f"seen on the node of rank {first}", json.dumps([1, [asdict(one) for one in seen]]))
    found = elsewhere.seen_elsewhere(GoneAfter(calls, store), [0, 2])  # type: ignore[arg-type]
    cause = find_cause(found, waited=False)
    assert [rank.rank for rank in found] == lost and (cause is None) == (not lost)
    assert cause is None or "nothing is heard of its node, in the forward pass of step 4" in str(cause)


def test_a_store_that_is_gone_is_told_with_its_address() -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(listener.getsockname()[1])}
        said = elsewhere.why_unreachable(environment)
        where = f"127.0.0.1:{environment['MASTER_PORT']}"
        assert said == f"the first node: its torchrun at {where} does not answer (Connection refused)"
        listener.listen()
        assert elsewhere.why_unreachable(environment) is None
