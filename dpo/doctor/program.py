"""Examines whether a run would work here, and how fast the machine is.

    python -m dpo.doctor [--config FILE] [--SECTION.KEY VALUE ...]
    torchrun --standalone --nproc-per-node 8 -m dpo.doctor --config FILE [--report REPORT.json]

The config gives the axes of the mesh, the folders, and the models' sizes. No weights are read, and no data unless a
report is asked for, whose steps have the lengths of the data.
"""

import os
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from datasets import disable_progress_bars
from transformers import PretrainedConfig

from dpo.base.errors import RunError, UserError
from dpo.base.files import default_cache_dir, nearest_existing
from dpo.config import Config, ParallelConfig
from dpo.disk.sizes import sizes_of
from dpo.distributed.collectives import all_gather, first_on_each_node, on_main
from dpo.distributed.startup import open_world, start_devices
from dpo.distributed.world import World, check_mesh
from dpo.doctor.arguments import TIMEOUT_SECONDS, read_arguments
from dpo.doctor.attention import ATTENTION
from dpo.doctor.host import DEVICES, TOOLCHAIN, VERSIONS
from dpo.doctor.model import MODEL
from dpo.doctor.parts import Finding, Part, Subject, finding_of, measured
from dpo.doctor.rates import RATES
from dpo.doctor.report import make_report
from dpo.doctor.speed import LINKS, PRODUCTS
from dpo.doctor.steps import STEPS
from dpo.doctor.storage import CACHE, STORAGE
from dpo.doctor.words import header, lines_of, verdict
from dpo.estimate.lengths import find_lengths
from dpo.estimate.report_file import write_report
from dpo.model.download import find_model_config, read_named_config
from dpo.model.kernels import keep_kernels
from dpo.ref_logps.cache import cache_root
from dpo.terminal.console import in_one_line, is_quiet, say

BEFORE_DEVICES: tuple[Part, ...] = (VERSIONS, TOOLCHAIN, STORAGE, CACHE)
"""Examined over gloo, before any rank starts CUDA or NCCL, as a run checks them."""

ON_DEVICES: tuple[Part, ...] = (DEVICES, PRODUCTS, LINKS, MODEL, ATTENTION)


def check_report(file: Path) -> None:
    """Raises UserError where a file cannot be written: without it, minutes of measurements are lost."""
    present = nearest_existing(file.parent)
    if not present.is_dir() or not os.access(present, os.W_OK | os.X_OK):
        raise UserError(
            "command line: --report", f"{file}: cannot write to {present}", "a file in a folder to write in"
        )


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


def with_lengths(subject: Subject, world: World) -> Subject:
    """Returns the subject with the trees of some steps, from the data where it is here. Every rank must get here, or
    the rest hang. Raises UserError where the data cannot be read.
    """
    config = subject.config
    assert config is not None, "a report needs a config"
    if is_quiet() or not (world.is_main and sys.stderr.isatty()):
        disable_progress_bars()
    lengths = first_on_each_node(world, lambda: find_lengths(config, subject.models[0], None, None))
    return replace(subject, lengths=lengths)


def main() -> None:
    """Runs `python -m dpo.doctor`. Raises RunError where a run would fail."""
    arguments = read_arguments()
    replicate = arguments.config.parallel.replicate if arguments.config else 1
    with open_world(arguments.timeout_seconds, replicate) as world:
        report = arguments.report
        if report:
            on_main(world, lambda: check_report(report))
        subject = subject_of(arguments.config, world)
        if report:
            subject = with_lengths(subject, world)
        examination = Examination(subject, world, report, len(set(all_gather(socket.gethostname()))))
        findings = examination.run()
    if any(finding.problems for finding in findings):
        raise RunError(verdict(findings))


@dataclass(frozen=True)
class Examination:
    """The examination of a subject by all ranks."""

    subject: Subject
    world: World
    report: Path | None
    """The file of the report."""
    num_nodes: int
    results: dict[str, list[Any]] = field(default_factory=dict)
    """The results of the parts so far, by rank."""

    def run(self) -> list[Finding]:
        """Examines all parts, prints their findings and the verdict, and writes the report. Every rank must get here,
        or the rest hang.
        """
        _print(self.world, header(self.world, self.num_nodes))
        findings = [self._examine(part) for part in BEFORE_DEVICES]
        if can_start_devices(findings, self.world):
            keep_kernels()  # a run, or the next examination, reuses the kernels that are compiled here
            start_devices(self.world, TIMEOUT_SECONDS)
            findings += [self._examine(part) for part in ON_DEVICES]
            if self.report:
                findings.append(self._examine(RATES))
                self._write()  # in case a rank runs out of memory in a step, which may end all
                findings.append(self._examine(STEPS))
        self._write()
        _print(self.world, [verdict(findings)])
        return findings

    def _examine(self, part: Part) -> Finding:
        """Examines a part and prints its finding at once. Every rank must get here, or the rest hang."""
        notice = part.notice(self.subject, self.world)
        if notice and self.world.is_main:
            say(f"{part.name}: {notice}")
        results = measured(part, self.subject, self.world)
        self.results[part.name] = results
        finding = finding_of(part, self.subject, results)
        _print(self.world, lines_of(finding))
        return finding

    def _write(self) -> None:
        """Writes the report, where one is asked for. Every rank must get here, or the rest hang."""
        file = self.report
        if file is None:
            return

        def write() -> None:
            write_report(file, make_report(self.subject, self.world, self.num_nodes, self.results))

        on_main(self.world, write)


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


def _print(world: World, lines: Sequence[str]) -> None:
    if world.is_main:
        print("\n".join(map(in_one_line, lines)), flush=True)
