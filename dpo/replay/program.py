"""Computes the steps of a run again in a temporary folder, and compares them with what the run recorded.

    python -m dpo.replay RUN --step 100
    torchrun --standalone --nproc-per-node 8 -m dpo.replay RUN --step 100

A difference on the same layout and the same code is a bit that has flipped: in the weights or the optimizer of the run,
in memory, on a GPU. It lies in the first step that differs or in the update before it.
"""

import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch.distributed.checkpoint.state_dict import get_model_state_dict

from dpo.base.errors import RunError
from dpo.checkpoint.fingerprint import fingerprint
from dpo.checkpoint.folders import checkpoint_path
from dpo.checkpoint.store import trained_part
from dpo.config import Config
from dpo.distributed.collectives import on_main
from dpo.distributed.startup import open_world, start_devices
from dpo.distributed.world import World
from dpo.replay.arguments import read_arguments
from dpo.replay.beginning import RUN, Beginning, find_beginning, read_config, replay_config
from dpo.replay.comparison import FAILED, TOLERANCE, Metrics, describe, differences, table
from dpo.run.identity import check_identity, identity_of
from dpo.run.inputs import read_inputs
from dpo.run.layout import layout_here
from dpo.run.own_code import check_own_code
from dpo.run.provenance import provenance
from dpo.terminal.console import begin_log, say
from dpo.train.loop import take_step
from dpo.train.setup import Hooks, Run, build_run

CODE = ("version", "commit", "dirty", "torch", "transformers", "peft")
"""The facts of a start that say by which code it computed. Older versions recorded fewer."""


def main() -> None:
    """Runs `python -m dpo.replay`."""
    arguments = read_arguments()
    replay(arguments.run, arguments.step, arguments.trust_remote_code)


def replay(folder: Path, step: int, trusts_code: bool) -> None:
    """Computes the steps of a run to `step` again, compares them, and prints the result on rank 0. Every rank must get
    here, or the rest hang.

    Args:
        folder: the run folder, which may be anybody's.
        step: the last step to compute.
        trusts_code: whether code of the model's own repository may run, where the run's config asks for it.

    Raises RunError where a step or the weights differ, and UserError where the run has no such step, its input has
    changed, or it asks for code that is not trusted.
    """
    begin_log()
    config = read_config(folder)
    check_own_code(config, trusts_code, RUN)
    with open_world(config.parallel.setup_timeout_seconds, config.parallel.replicate) as world:
        beginning = find_beginning(folder, step, world)
        with _work_folder(world) as work:
            run = _build(replay_config(config, work, world.size), world, beginning)
            is_same = _is_same_layout(run, beginning)
            steps = range(beginning.start.step + 1, step + 1)
            replayed = {number: _take(run, number) for number in steps}
            weights = _weights_of(run)
            on_main(world, lambda: _compare(beginning, replayed, is_same, weights, folder))


@contextmanager
def _work_folder(world: World) -> Iterator[Path]:
    """Yields a temporary folder of rank 0 for the log. Every rank must get here, or the rest hang."""
    with tempfile.TemporaryDirectory(prefix="dpo-replay-") as own:
        yield Path(on_main(world, lambda: own))


def _build(config: Config, world: World, beginning: Beginning) -> Run:
    """Returns the run, ready for the first of the steps. Every rank must get here, or the rest hang.

    Raises UserError, on every rank, where the input is not that of the run.
    """
    inputs = read_inputs(config, world)
    identity = identity_of(config, inputs)
    on_main(world, lambda: check_identity(beginning.start, identity))
    start_devices(world, config.parallel.timeout_seconds)
    return build_run(config, world, inputs, beginning.start, Hooks())


def _is_same_layout(run: Run, beginning: Beginning) -> bool:
    """Returns whether every step was computed on the layout of these ranks; says where it was not, and where the code
    has changed. Every rank must get here, or the rest hang.
    """
    layout = layout_here(run.config, run.world)
    changed = {key for each in beginning.layouts for key in layout if each.get(key) != layout[key]}
    is_same = bool(beginning.layouts) and not changed
    if run.world.is_main:
        now, before = provenance([], 0), beginning.code
        code = [f"{key} {before[key]} -> {now[key]}" for key in CODE if key in before and before[key] != now[key]]
        if code:
            say(f"the code has changed since the run's last start, and may compute other bits: {', '.join(code)}")
        if not is_same:
            why = f"differs in {', '.join(sorted(changed))}" if changed else "is not recorded"
            say(f"the layout of the run {why}: the losses are compared to {TOLERANCE:g} of them, and nothing else")
    return is_same


def _take(run: Run, step: int) -> Metrics:
    """Takes a step; returns its metrics but those that are not finite. Every rank must get here, or the rest hang."""
    _, metrics = take_step(run, step, run.batches(step), time.perf_counter())
    return {name: value for name, value in metrics.items() if value is not None}


def _weights_of(run: Run) -> str:
    """Returns the hash of the weights that a checkpoint holds. Every rank must get here, or the rest hang."""
    tensors = trained_part(run.policy.model, get_model_state_dict(run.policy.model))
    return fingerprint({name: tensor.cpu() for name, tensor in tensors.items()})


def _compare(beginning: Beginning, replayed: dict[int, Metrics], is_same: bool, weights: str, folder: Path) -> None:
    """Prints the table and the result; for rank 0 alone. Raises RunError where a step or the weights differ.

    Args:
        beginning: what the run recorded.
        replayed: step -> the metrics that were computed again.
        is_same: the layout is that of the run.
        weights: the hash of the weights after the last step.
        folder: the run folder.
    """
    recorded, first, last = beginning.recorded, min(replayed), max(replayed)
    rows = [(n, recorded.get(n), again, differences(recorded.get(n), again, is_same)) for n, again in replayed.items()]
    for line in table(rows):
        print(line)
    for number, before, again, names in rows:
        if names:
            raise RunError(f"step {number} is the first that differs: {describe(before, again, names)}")
    checkpoint = checkpoint_path(folder, last)
    if beginning.weights is None:
        told = f"the weights are not compared: {checkpoint} has no hash of them, or is not there"
    elif not is_same:
        told = "the weights are not compared: on another layout they differ by rounding"
    elif beginning.weights != weights:
        what = f"have the hash {weights}, those of {checkpoint} {beginning.weights}"
        raise RunError(f"all metrics of steps {first} to {last} are equal, but the weights after step {last} {what}")
    else:
        told = f"the weights are those of {checkpoint}, {weights}"
    how = "to the last bit" if is_same else f"in their losses to {TOLERANCE:g}"
    ending = f"; step {last}, which ended the run, is not finite again" if recorded.get(last) == FAILED else ""
    print(f"steps {first} to {last} are equal {how}{ending}; {told}")
