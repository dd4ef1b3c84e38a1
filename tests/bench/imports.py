"""What importing the trainer asks of a file system: `python -m tests.bench.imports [--ranks 16]`.

Prints, by strace, the files that importing `dpo.train.program` opens, the look-ups that fail, the calls that ask for a
file's attributes, and the bytes read, each in all and by package. A network file system asks its server at every open.

With `--ranks`, as root, it empties the page cache and prints the seconds until that many ranks have joined their group:
with all importing at once, and after one process has imported alone, as a launcher could do on each node.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

CALLS = "openat,newfstatat,statx,readlink,access,read,pread64"
JOIN = """
import dpo.train.program
from dpo.distributed.collectives import all_gather
from dpo.distributed.startup import open_world
with open_world(600):
    all_gather(None)
"""


def package_of(path: str) -> str:
    """The package that a file belongs to; models of transformers apart, whose files it reads one by one."""
    found = re.search(r"site-packages/([^/]+)(/models/)?", path)
    if found:
        return found[1] + (found[2] or "").rstrip("/")
    return "dpo" if "/dpo/" in path else "Python" if "/lib/python3" in path else "other"


def count(trace: str) -> dict[str, Counter[str]]:
    """Counts by kind and package in strace's lines."""
    counts: dict[str, Counter[str]] = {kind: Counter() for kind in ("opened", "failed", "attributes", "bytes read")}
    for line in trace.splitlines():
        if read := re.search(r"(?:read|pread64)\(\d+<(/[^>]*)>.* = (\d+)$", line):
            counts["bytes read"][package_of(read[1])] += int(read[2])
        elif call := re.search(r'(\w+)\(.*?"([^"]+)".* = (-?\d+)', line):
            kind = "failed" if call[3] == "-1" else "opened" if call[1] == "openat" else "attributes"
            counts[kind][package_of(call[2])] += 1
    return counts


def traced(code: str) -> str:
    """strace's lines of a Python program."""
    with tempfile.NamedTemporaryFile("r", errors="replace") as file:
        words = ["strace", "-f", "-y", "-e", f"trace={CALLS}", "-o", file.name, sys.executable, "-c", code]
        subprocess.run(words, check=True)
        return file.read()


def seconds_to_join(ranks: int, cold: bool, alone_first: bool) -> float:
    """The seconds until all ranks have joined their group, torchrun's own import included."""
    if cold:
        os.sync()
        Path("/proc/sys/vm/drop_caches").write_text("3", encoding="ascii")
    started = time.monotonic()
    if alone_first:
        subprocess.run([sys.executable, "-c", "import dpo.train.program"], check=True)
    with tempfile.NamedTemporaryFile("w", suffix=".py") as file:
        file.write(JOIN)
        file.flush()
        run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), file.name]
        subprocess.run(run, check=True, env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])})
    return time.monotonic() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int)
    ranks = parser.parse_args().ranks
    for kind, counts in count(traced("import dpo.train.program")).items():
        shown = ", ".join(f"{package} {number:,}" for package, number in counts.most_common(6))
        print(f"{kind}: {counts.total():,} ({shown})")
    if ranks:
        for _ in range(2):
            print(f"{ranks} ranks, empty cache, all at once: {seconds_to_join(ranks, True, False):.1f} s")
            print(f"{ranks} ranks, empty cache, one alone first: {seconds_to_join(ranks, True, True):.1f} s")
        print(f"{ranks} ranks, files in the cache: {seconds_to_join(ranks, False, False):.1f} s")


if __name__ == "__main__":
    main()
