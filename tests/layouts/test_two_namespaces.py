"""Two nodes without SLURM: the README's torchrun line, one in each of two network namespaces that a cable joins.

Each has a host name, a hosts file and addresses of its own, so nothing that works over a loopback alone works here.
"""

import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from dpo.config import Config, to_yaml
from tests.support.models import save_model, save_pairs
from tests.support.runs import changed, run, six_steps, train_lines, without_clock, worst_relative

README = Path(__file__).parents[2] / "dpo" / "README.md"
NODES = {"node0": "10.78.0.1", "node1": "10.78.0.2"}
HOSTS = Path("/etc/netns")
"""Where `ip netns exec` looks for what it lays over /etc."""

SECONDS = 120


@contextmanager
def two_nodes(own_address: Mapping[str, str]) -> Iterator[list[str]]:
    """The namespaces of the NODES, where each node's own name resolves to `own_address[name]`; skips where that takes
    more rights than this process has.
    """
    if os.geteuid() != 0 or not shutil.which("ip") or not shutil.which("unshare"):
        pytest.skip("network namespaces need root, ip and unshare")
    namespaces = [f"dpo-{os.getpid()}-{name}" for name in NODES]
    if subprocess.run(["ip", "netns", "add", namespaces[0]], capture_output=True).returncode:
        pytest.skip("network namespaces are not allowed here")
    try:
        ip("netns", "add", namespaces[1])
        ip(
            "link",
            "add",
            "eth0",
            "netns",
            namespaces[0],
            "type",
            "veth",
            "peer",
            "name",
            "eth0",
            "netns",
            namespaces[1],
        )
        for namespace, name in zip(namespaces, NODES, strict=True):
            connect(namespace, name, NODES | {name: own_address[name]})
        yield namespaces
    finally:
        for namespace in namespaces:
            remove(namespace)
        with suppress(OSError):  # other namespaces have their files there
            HOSTS.rmdir()


def connect(namespace: str, name: str, hosts: Mapping[str, str]) -> None:
    """Gives a node its address and its hosts file."""
    ip("-n", namespace, "link", "set", "lo", "up")
    ip("-n", namespace, "address", "add", f"{NODES[name]}/24", "dev", "eth0")
    ip("-n", namespace, "link", "set", "eth0", "up")
    (HOSTS / namespace).mkdir(parents=True)
    (HOSTS / namespace / "hosts").write_text(
        "127.0.0.1 localhost\n" + "".join(f"{ip} {host}\n" for host, ip in hosts.items())
    )


def remove(namespace: str) -> None:
    """Ends what still runs in a namespace, and removes it with its hosts file."""
    listed = subprocess.run(["ip", "netns", "pids", namespace], capture_output=True, text=True)
    for pid in listed.stdout.split():
        os.kill(int(pid), signal.SIGKILL)
    subprocess.run(["ip", "netns", "delete", namespace], capture_output=True)
    shutil.rmtree(HOSTS / namespace, ignore_errors=True)


def ip(*arguments: str) -> None:
    """Runs `ip`, which must succeed."""
    subprocess.run(["ip", *arguments], check=True)


def readme_line(node: int, config: Path) -> list[str]:
    """The README's command for this node, with one rank instead of eight."""
    line = next(line for line in README.read_text().splitlines() if line.strip().startswith("torchrun --nnodes 2"))
    words = shlex.split(line)
    values = {"--node-rank": str(node), "--nproc-per-node": "1", "--master-addr": "node0", "--config": str(config)}
    for option, value in values.items():
        words[words.index(option) + 1] = value
    return [str(Path(sys.executable).with_name(words[0])), *words[1:]]


def train_on_two_nodes(namespaces: list[str], config: Config) -> list[str]:
    """What the two nodes said, both of which must succeed."""
    folder = Path(str(config.train.run_dir)).parent
    (folder / "two.yaml").write_text(to_yaml(config))
    processes = []
    for node, (namespace, name) in enumerate(zip(namespaces, NODES, strict=True)):
        named = f"hostname {name} && exec {shlex.join(readme_line(node, folder / 'two.yaml'))}"
        command = ["ip", "netns", "exec", namespace, "unshare", "--uts", "sh", "-c", named]
        with (folder / f"{name}.log").open("w") as log:
            processes.append(subprocess.Popen(command, stdout=log, stderr=log))
    codes = wait_for(processes)
    said = [(folder / f"{name}.log").read_text() for name in NODES]
    assert codes == [0, 0], "\n".join(said)
    return said


def wait_for(processes: list[subprocess.Popen[bytes]]) -> list[int]:
    """The exit codes; none is waited for longer than until another has failed, or SECONDS are over."""
    end = time.monotonic() + SECONDS
    while any(process.poll() is None for process in processes):
        if any(process.poll() for process in processes) or time.monotonic() > end:
            for process in processes:
                process.kill()
        time.sleep(0.1)
    return [process.wait() for process in processes]


@pytest.mark.parametrize("loopback", [False, True], ids=["own name in the network", "own name a loopback"])
def test_the_readmes_line_trains_on_two_nodes(loopback: bool, tmp_path: Path) -> None:
    """Every metric equals that of a run of one process to 1e-5 relative, in float64, at the first step too: accuracies
    and rewards apart, there, which are those of a policy equal to its reference but for rounding.
    """
    save_model(tmp_path / "model", "gpt2")
    save_pairs(tmp_path / "pairs.jsonl", 12)
    save_pairs(tmp_path / "eval.jsonl", 4, seed=1)
    config = six_steps(tmp_path, tmp_path / "one", model__dtype="float64", parallel__reduce_dtype="float64")
    one = without_clock(train_lines(run(config)))
    with two_nodes(dict.fromkeys(NODES, "127.0.1.1") if loopback else NODES) as namespaces:
        changes = {"train__run_dir": str(tmp_path / "two"), "reference__cache_dir": str(tmp_path / "cache-of-two")}
        said = train_on_two_nodes(namespaces, changed(config, **changes))
    assert "2 on 2 nodes" in said[0]
    two = without_clock(train_lines(tmp_path / "two"))
    assert worst_relative(one[:1], two[:1], ["train/loss", "train/grad_norm", "train/logps/chosen"]) <= 1e-5
    assert worst_relative(one[1:], two[1:], sorted(one[0])) <= 1e-5
