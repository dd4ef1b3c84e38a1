"""Where each rank of a node stands, and when it last gave a sign of life: a small file per rank, mapped into memory.

A rank writes its own file, without a system call. The others of its node, and the watcher of the node, read it:

    header     JSON, written once: process id and the namespace it counts in, rank, host, error file of torchrun
    life       the time of the last sign of life, and after how many seconds without one the rank counts as lost
    place      number of places so far, step, micro-batch, since when, phase
    end        how the rank left the run (`IN` while it is there), when, and in which words
    frame      what the main thread does, where it has stood in its place for a while

All times are of the monotonic clock, which the processes of a host share. Fields are written without a lock. Each is
packed first and then copied, so that who reads meanwhile finds the old value or the new: `Struct.pack_into` would fill
the memory with zeros before it writes, and a rank whose last sign of life is 0.0 looks lost. Of a place that is being
written some fields may be of the place before, which matters to nobody, since a rank that is looked for stands still.
Without torch.
"""

import json
import mmap
import os
import struct
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpo.base.files import write_file
from dpo.base.processes import find_process, own_pid_namespace

IN, DONE, TOGETHER, FAILED, LOST = range(5)
"""How a rank has left the run: not yet; its work is done; with a failure that all ranks raise; with a failure of its
own; because it lost another rank."""

ELSEWHERE = "-"
"""The state of a process of another pid namespace, such as that of another container: its id means nothing here."""
NOT_HEARD = "?"
"""The state of a process of which nothing is heard any more, since its node does not publish any."""
END_FILE = "end"
"""The name of a file beside the slots, once the ranks must end for what happened on another node: a JSON list of the
rank that is to blame (-1: none of this run) and why."""

_TIME, _PLACE, _END, _WHY = struct.Struct("=d"), struct.Struct("=qqqd32s"), struct.Struct("=q"), struct.Struct("=d600s")
_LIFE_AT, _LIMIT_AT, _PLACE_AT, _END_AT, _WHY_AT, _FRAME_AT = 2048, 2056, 2080, 2176, 2184, 2816
_SIZE, _FRAME = 4096, 600


@dataclass(frozen=True)
class Seen:
    """What is seen of a rank at one moment."""

    rank: int
    host: str
    pid: int
    started: str
    """By which the process is told from a later one with the same id."""
    namespace: str
    """In which the process id counts."""
    error_file: str
    """The file from which torchrun takes the failure of the rank; empty: none."""
    silence: float
    """Seconds since its last sign of life."""
    limit: float
    """Seconds of silence after which the rank counts as lost."""
    count: int
    """Number of places that the rank has come to. All ranks come to the same places in the same order."""
    step: int
    """0: before the first step."""
    micro_batch: int
    """0: none."""
    age: float
    """Seconds since it came to its place."""
    phase: str
    end: int
    ended: float
    """Seconds since it left the run."""
    words: str
    """Why it left the run."""
    frame: str
    """What its main thread does, where it has stood in its place for a while."""
    process: str
    """The state of its process as Linux has it (R, S, D, T, t, Z), or ELSEWHERE, or NOT_HEARD; empty: there is no such
    process any more.
    """

    @property
    def is_gone(self) -> bool:
        """Returns whether its process has ended."""
        return self.process in ("", "Z", "X")

    @property
    def place(self) -> str:
        """Returns the place in words: `the forward pass of step 4, micro-batch 2`."""
        step = f" of step {self.step}" if self.step else ""
        return f"{self.phase}{step}{f', micro-batch {self.micro_batch}' if self.micro_batch else ''}"


