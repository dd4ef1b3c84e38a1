"""The state of a run in a checkpoint, apart from its tensors: state.json."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from dpo.base.errors import UserError
from dpo.checkpoint.folders import bears_step, step_of
from dpo.checkpoint.marker import STATE
from dpo.checkpoint.verify import find_fault

VALID = "a folder RUN/checkpoints/step-000100"


@dataclass(frozen=True)
class RunState:
    """The state of a run apart from its tensors: the number of updates, and the identity that a resume must match."""

    step: int
    identity: dict[str, Any]
    skipped: int = 0
    """The number of steps before `step`, this one included, that were skipped one after another."""
    weights: str | None = None
    """The hash of the weights, see `fingerprint`; None until the checkpoint is written, and in one of an older version.
    """


def read_state(folder: Path, key: str) -> RunState:
    """Returns the step and identity of a checkpoint, all of whose files are compared with their hashes.

    Raises UserError, with the place `key`, where the folder is not a complete checkpoint.
    """
    fault = find_fault(folder)
    if fault is not None:
        raise UserError(key, f"{folder}: {fault}", VALID)
    return read_verified_state(folder, key)


def read_verified_state(folder: Path, key: str) -> RunState:
    """Does the same as `read_state` for a checkpoint in which `verify` has found no fault. A field that is newer than
    this version is left out. A folder with the name of a step must be of that step: its place among the checkpoints of
    a run goes by its name.
    """
    try:
        content = json.loads((folder / STATE).read_text(encoding="utf-8"))
        state = RunState(**{known.name: content[known.name] for known in fields(RunState) if known.name in content})
    except (ValueError, TypeError, RecursionError) as failure:
        raise UserError(key, f"{folder / STATE}: not the state of a run", VALID) from failure
    is_whole = type(state.step) is type(state.skipped) is int and isinstance(state.identity, Mapping)
    if not is_whole or not isinstance(state.weights, str | None):
        raise UserError(key, f"{folder / STATE}: not the state of a run", VALID)
    if bears_step(folder) and state.step != step_of(folder):
        raise UserError(key, f"{folder} is a checkpoint of step {state.step}", "each under the name of its own step")
    return state
