"""Signs of life that one process gives while another looks."""

import multiprocessing
import time
from pathlib import Path

from dpo.watch.slots import IN, Slot, look

LIMIT, LOOKS = 60.0, 4_000


def _write_for_ever(folder: Path) -> None:
    slot = Slot(folder, {"rank": 0, "host": "n1", "error_file": ""}, LIMIT)
    while True:
        slot.live()
        slot.stand("the forward pass", 4, 2)


def test_no_look_finds_a_rank_lost_that_gives_signs(tmp_path: Path) -> None:
    """Whatever the moment of the look: a value that is half written would kill a healthy rank."""
    writer = multiprocessing.get_context("spawn").Process(target=_write_for_ever, args=(tmp_path,), daemon=True)
    writer.start()
    try:
        while not look(tmp_path):
            time.sleep(0.01)
        for _ in range(LOOKS):
            (seen,) = look(tmp_path)
            assert (seen.limit, seen.end, seen.process in "RSD") == (LIMIT, IN, True)
            assert seen.silence < LIMIT and seen.age < LIMIT
            assert seen.place in ("setup", "the forward pass of step 4, micro-batch 2")
    finally:
        writer.kill()
        writer.join()
