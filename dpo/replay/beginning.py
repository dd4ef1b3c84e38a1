"""From where the steps of a run are computed again: the newest checkpoint before them, and the run's config."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dpo.base.errors import UserError
from dpo.checkpoint.folders import checkpoint_path, checkpoints_until
from dpo.checkpoint.marker import STATE, find_change, list_files
from dpo.checkpoint.state import read_verified_state
from dpo.checkpoint.verify import first_usable
from dpo.config import Config, load_config
from dpo.distributed.collectives import on_main
from dpo.distributed.world import World
from dpo.replay.comparison import FAILED
from dpo.run.folder import Start, read_starts
from dpo.run_folder.files import CONFIG, METRICS, NONFINITE, PROVENANCE, is_step, read_metrics
from dpo.terminal.console import say

RUN, STEP = "command line: RUN", "command line: --step"


@dataclass(frozen=True)
class Beginning:
    """What the run folder holds of the steps that are computed again."""

    start: Start
    recorded: Mapping[int, Mapping[str, float]]
    """Step -> its line in metrics.jsonl, without the step; FAILED for a step that was not finite and ended the run."""
    weights: str | None
    """The hash of the weights after the last of the steps; None where no checkpoint tells it."""
    layouts: Sequence[Mapping[str, Any]]
    """The layouts on which the steps may have been computed; empty where none is recorded."""
    code: Mapping[str, Any]
    """The facts of the run's last start (`dpo.run.provenance`)."""


def read_config(folder: Path) -> Config:
    """Returns the config of a run. Raises UserError where the folder is no run folder."""
    path = folder / CONFIG
    if not path.is_file():
        raise UserError(RUN, f"{path} is missing", "a run folder")
    return load_config(["--config", str(path)], "dpo.replay")


def replay_config(config: Config, work: Path, num_ranks: int) -> Config:
    """Returns the config by which the steps are computed again: in another folder, without answers and sinks. On
    another number of ranks than `parallel.shard` and `parallel.replicate` give, the model is sharded over all of them.
    """
    parallel = config.parallel
    if (parallel.shard or num_ranks // parallel.replicate) * parallel.replicate != num_ranks:
        parallel = replace(parallel, shard=None, replicate=1)
    return replace(
        config,
        parallel=parallel,
        eval=replace(config.eval, samples=0),
        train=replace(config.train, run_dir=str(work), report_to=[], profile_steps=None),
    )


def find_beginning(folder: Path, step: int, world: World) -> Beginning:
    """Returns what a run folder holds of the steps to `step`. Reads only. Every rank must get here, or the rest hang.

    Raises UserError, on every rank, where metrics.jsonl has no such step.
    """
    lines = on_main(world, lambda: _lines_until(folder, step))
    start = _newest_before(folder, step, world)
    return on_main(world, lambda: _beginning(folder, step, start, lines))


def _lines_until(folder: Path, step: int) -> dict[int, Mapping[str, float]]:
    """Returns the lines of metrics.jsonl of the steps to `step`, which may be the one that ended the run: its pairs are
    in the folder, its line is not. Raises UserError where the line of `step` is missing otherwise.
    """
    lines: dict[int, Mapping[str, float]] = {int(line["step"]): line for line in read_metrics(folder) if is_step(line)}
    if step > max(lines, default=0) and (folder / NONFINITE / f"step-{step:06d}.jsonl").is_file():
        lines[step] = FAILED
    if step not in lines:
        valid = f"{min(lines)} to {max(lines)}" if lines else "a run with a step"
        raise UserError(STEP, f"{folder / METRICS} has no step {step}", valid)
    return {number: line for number, line in lines.items() if number <= step}


def _newest_before(folder: Path, step: int, world: World) -> Start:
    """Returns the start at the newest checkpoint before a step whose files are as they were written, which the ranks
    compare together, or at step 0; tells which ones it skips. Every rank must get here, or the rest hang.
    """
    candidates = on_main(world, lambda: checkpoints_until(folder, step - 1)[::-1])
    found, faults = first_usable(candidates, world)
    if world.is_main and len(candidates) == len(faults) == 1:  # of several `first_usable` tells each
        say(f"checkpoint {candidates[0]} is skipped: {faults[candidates[0]]}")
    return Start(found, on_main(world, lambda: read_verified_state(found, RUN))) if found else Start()


def _beginning(folder: Path, step: int, start: Start, lines: Mapping[int, Mapping[str, float]]) -> Beginning:
    steps = range(start.step + 1, step + 1)
    recorded = {n: {name: value for name, value in lines[n].items() if name != "step"} for n in steps if n in lines}
    starts = read_starts(folder / PROVENANCE) or []
    begun = starts[-1].get("first_step", 1) if starts else 1
    if begun > start.step + 1:
        say(f"steps before {begun} are of an earlier start; they are computed by the config of the last one, too")
    layouts = [layout for number in steps for layout in layouts_of(starts, number)]
    return Beginning(start, recorded, _weights_after(folder, step), layouts, starts[-1] if starts else {})


def _weights_after(folder: Path, step: int) -> str | None:
    """Returns the hash of the weights after a step, from the `state.json` of its checkpoint: that file alone is
    compared with its hash.
    """
    path = checkpoint_path(folder, step)
    if not path.is_dir():
        return None
    files, fault = list_files(path)
    fault = fault or find_change(path, {STATE: files[STATE]})
    if fault:
        say(f"checkpoint {path} is not compared: {fault}")
        return None
    return read_verified_state(path, RUN).weights


def layouts_of(starts: Sequence[Mapping[str, Any]], step: int) -> list[Mapping[str, Any]]:
    """Returns the layouts on which a step may have been computed, from the entries of provenance.json.

    The last start that began at or before the step has computed it. Starts of an older version do not tell where they
    began: each of them may have.
    """
    before = [start for start in starts if start.get("first_step", 1) <= step and isinstance(start.get("layout"), dict)]
    known = [number for number, start in enumerate(before) if "first_step" in start]
    return [start["layout"] for start in before[known[-1] if known else 0 :]]
