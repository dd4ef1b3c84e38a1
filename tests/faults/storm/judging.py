"""What became of a start of a damaged run, compared with a start of the same run undamaged."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpo.base.sums import SUMS
from dpo.run_folder.evaluations import read_evaluation
from tests.faults.storm.damages import Damage
from tests.faults.storm.starts import RANKS, Ended
from tests.support.runs import without_clock

RECOVERED, REFUSED, NO_EFFECT = "recovered and said", "refused by name", "no effect"
GOOD = (RECOVERED, REFUSED, NO_EFFECT)


@dataclass(frozen=True)
class Result:
    """What a run leaves that somebody uses."""

    final: Mapping[str, bytes]
    """The files of final/, but for the model card, which tells times."""
    metrics: list[dict[str, float]]
    rest: Mapping[str, Any]
    """The last answers, and the values of single pairs of the last evaluation."""


def read_result(run: Path) -> Result:
    """Reads what a run has left; of damaged files what can be read."""
    files = [path for path in (run / "final").glob("*") if path.is_file() and path.name not in ("README.md", SUMS)]
    answers = run / "answers" / "step-000006.jsonl"
    try:
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_bytes().splitlines()]
        values = {name: array.tobytes() for name, array in read_evaluation(run, 6).items()}
    except (OSError, ValueError):
        lines, values = [], {}
    rest = {"answers": answers.read_bytes() if answers.exists() else b"", "values": values}
    return Result({path.name: path.read_bytes() for path in files}, without_clock(lines), rest)


def judge(damage: Damage, ended: Ended, result: Result, usual: Ended, expected: Result) -> str:
    """Returns RECOVERED, REFUSED, NO_EFFECT, or what is wrong.

    Args:
        damage: what was done.
        ended: how the start ended.
        result: what it left.
        usual: how a start of the same run ends where nothing is damaged.
        expected: what that leaves.
    """
    if None in ended.codes:
        return "FAIL: hangs"
    if "Traceback (most recent call last)" in ended.said:
        return f"FAIL: traceback: {ended.said.strip().splitlines()[-1][:200]}"
    new = [line for line in ended.said.splitlines() if line not in usual.said]
    is_named = any(name in line for line in new for name in _names(damage))
    if any(ended.codes):
        errors = [line for line in ended.said.splitlines() if line.startswith("error:")]
        is_key = any(re.match(r"error: (.+?: )?[a-z]+\.[a-z_]+", line) for line in errors)
        return REFUSED if len(errors) in range(1, RANKS + 1) and (is_named or is_key) else f"FAIL: vague: {errors}"
    if result.final != expected.final:
        names = sorted(name for name in {**result.final, **expected.final} if _differ(name, result, expected))
        return f"FAIL: another final/: {', '.join(names)}"
    is_read = (damage.run, damage.kind) != ("finished", "run folder")  # such a start reads none of it, nor writes it
    if is_read and (result.metrics, result.rest) != (expected.metrics, expected.rest):
        return RECOVERED if is_named else "FAIL: another history in silence"
    return RECOVERED if is_named else NO_EFFECT


def _differ(name: str, one: Result, other: Result) -> bool:
    return one.final.get(name) != other.final.get(name)


def _names(damage: Damage) -> list[str]:
    """Returns names of the damaged files that a line may have: their own, or that of the folder made for them."""
    files = [Path(file) for file in (damage.file, damage.other) if file]
    folders = [part for file in files for part in file.parts if re.match(r"(rows|tokens|pairs|step)-", part)]
    return [*(file.name for file in files), *folders, *(["/model:"] if damage.kind == "model" else [])]
