"""The command line of `python -m launch.submit`. The launcher's own flags have no dot; keys of the config have one."""

import argparse
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dpo.base.errors import UserError
from dpo.command.line import Option, Parser, names_of, parse_arguments, split_options, words_of
from dpo.config.help import print_about_config
from dpo.config.hints import check_setting, unknown_flag
from launch.durations import FORMATS, minutes_of
from launch.flags import REPEATABLE, make_parser
from launch.sbatch import sbatch_options

LEAST_SIGNAL_DELAY = 120
"""Seconds; also the value where the needs of the run are not known."""


@dataclass(frozen=True)
class Request:
    """A parsed and checked command line of `launch.submit`."""

    words: tuple[str, ...]
    """The command line of the run: --config FILE --SECTION.KEY VALUE ..."""
    sweep: tuple[str, ...]
    """KEY=VALUE,VALUE,... of --sweep."""
    cluster: str
    nodes: int
    gpus: str | None
    """GPUs per node as SLURM takes them: 8, or a100:8; None: no GPUs."""
    ranks_per_node: int
    minutes: int | None
    device: str | None
    measured: str | None
    no_estimate: bool
    prepare: bool
    prepare_partition: str | None
    signal_delay: int | None
    """Seconds between SIGUSR2 and the end of the job; None: not decided yet (see `launch.resources`)."""
    max_timeouts: int
    max_crashes: int
    max_parallel: int | None
    cpus_per_gpu: int | None
    """CPUs for each rank."""
    python: str
    """The interpreter of the ranks."""
    apptainer: str | None
    container_image: str | None
    container_mounts: str | None
    setup: tuple[str, ...]
    env: tuple[tuple[str, str], ...]
    sbatch: tuple[tuple[str, str | bool], ...]
    """Further options of sbatch; True for an option without a value."""
    follow: bool
    dry_run: bool
    srun: tuple[str, ...] = ()
    """Further arguments of srun."""

    @property
    def seconds_to_save(self) -> int:
        """Returns the seconds between SIGUSR2 and the end of the job."""
        return self.signal_delay or LEAST_SIGNAL_DELAY

    @property
    def launcher_python(self) -> str:
        """Returns the interpreter of the launcher on the nodes, which stays outside an image of Apptainer."""
        return sys.executable if self.apptainer else self.python

    def sbatch_option(self, name: str) -> str | None:
        """Returns the value of an option of sbatch; None if it is not set or has no value."""
        value = dict(self.sbatch).get(name)
        return value if isinstance(value, str) else None


def read_arguments(words: Sequence[str] | None = None, parser: Parser | None = None) -> Request:
    """Parses and checks a command line.

    Args:
        words: the command line; None: this process's own.
        parser: of `make_parser`; None: that of `python -m launch.submit`.

    Raises:
        UserError: if a flag is unknown, missing or wrong, or flags conflict.
        SystemExit: with code 0, after --help, --help-config or --config-schema has printed.
    """
    parser = parser or make_parser()
    own, of_config = _divided(split_options(sys.argv[1:] if words is None else words))
    print_about_config([option.key for option in own if option.key])
    _check_flags(own, parser)
    args = parse_arguments(parser, words_of(own), REPEATABLE)
    request = Request(
        words=(*words_of(of_config), *(["--quiet"] if args.quiet else [])),
        sweep=tuple(args.sweep),
        cluster=args.cluster,
        nodes=args.nodes,
        gpus=_gpus(args),
        ranks_per_node=_ranks_per_node(args),
        minutes=minutes_of(args.time) if args.time else None,
        device=args.device,
        measured=args.measured,
        no_estimate=args.no_estimate,
        prepare=args.prepare,
        prepare_partition=args.prepare_partition,
        signal_delay=args.signal_delay,
        max_timeouts=args.max_timeouts,
        max_crashes=args.max_crashes,
        max_parallel=args.max_parallel,
        cpus_per_gpu=args.cpus_per_gpu,
        python=args.python or _default_python(args),
        apptainer=args.apptainer,
        container_image=args.container_image,
        container_mounts=args.container_mounts,
        setup=tuple(args.setup),
        env=tuple(_name_and_value("--env", text, "NAME=VALUE", r"[A-Za-z_]\w*") for text in args.env),
        sbatch=sbatch_options(args),
        follow=args.follow,
        dry_run=args.dry_run,
    )
    _check(request)
    return request


def _divided(options: Sequence[Option]) -> tuple[list[Option], list[Option]]:
    """Returns the launcher's own options, and those that are the config's. Bare words KEY=VALUE after --sweep are more
    of its values.
    """
    own: list[Option] = []
    of_config: list[Option] = []
    is_sweep = False
    for option in options:
        is_sweep = option.key == "sweep" or (is_sweep and option.is_bare and option.is_key)
        (own if is_sweep or not option.is_config else of_config).append(option)
    return own, of_config


def _check_flags(options: Sequence[Option], parser: Parser) -> None:
    """Raises UserError for a flag that does not exist, which may be a key of the config or one of TRL's names."""
    names = [*names_of(parser.parse_args([])), "help"]
    for option in options:
        if option.key is None:
            check_setting(option)
        elif not option.is_key and option.key not in names:
            raise unknown_flag(option.key, names, f"see {parser.prog} --help")


# --- flags that need more than a type ---------------------------------------------------------------------------------


