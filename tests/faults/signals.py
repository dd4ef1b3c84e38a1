"""Signals in every phase of a run: `python -m tests.faults.signals`.

Bare ranks, as under torchrun: SIGTERM, SIGINT and SIGUSR2 to both of two ranks, within each of PHASES. Then the command
`dpo train` with SIGTERM and Ctrl-C to its processes, while it imports torch and in each of COMMAND_PHASES: it must
save where a step was made, end with the code of dpo/README.md, tell it in its last line, and leave no process. After
each the same run is started again, and must end as one that nobody disturbed, to the last bit. Ends with 1 where
something is otherwise.
"""

import argparse
import itertools
import os
import pkgutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from dpo.config import Config, to_yaml
from tests.faults.kills import faults
from tests.faults.worlds import SECONDS, last_step, start_world
from tests.support.runs import changed, save_six_steps, six_steps

ROOT = Path(__file__).parents[2]
NUMBERS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)

PHASES: Mapping[str, tuple[str, int]] = {
    "the ranks meet": ("dpo.distributed.startup.join", 1),
    "tokenizing": ("dpo.pairs.prepare.tokenize_source", 1),
    "hashing": ("dpo.run.inputs.hash_model", 1),
    "reading weights": ("dpo.train.setup.load_and_warm", 1),
    "reference pass": ("dpo.ref_logps.fill._run", 1),
    "evaluation before step 1": ("dpo.step.evaluation.evaluation_plans", 1),
    "a step": ("dpo.train.loop.train_step", 3),
    "writing the metrics": ("dpo.train.loop._tell_step", 3),
    "copying to save": ("dpo.checkpoint.saver.state_tensors", 1),
    "writing a checkpoint": ("dpo.checkpoint.saver.write_checkpoint", 1),
    "evaluation": ("dpo.step.evaluation.evaluation_plans", 2),
    "the last step": ("dpo.train.loop.train_step", 6),
    "export": ("dpo.train.outputs.export", 1),
}
"""Phase -> function, and the call of it (from 1) at whose beginning the signal comes."""

COMMAND_PHASES = ("tokenizing", "reference pass", "a step", "writing a checkpoint", "export")
IMPORTS = "imports"
"""The phase in which a rank of `dpo train` imports torch."""


def own_run(root: Path, name: str) -> Config:
    """A run whose tokens and log-probabilities no cache has."""
    changes = {"reference__cache_dir": str(root / f"{name}-cache"), "checkpoint__save_every": 2}
    return six_steps(root, root / name, **changes)


# --- bare ranks -------------------------------------------------------------------------------------------------------


def signal_within(target: str, number: int, signal_number: int, rank: int) -> None:
    """Arranges that this rank gets a signal at the beginning of a call of a function."""
    whole, calls = pkgutil.resolve_name(target), itertools.count(1)

    def disturbed(*args: Any, **named: Any) -> Any:
        if next(calls) == number:
            os.kill(os.getpid(), signal_number)
        return whole(*args, **named)

    module, _, name = target.rpartition(".")
    setattr(pkgutil.resolve_name(module), name, disturbed)


def of_bare_ranks(root: Path) -> Iterator[str]:
    """Yields the faults of all phases and signals."""
    for (phase, (target, call)), number in itertools.product(PHASES.items(), NUMBERS):
        name = f"{phase}-{number.name}".replace(" ", "-")
        config = fresh_cache(own_run(root, name), root / f"{name}-hf")
        codes = start_world(config, arrange=partial(signal_within, target, call, number)).wait()
        steps = last_step(root / name)
        again = start_world(config).wait()
        found = [] if again == [0, 0] else [f"the start after it ends with {again}"]
        if number == signal.SIGUSR2 and any(codes):
            found.append("asked to save, it fails")
        found += faults(root / name, root / "whole") if not found else []
        print(f"{phase:<26} {number.name:<8} codes {codes}, {steps} steps: {'; '.join(found) or 'equal'}", flush=True)
        yield from (f"{name}: {fault}" for fault in found)


def fresh_cache(config: Config, folder: Path) -> Config:
    """The config, with HF_HOME, which ranks inherit, set to a folder of its own."""
    os.environ["HF_HOME"] = str(folder)
    return changed(config)


# --- the command ------------------------------------------------------------------------------------------------------

HELD = """
import itertools, os, time
if "RANK" in os.environ:
    import pkgutil
    target, call, place = {target!r}, {call}, {place!r}
    module, _, name = target.rpartition(".")
    owner = pkgutil.resolve_name(module)
    whole, calls = getattr(owner, name), itertools.count(1)
    def held(*args, **named):
        if next(calls) == call:
            open(place + "-" + os.environ["RANK"], "w").close()
            time.sleep(1)
        return whole(*args, **named)
    setattr(owner, name, held)
"""
"""A sitecustomize.py: each rank waits a second at the beginning of a phase, in which the signal comes."""


