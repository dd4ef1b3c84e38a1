"""A real SLURM of two nodes on this machine, while one command runs: `python -m tests.slurm.cluster COMMAND...`

It installs by apt what is missing, then lives in namespaces of its own: processes, mounts, network, host names. So its
daemons and jobs die with it however it ends, kill -9 included, its files lie in a file system in memory over /etc/slurm
that nobody else sees, /etc/hosts of the machine is never touched, and two of them can run side by side.
`python -m tests.slurm.cluster bash` is a shell on it.

Ends with the command's exit code, or with 77 and a line that says why where there can be no such cluster.
"""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

UNAVAILABLE = 77
NODES = {"head": "10.77.0.1", "node1": "10.77.0.2", "node2": "10.77.0.3"}
"""The hosts by name; all addresses are this machine's, in the cluster's own network."""

HOME = Path("/etc/slurm")
"""Where SLURM looks for its configuration; empty memory inside the cluster."""

PROGRAMS = {
    "slurmctld": "slurmctld",
    "slurmd": "slurmd",
    "sbatch": "slurm-client",
    "munged": "munge",
    "ip": "iproute2",
    "unshare": "util-linux",
}
"""The package of each program."""

FREEZER = Path("/sys/fs/cgroup/freezer")

SLURM_CONF = """
ClusterName=two
SlurmctldHost=head
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={home}/munge.socket,cred_expire=5  # a requeued job may start after 5 s, not after 120
StateSaveLocation={home}/state
SlurmdSpoolDir={home}/spool-%n
SlurmctldPidFile={home}/slurmctld.pid
SlurmdPidFile={home}/slurmd-%n.pid
ProctrackType={proctrack}
TaskPlugin=task/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1
SlurmdParameters=config_overrides  # more than the machine has
ReturnToService=2
JobRequeue=1
MinJobAge=3600  # finished jobs can be asked for as long as a test may want to
GresTypes=gpu
NodeName=node1 Port=17001 CPUs=4 RealMemory=64000 Gres=gpu:2
NodeName=node2 Port=17002 CPUs=4 RealMemory=64000 Gres=gpu:2
PartitionName=tests Nodes=ALL Default=YES MaxTime=INFINITE
"""
GRES_CONF = f"NodeName=node[1-2] Name=gpu File={HOME}/gpu[0-1]\n"
CGROUP_CONF = "CgroupPlugin=cgroup/v1\n"
SACCT = """#!/bin/sh
# submitit asks sacct alone, which needs a database; squeue knows as much of jobs that ended lately.
echo 'JobID|State|NodeList'
exec squeue --noheader --states all --array --format '%i|%T|%N'
"""


class Unavailable(Exception):
    """This machine cannot have such a cluster; the message says why."""


# --- outside ---------------------------------------------------------------------------------------------------------


def main(command: Sequence[str]) -> int:
    """Runs the command inside a new cluster; its exit code."""
    os.environ["PATH"] += ":/usr/sbin:/sbin"  # not everybody who is root looks there
    try:
        install_missing()
        check_namespaces()
    except Unavailable as reason:
        print(f"skipped: no SLURM on this machine: {reason}", flush=True)
        return UNAVAILABLE
    freezer = own_freezer()
    inside = [sys.executable, "-m", "tests.slurm.cluster", "--inside", str(freezer or "-"), *command]
    process = subprocess.Popen(["setpriv", "--pdeathsig", "KILL", *NAMESPACES, *inside])
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the command gets it too, and ends in its own way
    signal.signal(signal.SIGTERM, lambda *_: process.kill())
    code = process.wait()
    if freezer:
        remove_cgroup(freezer)
    return as_shells_count(code)


NAMESPACES = ("unshare", "--mount", "--uts", "--net", "--pid", "--fork", "--mount-proc", "--kill-child")


def install_missing() -> None:
    """Installs the packages of missing programs by apt. Raises Unavailable."""
    if os.geteuid() != 0:
        raise Unavailable("it needs root")
    packages = sorted({package for program, package in PROGRAMS.items() if not shutil.which(program)})
    if not packages:
        return
    if not shutil.which("apt-get"):
        raise Unavailable(f"{' '.join(packages)} are missing, and there is no apt-get")
    install = ["apt-get", "install", "--yes", "--no-install-recommends", *packages]
    if apt(install) and (apt(["apt-get", "update"]) or apt(install)):  # the lists of packages may be old or absent
        raise Unavailable(f"apt-get could not install {' '.join(packages)}")


def apt(command: Sequence[str]) -> int:
    """The exit code of an apt command; RUNLEVEL=1 keeps what is installed from being started as a service."""
    quiet = os.environ | {"DEBIAN_FRONTEND": "noninteractive", "RUNLEVEL": "1"}
    return subprocess.run(command, env=quiet, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL).returncode


def check_namespaces() -> None:
    """Raises Unavailable where this process may not make namespaces or mount in them."""
    tried = subprocess.run([*NAMESPACES, "mount", "-t", "tmpfs", "tmpfs", "/mnt"], capture_output=True, text=True)
    if tried.returncode:
        raise Unavailable(f"namespaces are not allowed here: {tried.stderr.strip()}")


def own_freezer() -> Path | None:
    """A new cgroup in which the cluster keeps track of its jobs; None where there is no version 1 of cgroups."""
    if not (FREEZER / "cgroup.procs").is_file():
        return None
    for left in FREEZER.glob("dpo-slurm-*"):  # of one that was killed before it could tidy up
        if not Path("/proc", left.name.rpartition("-")[2]).exists():
            remove_cgroup(left)
    freezer = FREEZER / f"dpo-slurm-{os.getpid()}"
    freezer.mkdir()
    return freezer


