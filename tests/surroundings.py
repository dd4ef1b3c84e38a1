"""What a test run inherits from where it is started, and must not depend on: signals, environment, umask.

A shell's `&` and `nohup` leave SIGINT or SIGHUP ignored, and every process below inherits that; an allocation of a
cluster sets SLURM_* and RANK; a terminal sets COLUMNS. conftest.py calls `leave_behind` before anything else.
"""

import gc
import os
import signal
from collections.abc import MutableMapping
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOREIGN_PREFIXES = (
    *("SLURM_", "SBATCH_", "TORCHELASTIC_", "NCCL_", "GLOO_", "DPO_"),
    *("PYTORCH_", "TORCH_", "TORCHINDUCTOR_", "TRITON_", "CUDA_", "HF_", "TRANSFORMERS_"),
)
FOREIGN_NAMES = (
    *("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT"),
    *("COLUMNS", "LINES", "FORCE_COLOR", "NO_COLOR", "PYTHONWARNINGS", "PYTHONUNBUFFERED"),
)
OWN_NAMES = ("DPO_TEST_DATA", "DPO_TEST_GPU", "CUDA_VISIBLE_DEVICES", "SLURM_CONF")
"""What tests are told by: by the person who starts them, or by tests/slurm/cluster.py."""

SIGNALS = (signal.SIGINT, signal.SIGQUIT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGCHLD)
"""Not SIGHUP, which nohup means to be ignored."""


def leave_behind(environment: MutableMapping[str, str]) -> None:
    """Gives this process, and all that it starts, what a plain shell in this checkout would."""
    for name in [name for name in environment if is_foreign(name)]:
        del environment[name]
    environment["PYTHONPATH"] = str(ROOT)  # what is tested is this checkout, wherever a program under test is started
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    for number in SIGNALS:
        if signal.getsignal(number) == signal.SIG_IGN:
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    os.umask(0o022)


def spare_the_disk() -> None:
    """Lets `os.fsync` return at once in this process: what a test writes need not survive a power cut."""
    os.fsync = lambda fd: None


def spare_the_collector() -> None:
    """Leaves what is imported by now out of all later collections of garbage: each run under test asks for a full one,
    which would look at half a million objects of libraries.
    """
    gc.collect()
    gc.freeze()


def is_foreign(name: str) -> bool:
    """Returns whether an environment variable would change what programs under test do."""
    return name not in OWN_NAMES and (name in FOREIGN_NAMES or name.startswith(FOREIGN_PREFIXES))
