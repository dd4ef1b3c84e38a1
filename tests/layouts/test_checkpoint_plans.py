"""What the ranks agreed on at the first checkpoint is kept for the next ones, for each run and each group apart."""

import pickle
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import default_planner
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.utils import _DistWrapper
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard, distribute_tensor

from dpo.checkpoint import saver as saving
from dpo.checkpoint.plans import forget_plans, save_planner
from dpo.config import Config
from dpo.distributed.startup import open_world
from tests.checkpoint.test_failed_checkpoint import fail_once, save
from tests.support.models import save_model, save_pairs
from tests.support.ranks import Ranks
from tests.support.runs import make_config, run

pytestmark = pytest.mark.xdist_group("ranks")

CACHES = (
    "_cached_save_plan",
    "_cached_final_save_plan",
    "_cached_all_plans",
    "_cached_global_plan",
    "_cached_metadata",
)


@contextmanager
def planning(done: Counter[str]) -> Iterator[None]:
    """Counts the items of plans that this rank gathers, and how often it deduplicates and validates plans."""
    gather, dedup, validate = _DistWrapper.gather_object, default_planner.dedup_save_plans, "_validate_global_plan"
    check = getattr(default_planner, validate)

    def gathered(self: Any, value: Any) -> Any:
        values = gather(self, value)
        done["items gathered"] += sum(len(plan.items) for plan in values or () if isinstance(plan, SavePlan))
        return values

    def deduplicated(*args: Any) -> Any:
        done["deduplicated"] += 1
        return dedup(*args)

    def validated(*args: Any) -> Any:
        done["validated"] += 1
        return check(*args)

    with (
        patch.object(_DistWrapper, "gather_object", gathered),
        patch.object(default_planner, "dedup_save_plans", deduplicated),
        patch.object(default_planner, validate, validated),
    ):
        yield


# --- a run -----------------------------------------------------------------------------------------------------------


def counts_of_checkpoints(config: Config) -> tuple[list[Counter[str]], int]:
    """What each checkpoint of a run planned on this rank, and how many plans are kept when it is over."""
    counts: list[Counter[str]] = []
    write = saving.write_checkpoint

    def counted(*args: Any) -> None:
        counts.append(Counter())
        with planning(counts[-1]):
            write(*args)

    with patch.object(saving, "write_checkpoint", counted):
        run(config)
    return counts, sum(len(getattr(SavePlanner, name)) for name in CACHES)


def test_a_run_plans_its_first_checkpoint_alone(ranks: Ranks, tmp_path: Path) -> None:
    """Three checkpoints of two ranks: rank 0 plans once, and nothing is kept when the run is over."""
    folder, pairs = save_model(tmp_path / "model", "llama"), save_pairs(tmp_path / "pairs.jsonl", 8)
    config = make_config(
        folder, pairs, tmp_path / "run", batch__pairs_per_step=4, train__steps=3, checkpoint__save_every=1
    )
    (main, kept), (other, other_kept) = ranks(2, counts_of_checkpoints, config)
    assert main[0]["items gathered"] > 0
    assert (main[0]["deduplicated"], main[0]["validated"]) == (1, 1)
    assert [+counts for counts in main[1:]] == [Counter(), Counter()]
    assert [+counts for counts in other] == [Counter()] * 3
    assert kept == other_kept == 0


# --- groups of 1, 2 and 3 ranks in the same processes ----------------------------------------------------------------


def values(size: int, step: int) -> torch.Tensor:
    """Other numbers, and another shape, in each group; other numbers at each step."""
    return torch.arange(6.0 * size * 2).view(6 * size, 2) + 1000 * size + 100_000 * step


def state_of(size: int, step: int, mesh: DeviceMesh) -> dict[str, Any]:
    """A sharded tensor, and an object whose pickle grows from step to step."""
    return {"weight": distribute_tensor(values(size, step), mesh, [Shard(0)]), "note": "x" * 10 ** (step + size)}


