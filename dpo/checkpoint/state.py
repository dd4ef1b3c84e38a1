"""The state of a run in a checkpoint, apart from its tensors: state.json."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from dpo.base.errors import UserError
from dpo.checkpoint.folders import bears_step, step_of
from dpo.checkpoint.marker import STATE
from dpo.checkpoint.verify import find_fault

VALID = "a folder RUN/checkpoints/step-000100"
FILES = "model_files"
"""The key of the digests of `dpo.run.model_files` in the identity. Files may be added."""
SHARES = "shares"
"""The key of the shares of an epoch in the identity. They may change where the pairs do not, as from null to weight 1;
an error about the pairs names them."""


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
    finite: bool = True
    """False: weights are NaN or infinite. True also where some were when the process that wrote the checkpoint began,
    and in one of an older version.
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
    if not _is_whole(state):
        raise UserError(key, f"{folder / STATE}: not the state of a run", VALID)
    if bears_step(folder) and state.step != step_of(folder):
        raise UserError(key, f"{folder} is a checkpoint of step {state.step}", "each under the name of its own step")
    return state


def _is_whole(state: RunState) -> bool:
    """Returns whether the fields of a state have the forms that a run writes."""
    if type(state.step) is not int or type(state.skipped) is not int or type(state.finite) is not bool:
        return False
    if not isinstance(state.weights, str | None):
        return False
    return isinstance(state.identity, Mapping) and _are_whole_parts(state.identity)


def _are_whole_parts(identity: Mapping[str, Any]) -> bool:
    """Returns whether the parts of an identity that are dicts have their forms; older versions wrote neither."""
    files, shares = identity.get(FILES, {}), identity.get(SHARES, {})
    if not isinstance(files, Mapping) or not isinstance(shares, Mapping):
        return False
    are_digests = all(isinstance(part, Mapping) and _are_texts(part.values()) for part in files.values())
    return are_digests and all(type(share) in (int, float) for share in shares.values())


def _are_texts(values: Iterable[object]) -> bool:
    return all(isinstance(value, str) for value in values)
