"""The command line of `python -m launch.submit`. The launcher's own flags have no dot; keys of the config have one."""

import argparse
import re
import sys
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from dpo.base.command import Parser, parse_arguments, split_options, words_of
from dpo.base.errors import UserError
from launch.durations import FORMATS, minutes_of

PROG = "launch.submit"
DESCRIPTION = """Submits a training run to SLURM: one task per node, each with the torchrun that you would type
yourself. Keys of the config, such as --loss.beta 0.5, are passed to the run. After a preemption, and when its time is
up, the run resumes by itself."""
_ASKED_BY_US = (
    "array",
    "error",
    "gpus-per-node",
    "nodes",
    "ntasks",
    "ntasks-per-node",
    "open-mode",
    "output",
    "signal",
)
"""Options of sbatch that the launcher sets itself, since it relies on their values."""


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
    signal_delay: int
    """Seconds between SIGUSR2 and the end of the job."""
    max_timeouts: int
    max_crashes: int
    max_parallel: int | None
    cpus_per_gpu: int | None
    """CPUs for each rank."""
    python: str
    container_image: str | None
    container_mounts: str | None
    setup: tuple[str, ...]
    env: tuple[tuple[str, str], ...]
    sbatch: tuple[tuple[str, str | bool], ...]
    """Further options of sbatch; True for an option without a value."""
    follow: bool
    dry_run: bool


def parse_request(argv: Sequence[str] | None = None) -> Request:
    """Parses and checks a command line.

    Args:
        argv: the words of the command line; None: sys.argv[1:].

    Raises:
        UserError: if a flag is unknown, missing or wrong, or flags conflict.
        SystemExit: with code 0, after --help has printed.
    """
    options = split_options(sys.argv[1:] if argv is None else argv)
    args = parse_arguments(_parser(), words_of([option for option in options if not option.is_key]))
    keys = words_of([option for option in options if option.is_key])
    config = [word for file in args.config for word in ("--config", file)]  # `load_config` refuses a second file
    request = Request(
        words=(*config, *keys, *(["--quiet"] if args.quiet else [])),
        sweep=tuple(args.sweep),
        cluster=args.cluster,
        nodes=args.nodes,
        gpus=_gpus(args),
        ranks_per_node=_ranks_per_node(args),
        minutes=minutes_of(args.time) if args.time else None,
        signal_delay=args.signal_delay,
        max_timeouts=args.max_timeouts,
        max_crashes=args.max_crashes,
        max_parallel=args.max_parallel,
        cpus_per_gpu=args.cpus_per_gpu,
        python=args.python,
        container_image=args.container_image,
        container_mounts=args.container_mounts,
        setup=tuple(args.setup),
        env=tuple(_name_and_value("--env", text, "NAME=VALUE", r"[A-Za-z_]\w*") for text in args.env),
        sbatch=_sbatch_options(args),
        follow=args.follow,
        dry_run=args.dry_run,
    )
    _check(request)
    return request


def _parser() -> Parser:
    parser = Parser(prog=f"python -m {PROG}", description=DESCRIPTION, allow_abbrev=False)
    parser.add_argument(
        "--config",
        action="append",
        default=[],
        metavar="FILE",
        help="YAML file of the run; --SECTION.KEY VALUE replaces its values",
    )
    _add_where(parser.add_argument_group("where and how long"))
    _add_restarts(parser.add_argument_group("stopping and restarting"))
    _add_sweep(parser.add_argument_group("many runs"))
    _add_sbatch(parser.add_argument_group("options of sbatch"))
    _add_job(parser.add_argument_group("environment of the job"))
    _add_watching(parser.add_argument_group("watching"))
    return parser


def _add_where(group: argparse._ArgumentGroup) -> None:
    about = "slurm (default): a job of SLURM; local: in the background on this machine; debug: in this process"
    group.add_argument("--cluster", choices=("slurm", "local", "debug"), default="slurm", help=about)
    group.add_argument("--nodes", type=_positive, default=1, metavar="N", help="number of nodes (default: 1)")
    about = "GPUs per node, with one rank per GPU: 8, or with a type a100:8; 0: ranks on CPUs"
    group.add_argument("--gpus-per-node", metavar="N", help=about)
    about = "ranks per node without --gpus-per-node: on CPUs, or on GPUs requested by --sbatch gres=gpu:8"
    group.add_argument("--ranks-per-node", type=_positive, metavar="N", help=about)
    about = f"maximum time that the job runs before it is requeued: {FORMATS}; required for SLURM"
    group.add_argument("--time", metavar="TIME", help=about)


def _add_restarts(group: argparse._ArgumentGroup) -> None:
    about = "seconds before the end of --time at which the ranks get a signal to save; they have three quarters of"
    about += " these seconds to finish (default: 120)"
    group.add_argument("--signal-delay", type=_positive, default=120, metavar="S", help=about)
    about = "maximum number of times that a job of SLURM is restarted when its time is up; preemptions have no limit,"
    about += " but if --time is 10 minutes or less they count as time-outs, as do ranks killed in the last fifth of"
    about += " --time (default: 10)"
    group.add_argument("--max-timeouts", type=_natural, default=10, metavar="N", help=about)
    about = "maximum number of times that the job is restarted after a rank was killed (out of memory, a lost GPU or"
    about += " node) without a new checkpoint in between; an exception always ends the job (default: 3)"
    group.add_argument("--max-crashes", type=_natural, default=3, metavar="N", help=about)


