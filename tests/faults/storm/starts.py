"""The run that is damaged, and starts of it on two ranks: forks of this process, which has imported everything."""

import os
import random
import shutil
import socket
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import datasets

from dpo.config import Config, SourceConfig
from dpo.demo.world import preference_row, questions, save_model, save_rows
from tests.support.models import plain_model
from tests.support.runs import exit_code, make_config, run_until

RANKS, SECONDS = 2, 120.0
GRACE = 5.0
"""Seconds that other ranks have once one has failed, as torchrun ends them then."""
STOPPED = 2
"""The exit code of a run that `run_until` stopped."""


@dataclass(frozen=True)
class Ended:
    """How a start ended."""

    codes: tuple[int | None, ...]
    """The exit code of each rank; negative: by a signal; None: it had to be killed after SECONDS."""
    said: str
    """stderr of all ranks."""


def config_of(root: Path, name: str) -> Config:
    """The config of a run of six steps."""
    return make_config(
        root / "model",
        root / "pairs.jsonl",
        root / name,
        batch__pairs_per_step=4,
        train__steps=6,
        train__eval_every=3,
        optim__warmup_steps=0,
        optim__lr=1e-3,
        checkpoint__save_every=2,
        checkpoint__keep=None,
        eval__samples=1,
        eval__max_new_tokens=3,
        data__eval=[SourceConfig(str(root / "eval.jsonl"))],
        reference__cache_dir=str(root / "cache"),
        parallel__timeout_seconds=60,
    )


def make_runs(root: Path) -> None:
    """Makes a model of several files, data, caches, a run that died before step 6, and a finished one."""
    rng = random.Random(0)
    rows = [preference_row(question, 2, rng) for question in questions(14, 0)]
    save_model(root / "one", rows, 0)
    shutil.copytree(root / "one", root / "model", ignore=shutil.ignore_patterns("*.safetensors"))
    plain_model(root / "one").save_pretrained(root / "model", max_shard_size="100KB")
    save_rows(root / "pairs.jsonl", rows[:10])
    save_rows(root / "eval.jsonl", rows[10:])
    shutil.rmtree(root / "one")
    died, finished = start(root, lambda: _die(root)), start(root, lambda: exit_code(config_of(root, "finished")))
    assert died.codes == (STOPPED,) * RANKS and finished.codes == (0,) * RANKS, (died, finished)


def _die(root: Path) -> int:
    run_until(config_of(root, "dead"), 6)
    return STOPPED


def start(root: Path, work: Callable[[], int]) -> Ended:
    """Runs `work` on all ranks, with the caches below `root`."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    logs = [root.parent / f"stderr-{rank}" for rank in range(RANKS)]
    ranks = [_fork(root, work, rank, port, log) for rank, log in enumerate(logs)]
    codes = _wait(ranks)
    return Ended(codes, "".join(log.read_text(errors="replace") for log in logs))


def _fork(root: Path, work: Callable[[], int], rank: int, port: int, log: Path) -> int:
    process = os.fork()
    if process:
        return process
    code = 1
    try:
        with log.open("wb") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        facts = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": RANKS, "LOCAL_WORLD_SIZE": RANKS}
        os.environ.update({name: str(fact) for name, fact in facts.items()})
        os.environ.update({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)})
        datasets.config.HF_DATASETS_CACHE = root / "hf" / "datasets"
        os.environ["HF_DATASETS_CACHE"] = str(root / "hf" / "datasets")
        code = work()
    except BaseException:  # whatever it is, it is judged
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def _wait(ranks: list[int]) -> tuple[int | None, ...]:
    """Waits for the ranks; kills those that go on after another has failed, and all after SECONDS."""
    codes: dict[int, int | None] = {}
    deadline = time.monotonic() + SECONDS
    while len(codes) < len(ranks):
        for rank in [rank for rank in ranks if rank not in codes]:
            process, status = os.waitpid(rank, os.WNOHANG)
            if process:
                codes[rank] = os.waitstatus_to_exitcode(status)
                if codes[rank]:
                    deadline = min(deadline, time.monotonic() + GRACE)
        if time.monotonic() > deadline:
            is_hang = not any(codes.values())
            for rank in [rank for rank in ranks if rank not in codes]:
                os.kill(rank, 9)
                os.waitpid(rank, 0)
                codes[rank] = None if is_hang else -9
        time.sleep(0.02)
    return tuple(codes[rank] for rank in ranks)
