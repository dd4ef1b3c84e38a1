"""Refuses this process every connection but to loopback, and lists what it wanted to reach in the file GUARD_LOG.

Python imports this module at its start where this folder is on PYTHONPATH, in every process that a program starts.
"""

import os
import socket
from typing import Any

LOOPBACK = ("127.", "localhost", "::1", "0.0.0.0")
MESSAGE = "the guard refuses a connection to"


def _check(host: object) -> None:
    name = host.decode() if isinstance(host, bytes) else str(host)
    own = (socket.gethostname(), "None", "")
    if not (name.startswith(LOOPBACK) or name in own):
        with open(os.environ["GUARD_LOG"], "a", encoding="utf-8") as log:  # noqa: PTH123  (at a process's start)
            log.write(f"{name}\n")
        raise OSError(f"{MESSAGE} {name}")


def _guarded(real: Any) -> Any:
    def connect(self: socket.socket, address: Any) -> Any:
        if self.family in (socket.AF_INET, socket.AF_INET6):
            _check(address[0])
        return real(self, address)

    return connect


_lookup = socket.getaddrinfo


def _look_up(host: Any, *args: Any, **options: Any) -> Any:
    _check(host)
    return _lookup(host, *args, **options)


socket.socket.connect = _guarded(socket.socket.connect)  # type: ignore[method-assign]
socket.socket.connect_ex = _guarded(socket.socket.connect_ex)  # type: ignore[method-assign]
socket.getaddrinfo = _look_up
