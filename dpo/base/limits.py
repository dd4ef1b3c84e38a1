"""The limit of a process on open file descriptors."""

import resource
from dataclasses import dataclass


@dataclass(frozen=True)
class Limit:
    """The limit of a process on its open file descriptors."""

    before: int
    """The soft limit before `raise_limit`."""
    now: int
    """The soft limit since: the hard limit, above which only root can raise it."""


def raise_limit(pid: int = 0) -> Limit:
    """Raises the soft limit of a process on open file descriptors to its hard limit; children inherit it. Any process
    may do so for itself and for processes of the same user.

    Args:
        pid: the id of the process; 0: this process.
    """
    soft, hard = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (hard, hard))
    return Limit(soft, hard)
