"""What a restart takes, from torchrun to the end of a resumed run's first step: `python -m tests.bench.restart`.

Prints, as medians over `--starts` starts of two ranks of a tiny model, the wall seconds of each phase and the seconds
of the processor that rank 0 took in it, and the same of importing the trainer alone: plainly, and as a rank does.
The processor's seconds depend less on what else runs on the machine. Then the floor: the same of the least program
that trains with the same libraries on one rank (`least.py`). What is above it is the trainer's own.

Python keeps what it has compiled, as it does for installed packages, also where PYTHONDONTWRITEBYTECODE is set.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
IMPORTS = {
    "plainly": "import dpo.train.program",
    "as a rank": "from dpo.command.exits import slow_imports\nwith slow_imports(): import dpo.train.program",
}
LEAST = [sys.executable, "-m", "tests.bench.least"]
TELL = "\nimport time; print(time.process_time())"


def cpu_seconds_of_imports(code: str) -> float:
    """The processor's seconds of a new Python until it has imported the trainer."""
    done = subprocess.run([sys.executable, "-c", code + TELL], check=True, capture_output=True, text=True, cwd=ROOT)
    return float(done.stdout)


def measured_start(config: Path, told: Path) -> dict[str, tuple[float, float]]:
    """Phase -> (wall seconds, processor's seconds of rank 0) of a start by torchrun, which ends with its first step."""
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    words += ["-m", "tests.bench.restart", "--rank", str(told), "--config", str(config)]
    started = time.monotonic()
    subprocess.run(words, cwd=ROOT, capture_output=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    facts = json.loads(told.read_text(encoding="utf-8"))
    told.unlink()
    return {"torchrun": (facts["begun"] - started, 0.0), **facts["phases"]}


def measured_floor(model: Path, checkpoint: Path) -> dict[str, tuple[float, float]]:
    """Phase -> (0, processor's seconds) of the least program."""
    words = [*LEAST, str(model), str(checkpoint)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, check=True, capture_output=True, text=True, cwd=ROOT, env=environment)
    return {name: (0.0, seconds) for name, seconds in json.loads(done.stdout.splitlines()[-1]).items()}


def train_as_rank(told: Path) -> None:
    """Trains as a rank until its first step; rank 0 tells the phases."""
    from dpo.command.exits import slow_imports

    with slow_imports():
        from dpo.train import phases, program

    ends: list[tuple[str, float]] = []
    end = phases.Phases.end

    def end_and_note(these: phases.Phases, name: str) -> None:
        end(these, name)
        ends.append((name, time.process_time()))
        if name == "first step":
            if os.environ["RANK"] == "0":
                begun = phases.process_start()
                told.write_text(json.dumps({"begun": begun, "phases": with_cpu(these.seconds, ends)}), "utf-8")
            os._exit(0)

    phases.Phases.end = end_and_note  # type: ignore[method-assign]
    program.main()


def with_cpu(seconds: Mapping[str, float], ends: Sequence[tuple[str, float]]) -> dict[str, tuple[float, float]]:
    """Phase -> (wall seconds, processor's seconds), from the processor's time at the end of each phase."""
    before = [0.0, *(cpu for _, cpu in ends)]
    return {name: (seconds[name], cpu - since) for (name, cpu), since in zip(ends, before, strict=False)}


def show(starts: Sequence[Mapping[str, tuple[float, float]]]) -> None:
    """Prints a row a phase."""
    print(f"{'phase':<12} {'wall s':>7} {'CPU s':>7}")
    medians: dict[str, Any] = {
        name: [statistics.median(start[name][i] for start in starts) for i in (0, 1)] for name in starts[0]
    }
    medians["all"] = [statistics.median(sum(part[i] for part in start.values()) for start in starts) for i in (0, 1)]
    for name, (wall, cpu) in medians.items():
        print(f"{name:<12} {wall:>7.2f} {cpu:>7.2f}")


def main() -> None:
    from dpo.config import to_yaml  # here and below: in a rank, only what a rank imports is measured
    from tests.support.runs import run_until, save_six_steps, six_steps

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--starts", type=int, default=5)
    starts = parser.parse_args().starts
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    for how, code in IMPORTS.items():
        seconds = statistics.median(cpu_seconds_of_imports(code) for _ in range(starts))
        print(f"importing the trainer {how}: {seconds:.2f} s of the processor")
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        os.environ["HF_HOME"] = str(root / "hf")
        save_six_steps(root)
        config = six_steps(root, root / "run", train__steps=1000, checkpoint__save_every=2, optim__name="adamw")
        run_until(config, 3)
        (root / "run.yaml").write_text(to_yaml(config), encoding="utf-8")
        subprocess.run([*LEAST, str(root / "model"), str(root / "least"), "save"], check=True, cwd=ROOT)
        pairs = [
            (measured_start(root / "run.yaml", root / "told.json"), measured_floor(root / "model", root / "least"))
            for _ in range(starts)
        ]
        print("the trainer")
        show([start for start, _ in pairs])
        print("the least program")
        show([floor for _, floor in pairs])


if __name__ == "__main__":
    if sys.argv[1:2] == ["--rank"]:
        file = Path(sys.argv[2])
        del sys.argv[1:3]
        train_as_rank(file)
    else:
        main()
