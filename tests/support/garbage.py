"""What a fork must not collect: a process group that nothing but the collector ends."""

import datetime
import gc
import weakref
from typing import Any

import torch.distributed as dist

from dpo.pairs import token_rows


class Holder:
    """Refers to itself, and to a group."""

    def __init__(self) -> None:
        store, timeout = dist.HashStore(), datetime.timedelta(minutes=1)
        self.itself, self.group = self, dist.ProcessGroupGloo(store, 0, 1, timeout)


def leave_group() -> "weakref.ref[Holder]":
    """Leaves a gloo group of one rank as garbage, and a reference that tells whether it is still there. Its destructor
    waits for threads that a forked process does not have.
    """
    return weakref.ref(Holder())


def collect_and_tokenize(*args: Any, **options: Any) -> dict[str, Any]:
    """`tokenize_row`, before which all garbage is collected."""
    gc.collect()
    return TOKENIZE_ROW(*args, **options)


TOKENIZE_ROW = token_rows.tokenize_row
