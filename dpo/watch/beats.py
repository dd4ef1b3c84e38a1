"""Signs of life of this rank, and its place in the run, for the other ranks and for the watcher of its node.

    thread    every half second: a sign of life; where the rank stands still, what its main thread does
    program   `stand("the forward pass", step)`: a new place
    thread    on several nodes, every 2 s: what is seen of the ranks of this node, into the store of the run

The files of a node are in memory (/dev/shm) where that is possible, so that a disk that stalls does not stop a rank; a
node without room for them runs without. A run of one rank has none of this: nothing waits for it.
"""

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import torch.distributed as dist

from dpo.base.errors import Preempted, RunError, UserError, one_line
from dpo.command.blame import PLACE_FILE
from dpo.command.exits import line_of
from dpo.terminal.console import warn
from dpo.watch.causes import Cause, find_cause
from dpo.watch.elsewhere import blame, publish, seen_elsewhere, why_unreachable
from dpo.watch.failures import has_lost_rank, is_timeout, met_alone, name_lost
from dpo.watch.flight import Flight
from dpo.watch.folders import make_folder, remove_leftovers
from dpo.watch.slots import DONE, FAILED, LOST, TOGETHER, Slot, look, still_in
from dpo.watch.watcher import clear, record, unless_stalled, write_places

_BEAT_SECONDS = 0.5
_STILL_SECONDS = 3.0
"""How long a rank stands still before its main thread is looked at, and between looks: no step is disturbed that goes
on.
"""
_LOOKS, _LOOK_SECONDS = 5, 0.1
_ROOT = Path(__file__).parents[2]
_NOWHERE = Path("/nowhere/dpo-slots")


class _Here:
    """The slot of this process while it is a rank of several."""

    slot: Slot | None = None
    step = 0


_HERE = _Here()


def stand(phase: str, step: int | None = None, micro_batch: int = 0) -> None:
    """Tells where this rank stands from now on. Takes a microsecond.

    Every rank must get here, in the main thread, as often as the others and in the same order: the rank that has come
    to fewer places than the others is the one that they wait for.

    Args:
        phase: in words that follow `in`, such as `the forward pass`; up to 31 characters.
        step: the step; None: that of the place before.
        micro_batch: its number, from 1; 0: none.
    """
    _HERE.step = _HERE.step if step is None else step
    if _HERE.slot is not None:
        _HERE.slot.stand(phase, _HERE.step, micro_batch)


def set_limit(seconds: float) -> None:
    """Sets after how many seconds without a sign of life this rank counts as lost."""
    if _HERE.slot is not None:
        _HERE.slot.set_limit(seconds)


@dataclass(frozen=True)
class Node:
    """A rank among those of its node."""

    rank: int
    size: int
    first: int
    """The first rank of the node."""
    local_size: int
    store: dist.Store
    folder: Path
    """The files of the node's ranks."""

    @property
    def is_first(self) -> bool:
        """Returns whether this is the first rank of its node."""
        return self.rank == self.first

    @property
    def others(self) -> list[int]:
        """Returns the first ranks of the other nodes."""
        return [first for first in range(0, self.size, self.local_size) if first != self.first]


@contextmanager
def beating(environment: dict[str, int], store: dist.Store, limit: float) -> Iterator[Path | None]:
    """Gives signs of life in a with-block, and says how this rank leaves it. Yields the folder of the node's files;
    None in a run of one rank, and where there is no such folder.

    A failure that comes of another rank's gets a note which rank that is, and why (`failures.name_lost`).

    Args:
        environment: RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE.
        store: of the run; every rank of the node must get here.
        limit: seconds without a sign of life after which this rank counts as lost.
    """
    if environment["WORLD_SIZE"] == 1:
        yield None
        return
    node = _join(environment, store)
    slot = _open_slot(node, limit) if node else None
    if node is None or slot is None:
        yield None
        return
    _HERE.slot, _HERE.step, stopped = slot, 0, threading.Event()
    watcher = _start_watcher(node, stopped) if node.is_first else None
    threading.Thread(target=_beat, args=(slot, threading.get_ident(), stopped), daemon=True).start()
    if node.others:
        threading.Thread(
            target=publish, args=(node.store, node.rank, node.first, node.folder, stopped), daemon=True
        ).start()
    try:
        yield node.folder
        slot.leave(DONE)
    except (UserError, RunError, Preempted):
        slot.leave(TOGETHER)
        raise
    except Exception as failure:
        slot.leave(*_last_words(node, failure))
        raise
    except BaseException as failure:
        slot.leave(FAILED, f"left by {type(failure).__name__}")
        raise
    finally:
        _HERE.slot = None
        stopped.set()
        if node.is_first:
            _end_watcher(watcher, node.folder)


def _error_file() -> str:
    return os.environ.get("TORCHELASTIC_ERROR_FILE", "")


def _join(environment: dict[str, int], store: dist.Store) -> Node | None:
    """Returns this rank's place on its node; its first rank makes the folder and tells the others. None where this rank
    has no such folder: there is no room for it, or the ranks of the node do not see the same one.
    """
    rank, local_size = environment["RANK"], environment["LOCAL_WORLD_SIZE"]
    first = rank - environment["LOCAL_RANK"]
    key = f"slots of the node of rank {first}"
    if rank == first:
        remove_leftovers()
        store.set(key, str(make_folder(local_size) or _NOWHERE))
    folder = Path(store.get(key).decode())
    if folder.is_dir():
        return Node(rank, environment["WORLD_SIZE"], first, local_size, store, folder)
    what = f"{folder} is not there" if folder != _NOWHERE else "neither /dev/shm nor the temporary folder has room"
    if rank == first or folder != _NOWHERE:
        _warn_unwatched(rank, rank == first, what)
    return None


