"""What several nodes must agree on, with every rank playing the first of a node of its own."""

import os
from pathlib import Path

import pytest

from dpo.distributed.collectives import all_gather, first_on_each_node
from dpo.distributed.program import run_program
from dpo.distributed.startup import open_world
from dpo.train import run_training
from tests.support.models import save_model, save_pairs
from tests.support.ranks import Ranks
from tests.support.runs import make_config, train_lines

pytestmark = pytest.mark.xdist_group("ranks")


def train_on_a_node_of_its_own(model: str, data: str, run_dir: str) -> int:
    """The exit code of a rank that lies alone on its node; `{rank}` in the data's path is its number."""
    os.environ["LOCAL_RANK"], os.environ["LOCAL_WORLD_SIZE"] = "0", "1"
    config = make_config(model, data.format(rank=os.environ["RANK"]), run_dir, train__steps=1, loss__name="sft")
    return run_program(lambda: run_training(config))


@pytest.mark.parametrize("num_prompts", [64, 70], ids=["other ids", "another number"])
def test_nodes_with_other_data_are_refused(ranks: Ranks, num_prompts: int, tmp_path: Path) -> None:
    """They would train on different steps, or wait for each other for ever."""
    save_pairs(tmp_path / "0.jsonl", 64, seed=0)
    save_pairs(tmp_path / "1.jsonl", num_prompts, seed=1)
    model, run_dir = str(save_model(tmp_path / "model", "llama")), str(tmp_path / "run")
    assert ranks(2, train_on_a_node_of_its_own, model, str(tmp_path / "{rank}.jsonl"), run_dir) == [2, 2]
    assert not (tmp_path / "run").exists()


def test_nodes_with_the_same_data_in_other_places_train(ranks: Ranks, tmp_path: Path) -> None:
    for rank in (0, 1):
        save_pairs(tmp_path / f"{rank}.jsonl", 64, seed=0)
    model, run_dir = str(save_model(tmp_path / "model", "llama")), str(tmp_path / "run")
    assert ranks(2, train_on_a_node_of_its_own, model, str(tmp_path / "{rank}.jsonl"), run_dir) == [0, 0]
    assert len(train_lines(run_dir)) == 1


def record_turns(folder: Path) -> list[int]:
    """How many ranks had worked when this one did, by rank; ranks 0 and 1 lie on one node, 2 and 3 on another."""
    os.environ["LOCAL_RANK"] = str(int(os.environ["RANK"]) % 2)

    def work() -> int:
        seen = len(list(folder.iterdir()))
        (folder / os.environ["RANK"]).touch()
        return seen

    with open_world(60) as world:
        return all_gather(first_on_each_node(world, work))


def test_the_first_rank_works_before_the_first_of_other_nodes_and_these_before_the_rest(
    ranks: Ranks, tmp_path: Path
) -> None:
    """Rank 0 sees no one's work, rank 2 that of rank 0, ranks 1 and 3 that of both."""
    seen = ranks(4, record_turns, tmp_path)[0]
    assert seen[0] == 0
    assert seen[2] == 1
    assert seen[1] >= 2
    assert seen[3] >= 2
