"""The flags of `python -m launch.submit`, with their help texts."""

import argparse
import re

from dpo.command.line import SWITCHES, Parser, with_quiet
from dpo.config.help import TEXTS as CONFIG_TEXTS
from launch.durations import FORMATS

PROG = "launch.submit"
DESCRIPTION = """Submits a training run to SLURM: one task per node, each with the torchrun that you would type
yourself. Keys of the config, such as --loss.beta 0.5, are passed to the run. After a preemption, and when its time is
up, the run resumes by itself."""


REPEATABLE = ("env", "sbatch", "setup", "sweep")
"""Flags that may be given more than once."""


def make_parser(prog: str = f"python -m {PROG}") -> Parser:
    """Returns the parser of the launcher's own flags. --config stands in it for the help text alone."""
    example = f"example: {prog} my.yaml --nodes 2 --gpus-per-node 8 --time 1-0 loss.beta=0.5"
    parser = Parser(prog, description=DESCRIPTION, epilog=example, allow_abbrev=False)
    about = "YAML file of the run, also without --config; --SECTION.KEY VALUE or SECTION.KEY=VALUE replaces its values"
    parser.add_argument("--config", metavar="FILE", help=about)
    for flag in CONFIG_TEXTS:
        parser.add_argument(f"--{flag}", action="store_true", help=SWITCHES[flag])
    _add_where(parser.add_argument_group("where and how long"))
    _add_restarts(parser.add_argument_group("stopping and restarting"))
    _add_sweep(parser.add_argument_group("many runs"))
    _add_sbatch(parser.add_argument_group("options of sbatch"))
    _add_job(parser.add_argument_group("environment of the job"))
    _add_watching(parser.add_argument_group("watching"))
    return with_quiet(parser)


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
    about = "GPU for the estimate of the run's needs, as dpo.estimate takes it (default: the type of --gpus-per-node,"
    about += " else h100)"
    group.add_argument("--device", metavar="NAME", help=about)
    about = "report of dpo.doctor --report from these nodes: the estimate then uses measured speeds"
    group.add_argument("--measured", metavar="FILE", help=about)
    about = "do not estimate what the run needs: --signal-delay and --mem are not derived"
    group.add_argument("--no-estimate", action="store_true", help=about)
    about = "queue a job without GPUs that runs dpo.prepare, and start the run after it"
    group.add_argument("--prepare", action="store_true", help=about)
    about = "partition of the job of --prepare (default: that of the run)"
    group.add_argument("--prepare-partition", metavar="NAME", help=about)


def _add_restarts(group: argparse._ArgumentGroup) -> None:
    about = "seconds before the end of --time at which the ranks get a signal to save; they have three quarters of"
    about += " these seconds to finish (default: derived from the bytes of a checkpoint and the speed of the disk, at"
    about += " least 120)"
    group.add_argument("--signal-delay", type=_positive, metavar="S", help=about)
    about = "maximum number of times that a job of SLURM is restarted when its time is up; preemptions have no limit,"
    about += " but if --time is 10 minutes or less they count as time-outs, as do ranks killed in the last fifth of"
    about += " --time (default: 10)"
    group.add_argument("--max-timeouts", type=_natural, default=10, metavar="N", help=about)
    about = "maximum number of times that the job is restarted after a rank was killed (out of memory, a lost GPU or"
    about += " node) without a new checkpoint in between; an exception always ends the job (default: 3)"
    group.add_argument("--max-crashes", type=_natural, default=3, metavar="N", help=about)


def _add_sweep(group: argparse._ArgumentGroup) -> None:
    about = "start one run for every combination of values, each in its own folder under train.run_dir"
    group.add_argument("--sweep", nargs="+", action="extend", default=[], metavar="KEY=A,B,...", help=about)
    about = "maximum number of runs of a sweep at the same time"
    group.add_argument("--max-parallel", type=_positive, metavar="N", help=about)


PLAIN = ("partition", "account", "qos", "constraint", "mail-user", "mail-type", "mem")


def _add_sbatch(group: argparse._ArgumentGroup) -> None:
    for name in PLAIN:
        derived = " (default: derived from the estimate, where SLURM limits memory)" if name == "mem" else ""
        group.add_argument(f"--{name}", metavar=name.rpartition("-")[2].upper(), help=f"sbatch's --{name}{derived}")
    about = "CPUs per GPU, or per rank on nodes without GPUs (default: derived from the CPUs of a node, at most 8 per"
    about += " GPU)"
    group.add_argument("--cpus-per-gpu", type=_positive, metavar="N", help=about)
    about = "any other option of sbatch, as in --sbatch reservation=mine, --sbatch exclusive; may be repeated"
    group.add_argument("--sbatch", action="append", default=[], metavar="KEY[=VALUE]", help=about)


def _add_job(group: argparse._ArgumentGroup) -> None:
    about = "shell command to run before the run starts, as in --setup 'module load cuda'; may be repeated"
    group.add_argument("--setup", action="append", default=[], metavar="LINE", help=about)
    about = "environment variable of the ranks, recorded in the run folder; may be repeated"
    group.add_argument("--env", action="append", default=[], metavar="NAME=VALUE", help=about)
    about = "Python interpreter of the ranks (default: this interpreter; of an image python3)"
    group.add_argument("--python", metavar="FILE", help=about)
    about = "image in which Apptainer runs the ranks: a .sif file, or docker://..."
    group.add_argument("--apptainer", metavar="IMAGE", help=about)
    about = "image in which pyxis runs the job; it must contain scontrol and squeue"
    group.add_argument("--container-image", metavar="IMAGE", help=about)
    about = "further folders that the container sees; those that the run needs are added by themselves (--dry-run)"
    group.add_argument("--container-mounts", metavar="FROM:TO,...", help=about)


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
