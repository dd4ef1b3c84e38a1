"""A mixture of two sources with shares, weights and margins: the same steps on any ranks, and after a kill."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dpo.config import Config, SourceConfig
from dpo.distributed.startup import open_world
from dpo.run.inputs import read_inputs
from dpo.train.program import run_training
from tests.support.caches import cache_of_datasets
from tests.support.models import save_model, save_pairs
from tests.support.ranks import Ranks
from tests.support.runs import make_config, run_until, train_lines, without_clock, worst_relative

pytestmark = pytest.mark.xdist_group("ranks")

METRICS = ["train/loss", "train/grad_norm", "train/logps/chosen", "train/logps/rejected", "train/tokens", "train/pairs"]
PAIRS_OF_EPOCH = 24 + 25
"""Half of the 48 pairs of the first source; 25 of the 10 pairs of the second, each two or three times."""
LAST_STEP = 13
"""Two epochs of 49 pairs at 8 per step: 12 steps and a last one of 2 pairs."""

Ids = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """model/, and a.jsonl whose rows have weights and margins, and b.jsonl."""
    root = tmp_path_factory.mktemp("mixture")
    save_model(root / "model", "llama")
    rows = save_pairs(root / "a.jsonl", 24, completions=3, pairs_each=2).read_text().splitlines()
    valued = [json.loads(row) | {"w": (i % 5) / 2, "gap": i / 10 - 1} for i, row in enumerate(rows)]
    (root / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in valued))
    save_pairs(root / "b.jsonl", 10, seed=1)
    return root


def mixture(root: Path, run_dir: Path, group_by_prompt: bool, **changes: Any) -> Config:
    """A run of two epochs of the mixture, with a checkpoint after every third step."""
    values = {"weight": "w", "margin": "gap"}
    sources = [
        SourceConfig(str(root / "a.jsonl"), columns=values, weight=0.5),
        SourceConfig(str(root / "b.jsonl"), count=25),
    ]
    facts = {
        "data__train": sources,
        "batch__pairs_per_step": 8,
        "batch__group_by_prompt": group_by_prompt,
        "batch__tokens_per_micro_batch": 150,
        "train__epochs": 2,
        "checkpoint__save_every": 3,
        "reference__cache_dir": str(root / "cache"),
    }
    return make_config(root / "model", root / "a.jsonl", run_dir, **(facts | changes))


def pairs_of_steps(config: Config, folder: Path) -> list[list[tuple[Ids, float, float]]]:
    """The ids, the weight and the margin of every pair of every step, as a rank reads them that has a cache of its
    own, so that it chooses the pairs itself.
    """
    with open_world(70) as world:
        cache = folder / f"rank {world.rank} of {world.size}"
        with cache_of_datasets(cache):
            inputs = read_inputs(config, world)
        assert cache.is_dir()
        steps = []
        for step in range(1, inputs.last_step + 1):
            pairs = inputs.data.train.pairs(inputs.order.items(step, inputs.last_item))
            ids = [tuple(tuple(part.tolist()) for part in (p.prompt_ids, p.chosen_ids, p.rejected_ids)) for p in pairs]
            steps.append([(i, pair.weight, pair.margin) for i, pair in zip(ids, pairs, strict=True)])
        return steps


def rows_of(path: Path) -> dict[Ids, tuple[float, float]]:
    """Weight and margin of every pair of a file, by its ids."""
    found = {}
    for row in map(json.loads, path.read_text().splitlines()):
        for w, v in row["pairs"]:
            ids = tuple(tuple(part) for part in (row["prompt_ids"], row["completion_ids"][w], row["completion_ids"][v]))
            found[ids] = row.get("w", 1.0), row.get("gap", 0.0)
    return found


@pytest.mark.parametrize("group_by_prompt", [False, True])
def test_every_rank_reads_the_same_pairs(ranks: Ranks, root: Path, tmp_path: Path, group_by_prompt: bool) -> None:
    """On 1, 2 and 3 ranks; each epoch has the same 24 of the first source once, and each of the second two or three
    times, with the weights and margins of their rows.
    """
    config = mixture(root, tmp_path / "run", group_by_prompt)
    (steps,) = ranks(1, pairs_of_steps, config, tmp_path)
    assert [len(step) for step in steps] == [8] * 12 + [2]
    for size in (2, 3):
        assert ranks(size, pairs_of_steps, config, tmp_path) == [steps] * size
    sequence = [pair for step in steps for pair in step]
    first, second = Counter(sequence[:PAIRS_OF_EPOCH]), Counter(sequence[PAIRS_OF_EPOCH:])
    assert first == second and sequence[:PAIRS_OF_EPOCH] != sequence[PAIRS_OF_EPOCH:]
    valued, plain = rows_of(root / "a.jsonl"), rows_of(root / "b.jsonl")
    assert all((valued | plain)[ids] == (weight, margin) for ids, weight, margin in first)
    times = [[count for (ids, *_), count in first.items() if ids in source] for source in (valued, plain)]
    assert times[0] == [1] * 24 and sorted(times[1]) == [2] * 5 + [3] * 5


@pytest.mark.parametrize("group_by_prompt", [False, True])
def test_a_mixture_on_any_ranks_and_after_a_kill(
    ranks: Ranks, root: Path, tmp_path: Path, group_by_prompt: bool
) -> None:
    """1, 2 and 3 ranks agree to 1e-5 relative in every step. Killed in step 8 and resumed from step 6: to the last bit
    on the same ranks, to 1e-5 on others.
    """

    def lines_of(size: int, name: str) -> list[dict[str, float]]:
        ranks(size, run_training, mixture(root, tmp_path / name, group_by_prompt))
        return train_lines(tmp_path / name)

    oracle, pair, three = (lines_of(size, f"{size}") for size in (1, 2, 3))
    assert [line["train/pairs"] for line in oracle] == [8] * 12 + [2]
    assert max(worst_relative(oracle, lines, METRICS) for lines in (pair, three)) <= 1e-5
    assert np.ptp([line["train/grad_norm"] for line in oracle]) > 0.1, "else the steps are all alike"
    for name in ("same", "other"):
        ranks(2, run_until, mixture(root, tmp_path / name, group_by_prompt), 8)
        assert len(train_lines(tmp_path / name)) == 7
    assert without_clock(lines_of(2, "same")) == without_clock(pair)
    assert worst_relative(oracle, lines_of(3, "other"), METRICS) <= 1e-5
