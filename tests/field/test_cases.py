"""Inputs from the field, each with the result that is right: the folders of `cases`, beside the test data.

Each case is a small input that a trainer once read wrongly, with a `case.md` that derives the right result by plain
transformers, and an `expected.json`: the arguments of the program, and the results that are right, of which one must
hold. The cases belong to no commit of this project and are skipped where they are not there.
"""

import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

CASES = Path(os.environ.get("DPO_TEST_DATA", "../shared/data")).absolute().parent / "cases"
NAMES = sorted(path.parent.name for path in CASES.glob("*/expected.json"))
STEP = ("--optim.warmup_steps", "0", "--train.steps", "1")
TOLERANCE = 0.02
"""Nats per completion, float32 rounding included; the wrong readings differ by 0.7 and more."""


@dataclass(frozen=True)
class Outcome:
    """The result of a program on a case."""

    exit_code: int
    output: str
    """Everything that it wrote to the terminal, with CASE for the folder of the case."""
    run_dir: Path

    def logps(self) -> dict[str, float]:
        """The mean log-probability of step 1 of winners and losers, nats."""
        lines = map(json.loads, (self.run_dir / "metrics.jsonl").read_text().splitlines())
        step = next(line for line in lines if "train/loss" in line)
        return {side: step[f"train/logps/{side}"] for side in ("chosen", "rejected")}


def fits(accepted: dict[str, Any], outcome: Outcome) -> bool:
    """Whether an outcome is one of the right results of a case."""
    errors = "\n".join(line for line in outcome.output.splitlines() if line.startswith("error:"))
    checks = {
        "exit": lambda code: outcome.exit_code == code,
        "says": lambda pattern: re.search(pattern, outcome.output),
        "error": lambda pattern: re.search(pattern, errors),
        "not": lambda text: text not in outcome.output,
        "never": lambda text: text not in outcome.output,
        "longest_line": lambda limit: max(map(len, outcome.output.splitlines())) <= limit,
        "logps": lambda expected: outcome.logps() == pytest.approx(expected, abs=TOLERANCE),
        "final": lambda files: all(_has(outcome.run_dir / "final" / name, keys) for name, keys in files.items()),
        "loads": lambda name: _class_of(outcome.run_dir / "final") == name,
    }
    return all(checks[key](value) for key, value in accepted.items())


def _has(file: Path, expected: dict[str, Any]) -> bool:
    content = json.loads(file.read_text())
    return all(content.get(key) == value for key, value in expected.items())


def _class_of(folder: Path) -> str:
    """The class of the model of a folder that brings its own code, which only another process loads without traces."""
    program = (
        "from transformers import AutoModelForCausalLM as Auto;"
        f"print(type(Auto.from_pretrained({str(folder)!r}, trust_remote_code=True)).__name__)"
    )
    environment = dict(os.environ, HF_HOME=str(folder.parent / "hf"))
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600, check=True)
    return done.stdout.split()[-1]


def run_case(name: str, folder: Path) -> Outcome:
    """Runs the program of a case in a folder of its own."""
    case = json.loads((CASES / name / "expected.json").read_text())
    args = [str(word).replace("CASES", str(CASES)).replace("CASE", str(CASES / name)) for word in case["args"]]
    if case["program"] == "dpo.train":
        args += [*STEP, "--train.run_dir", str(folder / "run"), "--batch.pairs_per_step", str(case["pairs"])]
    environment = dict(os.environ, HF_HOME=str(folder / "hf"), DPO_CACHE=str(folder / "cache"), OMP_NUM_THREADS="1")
    command = [sys.executable, "-m", case["program"], *args]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600, check=False)
    output = (done.stdout + done.stderr).replace(str(CASES / name), "CASE")
    return Outcome(done.returncode, output, folder / "run")


@pytest.mark.skipif(not NAMES, reason=f"no cases in {CASES}; set DPO_TEST_DATA to a folder beside `cases`")
@pytest.mark.parametrize("name", NAMES or ["none"])
def test_the_case_gives_a_right_result(name: str, tmp_path: Path) -> None:
    outcome = run_case(name, tmp_path)
    accepted = json.loads((CASES / name / "expected.json").read_text())["accept"]
    assert any(fits(one, outcome) for one in accepted), f"exit {outcome.exit_code}; {outcome.output[-3000:]}"
