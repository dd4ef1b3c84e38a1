"""The options of sbatch that a command line asks for, checked against those of sbatch's manual."""

import argparse
import re
from collections.abc import Collection, Mapping

from dpo.base.errors import UserError
from dpo.command.likeness import closest, meant
from dpo.command.line import COMMAND_LINE
from launch.flags import PLAIN

_ASKED_BY_US: Mapping[str, str] = {
    "array": "--sweep",
    "error": "other options",
    "gpus-per-node": "--gpus-per-node",
    "nodes": "--nodes",
    "ntasks": "--ranks-per-node",
    "ntasks-per-node": "--ranks-per-node",
    "open-mode": "other options",
    "output": "other options",
    "signal": "--signal-delay",
}
"""Option of sbatch that the launcher sets itself, since it relies on its value -> what to set in its place."""

OPTIONS = """
    account acctg-freq array batch bb bbf begin chdir cluster-constraint clusters comment consolidate-segments
    constraint container contiguous core-spec cores-per-socket cpu-freq cpus-per-gpu cpus-per-task deadline delay-boot
    dependency distribution error exclude exclusive export export-file extra extra-node-info get-user-env gid
    gpu-bind gpu-freq gpus gpus-per-node gpus-per-socket gpus-per-task gres gres-flags hint hold ignore-pbs input
    job-name kill-on-invalid-dep licenses mail-type mail-user mcs-label mem mem-bind mem-per-cpu mem-per-gpu mincpus
    network nice no-kill no-requeue nodefile nodelist nodes ntasks ntasks-per-core ntasks-per-gpu ntasks-per-node
    ntasks-per-socket oom-kill-step open-mode output overcommit oversubscribe partition power prefer priority
    profile propagate qos reboot requeue reservation resv-ports segment signal sockets-per-node spread-job stepmgr
    switches thread-spec threads-per-core time time-min tmp tres-bind tres-per-task uid use-min-nodes wait
    wait-all-nodes wckey
""".split()
"""The long options that a script of sbatch may have, of SLURM 22 to 25. Plugins of a cluster add others."""
_LIKENESS = 0.8


def sbatch_options(args: argparse.Namespace) -> tuple[tuple[str, str | bool], ...]:
    """Returns the options of sbatch: first the flags of the same name, then those of --sbatch. Raises UserError."""
    plain = {name: getattr(args, name.replace("-", "_")) for name in PLAIN}
    options: dict[str, str | bool] = {name: value for name, value in plain.items() if value is not None}
    for text in args.sbatch:
        name, equals, value = text.partition("=")
        if not re.fullmatch(r"[a-z][a-z-]+", name) or text.endswith("="):
            raise UserError(f"{COMMAND_LINE}: --sbatch", f"got {text!r}", "a long option of sbatch, KEY or KEY=VALUE")
        _check(name, options)
        options[name] = value if equals else True
    return tuple(options.items())


def _check(name: str, given: Collection[str]) -> None:
    """Raises UserError if --sbatch must not set the option `name`, or it is a near miss of another. `given`: the
    options that are set already.
    """
    place = f"{COMMAND_LINE}: --sbatch"
    if name in _ASKED_BY_US:
        raise UserError(place, f"cannot set {name}, which the launcher sets", _ASKED_BY_US[name])
    if name in (*PLAIN, "time"):
        raise UserError(place, f"cannot set {name}, which has its own flag", f"--{name}")
    if name in given:
        raise UserError(place, f"{name} is given twice", "once")
    near = None if name in OPTIONS else closest(name, OPTIONS, _LIKENESS)
    if near is None:
        return
    flag = f"--{near}" if near in (*PLAIN, "time") else _ASKED_BY_US.get(near, f"--sbatch {near}")
    raise UserError(place, f"{name} is not an option of sbatch{meant(near)}", flag)


def doubts(options: Collection[tuple[str, str | bool]]) -> list[str]:
    """Returns a warning for each of the options that only a plugin of the cluster could know."""
    what = "not an option of sbatch's manual; sbatch refuses it unless a plugin knows it"
    return [f"--sbatch {name}: {what}" for name, _ in options if name not in OPTIONS]
