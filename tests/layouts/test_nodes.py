"""What several nodes must agree on, with every rank playing the first of a node of its own."""

import contextlib
import errno
import io
import os
import socket
from pathlib import Path
from unittest.mock import patch

import pytest

from dpo.checkpoint.marker import MARKER
from dpo.checkpoint.plans import forget_plans
from dpo.config import Config
from dpo.distributed.collectives import all_gather, first_on_each_node
from dpo.distributed.program import run_program
from dpo.distributed.shared import Unseen, _sees
from dpo.distributed.startup import open_world
from dpo.train.program import run_training
from tests.support.caches import cache_of_datasets
from tests.support.checkpoints import remark, save, shelf_of
from tests.support.models import save_model, save_pairs
from tests.support.ranks import Ranks
from tests.support.runs import changed, error_lines, make_config, save_six_steps, six_steps, train_lines

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


# --- folders ---------------------------------------------------------------------------------------------------------


def train_where_nodes_differ(config: Config, places: dict[str, str], work_dirs: str) -> tuple[int, str]:
    """A rank alone on its node `node0`, `node1`, ..., in a working directory of its own; `{rank}` in the values of the
    environment variables `places`, and in `work_dirs`, is its number. (exit code, stderr).
    """
    rank, before, stderr = os.environ["RANK"], Path.cwd(), io.StringIO()
    os.environ.update(LOCAL_RANK="0", LOCAL_WORLD_SIZE="1")
    os.environ.update({name: place.format(rank=rank) for name, place in places.items()})
    os.chdir(work_dirs.format(rank=rank))
    names, errors = patch.object(socket, "gethostname", lambda: f"node{rank}"), contextlib.redirect_stderr(stderr)
    data_cache = cache_of_datasets(os.environ.get("HF_DATASETS_CACHE", "/nowhere"))
    try:
        with names, errors, data_cache if "HF_DATASETS_CACHE" in places else contextlib.nullcontext():
            return run_program(lambda: run_training(config)), stderr.getvalue()
    finally:
        os.chdir(before)


@pytest.fixture
def on_nodes(tmp_path: Path) -> Config:
    """Six steps, whose folders are relative paths or the defaults; 0/, 1/ and 2/ are working directories."""
    for rank in range(3):
        (tmp_path / str(rank)).mkdir()
    (tmp_path / "together").mkdir()
    return six_steps(save_six_steps(tmp_path), tmp_path / "run", reference__cache_dir=None)


def plant_checkpoint(run_dir: Path) -> None:
    """A whole checkpoint, with a shard for each of three ranks to compare."""
    with open_world(60) as world:
        shelf = shelf_of(run_dir, None, world)
        folder = save(shelf, 1)
        forget_plans(shelf.plans)
    for rank in (1, 2):
        (folder / f"__{rank}_0.distcp").write_bytes(b"a shard")
    (folder / MARKER).unlink()
    remark(folder)


@pytest.mark.parametrize(
    ("key", "run_dir", "cache", "named"),
    [
        ("train.run_dir", "runs/here", "together", "{tmp}/0/runs/here"),
        ("reference.cache_dir", "{tmp}/run", "{rank}", "{tmp}/0"),
    ],
)
def test_a_folder_that_other_nodes_do_not_see_is_refused_with_their_names(
    on_nodes: Config, ranks: Ranks, tmp_path: Path, key: str, run_dir: str, cache: str, named: str
) -> None:
    """Before data is read or a folder is made, and without a file left behind; also where rank 0 sees checkpoints, of
    which the other nodes miss the shards that they are to compare.
    """
    plant_checkpoint(tmp_path / "0" / run_dir.format(tmp=tmp_path))
    before = {path for path in tmp_path.rglob("*") if path.is_file()}
    config = changed(on_nodes, train__run_dir=run_dir.format(tmp=tmp_path))
    places = {"DPO_CACHE": f"{tmp_path}/{cache}"}
    answers = ranks(3, train_where_nodes_differ, config, places, f"{tmp_path}/{{rank}}")
    assert [code for code, _ in answers] == [2, 2, 2]
    assert [error_lines(said) for _, said in answers[1:]] == [[], []]
    (error,) = error_lines(answers[0][1])
    folder = run_dir if key == "train.run_dir" else named.format(tmp=tmp_path)
    assert f"{key}: {folder} is not shared: node1, node2 do not see a file that node0 wrote there; valid: " in error
    assert "data: reading" not in answers[0][1]
    assert {path for path in tmp_path.rglob("*") if path.is_file()} == before


def test_nodes_that_tokenize_apart_are_told(on_nodes: Config, ranks: Ranks, tmp_path: Path) -> None:
    """One line, and the run trains."""
    places = {"DPO_CACHE": f"{tmp_path}/together", "HF_DATASETS_CACHE": f"{tmp_path}/{{rank}}"}
    answers = ranks(2, train_where_nodes_differ, changed(on_nodes, train__steps=1), places, str(tmp_path))
    assert [code for code, _ in answers] == [0, 0]
    (line,) = [line for line in answers[0][1].splitlines() if line.startswith("HF_HOME")]
    assert line == (
        f"HF_HOME: {tmp_path}/0 is not shared: node1 does not see a file that node0 wrote there: each node tokenizes "
        "the data, and needs its own models of the hub"
    )


def test_a_node_whose_mount_is_stale_sees_no_file(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its rank must get to the exchange all the same, or the others wait for it."""

    def stale(path: Path) -> bool:
        raise OSError(errno.ESTALE, "Stale file handle")

    monkeypatch.setattr(Path, "exists", stale)
    assert not _sees(Path("/shared/.probe"))


def test_many_hosts_are_named_by_the_first() -> None:
    hosts = tuple(f"node{number}" for number in range(1, 8))
    assert str(Unseen(Path("/local"), "node0", hosts)) == (
        "/local is not shared: node1, node2, node3, node4 and 3 more do not see a file that node0 wrote there"
    )


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