def _add_sweep(group: argparse._ArgumentGroup) -> None:
    about = "start one run for every combination of values, each in its own folder under train.run_dir"
    group.add_argument("--sweep", nargs="+", default=[], metavar="KEY=A,B,...", help=about)
    about = "maximum number of runs of a sweep at the same time"
    group.add_argument("--max-parallel", type=_positive, metavar="N", help=about)


_PLAIN = ("partition", "account", "qos", "constraint", "mail-user", "mail-type", "mem")


def _add_sbatch(group: argparse._ArgumentGroup) -> None:
    for name in _PLAIN:
        group.add_argument(f"--{name}", metavar=name.rpartition("-")[2].upper(), help=f"sbatch's --{name}")
    about = "CPUs per GPU, or per rank on nodes without GPUs"
    group.add_argument("--cpus-per-gpu", type=_positive, metavar="N", help=about)
    about = "any other option of sbatch, as in --sbatch reservation=mine, --sbatch exclusive; may be repeated"
    group.add_argument("--sbatch", action="append", default=[], metavar="KEY[=VALUE]", help=about)


def _add_job(group: argparse._ArgumentGroup) -> None:
    about = "shell command to run before the run starts, as in --setup 'module load cuda'; may be repeated"
    group.add_argument("--setup", action="append", default=[], metavar="LINE", help=about)
    about = "environment variable of the ranks, recorded in the run folder; may be repeated"
    group.add_argument("--env", action="append", default=[], metavar="NAME=VALUE", help=about)
    about = "Python interpreter of the job, for example the one in a container (default: this interpreter)"
    group.add_argument("--python", default=sys.executable, metavar="FILE", help=about)
    about = "image in which pyxis runs the ranks; it must contain scontrol; the working directory is mounted"
    group.add_argument("--container-image", metavar="IMAGE", help=about)
    group.add_argument("--container-mounts", metavar="FROM:TO,...", help="further folders that pyxis mounts")


def _add_watching(group: argparse._ArgumentGroup) -> None:
    about = "print the log of the first node until the job ends; Ctrl-C leaves the job running"
    group.add_argument("--follow", action="store_true", help=about)
    about = "print the script for sbatch and the torchrun command; submit nothing"
    group.add_argument("--dry-run", action="store_true", help=about)


def _positive(text: str) -> int:
    return _at_least(1, text)


def _natural(text: str) -> int:
    return _at_least(0, text)


def _at_least(least: int, text: str) -> int:
    if not re.fullmatch(r"\d+", text) or int(text) < least:
        raise argparse.ArgumentTypeError(f"must be an integer >= {least}, got {text!r}")
    return int(text)


# --- flags that need more than a type ---------------------------------------------------------------------------------


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


def _sbatch_options(args: argparse.Namespace) -> tuple[tuple[str, str | bool], ...]:
    """Returns the options of sbatch: first the flags of the same name, then those of --sbatch. Raises UserError."""
    plain = {name: getattr(args, name.replace("-", "_")) for name in _PLAIN}
    options: dict[str, str | bool] = {name: value for name, value in plain.items() if value is not None}
    for text in args.sbatch:
        name, equals, value = text.partition("=")
        if not re.fullmatch(r"[a-z][a-z-]+", name):
            raise UserError("command line: --sbatch", f"got {text!r}", "a long option of sbatch, KEY or KEY=VALUE")
        _check_sbatch(name, options)
        options[name] = value if equals else True
    return tuple(options.items())


def _check_sbatch(name: str, given: Collection[str]) -> None:
    """Raises UserError if --sbatch must not set the option `name`; `given`: the options that are set already."""
    if name in _ASKED_BY_US:
        raise UserError("command line: --sbatch", f"cannot set {name}, which the launcher sets", "other options")
    if name in (*_PLAIN, "time"):
        raise UserError("command line: --sbatch", f"cannot set {name}, which has its own flag", f"--{name}")
    if name in given:
        raise UserError("command line: --sbatch", f"{name} is given twice", "once")


def _check(request: Request) -> None:
    """Raises UserError if flags conflict."""
    if request.cluster != "slurm" and request.nodes > 1:
        what = f"--cluster {request.cluster} is one machine, got {request.nodes} nodes"
        raise UserError("command line: --nodes", what, "1, or --cluster slurm")
    if request.cluster == "slurm" and request.minutes is None:
        raise UserError("command line: --time", "is missing", FORMATS)
    if request.minutes is not None and 60 * request.minutes <= request.signal_delay:
        what = f"must be below --time, {60 * request.minutes} s, got {request.signal_delay} s"
        raise UserError("command line: --signal-delay", what, "seconds for saving a checkpoint")
    if request.container_mounts and not request.container_image:
        raise UserError("command line: --container-mounts", "needs --container-image", "both flags")
    if request.max_parallel and not request.sweep:
        raise UserError("command line: --max-parallel", "needs --sweep", "both flags")


def unused_here(request: Request) -> list[str]:
    """Returns the flags of a request that have no effect on a job on this machine."""
    given = {
        "--time": request.minutes,
        "--cpus-per-gpu": request.cpus_per_gpu,
        "--container-image": request.container_image,
        "--max-parallel": request.max_parallel,
        "--setup": request.setup if request.cluster == "debug" else None,
    }
    return [flag for flag, value in given.items() if value] + [f"--{name}" for name, _ in request.sbatch]
