"""Examines whether a run would work here, and how fast the machine is.

    python -m dpo.doctor [--config FILE] [--SECTION.KEY VALUE ...]
    torchrun --standalone --nproc-per-node 8 -m dpo.doctor --config FILE

The config gives the axes of the mesh, the folders, and the models' sizes. No weights and no data are read.
"""

import socket
import sys
from collections.abc import Sequence
from pathlib import Path

from transformers import PretrainedConfig

from dpo.base.console import say
from dpo.base.errors import RunError
from dpo.base.files import default_cache_dir
from dpo.config import Config, ParallelConfig, load_config
from dpo.config.reading import split_command_line
from dpo.distributed.collectives import all_gather, first_on_each_node, on_main
from dpo.distributed.startup import open_world, start_devices
from dpo.distributed.world import World, check_mesh
from dpo.doctor.attention import ATTENTION
from dpo.doctor.host import DEVICES, TOOLCHAIN, VERSIONS
from dpo.doctor.model import MODEL
from dpo.doctor.parts import Finding, Part, Subject, examine
from dpo.doctor.speed import LINKS, PRODUCTS
from dpo.doctor.storage import CACHE, STORAGE
from dpo.doctor.words import header, lines_of, verdict
from dpo.model.download import find_model_config, read_named_config
from dpo.model.kernels import keep_kernels
from dpo.ref_logps.cache import cache_root
from dpo.run.disk import sizes_of

DESCRIPTION = """Shows on one screen whether a run would work here and how fast the machine is: devices, versions,
compiler, matrix products, all-gathers, the disks of the run folder and of the cache, the memory that the model takes
per rank, and attention against plain attention. Start it as the run would be started, alone or under torchrun. With
--config FILE it examines the run's mesh, folders and model, without it the defaults. The exit code is 1 where a run
would fail."""

TIMEOUT_SECONDS = 300
"""A collective that takes longer ends the program: a network that does not work must show soon."""

BEFORE_DEVICES: tuple[Part, ...] = (VERSIONS, TOOLCHAIN, STORAGE, CACHE)
"""Examined over gloo, before any rank starts CUDA or NCCL, as a run checks them."""

ON_DEVICES: tuple[Part, ...] = (DEVICES, PRODUCTS, LINKS, MODEL, ATTENTION)


def read_arguments(argv: Sequence[str]) -> Config | None:
    """Returns the config; None where none is given. Raises UserError; --help prints and raises SystemExit(0)."""
    line = split_command_line(argv)
    if line.config is None and not line.texts and not line.help:
        return None
    return load_config(argv, "dpo.doctor", DESCRIPTION)


def subject_of(config: Config | None, world: World) -> Subject:
    """Returns the subject of the examination. Every rank must get here, or the rest hang.

    Raises:
        UserError: the layout does not fit the ranks, a model is missing, or it cannot be trained.
    """
    if config is None:
        return Subject(ParallelConfig(), "float32", Path("runs"), default_cache_dir())
    check_mesh(world, config.parallel)
    models = first_on_each_node(world, lambda: find_model_configs(config))
    sizes = on_main(world, lambda: sizes_of(config, models[0]))
    cache_dir = cache_root(config) if config.loss.facts.uses_reference else None
    run_dir = Path(str(config.train.run_dir))
    return Subject(config.parallel, config.model.dtype, run_dir, cache_dir, models, config, sizes)


def find_model_configs(config: Config) -> tuple[PretrainedConfig, ...]:
    """Returns the config of the policy, and that of the reference where it is another model."""
    model, other = find_model_config(config), config.reference.path
    if other is None or not config.loss.facts.uses_reference:
        return (model,)
    return model, read_named_config(other, "reference.path", config.model.trust_remote_code)


def main() -> None:
    """Runs `python -m dpo.doctor`. Raises RunError where a run would fail."""
    config = read_arguments(sys.argv[1:])
    with open_world(TIMEOUT_SECONDS) as world:
        subject = subject_of(config, world)
        hosts = all_gather(socket.gethostname())
        _print(world, header(world, len(set(hosts))))
        findings = [_examine(part, subject, world) for part in BEFORE_DEVICES]
        if can_start_devices(findings, world):
            keep_kernels()  # a run, or the next examination, reuses the kernels that are compiled here
            start_devices(world, TIMEOUT_SECONDS)
            findings += [_examine(part, subject, world) for part in ON_DEVICES]
        _print(world, [verdict(findings)])
    if any(finding.problems for finding in findings):
        raise RunError(verdict(findings))


def can_start_devices(findings: Sequence[Finding], world: World) -> bool:
    """Returns whether to go on to the devices: not to GPUs that do not start, or for which nothing can be compiled.
    Prints the next action on rank 0.
    """
    if world.device.type == "cpu":
        return True
    broken = any(finding.problems for finding in findings if finding.name == TOOLCHAIN.name)
    if world.is_main:
        connecting = f"connecting the GPUs: a network that does not work shows within {TIMEOUT_SECONDS} s"
        say("the parts that need the GPUs were not tried" if broken else connecting)
    return not broken


def _examine(part: Part, subject: Subject, world: World) -> Finding:
    """Examines a part and prints its finding at once. Every rank must get here, or the rest hang."""
    if part.notice and world.is_main:
        say(f"{part.name}: {part.notice}")
    finding = examine(part, subject, world)
    _print(world, lines_of(finding))
    return finding


def _print(world: World, lines: Sequence[str]) -> None:
    if world.is_main:
        print("\n".join(lines), flush=True)
