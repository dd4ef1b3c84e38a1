"""A few damages of `python -m tests.faults.storm`, and the judgement of it by hand."""

import random
import subprocess
import sys
from pathlib import Path

from tests.faults.storm.damages import WAYS, Damage, draw
from tests.faults.storm.judging import NO_EFFECT, RECOVERED, REFUSED, Result, judge
from tests.faults.storm.starts import Ended


def test_a_few_of_the_storm() -> None:
    """On two ranks; the whole storm is `make test-faults`."""
    words = [
        "--seed",
        "7",
        "--count",
        "12",
        "--kinds",
        "model",
        "rows",
        "tokens",
        "pairs",
        "reference",
        "checkpoint",
        "final",
    ]
    command = [sys.executable, "-m", "tests.faults.storm", *words]
    ended = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr


def test_a_way_does_what_it_says(tmp_path: Path) -> None:
    """Each file that is not named stays as it was."""
    folder = tmp_path / "hf/datasets/dpo/tokens-0"
    folder.mkdir(parents=True)
    contents = {"a": b"\x00\x01\x02", "b": b"other"}

    def after(damage: Damage) -> dict[str, bytes]:
        for name, content in contents.items():
            (folder / name).write_bytes(content)
        damage.apply(tmp_path)
        return {path.name: path.read_bytes() for path in folder.iterdir()}

    name = "hf/datasets/dpo/tokens-0/"
    base = ("dead", "tokens")
    assert after(Damage(*base, "cut", f"{name}a", place=2)) == contents | {"a": b"\x00\x01"}
    assert after(Damage(*base, "flip", f"{name}a", place=8 + 1)) == contents | {"a": b"\x00\x03\x02"}
    assert after(Damage(*base, "delete", f"{name}a")) == {"b": b"other"}
    assert after(Damage(*base, "swap", f"{name}a", f"{name}b")) == {"a": b"other", "b": contents["a"]}
    (folder / "a").write_bytes(b"x")
    drawn = [draw(tmp_path, random.Random(seed)) for seed in range(100)]
    assert {damage.way for damage in drawn} == set(WAYS)
    assert drawn[:9] == [draw(tmp_path, random.Random(seed)) for seed in range(9)]


def test_judgements() -> None:
    """The same end is of no effect, or recovered where a line names the file; another end is a failure either way."""
    damage = Damage("dead", "pairs", "flip", "hf/datasets/dpo/pairs-0/train/keys.npy")
    usual, whole = Ended((0, 0), "resumes\n"), Result({"model": b"1"}, [{"step": 1}], {})
    other, history = Result({"model": b"2"}, [{"step": 1}], {}), Result({"model": b"1"}, [], {})

    def judged(code: int | None, said: str, result: Result = whole) -> str:
        return judge(damage, Ended((code, code), said), result, usual, whole)

    named = "cache: pairs-0 is damaged\n"
    assert judged(0, "resumes\n") == NO_EFFECT
    assert judged(0, f"{named}resumes\n") == RECOVERED == judged(0, named, history)
    assert judged(0, named, other).startswith("FAIL: another final/: model")
    assert judged(0, "", history).startswith("FAIL: another history")
    assert judged(2, "error: /x/pairs-0: keys.npy has changed\n") == REFUSED
    assert judged(2, "error: command line: data.train: wrong\n") == REFUSED == judged(2, "error: model.path: wrong\n")
    assert judged(1, "error: KeyError\n").startswith("FAIL: vague")
    assert judged(1, "Traceback (most recent call last)\nKeyError: 1").startswith("FAIL: traceback: KeyError: 1")
    assert judged(None, named).startswith("FAIL: hangs")
