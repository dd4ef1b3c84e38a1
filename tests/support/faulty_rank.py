"""A fault in rank 1 of a run that any program starts: `environment(fault, place)` are variables for that program.

Python imports `sitecustomize` from PYTHONPATH at its start; that of `FOLDER` imports this file, which waits for the
module of the place to be imported and puts the fault into one of its functions.
"""

import ctypes
import importlib.abc
import importlib.machinery
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

FOLDER = Path(__file__).parent / "faulty"
ROOT = Path(__file__).parents[2]
RANK = "1"

PLACES = {
    "start": ("dpo.train.program", "open_world", 1),
    "input": ("dpo.train.program", "read_inputs", 1),
    "reference": ("dpo.ref_logps.fill", "_run", 1),
    "forward": ("dpo.step.update", "pair_losses", 4),
    "save": ("dpo.checkpoint.saver", "state_tensors", 2),
    "export": ("dpo.train.program", "export_run", 1),
}
"""Place -> module, function, and the number of the call of it that does not end well."""


def environment(fault: str, place: str) -> dict[str, str]:
    """The variables of a program whose rank 1 has a fault."""
    path = f"{FOLDER}:{ROOT}"
    return dict(os.environ) | {"PYTHONPATH": path, "TEST_FAULT": fault, "TEST_PLACE": place, "OMP_NUM_THREADS": "1"}


def install() -> None:
    """Puts the fault of this process's environment into its module, once that is imported."""
    if os.environ.get("RANK") == RANK and "TEST_FAULT" in os.environ:
        sys.meta_path.insert(0, _Finder(*PLACES[os.environ["TEST_PLACE"]], FAULTS[os.environ["TEST_FAULT"]]))


class _Finder(importlib.abc.MetaPathFinder):
    def __init__(self, module: str, function: str, number: int, fault: Callable[[], None]):
        self.module, self.function, self.number, self.fault = module, function, number, fault

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> Any:
        if name != self.module:
            return None
        sys.meta_path.remove(self)
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        assert spec is not None and spec.loader is not None
        run = spec.loader.exec_module

        def run_and_break(module: ModuleType) -> None:
            run(module)
            break_function(module, self.function, self.number, self.fault)

        spec.loader.exec_module = run_and_break  # type: ignore[method-assign]
        return spec


def break_function(module: ModuleType, function: str, number: int, fault: Callable[[], None]) -> None:
    """Has the call of this number begin with the fault."""
    whole, calls = getattr(module, function), []

    def broken(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == number:
            if mark := os.environ.get("TEST_MARK"):
                Path(mark).touch()
            fault()
        return whole(*args, **kwargs)

    setattr(module, function, broken)


def stop() -> None:
    """Stops this process, as a debugger or a suspended machine does."""
    os.kill(os.getpid(), signal.SIGSTOP)


def hold_the_lock() -> None:
    """Keeps Python's lock, so that no other thread of this process runs."""
    ctypes.PyDLL(None).sleep(100_000)


def backtrack() -> None:
    """Searches for ever, with Python's lock."""
    re.match(r"(a+)+$", "a" * 64 + "b")


def hang() -> None:
    """Waits for ever, while other threads run."""
    while True:
        time.sleep(1)


def fail() -> None:
    """Fails as a rank whose GPU is lost."""
    raise RuntimeError("CUDA error: GPU is lost; the GPU has fallen off the bus")


def die() -> None:
    """Is killed, as by the kernel."""
    os.kill(os.getpid(), signal.SIGKILL)


def abort() -> None:
    """Is aborted, as by a library in C++."""
    os.abort()


def leave() -> None:
    """Ends with exit code 0, as a library that calls exit."""
    os._exit(0)


FAULTS = {f.__name__: f for f in (stop, hold_the_lock, backtrack, hang, fail, die, abort, leave)}