def _open_slot(node: Node, limit: float) -> Slot | None:
    """Returns the slot of this rank. None where it cannot be made: another program has taken the room meanwhile, or the
    first rank of the node has ended just now, and its watcher has removed the folder.
    """
    header = {"rank": node.rank, "host": socket.gethostname(), "error_file": _error_file()}
    if _error_file():
        with suppress(OSError):  # a full disk of torchrun's logs
            Path(_error_file()).with_name(PLACE_FILE).touch()
    try:
        return Slot(node.folder, header, limit)
    except OSError as failure:
        _warn_unwatched(node.rank, node.is_first, line_of(failure))
        return None


def _warn_unwatched(rank: int, is_first: bool, why: str) -> None:
    """Warns that a rank is not watched; the first one of a node, which starts the watcher, that none of the node is."""
    node = f"all ranks of the node of rank {rank} run without its watcher"
    who = node if is_first else f"rank {rank} runs without the watcher of its node"
    warn(f"{who} ({why}): where one stops, that is found late")


def _beat(slot: Slot, main: int, stopped: threading.Event) -> None:
    """Gives signs of life until `stopped`; where the rank stands still, tells what its main thread does."""
    count, since = 0, time.monotonic()
    while not stopped.wait(_BEAT_SECONDS):
        slot.live()
        if slot.count != count:
            count, since = slot.count, time.monotonic()
        elif time.monotonic() - since >= _STILL_SECONDS:
            slot.show(_doing_of(main))
            since = time.monotonic()


def _doing_of(thread: int) -> str:
    """Returns what a thread does, in words. Keeps none of its frames: they hold the tensors of its local variables."""
    frame = sys._current_frames().get(thread)
    return frame_in_words(frame) if frame else ""


def frame_in_words(frame: FrameType) -> str:
    """Returns what a thread does: the innermost frame, and the innermost one of this package that called it."""
    own, caller = _place_of(frame), frame
    while caller.f_back and not caller.f_code.co_filename.startswith(str(_ROOT / "dpo")):
        caller = caller.f_back
    return own if caller is frame else f"{own}, called from {_place_of(caller)}"


def _place_of(frame: FrameType) -> str:
    path = "/".join(Path(frame.f_code.co_filename).parts[-3:])
    return f"{path}:{frame.f_lineno} in {frame.f_code.co_name}"


# --- the end ----------------------------------------------------------------------------------------------------------


def _last_words(node: Node, failure: Exception) -> tuple[int, str]:
    """Returns how this rank leaves the run after a failure, and in which words; names the rank that it lost."""
    if not has_lost_rank(failure):
        return FAILED, met_alone(failure) or one_line(f"{type(failure).__name__}: {line_of(failure)}")
    cause = _cause_of(node, failure)
    if cause is None:
        if node.others and (why := why_unreachable(os.environ)):
            name_lost(failure, f"lost {why}")
        return LOST, ""
    found = Flight(node.folder).found
    name_lost(failure, f"lost {cause}{found}")
    return LOST, f"{cause.rank.rank} {cause.words}"


def _cause_of(node: Node, failure: Exception) -> Cause | None:
    """Returns the rank to blame for the loss of another rank; records its failure where it cannot do so itself."""
    waited = is_timeout(failure)
    for _ in range(_LOOKS):
        here = look(node.folder)
        if cause := find_cause(here, waited):
            break
        time.sleep(_LOOK_SECONDS)  # a dying process closes its connections before it is seen to be gone
    if cause is None and node.others and why_unreachable(os.environ) is None:
        cause = find_cause([*here, *seen_elsewhere(node.store, node.others)], waited)
    if cause is None or cause.rank.rank == node.rank:
        return None
    if cause.is_silent and cause.rank in here:
        unless_stalled(lambda: record(cause, Flight(node.folder).found))
    elif cause.is_silent:
        blame(node.store, cause.rank.rank, cause.words)
    return cause


# --- the watcher ------------------------------------------------------------------------------------------------------


def _start_watcher(node: Node, stopped: threading.Event) -> subprocess.Popen[bytes] | None:
    """Starts the watcher of this node, in a session of its own and without descriptors of this process: one that held
    its sockets would keep the other ranks from seeing that this rank is gone. None where no process can be started.
    """
    code = "import sys; sys.path.insert(0, sys.argv.pop(1)); from dpo.watch.watcher import main; main()"
    words = [sys.executable, "-I", "-S", "-c", code, str(_ROOT), str(node.folder)]
    nothing = subprocess.DEVNULL
    try:
        process = subprocess.Popen(words, stdin=nothing, stdout=nothing, stderr=nothing, start_new_session=True)
    except OSError as failure:
        _warn_unwatched(node.rank, node.is_first, line_of(failure))
        return None

    def wait() -> None:
        code = process.wait()
        if not stopped.is_set():
            warn(f"the watcher of this node's ranks has ended with exit code {code}: a rank that stops is found late")

    threading.Thread(target=wait, daemon=True).start()
    return process


def _end_watcher(process: subprocess.Popen[bytes] | None, folder: Path) -> None:
    """Ends the watcher at once where no rank of the node is left, which it would find out itself a moment later."""
    with suppress(FileNotFoundError):  # it has found out, and removed the files
        if not still_in(seen := look(folder)):
            unless_stalled(lambda: write_places(seen))
            if process is not None:
                process.kill()
            clear(folder)
