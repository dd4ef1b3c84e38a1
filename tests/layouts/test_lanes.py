"""What depends on a rank's lane asks for the lane, not for the rank."""

from pathlib import Path
from unittest.mock import patch

import pytest

from dpo.config import Config
from dpo.distributed.world import World
from dpo.train.program import run_training
from tests.support.models import save_pairs
from tests.support.ranks import Ranks
from tests.support.runs import eval_lines, save_six_steps, six_steps, train_lines, worst_relative

pytestmark = pytest.mark.xdist_group("ranks")


def run_crossed(config: Config) -> None:
    """A run in which the last rank has the first lane, and so on."""
    with patch.object(World, "lane", property(lambda world: world.size - 1 - world.rank)):
        run_training(config)


def test_lanes_may_lie_on_other_ranks(ranks: Ranks, tmp_path: Path) -> None:
    """Reference pass, first-step check, steps and evaluations of two ranks that have each other's lanes: the metrics
    are those of the run in order, up to the rounding of sums. Where one part took the rank for the lane, ranks would
    run other rows than those whose results they report.
    """
    root = save_six_steps(tmp_path)
    save_pairs(root / "pairs.jsonl", 10, completions=3)
    plain, crossed = (
        six_steps(root, root / name, reference__cache_dir=str(root / f"cache-{name}"), batch__tokens_per_micro_batch=40)
        for name in ("plain", "crossed")
    )
    ranks(2, run_training, plain)
    ranks(2, run_crossed, crossed)
    names = ["train/loss", "train/grad_norm", "train/logps/chosen", "train/rewards/margins", "train/tokens"]
    assert worst_relative(train_lines(root / "plain"), train_lines(root / "crossed"), names) <= 1e-5
    names = ["eval/loss", "eval/logps/chosen", "eval/pairs"]
    assert worst_relative(eval_lines(root / "plain"), eval_lines(root / "crossed"), names) <= 1e-5
