"""Tells of a file system that does not answer, as NFS where its server is gone: a write or a read then never returns,
and raises nothing.
"""

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

STALL_SECONDS = 60.0


@contextmanager
def telling_stalls(path: Path, seconds: float = STALL_SECONDS) -> Iterator[None]:
    """Warns where a with-block that writes or reads `path` takes over `seconds`, and again each time that it has taken
    twice as long. A thread does, since this one waits.
    """
    has_returned = threading.Event()

    def watch() -> None:
        passed = 0.0
        while not has_returned.wait(max(passed, seconds)):
            passed += max(passed, seconds)
            line = f"{path} has not answered for {passed:g} s: is its file system there?"
            logging.getLogger("dpo").warning(f"WARNING: {line}")

    threading.Thread(target=watch, name=f"watch over {path}", daemon=True).start()
    try:
        yield
    finally:
        has_returned.set()