def _default_python(args: argparse.Namespace) -> str:
    """Returns the interpreter of the ranks: python3 of the image, if there is one; pyxis is part of SLURM alone."""
    is_in_image = args.apptainer or (args.container_image and args.cluster == "slurm")
    return "python3" if is_in_image else sys.executable


def _gpus(args: argparse.Namespace) -> str | None:
    text = args.gpus_per_node
    if text is None and args.ranks_per_node is None:
        raise UserError("command line: --gpus-per-node", "is missing", "N, or 0 with --ranks-per-node N")
    if text is not None and not re.fullmatch(r"([\w.-]+:)?\d+", text):
        raise UserError("command line: --gpus-per-node", f"got {text!r}", "8, or a type as in a100:8")
    return None if text is None or _count(text) == 0 else text


def _count(gpus: str) -> int:
    return int(gpus.rpartition(":")[2])


def _ranks_per_node(args: argparse.Namespace) -> int:
    gpus, ranks = _gpus(args), args.ranks_per_node
    if gpus is None and ranks is None:
        raise UserError("command line: --ranks-per-node", "is missing, there are no GPUs", "an integer >= 1")
    if gpus is not None and ranks not in (None, _count(gpus)):
        what = f"must be --gpus-per-node, one rank per GPU, got {ranks} and {gpus}"
        raise UserError("command line: --ranks-per-node", what, "leave it out")
    return int(ranks) if gpus is None else _count(gpus)


def _name_and_value(flag: str, text: str, form: str, name_form: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals or not re.fullmatch(name_form, name):
        raise UserError(f"command line: {flag}", f"got {text!r}", form)
    return name, value


def _check(request: Request) -> None:
    """Raises UserError if flags conflict."""
    if request.cluster != "slurm" and request.nodes > 1:
        what = f"--cluster {request.cluster} is one machine, got {request.nodes} nodes"
        raise UserError("command line: --nodes", what, "1, or --cluster slurm")
    if request.cluster == "slurm" and request.minutes is None:
        raise UserError("command line: --time", "is missing", FORMATS)
    if request.minutes is not None and 60 * request.minutes <= request.seconds_to_save:
        if request.signal_delay is None:
            what = f"{60 * request.minutes} s leave no time beside {LEAST_SIGNAL_DELAY} s for saving a checkpoint"
            raise UserError("command line: --time", what, "a longer time, or a shorter --signal-delay")
        what = f"must be below --time, {60 * request.minutes} s, got {request.signal_delay} s"
        raise UserError("command line: --signal-delay", what, "seconds for saving a checkpoint")
    if request.container_image and request.apptainer:
        raise UserError("command line: --apptainer", "--container-image is given too", "one of them")
    if request.container_mounts and not (request.container_image or request.apptainer):
        what = "needs --apptainer or --container-image"
        raise UserError("command line: --container-mounts", what, "both flags")
    if request.prepare_partition and not request.prepare:
        raise UserError("command line: --prepare-partition", "needs --prepare", "both flags")
    if request.measured and not Path(request.measured).is_file():
        raise UserError(
            "command line: --measured", f"no such file: {request.measured}", "a file of dpo.doctor --report"
        )
    if request.max_parallel and not request.sweep:
        raise UserError("command line: --max-parallel", "needs --sweep", "both flags")


_OF_GPU_NODES = ("constraint", "cpus-per", "exclude", "exclusive", "mem", "nodelist", "ntasks-per", "tres")
"""First letters of the options of sbatch that mean the run's nodes; sbatch refuses some of them without GPUs."""
PREPARE_CPUS = 8
"""Maximum number of CPUs of the job of --prepare, for processes that tokenize."""
PREPARE_MEMORY = "16G"


def for_preparing(request: Request, cpus: int | None, max_minutes: int | None) -> Request:
    """Returns the request of the job of --prepare: one process on one node without GPUs, with the other options.

    Args:
        request: of the runs.
        cpus: CPUs of a node of the job's partition; None: not known, and the cluster's default is asked for.
        max_minutes: the limit of the job's partition; None: none is known.
    """
    kept = [(name, value) for name, value in request.sbatch if not name.startswith(("g", *_OF_GPU_NODES))]
    if request.prepare_partition:
        moved = ("partition", "reservation")
        kept = [("partition", request.prepare_partition), *(pair for pair in kept if pair[0] not in moved)]
    if request.sbatch_option("mem"):  # else SLURM may not limit memory, and have no value for a node's
        kept.append(("mem", PREPARE_MEMORY))
    changes: dict[str, Any] = {"nodes": 1, "gpus": None, "ranks_per_node": 1, "max_parallel": None}
    changes["cpus_per_gpu"] = cpus and min(cpus, PREPARE_CPUS)
    changes["minutes"] = min(request.minutes, max_minutes) if request.minutes and max_minutes else request.minutes
    return replace(request, **changes, sbatch=tuple(kept))


def unused_here(request: Request) -> list[str]:
    """Returns the flags of a request that have no effect on a job on this machine."""
    given = {
        "--time": request.minutes,
        "--cpus-per-gpu": request.cpus_per_gpu,
        "--container-image": request.container_image,
        "--device": request.device,
        "--measured": request.measured,
        "--prepare-partition": request.prepare_partition,
        "--max-parallel": request.max_parallel,
        "--setup": request.setup if request.cluster == "debug" else None,
    }
    return [flag for flag, value in given.items() if value] + [f"--{name}" for name, _ in request.sbatch]
