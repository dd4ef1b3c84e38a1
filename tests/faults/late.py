"""The worst moment for a checkpoint that a thread writes: the last one."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

from dpo.checkpoint import saver as saving
from dpo.checkpoint.saver import Saver


@contextmanager
def written_late() -> Iterator[None]:
    """No checkpoint is begun before this rank's training thread waits for it."""
    is_waited_for = threading.Event()
    write, ended, leave = saving.write_checkpoint, Saver._wait_for_writing, Saver.leave

    def write_late(*args: Any) -> None:
        is_waited_for.wait()
        is_waited_for.clear()
        write(*args)

    def waiting(wait: Any) -> Any:
        def and_say_so(saver: Saver, *args: Any) -> Any:
            if saver.writing:
                is_waited_for.set()
            return wait(saver, *args)

        return and_say_so

    with (
        patch.object(saving, "write_checkpoint", write_late),
        patch.object(Saver, "_wait_for_writing", waiting(ended)),
        patch.object(Saver, "leave", waiting(leave)),
    ):
        yield
