"""How long ranks wait for each other where no key of the config says it: functions of the number of ranks.

Ranks that start at the same moment become ready at different times, since all of them import the same files, often
from one file server. Importing `dpo.train` opens 8,400 files per rank, and a network file system asks the server at
each of them. A server that answers 10,000 requests per second serves about one rank per second:

    ranks    leave_seconds    arrival_seconds
        8               68                908
      512              572              1,412

Connecting a group over gloo needs no such function. 32 ranks that shared two cores took 0.24 s (`python -m
tests.bench.many_ranks 32`); even if that grew with the square of their number, as the connections do, 512 would take
61 s, where the group's timeout is 1,800 s (`parallel.timeout_seconds`).
"""

_IMPORT_SECONDS_PER_RANK = 1


def arrival_seconds(size: int) -> int:
    """Returns how long a rank waits at its start for the other ranks, before any of them reads input: as long as
    torchrun waits for the other nodes (900 s), and the time of the imports.
    """
    return 900 + _IMPORT_SECONDS_PER_RANK * size


def leave_seconds(size: int) -> int:
    """Returns how long a rank that met an error before there was a process group waits for the other ranks, which meet
    the same error as soon as they have imported the program.
    """
    return 60 + _IMPORT_SECONDS_PER_RANK * size
