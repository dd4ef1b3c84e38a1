"""Whether a run would work here, and how fast the machine is.

    python -m dpo.doctor [--config FILE] [--SECTION.KEY VALUE ...]
    torchrun --standalone --nproc-per-node 8 -m dpo.doctor --config FILE

A config gives the axes of the mesh, the run folder and the width of the model's heads; no weights and no data are read.
"""

import socket
import sys
from collections.abc import Sequence
from pathlib import Path

from dpo.config import Config, ParallelConfig, load_config
from dpo.config_io import split_command_line
from dpo.distributed import World, all_gather, check_mesh, first_on_each_node, open_world, start_devices
from dpo.doctor.attention import ATTENTION
from dpo.doctor.machine import DEVICES, TOOLCHAIN, VERSIONS
from dpo.doctor.parts import Part, Subject, examine
from dpo.doctor.speed import LINKS, PRODUCTS
from dpo.doctor.storage import STORAGE
from dpo.doctor.words import lines_of, verdict
from dpo.errors import RunError
from dpo.inspect.program import find_model_config
from dpo.kernels import keep_kernels

DESCRIPTION = """Says on one screen whether a run would work here and how fast the machine is: devices, versions,
compiler, matrix products, all-gathers, the run folder's disk, attention against plain attention. Alone, or under
torchrun as the run would be; with --config FILE for its mesh, run folder and model, without it for the defaults. The
exit code is 1 where a run would fail."""

TIMEOUT_SECONDS = 300
"""A collective that takes longer here ends the program: a network that does not work must show."""

PARTS: tuple[Part, ...] = (DEVICES, VERSIONS, TOOLCHAIN, PRODUCTS, LINKS, STORAGE, ATTENTION)


def read_arguments(argv: Sequence[str]) -> Config | None:
    """The config; None where none is given. Raises UserError; --help prints and raises SystemExit(0)."""
    line = split_command_line(argv)
    if line.config is None and not line.texts and not line.help:
        return None
    return load_config(argv, "dpo.doctor", DESCRIPTION)


def subject_of(config: Config | None, world: World) -> Subject:
    """What is examined. Raises UserError where the layout does not fit. Every rank must get here."""
    if config is None:
        return Subject(ParallelConfig(), "float32", Path("runs"), ())
    check_mesh(world, config.parallel)
    model = first_on_each_node(world, lambda: find_model_config(config))
    return Subject(config.parallel, config.model.dtype, Path(str(config.train.run_dir)), (model,))


def main() -> None:
    """`python -m dpo.doctor`. Raises RunError where a run would fail."""
    config = read_arguments(sys.argv[1:])
    with open_world(TIMEOUT_SECONDS) as world:
        subject = subject_of(config, world)
        hosts = all_gather(socket.gethostname())
        start_devices(world, TIMEOUT_SECONDS)
        if world.device.type == "cuda":
            keep_kernels()  # what the attention compiles here, a run need not
        findings = [examine(part, subject, world) for part in PARTS]
        if world.is_main:
            print("\n".join(lines_of(findings, world, len(set(hosts)))), flush=True)
    if any(found.problems for found in findings):
        raise RunError(verdict(findings))
