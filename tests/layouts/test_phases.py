"""The two phases of a run's processes: input over gloo alone, then the devices."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any
from unittest.mock import Mock, patch

import pytest
import torch
import torch.distributed as dist

from dpo.config import Config, ParallelConfig
from dpo.distributed.collectives import all_gather, on_main
from dpo.distributed.startup import ALLOCATOR_VARIABLES, open_world, set_allocator, start_devices
from dpo.distributed.world import make_mesh
from dpo.machine.facts import Gpu
from dpo.reference import program as reference
from dpo.train import program as train
from tests.support.models import save_model, save_pairs
from tests.support.ranks import Ranks
from tests.support.runs import make_config

pytestmark = pytest.mark.xdist_group("ranks")


def timeout_of(group: dist.ProcessGroup | None = None) -> timedelta:
    """After which a collective of a group, by default the default one, fails."""
    backend = (group or dist.group.WORLD)._get_backend(torch.device("cpu"))  # type: ignore[union-attr]
    return backend.options._timeout


def phases(late: int) -> dict[str, Any]:
    """What the ranks exchange in both phases, where rank `late` comes to the second one last."""
    with open_world(70) as world:
        first = (all_gather(world.rank), timeout_of())
        if world.rank == late:
            while world.store.add("steps/arrived", 0) < world.size - 1:  # type: ignore[union-attr]
                pass
        start_devices(world, 50)
        total = torch.ones(3)
        dist.all_reduce(total)
        return {
            "first": first,
            "second": (all_gather(world.rank), timeout_of()),
            "from rank 0": on_main(world, lambda: 7),
            "sum": total.tolist(),
        }


@pytest.mark.parametrize("late", [0, 2])
def test_both_phases_have_a_group_of_all_with_a_timeout_of_its_own(ranks: Ranks, late: int) -> None:
    for found in ranks(3, phases, late):
        assert found == {
            "first": ([0, 1, 2], timedelta(seconds=70)),
            "second": ([0, 1, 2], timedelta(seconds=50)),
            "from rank 0": 7,
            "sum": [3.0, 3.0, 3.0],
        }


def mesh_of_four() -> dict[str, Any]:
    with open_world(70) as world:
        start_devices(world, 60)
        mesh = make_mesh(world, ParallelConfig(replicate=2, timeout_seconds=50))
        groups = {name: mesh.get_group(name) for name in ("replicate", "shard")}
        with patch.object(dist, "new_group", side_effect=AssertionError("a second policy needs no groups of its own")):
            again = make_mesh(world, ParallelConfig(replicate=2, timeout_seconds=50))
        assert all(again.get_group(name) is group for name, group in groups.items())
        sums = {}
        for name, group in groups.items():
            value = torch.tensor([10.0**world.rank])
            dist.all_reduce(value, group=group)
            sums[name] = value.item()
        return {
            "ranks": {name: dist.get_process_group_ranks(group) for name, group in groups.items()},
            "timeouts": {timeout_of(group) for group in groups.values()},
            "sums": sums,
            "place": mesh.get_coordinate(),
        }


def test_two_copies_of_two_parts(ranks: Ranks) -> None:
    """Rank r is part r % 2 of copy r // 2: 10^r summed over a dimension tells who was in it."""
    found = ranks(4, mesh_of_four)
    for rank, mesh in enumerate(found):
        copy, part = divmod(rank, 2)
        assert mesh["ranks"] == {"replicate": [part, part + 2], "shard": [2 * copy, 2 * copy + 1]}
        assert mesh["sums"] == {"replicate": 10.0**part + 10.0 ** (part + 2), "shard": 11.0 * 100.0**copy}
        assert mesh["timeouts"] == {timedelta(seconds=50)}
        assert list(mesh["place"]) == [copy, part]


# --- on a machine with a GPU, mocked ---------------------------------------------------------------------------------


@contextmanager
def one_gpu(started: list[str]) -> Iterator[None]:
    """torch finds a GPU; `started` hears what is done with it, and with process groups, in order."""
    init = dist.init_process_group

    def join(backend: str, **settings: Any) -> None:
        started.append(f"{backend} {settings.get('device_id')}")
        init("gloo", **{key: value for key, value in settings.items() if key != "device_id"})

    def place(device: torch.device) -> None:
        started.append(f"set_device {device}")

    with (
        patch.object(torch.cuda, "is_available", lambda: True),
        patch.object(torch.cuda, "set_device", place),
        patch.object(torch.cuda, "device_count", lambda: 1),
        patch("dpo.machine.facts.ask_cuda", lambda index: (Gpu("NVIDIA H100", (9, 0), 232_448), None)),
        patch("dpo.distributed.startup._connect", lambda world: started.append("connected")),
        patch.object(dist, "init_process_group", join),
        patch.dict(os.environ),
    ):
        os.environ.pop("PYTORCH_NVML_BASED_CUDA_CHECK", None)
        for name in ALLOCATOR_VARIABLES:
            os.environ.pop(name, None)
        yield


def test_the_first_phase_touches_no_gpu_and_the_second_connects_it_at_once() -> None:
    started: list[str] = []
    with one_gpu(started), open_world(60) as world:
        assert (world.device, started) == (torch.device("cuda", 0), ["gloo None"])
        assert os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] == "1"
        assert os.environ["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"
        start_devices(world, 60)
        assert started[1:] == ["set_device cuda:0", "cpu:gloo,cuda:nccl cuda:0", "connected"]
    assert not torch.cuda.is_initialized()


class Placed(Exception):
    """What a program raises that comes to its first model."""


PROGRAMS = {
    "train": (train, "decide_parallel", train.run_training),
    "reference": (reference, "make_packer", reference.fill_alone),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_input_is_read_before_the_gpu_is_used(tmp_path: Any, name: str) -> None:
    """The programs with a config read their input in the first phase, and place nothing before the second."""
    module, places, program = PROGRAMS[name]
    started: list[str] = []
    config: Config = make_config(
        save_model(tmp_path / "model", "llama"), save_pairs(tmp_path / "pairs.jsonl", 4), tmp_path / "run",
        batch__pairs_per_step=2,
    )  # fmt: skip
    read = module.read_inputs

    def reading(*args: Any) -> Any:
        inputs = read(*args)
        started.append("input read")
        return inputs

    with (
        one_gpu(started),
        patch.object(module, "read_inputs", reading),
        patch.object(module, places, side_effect=Placed),
    ):
        with pytest.raises(Placed):
            program(config)
        dist.destroy_process_group()
    assert started == ["gloo None", "input read", "set_device cuda:0", "cpu:gloo,cuda:nccl cuda:0", "connected"]


def test_gpus_that_cannot_be_connected_are_told_by_the_rank() -> None:
    broken = Mock(side_effect=dist.DistBackendError("NCCL error: unhandled system error"))
    says = r"^rank 0: the ranks cannot be connected: NCCL error: .*GLOO_SOCKET_IFNAME"
    with pytest.raises(ConnectionError, match=says), open_world(60) as world:
        with patch.object(dist, "init_process_group", broken):
            start_devices(world, 60)


@pytest.mark.parametrize("name", ALLOCATOR_VARIABLES)
def test_the_users_allocator_settings_stay(name: str) -> None:
    environment = {name: "max_split_size_mb:128"}
    set_allocator(environment)
    assert environment == {name: "max_split_size_mb:128"}
