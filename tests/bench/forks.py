"""Deaths of forked processes where the parent left a process group as garbage: `python -m tests.bench.forks`.

First a few processes are forked by multiprocessing alone, and collect all garbage that they inherit: each dies, or is
stuck. Then so many sets of rows are tokenized (`--maps`, by default 200) by two processes each, which do the same
before every row. The garbage is there at every fork. Prints a line for either, and ends with 1 where tokenizing lost a
process or its rows were not those of one process.
"""

import argparse
import gc
import json
import multiprocessing
import os
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import datasets

from dpo.base.errors import RunError
from dpo.config import Config, DataConfig, ModelConfig, SourceConfig
from dpo.pairs import token_rows
from dpo.pairs.prepare import prepare_data
from tests.support.caches import cache_of_datasets
from tests.support.garbage import collect_and_tokenize, leave_group
from tests.support.models import family_config

BARE = 5
SECONDS = 10
"""After which a process that does a second's work is stuck."""
ROWS = 64


class Stuck(Exception):
    """Raised where tokenizing takes longer than SECONDS."""


def bare_fork() -> str:
    """Forks a process that collects all garbage; returns how it ended."""
    process = multiprocessing.get_context("fork").Process(target=gc.collect)
    process.start()
    process.join(SECONDS)
    code = process.exitcode
    process.kill()
    process.join()
    if code is None:
        return "stuck"
    return "well" if code == 0 else "dead"


def tokenize(folder: Path, number: int) -> str:
    """Tokenizes a set of rows that no cache has by two processes; returns how that ended."""
    rows = [{"prompt_ids": [3 + number % 90, 3 + i], "chosen_ids": [5, i], "rejected_ids": [6]} for i in range(ROWS)]
    path = folder / f"{number}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = DataConfig(train=[SourceConfig(str(path), format="tokens")], num_proc=2)
    try:
        with time_limit():
            pairs = prepare_data(Config(model=ModelConfig(""), data=data), family_config("llama")).train
    except RunError:
        return "dead"
    except Stuck:
        return "stuck"
    found = [[part.tolist() for part in (p.prompt_ids, p.chosen_ids, p.rejected_ids)] for p in pairs.pairs(range(ROWS))]
    return "well" if found == [[*row.values()] for row in rows] else "wrong"


@contextmanager
def time_limit() -> Iterator[None]:
    """Raises Stuck where what is inside takes longer than SECONDS."""

    def stop(*_: object) -> None:
        raise Stuck

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def main() -> None:
    parser = argparse.ArgumentParser("python -m tests.bench.forks", description=__doc__, allow_abbrev=False)
    parser.add_argument("--maps", type=int, default=200)
    num_maps = parser.parse_args().maps
    datasets.disable_progress_bars()
    gc.disable()
    group = leave_group()
    bare = Counter(bare_fork() for _ in range(BARE))
    print(f"{BARE} bare forks: {bare['dead']} dead, {bare['stuck']} stuck, {bare['well']} well", flush=True)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as name, patch.object(token_rows, "tokenize_row", collect_and_tokenize):
        with cache_of_datasets(name):
            ends = Counter(tokenize(Path(name), number) for number in range(num_maps))
    assert group() is not None, "the garbage was collected meanwhile"
    figures = ", ".join(f"{ends[end]} {end}" for end in ("dead", "stuck", "wrong", "well"))
    print(f"{num_maps} maps of two processes in {time.perf_counter() - started:.0f} s: {figures}", flush=True)
    sys.stdout.flush()
    os._exit(ends["well"] != num_maps)


if __name__ == "__main__":
    main()