def remove_cgroup(folder: Path) -> None:
    """Removes a cgroup and those in it, as soon as the last of their processes is gone."""
    for inner in [path for path in folder.iterdir() if path.is_dir()]:
        remove_cgroup(inner)
    for _ in range(100):
        try:
            return folder.rmdir()
        except OSError:  # a process that was killed just now
            time.sleep(0.1)
    raise RuntimeError(f"{folder}: processes that do not die")


# --- inside ----------------------------------------------------------------------------------------------------------


def run_inside(freezer: Path | None, command: Sequence[str]) -> int:
    """As process 1 of the namespaces: starts the cluster, runs the command, gives its exit code."""
    prepare_machine(freezer)
    write_configuration("proctrack/cgroup" if freezer else "proctrack/linuxproc")
    for name in [name for name in os.environ if name.startswith(("SLURM_", "SBATCH_"))]:
        del os.environ[name]  # of another cluster
    os.environ |= {"SLURM_CONF": str(HOME / "slurm.conf"), "PATH": f"{HOME}:{os.environ['PATH']}"}
    start_daemons()
    process = subprocess.Popen(command)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the command gets it too
    return wait_and_reap(process)


def prepare_machine(freezer: Path | None) -> None:
    """Memory over /etc/slurm, a hosts file that knows the nodes, a loopback, and the cgroup as if it were the root."""
    run("ip", "link", "set", "lo", "up")
    for address in NODES.values():  # names that resolve to 127.* alone do not resolve for SLURM
        run("ip", "address", "add", address, "dev", "lo")
    HOME.mkdir(exist_ok=True)
    run("mount", "-t", "tmpfs", "-o", "mode=755", "tmpfs", str(HOME))
    hosts = HOME / "hosts"
    hosts.write_text("127.0.0.1 localhost\n" + "".join(f"{address} {name}\n" for name, address in NODES.items()))
    run("mount", "--bind", str(hosts), "/etc/hosts")
    socket.sethostname("head")
    if freezer:
        run("mount", "--bind", str(freezer), str(FREEZER))


def write_configuration(proctrack: str) -> None:
    """Everything that the daemons read, and the devices that they take for GPUs: each a /dev/null."""
    (HOME / "slurm.conf").write_text(SLURM_CONF.format(home=HOME, proctrack=proctrack))
    (HOME / "gres.conf").write_text(GRES_CONF)
    (HOME / "cgroup.conf").write_text(CGROUP_CONF)
    for gpu in ("gpu0", "gpu1"):
        run("mknod", str(HOME / gpu), "c", "1", "3")
    (HOME / "sacct").write_text(SACCT)
    (HOME / "sacct").chmod(0o755)
    (HOME / "munge.key").write_bytes(os.urandom(128))
    (HOME / "munge.key").chmod(0o600)


def start_daemons() -> None:
    """munge, the controller, and a slurmd a node, each with the name of its node; returns when both nodes are idle."""
    munge = {name: f"--{name}-file={HOME}/munge.{name}" for name in ("key", "log", "pid", "seed")}
    daemon("munged", "munged", "--foreground", f"--socket={HOME}/munge.socket", *munge.values())
    wait_until((HOME / "munge.socket").exists, "munged")
    daemon("slurmctld", "slurmctld", "-D", "-c")
    for node in ("node1", "node2"):
        named = f"hostname {node}; exec slurmd -D -N {node}"
        daemon(f"slurmd-{node}", "unshare", "--uts", "sh", "-c", named)
    wait_until(lambda: output("sinfo", "--noheader", "--states=idle", "--format=%D").strip() == "2", "slurmctld")


def daemon(name: str, *command: str) -> None:
    """Starts a daemon that logs to a file of its name. Not in the terminal's group: Ctrl-C is for the command."""
    with (HOME / f"{name}.log").open("w") as log:
        subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)


def wait_until(is_so: Callable[[], bool], name: str, seconds: float = 60) -> None:
    """Returns when `is_so()`. Raises RuntimeError with the end of the daemons' logs where that takes too long."""
    end = time.monotonic() + seconds
    while not is_so():
        if time.monotonic() > end:
            logs = [f"{log.name}:\n{log.read_text()[-2000:]}" for log in HOME.glob("*.log")]
            raise RuntimeError(f"{name} is not ready after {seconds} seconds\n" + "\n".join(logs))
        time.sleep(0.1)


def wait_and_reap(command: subprocess.Popen[bytes]) -> int:
    """The command's exit code; meanwhile buries orphans, as process 1 must: a dead process would look alive."""
    pid = None
    while pid != command.pid:
        pid, status = os.waitpid(-1, 0)
    return as_shells_count(os.waitstatus_to_exitcode(status))


def as_shells_count(code: int) -> int:
    """The exit code of a process, 128 and the signal where one killed it."""
    return code if code >= 0 else 128 - code


def run(*command: str) -> None:
    """Runs a command that must succeed."""
    subprocess.run(command, check=True)


def output(*command: str) -> str:
    """What a command prints, whether or not it succeeds."""
    return subprocess.run(command, capture_output=True, text=True).stdout


if __name__ == "__main__":
    if sys.argv[1:2] == ["--inside"]:
        sys.exit(run_inside(None if sys.argv[2] == "-" else Path(sys.argv[2]), sys.argv[3:]))
    sys.exit(main(sys.argv[1:]))
