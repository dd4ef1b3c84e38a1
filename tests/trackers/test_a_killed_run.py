"""A run that is killed and resumed, in the real W&B and the real trackio, without a network: `make test-trackers`."""

import dataclasses
import json
import os
import signal
import struct
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from dpo.board.sink import Ending
from dpo.board.tracker import Opening
from dpo.config import Config, SourceConfig, to_yaml
from dpo.demo.world import save_model, save_rows
from dpo.run_folder.files import read_metrics
from tests.board.test_watching import example_rows
from tests.support.runs import make_config

pytestmark = pytest.mark.skipif(
    not (find_spec("wandb") and find_spec("trackio")), reason="needs wandb and trackio: make test-trackers"
)

PROGRAM = """
import runpy
runpy.run_module("dpo.train", run_name="__main__", alter_sys=True)
"""
KILLED = """
import os, signal
from dpo.train import loop
step = loop._step
def step_or_die(run, number, *others):
    return os.kill(os.getpid(), signal.SIGKILL) if number == 6 else step(run, number, *others)
loop._step = step_or_die
"""
"""Step 6 never begins. Whatever a tracker still holds in memory is lost."""


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Config]:
    """Seven steps, evaluations after 0, 3, 6 and 7, checkpoints after 2 and 4; killed before step 6, then resumed."""
    root = tmp_path_factory.mktemp("trackers")
    rows = example_rows()
    save_model(root / "model", rows, 0)
    save_rows(root / "pairs.jsonl", rows[:8])
    save_rows(root / "eval.jsonl", rows[8:])
    config = make_config(
        root / "model",
        root / "pairs.jsonl",
        root / "run",
        data__eval=[SourceConfig(str(root / "eval.jsonl"))],
        batch__pairs_per_step=4,
        train__steps=7,
        train__eval_every=3,
        train__report_to=["tensorboard", "wandb", "trackio"],
        checkpoint__save_every=2,
        reference__cache_dir=str(root / "cache"),
        eval__samples=2,
        eval__max_new_tokens=5,
    )
    (root / "run.yaml").write_text(to_yaml(config))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "offline")
        for name in ("WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR", "TRACKIO_DIR"):
            patch.setenv(name, str(root / name))
        assert train(root / "run.yaml", KILLED + PROGRAM) == -signal.SIGKILL
        assert train(root / "run.yaml", PROGRAM) == 0
        yield config


def train(file: Path, code: str) -> int:
    """The exit code of a program, which trains."""
    command = [sys.executable, "-c", code, "--config", str(file)]
    result = subprocess.run(command, capture_output=True, text=True, env=dict(os.environ))
    assert result.returncode in (0, -signal.SIGKILL), result.stderr[-3000:]
    assert "WARNING: wandb" not in result.stderr and "WARNING: trackio" not in result.stderr, result.stderr
    return result.returncode


def figures(config: Config) -> dict[tuple[int, str], float]:
    """(step, name) -> metric, by metrics.jsonl."""
    lines = read_metrics(Path(str(config.train.run_dir)))
    return {(line["step"], name): value for line in lines for name, value in line.items() if name != "step"}


def assert_every_step_once(rows: list[dict[str, Any]], config: Config) -> None:
    """Of metrics each; of histograms and answers none twice, and those of the last evaluations, which no kill took."""
    expected = figures(config)
    cells = [((row["step"], name), value) for row in rows for name, value in row.items()]
    metrics = [(cell, value) for cell, value in cells if cell in expected]
    assert {step for step, _ in expected} == set(range(8))
    assert Counter(cell for cell, _ in metrics) == Counter([*expected])
    # The lines of steps that were run twice differ in what measures the clock.
    assert all(value == pytest.approx(expected[cell]) for cell, value in metrics if cell[1].endswith("loss"))
    for name in ("answers", "values/eval/rewards/margins"):
        steps = [step for (step, shown), _ in cells if shown == name]
        assert len(set(steps)) == len(steps) and steps[-2:] == [6, 7]
    assert {name for (_, name), _ in cells} >= {"run/config", "run/data", "run/summary", "run/code"}


