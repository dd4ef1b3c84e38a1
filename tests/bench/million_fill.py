"""`dpo.reference` with log-probabilities drawn at random in the place of computed ones: fills the caches of
`tests.bench.million`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dpo.distributed.program import exit_program
from dpo.pairs.pair_set import PairSet
from dpo.ref_logps import fill as reference_pass
from dpo.ref_logps.blocks import write_rows
from dpo.reference import program as reference


def keys_of(sets: Sequence[PairSet], numbers: np.ndarray) -> np.ndarray:
    """The keys (M, 2) of the completions of these numbers, in the place of their ids."""
    keys = np.concatenate([np.asarray(pairs.keys) for pairs in sets]).view("<u8").reshape(-1, 2)
    return keys[numbers]


def draw(keys: np.ndarray, total: int, folder: Path, *args: Any) -> None:
    """Rows of some tens of nats below 0, in the place of the reference's."""
    write_rows(folder, keys, -60 - 10 * np.random.default_rng(0).random(total))


def main() -> None:
    reference_pass._select, reference_pass._compute = keys_of, draw
    reference.main()


if __name__ == "__main__":
    exit_program(main)
