"""Facts of processes of this machine, as /proc shows them.

Source: https://man7.org/linux/man-pages/man5/proc_pid_stat.5.html
"""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Process:
    """Some fields of /proc/PID/stat."""

    state: str
    """A letter: R runs, S and D wait, T is stopped, Z and X have ended."""
    parent: int
    """The id of the process that started it."""
    started: int
    """When it was started, in clock ticks (`os.sysconf("SC_CLK_TCK")` per second) since the machine was."""


def find_process(pid: int) -> Process | None:
    """Returns the process with an id; None where /proc shows none. Raises OSError where /proc cannot be read."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return None
    fields = stat.rpartition(")")[2].split()  # the name of the process, in brackets, may hold anything
    return Process(fields[0], int(fields[1]), int(fields[19]))


def own_pid_namespace() -> str:
    """Returns the pid namespace of this process, outside of which its id means nothing. Raises OSError."""
    return str(Path("/proc/self/ns/pid").readlink())