class Slot:
    """The file of one rank, which the rank itself writes.

    Args:
        folder: of the node's files.
        header: rank, host and error file of the rank; of this process.
        limit: seconds without a sign of life after which the rank counts as lost.
    """

    def __init__(self, folder: Path, header: Mapping[str, Any], limit: float):
        own = {"pid": os.getpid(), "started": _started(os.getpid()), "namespace": own_namespace()}
        text = json.dumps(own | dict(header)).encode()
        draft = folder / f".{header['rank']}"
        write_file(draft, text.ljust(_LIFE_AT) + bytes(_SIZE - _LIFE_AT))  # all of it: no page may be missing later
        with draft.open("r+b") as file:
            self.memory = mmap.mmap(file.fileno(), _SIZE)
        self.count = 0
        self.live()
        self.set_limit(limit)
        self.stand("setup", 0, 0)
        draft.rename(folder / f"rank-{header['rank']}")

    def live(self) -> None:
        """Gives a sign of life."""
        self._write(_LIFE_AT, _TIME.pack(time.monotonic()))

    def set_limit(self, seconds: float) -> None:
        """Writes after how many seconds without a sign of life the rank counts as lost."""
        self._write(_LIMIT_AT, _TIME.pack(seconds))

    def stand(self, phase: str, step: int, micro_batch: int) -> None:
        """Writes a new place."""
        self.count += 1
        self.memory[_FRAME_AT] = 0
        self._write(_PLACE_AT, _PLACE.pack(self.count, step, micro_batch, time.monotonic(), phase.encode()))

    def leave(self, end: int, words: str = "") -> None:
        """Writes how the rank leaves the run; the first word counts."""
        if _END.unpack_from(self.memory, _END_AT)[0] == IN:
            self._write(_WHY_AT, _why(words))
            self._write(_END_AT, _END.pack(end))  # last: whoever sees it finds the words

    def show(self, frame: str) -> None:
        """Writes what the main thread does."""
        text = frame.encode()[:_FRAME].ljust(_FRAME, b"\0")
        self._write(_FRAME_AT, text)

    def _write(self, at: int, data: bytes) -> None:
        self.memory[at : at + len(data)] = data


def _why(words: str) -> bytes:
    return _WHY.pack(time.monotonic(), words.encode()[:600])


def condemn(folder: Path, rank: int, words: str) -> None:
    """Writes, from another process, that a rank has failed and why: before it is killed, so that no rank that loses it
    takes it for one that vanished.
    """
    with (folder / f"rank-{rank}").open("r+b", buffering=0) as file:
        for at, data in ((_WHY_AT, _why(words)), (_END_AT, _END.pack(FAILED))):
            file.seek(at)
            file.write(data)


def look(folder: Path) -> list[Seen]:
    """Returns what is seen of the ranks of a node now, by rank; nothing of a rank whose file is not there yet."""
    found = []
    with suppress(FileNotFoundError):  # the run has just ended, and the folder is removed
        for path in folder.glob("rank-*"):
            found.append(_seen(path.read_bytes()))  # what was found before stays
    return sorted(found, key=lambda seen: seen.rank)


def _seen(data: bytes) -> Seen:
    header = json.loads(data[:_LIFE_AT])
    ((life,), (limit,)) = (_TIME.unpack_from(data, at) for at in (_LIFE_AT, _LIMIT_AT))
    count, step, micro_batch, since, phase = _PLACE.unpack_from(data, _PLACE_AT)
    (end,), (ended, words) = _END.unpack_from(data, _END_AT), _WHY.unpack_from(data, _WHY_AT)
    now = time.monotonic()
    return Seen(
        **header,
        silence=now - life,
        limit=limit,
        count=count,
        step=step,
        micro_batch=micro_batch,
        age=now - since,
        phase=_text(phase),
        end=end,
        ended=now - ended,
        words=_text(words),
        frame=_text(data[_FRAME_AT : _FRAME_AT + _FRAME]),
        process=_state(header["pid"], header["started"], header["namespace"]),
    )


def _state(pid: int, started: str, namespace: str) -> str:
    if namespace != own_namespace():
        return ELSEWHERE
    found = find_process(pid)
    return found.state if found and str(found.started) == started else ""


def _started(pid: int) -> str:
    found = find_process(pid)
    return str(found.started) if found else ""


def _text(data: bytes) -> str:
    return data.partition(b"\0")[0].decode(errors="replace")


def own_namespace() -> str:
    """Returns the pid namespace of this process; empty where /proc does not tell."""
    try:
        return own_pid_namespace()
    except OSError:
        return ""


def still_in(seen: Iterable[Seen]) -> list[Seen]:
    """Returns the ranks that have not left the run, and whose process is there."""
    return [rank for rank in seen if rank.end == IN and not rank.is_gone]