def test_wandb_has_every_step_once(config: Config) -> None:
    """And one id, whose offline folders `wandb sync` joins."""
    from dpo.board.wandb_file import files_of, rows_of

    folder = Path(str(config.train.run_dir), "trackers")
    run_id = json.loads((folder / "wandb.jsonl").read_text().splitlines()[0])["id"]
    assert len(list(folder.glob(f"wandb/offline-run-*-{run_id}"))) == len(list(folder.glob("wandb/offline-run-*"))) == 2
    found = [row for path in files_of(folder, run_id) for row in rows_of(path)]
    assert_every_step_once(found, config)
    numbers = [row["_step"] for row in found]
    assert numbers == sorted(set(numbers))


def test_wandb_has_the_config(config: Config) -> None:
    from wandb.proto.wandb_internal_pb2 import Record

    from dpo.board.wandb_file import records

    *_, newest = sorted(Path(str(config.train.run_dir), "trackers").glob("wandb/offline-run-*/run-*.wandb"))
    updates = [item for record in records(newest.read_bytes()) for item in Record.FromString(record).config.update]
    assert {item.key: json.loads(item.value_json) for item in updates}["loss.beta"] == 0.1


@pytest.mark.parametrize(("ending", "code", "is_preempting"), [("done", 0, 0), ("failed", 1, 0), ("preempted", 1, 1)])
def test_wandb_is_told_how_a_start_ends(
    ending: Ending, code: int, is_preempting: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And never waits for its network without an end."""
    import wandb
    from wandb.proto.wandb_internal_pb2 import Record

    from dpo.board.to_wandb import FINISH_SECONDS, WandbRun
    from dpo.board.wandb_file import files_of, records

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    client = WandbRun(Opening("run", "0123abcd", tmp_path, {"loss.beta": 0.1}, 0))
    assert client.run.settings.finish_timeout == FINISH_SECONDS > 0
    client.send(1, {"train/loss": 1.0})
    client.close(ending)
    wandb.teardown()
    (file,) = files_of(tmp_path, "0123abcd")
    found = [Record.FromString(record) for record in records(file.read_bytes())]
    kinds = [record.WhichOneof("record_type") for record in found]
    assert [record.exit.exit_code for record in found if record.WhichOneof("record_type") == "exit"] == [code]
    assert kinds.count("preempting") == is_preempting


def test_trackio_has_every_step_once(config: Config) -> None:
    import trackio
    from trackio.sqlite_storage import SQLiteStorage

    (run,) = trackio.Api().runs("dpo")
    assert run.name.startswith("run-") and run.config["loss.beta"] == 0.1
    assert_every_step_once(SQLiteStorage.get_logs("dpo", run.name, run_id=run.id), config)


def test_a_wandb_file_of_many_blocks_is_read_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a second start, which a first one has left 400 rows; without its file the second cannot tell."""
    import wandb

    from dpo.board.to_wandb import WandbRun
    from dpo.board.wandb_file import BLOCK, files_of, rows_of

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    opening = Opening("run", "0123abcd", tmp_path, {"loss.beta": 0.1}, 0)
    first = WandbRun(opening)
    assert first.held() is None
    for step in range(400):
        first.send(step, {f"train/{number}": step * 1.5 for number in range(20)})
    first.close("done")
    wandb.teardown()  # its service ends, as at the end of a program: it writes the last rows after `finish`
    (file,) = files_of(tmp_path, "0123abcd")
    assert file.stat().st_size > 10 * BLOCK
    assert [row["step"] for row in rows_of(file)] == [*range(400)]
    second = WandbRun(dataclasses.replace(opening, num_rows=400))
    held = second.held()
    second.close("done")
    assert held is not None and held.keys() >= {f"train/{number}" for number in range(20)}
    assert set(held.values()) == {399}


def test_records_that_end_near_a_block_span_blocks_or_are_cut_off() -> None:
    """By hand: the first record leaves three bytes of its block, the second spans two blocks, the third is cut off."""
    from dpo.board.wandb_file import BLOCK, HEADER, records

    def chunk(kind: int, content: bytes) -> bytes:
        return bytes(4) + struct.pack("<HB", len(content), kind) + content

    first, second = b"a" * (BLOCK - 2 * HEADER - 3), b"b" * BLOCK
    begun = BLOCK - HEADER
    data = bytes(HEADER) + chunk(1, first) + bytes(3) + chunk(2, second[:begun]) + chunk(4, second[begun:])
    assert list(records(data + chunk(1, b"ccc")[:-1])) == [first, second]
