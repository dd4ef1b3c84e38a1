"""Estimates the memory, traffic and time of a step on devices that are not here, and finds changes that make it fit.

    python -m dpo.estimate --config FILE --ranks 64 --device h100 [--SECTION.KEY VALUE ...]

Needs no GPU and no weights: of a model only config.json is read.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from datasets import disable_progress_bars
from transformers import PretrainedConfig

from dpo.base.errors import RunError, UserError
from dpo.command.line import COMMAND_LINE
from dpo.config import Config
from dpo.disk.sizes import sizes_of
from dpo.distributed.world import World, check_mesh
from dpo.estimate.advice import advice
from dpo.estimate.arguments import DEFAULT_DEVICE, DEFAULT_RANKS_PER_NODE, device_key
from dpo.estimate.arguments import read_arguments as read_words
from dpo.estimate.changes import Change, find_changes, with_keys
from dpo.estimate.choice import Case, decide, with_values
from dpo.estimate.devices import DEVICES, Device, this_machine
from dpo.estimate.forecast import forecast, lines_of_run
from dpo.estimate.lengths import Extent, Lengths, find_lengths
from dpo.estimate.measured import arithmetic, checkpoint_lines, measured_device, sources, unmeasured_device, write_rate
from dpo.estimate.needs import Trial, memory_of, needed_bytes, plans_of, with_dtype
from dpo.estimate.parameters import groups_of
from dpo.estimate.report import Report
from dpo.estimate.speed import Cluster, Speed, step_speed
from dpo.estimate.traffic import Groups
from dpo.estimate.words import Estimate, lines_of, lines_of_changes, verdict, wrapped
from dpo.machine.data_sheets import DEFAULT_MFU
from dpo.model.download import find_model_config
from dpo.run_folder.forecast import write_forecast
from dpo.terminal.console import harmless, is_quiet, say


@dataclass(frozen=True)
class Arguments:
    """The command line."""

    config: Config
    cluster: Cluster
    prompt_tokens: int | None
    completion_tokens: int | None
    json: Path | None
    """A file to which the forecast of the run is written too."""
    report: Report | None = None
    """Of --measured."""


# --- the command line ------------------------------------------------------------------------------------------------


def read_arguments(argv: Sequence[str] | None = None) -> Arguments:
    """Returns the arguments of a command line, by default this process's own. Raises as `arguments.read_arguments`
    does, and UserError where the ranks do not fit the config.
    """
    words = read_words(argv)
    own, config, report = words.own, words.config, words.report
    num_ranks = own.ranks or _ranks_of(config, report)
    check_mesh(World(0, num_ranks, 0, num_ranks, torch.device("cpu")), config.parallel)
    usual = report.ranks.ranks_per_node if report else DEFAULT_RANKS_PER_NODE
    ranks_per_node = min(own.ranks_per_node or usual, num_ranks)
    _check_nodes(num_ranks, ranks_per_node, own.ranks_per_node is not None)
    device = _measured_device(own, config, report, ranks_per_node) if report else _device(own, ranks_per_node)
    found = arithmetic(report) if report else None
    mfu = own.mfu or (found[0] if found else DEFAULT_MFU)
    cluster = Cluster(_with_given(own, device), num_ranks, ranks_per_node, mfu)
    return Arguments(_with_dtype(config, device), cluster, own.prompt_tokens, own.completion_tokens, own.json, report)


def _ranks_of(config: Config, report: Report | None) -> int:
    if config.parallel.shard is None and report is not None:
        return report.ranks.ranks
    if config.parallel.shard is None:
        what = "is missing, and parallel.shard is null"
        raise UserError("command line: --ranks", what, "--ranks N, the number of GPUs of all nodes")
    return config.parallel.shard * config.parallel.replicate


def _check_nodes(num_ranks: int, ranks_per_node: int, is_given: bool) -> None:
    """Raises UserError where the ranks do not fill the nodes. `is_given`: --ranks-per-node is on the command line."""
    if num_ranks % ranks_per_node:
        flag = "--ranks-per-node" if is_given else "--ranks"
        full = [str(n) for n in range(1, ranks_per_node + 1) if num_ranks % n == 0]
        valid = f"--ranks-per-node {', '.join(full)}, or --ranks a multiple of {ranks_per_node}"
        raise UserError(f"{COMMAND_LINE}: {flag}", f"{num_ranks} ranks do not fill nodes of {ranks_per_node}", valid)


def _device(own: argparse.Namespace, ranks_per_node: int) -> Device:
    name = own.device or DEFAULT_DEVICE
    return this_machine(ranks_per_node) if name == "cpu" else DEVICES[device_key(name)]


def _measured_device(own: argparse.Namespace, config: Config, report: Report, ranks_per_node: int) -> Device:
    """Returns the device of --measured. Raises UserError where --device is given too, or the report has no device."""
    if own.device is not None:
        raise UserError("command line: --device", "--measured gives the device", "one of the two")
    if not report.devices:  # the examination did not get to them
        raise UserError(f"{own.measured}: devices", "is empty", "a report of dpo.doctor that found no problem")
    dtyped = with_dtype(config, unmeasured_device(report, ranks_per_node))
    return measured_device(report, dtyped, ranks_per_node, own.measured)


def _with_given(own: argparse.Namespace, device: Device) -> Device:
    """Returns the device with the links of the command line; --mfu includes the operations that are no products."""
    link = device.link if own.link_gb_s is None else own.link_gb_s * 1e9
    node_link = device.node_link if own.node_link_gb_s is None else own.node_link_gb_s * 1e9
    return replace(device, link=link, node_link=node_link, activation=0.0 if own.mfu else device.activation)


def _with_dtype(config: Config, device: Device) -> Config:
    """Returns the config as `needs.with_dtype` does. Raises RunError where the device has no known peak in that dtype:
    a run of the config would work.
    """
    config = with_dtype(config, device)
    if config.parallel.compute_dtype == "float64" and not device.is_cpu:
        raise RunError(f"no peak of {device.name} in float64 is known; valid: model.dtype float32, or --device cpu")
    return config


# --- the estimate ----------------------------------------------------------------------------------------------------


def estimate(arguments: Arguments, model_config: PretrainedConfig, lengths: Lengths) -> Estimate:
    """Returns the memory, traffic and time of a step. No key of `parallel` may be undecided.

    Args:
        arguments: the config and the cluster.
        model_config: the transformers config of the whole model.
        lengths: the trees of the steps.
    """
    config, cluster = arguments.config, arguments.cluster
    trial = Trial(config, cluster.num_ranks)
    memory, largest = memory_of(trial, model_config, lengths, cluster.device)
    plans = plans_of(trial, model_config, lengths.steps)
    groups = groups_of(config, model_config, cluster.num_ranks)
    speed = step_speed(config, model_config, plans, groups, cluster)
    return Estimate(config, model_config, cluster, lengths.description, largest, memory, groups, speed)


def _advice(
    arguments: Arguments, trial: Trial, model_config: PretrainedConfig, lengths: Lengths, groups: Groups
) -> list[str]:
    """Returns the advice for a trial that fits; see `advice`."""
    device = arguments.cluster.device

    def speed(trial: Trial) -> Speed:
        per_node = min(arguments.cluster.ranks_per_node, trial.num_ranks)
        cluster = replace(arguments.cluster, num_ranks=trial.num_ranks, ranks_per_node=per_node)
        plans = plans_of(trial, model_config, lengths.steps)
        return step_speed(trial.config, model_config, plans, groups, cluster)

    def fits(trial: Trial) -> bool:
        return needed_bytes(trial, model_config, lengths, device) <= device.memory

    return advice(trial, speed, fits)


def _changes(result: Estimate, lengths: Lengths) -> list[Change]:
    """Returns the changes that help a step that does not fit."""
    device, trial = result.cluster.device, Trial(result.config, result.cluster.num_ranks)
    largest_tree = max(tree.num_tokens for trees in (lengths.longest, *lengths.steps) for tree in trees)

    def needed(tried: Trial) -> float:
        return needed_bytes(tried, result.model_config, lengths, device)

    return find_changes(trial, result.needed, largest_tree, needed, device.memory)


def _measured_lines(arguments: Arguments, model_config: PretrainedConfig) -> list[str]:
    """Returns the lines about the report of --measured: its numbers, and the seconds of a checkpoint."""
    if arguments.report is None:
        return []
    config, report = arguments.config, arguments.report
    size = sizes_of(config, model_config).checkpoint
    return wrapped([*sources(report, config, arguments.cluster), *checkpoint_lines(report, size)])


def _tell_forecast(arguments: Arguments, result: Estimate, extent: Extent | None) -> None:
    """Prints what the whole run needs, and writes it where the command line names a file."""
    sizes = sizes_of(arguments.config, result.model_config, extent.num_steps if extent else None)
    found = forecast(result, sizes, extent, write_rate(arguments.report) if arguments.report else None)
    print(harmless("\n".join(wrapped(lines_of_run(found, arguments.cluster.device.is_cpu)))), flush=True)
    if arguments.json:
        write_forecast(arguments.json, found)


def main() -> None:
    """Runs `python -m dpo.estimate`. Raises RunError where the step does not fit."""
    arguments = read_arguments()
    if is_quiet() or not sys.stderr.isatty():
        disable_progress_bars()
    model_config = find_model_config(arguments.config)
    lengths = find_lengths(arguments.config, model_config, arguments.prompt_tokens, arguments.completion_tokens)
    if arguments.config.parallel.undecided:
        choice = decide(Case(arguments.config, model_config, lengths, arguments.cluster))
        arguments = replace(arguments, config=with_values(arguments.config, choice.values))
        print(harmless("\n".join(wrapped([choice.line]))), flush=True)
    result = estimate(arguments, model_config, lengths)
    print(harmless("\n".join([*lines_of(result), *_measured_lines(arguments, model_config)])), flush=True)
    _tell_forecast(arguments, result, lengths.extent)
    trial, heading = Trial(arguments.config, arguments.cluster.num_ranks), []
    if not result.fits:
        say("trying changes that may make the step fit")
        changes = _changes(result, lengths)
        print(harmless("\n".join(lines_of_changes(changes, arguments.cluster.device))), flush=True)
        first = next((change for change in changes if change.fits), None)
        if first is None:
            raise RunError(verdict(result))
        trial, heading = with_keys(trial, first.keys), [f"with {first.words}:"]
    advised = _advice(arguments, trial, model_config, lengths, result.groups)
    if advised:
        print(harmless("\n".join(wrapped([*heading, *advised]))))
    if not result.fits:
        raise RunError(verdict(result))