def processes_of(place: Path) -> list[str]:
    """The command lines of processes that know a folder."""
    listed = subprocess.run(["ps", "-wweo", "args"], capture_output=True, text=True, check=True).stdout
    return [line for line in listed.splitlines() if str(place) in line]


def command_in_phase(root: Path, phase: str, number: signal.Signals) -> list[str]:
    """The faults of `dpo train` with a signal in one phase."""
    name = f"command-{phase}-{number.name}".replace(" ", "-")
    place = root / name
    place.mkdir()
    config = own_run(root, f"{name}/run")
    (place / "my.yaml").write_text(to_yaml(config), encoding="utf-8")
    target, call = PHASES.get(phase, ("", 0))
    env = os.environ | {"PYTHONPATH": f"{place}:{ROOT}", "HF_HOME": str(place / "hf")}
    if target:
        code = HELD.format(target=target, call=call, place=str(place / "held"))
        (place / "sitecustomize.py").write_text(code, encoding="utf-8")
    words = [sys.executable, "-m", "dpo", "train", str(place / "my.yaml"), "--ranks", "2"]
    pipe = subprocess.PIPE
    process = subprocess.Popen(words, env=env, stderr=pipe, stdout=pipe, text=True, cwd=ROOT, start_new_session=True)
    await_phase(process, place, phase)
    steps = last_step(place / "run")
    os.killpg(process.pid, number) if number == signal.SIGINT else process.send_signal(number)
    _, said = process.communicate(timeout=SECONDS)
    (place / "sitecustomize.py").unlink(missing_ok=True)
    found = [f"{line} is left" for line in processes_of(place)]
    found += wrong_end(process.returncode, said, number, steps if phase != "export" else 6, last_step(place / "run"))
    again = subprocess.run(words, env=env, capture_output=True, text=True, cwd=ROOT)
    found += faults(place / "run", root / "whole") if not again.returncode else [f"again: {again.stderr[-500:]}"]
    last = (said.splitlines() or [""])[-1]
    result = "; ".join(found) or "equal"
    print(f"dpo train: {phase:<21} {number.name:<8} code {process.returncode}: {result}: {last}", flush=True)
    return [f"dpo train, {name}: {fault}" for fault in found]


def await_phase(process: subprocess.Popen[str], place: Path, phase: str) -> None:
    """Waits until both ranks are in a phase; of IMPORTS, until they have begun to import torch."""
    end = time.monotonic() + SECONDS
    wanted = (lambda: len(list(place.glob("held-*"))) == 2) if phase != IMPORTS else (lambda: ranks_import(process.pid))
    while not wanted():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < end, f"{phase} never comes"
        time.sleep(0.02)


def ranks_import(parent: int) -> bool:
    """Whether both ranks of a parent have begun to map libraries of torch."""
    listed = subprocess.run(["pgrep", "-P", str(parent)], capture_output=True, text=True).stdout.split()
    maps = [Path(f"/proc/{pid}/maps") for pid in listed]
    return len([path for path in maps if path.exists() and "torch" in path.read_text(errors="replace")]) == 2


def wrong_end(code: int, said: str, number: signal.Signals, steps: int, last: int) -> list[str]:
    """What is not as dpo/README.md says of a first signal.

    Args:
        code: the exit code.
        said: its stderr.
        number: the signal.
        steps: made before the signal; 0: it came before the first.
        last: the last step that was made.
    """
    lines = said.splitlines() or [""]
    found = [f"says {lines[-1]}"] if "Traceback" in said else []
    has_begun = any("saving after the current step" in line or "all is saved" in line for line in lines)
    wanted = 130 if number == signal.SIGINT else 0 if has_begun else 143
    if code != wanted:
        found.append(f"exit code {code}, not {wanted}")
    if has_begun and not ("the run is complete" in lines[-1] or f"step {last} is saved" in lines[-1]):
        found.append(f"made step {last}, says {lines[-1]}")
    if steps and not has_begun:
        found.append("did not save")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("ranks", "command"), help="one of the two parts; by default both")
    only = parser.parse_args().only
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's `&` ignores, and children inherit that
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="dpo-signals-") as folder:
        root = Path(folder)
        save_six_steps(root)
        assert start_world(own_run(root, "whole")).wait() == [0, 0], (root / "whole.stderr").read_text()[-3000:]
        found = [] if only == "command" else list(of_bare_ranks(root))
        if only != "ranks":
            for phase, number in itertools.product((IMPORTS, *COMMAND_PHASES), NUMBERS[:2]):
                found += command_in_phase(root, phase, number)
    for fault in found:
        print(f"FAULT: {fault}")
    print(f"{len(found)} faults in {time.monotonic() - started:.0f} s")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
