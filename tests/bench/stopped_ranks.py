"""How long a run of two ranks lives on after one of them has stopped, and its last line: `python -m
tests.bench.stopped_ranks`, in ten minutes.

    --timeout 20        parallel.timeout_seconds and setup_timeout_seconds
    --launcher NAME     dpo, torchrun or here (`dpo submit` on this machine); all of them by default
    --fault NAME ...    of tests/support/faulty_rank.py; --place NAME ... likewise
    --code DIR          another checkout
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from dpo.config import Config, to_yaml
from tests.support.faulty_rank import ROOT, environment
from tests.support.runs import save_six_steps, six_steps

CASES = (
    *(("stop", place) for place in ("forward", "save", "reference", "input", "start")),
    *(("hold_the_lock", "forward"), ("backtrack", "forward"), ("hang", "forward"), ("hang", "input")),
    *((fault, "forward") for fault in ("fail", "die", "abort", "leave")),
)
LAUNCHERS = {
    "dpo": ("dpo", "train", "--ranks", "2"),
    "torchrun": ("torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "dpo.train"),
    "here": ("launch.submit", "--cluster", "debug", "--no-estimate", "--ranks-per-node", "2", "--max-crashes", "0"),
}


def config(root: Path, name: str, timeout: int) -> Config:
    """Twenty steps of a tiny model, a checkpoint every second."""
    changes = {"train__steps": 20, "train__eval_every": None, "reference__cache_dir": str(root / name / "cache")}
    times = {"parallel__timeout_seconds": timeout, "parallel__setup_timeout_seconds": timeout}
    return six_steps(root, root / name / "run", **changes, **times)


def processes_of(root: Path) -> Iterator[int]:
    """The processes whose command line or environment names a folder."""
    for path in Path("/proc").glob("[0-9]*"):
        try:
            text = (path / "cmdline").read_bytes() + (path / "environ").read_bytes()
            state = (path / "stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue
        if str(root).encode() in text and state != "Z" and int(path.name) != os.getpid():
            yield int(path.name)


def measure(root: Path, launcher: str, fault: str, place: str, arguments: argparse.Namespace) -> tuple[float, int, str]:
    """(seconds from the fault until all processes are gone, exit code, last line)."""
    name = f"{launcher}-{fault}-{place}"
    (root / name).mkdir()
    file, said, mark = root / name / "c.yaml", root / name / "said", root / name / "broken"
    file.write_text(to_yaml(config(root, name, arguments.timeout)))
    variables = environment(fault, place) | {"TEST_FOLDER": str(root / name), "TEST_MARK": str(mark)}
    variables["PYTHONPATH"] = f"{ROOT / 'tests/support/faulty'}:{arguments.code}"
    words = [*LAUNCHERS[launcher], "--config", str(file)]
    with said.open("wb") as stream:
        process = subprocess.Popen(
            [sys.executable, "-m", *words], cwd=arguments.code, env=variables, stdout=stream, stderr=stream
        )
    while process.poll() is None and not mark.exists():
        time.sleep(0.1)
    begun = time.monotonic()
    code = process.wait()
    while list(processes_of(root / name)):
        time.sleep(0.1)
    lines = said.read_text(errors="replace").splitlines()
    told = [line for line in lines if line.startswith(("error:", "  traceback :", "    error:"))] or lines
    return time.monotonic() - begun, code, told[-1].strip()


def main() -> None:
    """Prints a row per case."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--timeout", type=int, default=20)
    parser.add_argument("--launcher", nargs="+", choices=LAUNCHERS, default=list(LAUNCHERS))
    parser.add_argument("--fault", nargs="+")
    parser.add_argument("--place", nargs="+")
    parser.add_argument("--code", type=Path, default=ROOT)
    arguments = parser.parse_args()
    print(
        "| launcher | fault | place | seconds until all are gone | exit code | last line |\n|---|---|---|---|---|---|"
    )
    with tempfile.TemporaryDirectory(prefix="stopped-") as folder:
        root = save_six_steps(Path(folder))
        for launcher in arguments.launcher:
            for fault, place in CASES:
                if fault in (arguments.fault or [fault]) and place in (arguments.place or [place]):
                    seconds, code, line = measure(root, launcher, fault, place, arguments)
                    print(f"| {launcher} | {fault} | {place} | {seconds:.1f} | {code} | {line} |", flush=True)


if __name__ == "__main__":
    main()
