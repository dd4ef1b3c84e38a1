"""The values of single pairs at each evaluation, `RUN/eval/step-000100.npz`; without torch.

Each array has a value per pair of the evaluation set, (P,), in the order of the set: the pairs of `data.eval` in the
order of its files, then the held-out pairs of `data.train`. At every step, and on any number of ranks, the order is the
same. Read the file with `np.load(path)`; an array that the loss does not have is absent.

    rewards_chosen, rewards_rejected      float32: the rewards, of which metrics.jsonl has the means; absent for sft
    logratios_chosen, logratios_rejected  float32: log pi - log ref, nats, summed over the answer's tokens; absent
                                          without a reference
    logps_chosen, logps_rejected          float32: log pi, nats, summed likewise; sft has no losers
    tokens_chosen, tokens_rejected        int32: the tokens of the answer, EOS included
    source                                int32: the source of the pair, an index into `sources`
    sources                               text: key and path of each source

A pair takes at most BYTES_PER_PAIR bytes: 36 MB per evaluation of a million pairs.
"""

import io
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from dpo.base.files import write_atomically
from dpo.run_folder.files import EVALUATIONS

BYTES_PER_PAIR = 36
"""Nine arrays of four bytes each."""


def evaluation_path(run_dir: Path, step: int) -> Path:
    """Returns the file of the evaluation after `step` steps."""
    return run_dir / EVALUATIONS / f"step-{step:06d}.npz"


def evaluation_steps(run_dir: Path) -> list[int]:
    """Returns the steps after which a run folder has the file of an evaluation, rising."""
    names = [path.stem.removeprefix("step-") for path in (run_dir / EVALUATIONS).glob("step-*.npz")]
    return sorted(int(name) for name in names if name.isdigit())


def write_evaluation(run_dir: Path, step: int, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes the file of an evaluation, atomically. Raises OSError.

    Args:
        run_dir: the run folder.
        step: updates made before the evaluation.
        arrays: the arrays by name; floating-point numbers are written as float32.
    """
    content = io.BytesIO()
    narrow = {name: array.astype(np.float32) if array.dtype.kind == "f" else array for name, array in arrays.items()}
    np.savez(content, allow_pickle=False, **narrow)
    write_atomically(evaluation_path(run_dir, step), content.getbuffer())


def read_evaluation(run_dir: Path, step: int) -> dict[str, np.ndarray]:
    """Returns the arrays of an evaluation by name. Raises OSError or ValueError where the file cannot be read."""
    path = evaluation_path(run_dir, step)
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as content:
            return {name: content[name] for name in content.files}
    except (zipfile.BadZipFile, EOFError, TypeError) as failure:  # TypeError: a file of a single array
        raise ValueError(f"{path} is damaged: {failure}") from failure


def drop_evaluations_after(run_dir: Path, step: int) -> None:
    """Removes the files of evaluations after more than `step` steps."""
    for later in evaluation_steps(run_dir):
        if later > step:
            evaluation_path(run_dir, later).unlink()