def save_from_groups(folder: Path) -> dict[tuple[int, int], tuple[bool, int]]:
    """Two steps are saved from groups of 1, 2 and 3 ranks by turns, then all are loaded.

    Gives for each (size, step) whether it came back bit for bit, and the length of the object.
    """
    with open_world(60) as world:
        groups = {size: dist.new_group(list(range(size))) for size in (1, 2, 3)}
        mine = {size: group for size, group in groups.items() if world.rank < size}
        meshes = {
            size: DeviceMesh.from_group(group, "cpu", mesh=list(range(size)), mesh_dim_names=("shard",))
            for size, group in mine.items()
        }
        for step in (1, 2):
            for size, group in mine.items():
                path = folder / f"{size}-{step}"
                writer = dcp.FileSystemWriter(path, per_thread_copy_ahead=0)
                state = state_of(size, step, meshes[size])
                dcp.save(state, storage_writer=writer, planner=save_planner(f"of {size}"), process_group=group)
            dist.barrier()
        found = {}
        for step in (1, 2):
            for size, group in mine.items():
                state = state_of(size, 0, meshes[size])
                dcp.load(state, checkpoint_id=str(folder / f"{size}-{step}"), process_group=group)
                same = torch.equal(state["weight"].full_tensor(), values(size, step))
                found[size, step] = (same, len(state["note"]))
        dist.barrier()
        for size in mine:
            forget_plans(f"of {size}")
        assert not any(getattr(SavePlanner, name) for name in CACHES)
        return found


def test_groups_of_several_sizes_in_one_process_each_keep_their_own(ranks: Ranks, tmp_path: Path) -> None:
    """Each comes back bit for bit, also the object that is longer than when the plan was made."""
    for rank, found in enumerate(ranks(3, save_from_groups, tmp_path)):
        sizes = [size for size in (1, 2, 3) if rank < size]
        assert found == {(size, step): (True, 10 ** (step + size)) for size in sizes for step in (1, 2)}
    with (tmp_path / "2-2" / ".metadata").open("rb") as file:
        places = [info for index, info in pickle.load(file).storage_data.items() if index.fqn == "note"]
    assert [place.length > 10**4 for place in places] == [True]


def save_what_grows(folder: Path) -> list[int]:
    """How often each checkpoint was planned: a tensor is new in the second and has another shape in the third."""
    with open_world(60) as world:
        counts = []
        whole = {"a": torch.arange(4.0)}
        states = [
            whole,
            whole | {"b": torch.ones(3)},
            whole | {"b": torch.full((5,), 2.0)},
            whole | {"b": -torch.ones(5)},
        ]
        for step, state in enumerate(states):
            done: Counter[str] = Counter()
            with planning(done):
                writer = dcp.FileSystemWriter(folder / str(step), per_thread_copy_ahead=0)
                dcp.save(state, storage_writer=writer, planner=save_planner("grows"), process_group=dist.group.WORLD)
            loaded = {name: torch.zeros_like(value) for name, value in state.items()}
            dcp.load(loaded, checkpoint_id=str(folder / str(step)))
            assert all(torch.equal(loaded[name], value) for name, value in state.items())
            counts.append(done["validated"] if world.is_main else 0)
        forget_plans("grows")
        return counts


def test_what_changes_is_planned_anew(ranks: Ranks, tmp_path: Path) -> None:
    assert ranks(2, save_what_grows, tmp_path) == [[1, 1, 1, 0], [0, 0, 0, 0]]


# --- a checkpoint that fails -----------------------------------------------------------------------------------------


def save_after_a_failure(folder: Path, name: str, rank: int) -> list[str]:
    """What three checkpoints in a row say where the disk of one rank is full the first time that its writer is asked
    for `name`; nothing of one that is read back bit for bit.
    """
    with open_world(60) as world, pytest.MonkeyPatch.context() as monkeypatch:
        if world.rank == rank:
            fail_once(monkeypatch, name)
        said = [save(folder, step, world) for step in (1, 2, 3)]
        assert any(getattr(SavePlanner, cache) for cache in CACHES)
        forget_plans("failing")
        return said


@pytest.mark.parametrize(
    ("name", "rank"), [("prepare_local_plan", 0), ("prepare_local_plan", 1), ("prepare_global_plan", 0), ("finish", 0)]
)
def test_a_failure_on_one_rank_leaves_the_next_checkpoints_whole(
    ranks: Ranks, tmp_path: Path, name: str, rank: int
) -> None:
    """All ranks tell the same failure, and none keeps a plan that the others lack."""
    for first, *later in ranks(2, save_after_a_failure, tmp_path, name, rank):
        assert f"the disk is full: rank {rank} cannot write " in first
        assert later == ["", ""]
