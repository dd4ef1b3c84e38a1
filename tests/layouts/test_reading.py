"""Which rank reads which bytes of a model folder, and that all copies of a model get what plain transformers reads."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from torch.distributed.checkpoint import FileSystemReader, HuggingFaceStorageReader
from torch.distributed.tensor import DTensor

from dpo.base.errors import RunError
from dpo.checkpoint.store import _tensors_of, load_checkpoint, state_tensors
from dpo.config import ParallelConfig
from dpo.distributed.startup import open_world, start_devices
from dpo.distributed.world import make_mesh
from dpo.model import weights
from dpo.model.build import build_policy, load_weights
from dpo.model.model_config import read_model_config
from dpo.model.weights import hash_model
from tests.support.models import plain_model, save_model
from tests.support.ranks import Ranks

pytestmark = pytest.mark.xdist_group("ranks")

Elements = Counter[tuple[str, int]]
"""(tensor, index of an element in it) -> how often it was read."""


@contextmanager
def counted_reads(elements: Elements, shapes: dict[str, Any]) -> Iterator[None]:
    """Counts the elements that the reader of the checkpoint library takes from the files."""
    read = HuggingFaceStorageReader._process_read_request

    def counted(self: Any, file: Any, request: Any, planner: Any) -> None:
        name = request.storage_index.fqn
        rows = tuple(slice(at, at + n) for at, n in zip(request.storage_offsets, request.lengths, strict=True))
        indices = torch.arange(shapes[name].numel()).view(shapes[name])[rows]
        elements.update((name, index) for index in indices.flatten().tolist())
        read(self, file, request, planner)

    with patch.object(HuggingFaceStorageReader, "_process_read_request", counted):
        yield


def load(folder: Path, replicate: int, dtype: str, offload: bool) -> tuple[Elements, dict[str, Any], dict[str, Any]]:
    """(the elements that this rank read; its shard of each parameter; the same shard of what transformers reads)."""
    shapes = {name: tensor.shape for name, tensor in load_file(folder / "model.safetensors").items()}
    parallel, elements = ParallelConfig(replicate=replicate, cpu_offload=offload), Counter[tuple[str, int]]()
    with open_world(60, replicate) as world:
        start_devices(world, 60)
        mesh = make_mesh(world, parallel)
        policy = build_policy(read_model_config(folder, False), parallel, dtype, mesh)
        with counted_reads(elements, shapes):
            load_weights(policy, folder)
        plain = dict(plain_model(folder, getattr(torch, dtype)).named_parameters())
        part, parts = mesh.get_local_rank("shard"), mesh.size(mesh.ndim - 1)
        local = {name: p.to_local().detach().numpy() for name, p in policy.model.named_parameters()}
        wanted = {name: _rows(plain[name].detach(), part, parts).numpy() for name in local}
    return elements, local, wanted


def _rows(tensor: torch.Tensor, part: int, parts: int) -> torch.Tensor:
    """The rows of a shard, by FSDP's rule: as `torch.chunk`, and none for the last ranks of a short tensor."""
    chunks = tensor.chunk(parts)
    return chunks[part] if part < len(chunks) else tensor[:0]


LAYOUTS = {
    "one rank": (1, 1),
    "sharded over 2": (2, 1),
    "sharded over 3, unevenly": (3, 1),
    "two copies on 2": (2, 2),
    "sharded over 4": (4, 1),
    "two copies of two shards": (4, 2),
    "four copies": (4, 4),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_element_is_read_by_one_rank_and_all_copies_are_equal(ranks: Ranks, tmp_path: Path, name: str) -> None:
    """Stored in bfloat16 and kept in float32, bit by bit what `from_pretrained` gives."""
    size, replicate = LAYOUTS[name]
    folder = save_model(tmp_path, "qwen3", dtype=torch.bfloat16)
    found = ranks(size, load, folder, replicate, "float32", False)
    for _, local, wanted in found:
        assert local.keys() == wanted.keys()
        for parameter in local:
            assert local[parameter].dtype == wanted[parameter].dtype
            assert local[parameter].tobytes() == wanted[parameter].tobytes(), parameter
    reads = sum((elements for elements, _, _ in found), Counter[tuple[str, int]]())
    stored = load_file(folder / "model.safetensors")
    assert reads == {(name, index): 1 for name, tensor in stored.items() for index in range(tensor.numel())}
    assert [bool(elements) for elements, _, _ in found] == [rank < size // replicate for rank in range(size)]


def test_copies_in_host_memory_are_equal_too(ranks: Ranks, tmp_path: Path) -> None:
    folder = save_model(tmp_path, "llama-tied")
    for _, local, wanted in ranks(4, load, folder, 2, "float64", True):
        assert all(local[name].tobytes() == wanted[name].tobytes() for name in wanted)


def resume(folder: Path, checkpoint: Path, replicate: int) -> tuple[int, dict[str, bytes]]:
    """(the items that this rank read of a checkpoint; its shards of weights and optimizer state after it). AdamW, which
    keeps the number of its steps in host memory too.
    """
    items: list[int] = []
    read_data = FileSystemReader.read_data
    parallel = ParallelConfig(replicate=replicate)

    def counted(self: Any, plan: Any, planner: Any) -> Any:
        items.append(len(plan.items))
        return read_data(self, plan, planner)

    with open_world(60, replicate) as world:
        start_devices(world, 60)
        policy = build_policy(read_model_config(folder, False), parallel, "float32", make_mesh(world, parallel))
        optimizer = torch.optim.AdamW(policy.model.parameters(), foreach=False)
        with patch.object(FileSystemReader, "read_data", counted):
            load_checkpoint(checkpoint, policy.model, optimizer)
        state = _tensors_of(state_tensors(policy.model, optimizer))
        return sum(items), {str(i): _local(tensor).numpy().tobytes() for i, tensor in enumerate(state)}


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()


def save_adamw(folder: Path, checkpoint: Path) -> dict[str, bytes]:
    """Writes a checkpoint of one rank after two steps of AdamW on made gradients; returns whole what is in it."""
    with open_world(60) as world:
        start_devices(world, 60)
        policy = build_policy(read_model_config(folder, False), ParallelConfig(), "float32", make_mesh(world, PLAIN))
        load_weights(policy, folder)
        optimizer = torch.optim.AdamW(policy.model.parameters(), foreach=False)
        for _ in range(2):
            for parameter in policy.model.parameters():
                parameter.grad = torch.ones_like(parameter) * 0.01 + parameter.detach()
            optimizer.step()
        state = state_tensors(policy.model, optimizer)
        dcp.save(state, checkpoint_id=str(checkpoint))
        return {str(i): _local(tensor).numpy().tobytes() for i, tensor in enumerate(_tensors_of(state))}


PLAIN = ParallelConfig()


def test_one_copy_reads_the_checkpoint_for_all(ranks: Ranks, tmp_path: Path) -> None:
    """Two copies of two shards: those of the first, side by side, are what was saved; the second has them too."""
    folder = save_model(tmp_path / "model", "qwen3")
    (saved,) = ranks(1, save_adamw, folder, tmp_path / "checkpoint")
    (read0, first0), (read1, first1), (read2, second0), (read3, second1) = ranks(
        4, resume, folder, tmp_path / "checkpoint", 2
    )
    assert read0 > 0 and read1 > 0 and read2 == read3 == 0
    assert (second0, second1) == (first0, first1)
    for name, tensor in saved.items():  # steps are whole on every rank
        assert tensor == first0[name] + first1[name] or tensor == first0[name] == first1[name]


def hashed_names(folder: Path) -> list[str]:
    """The tensors that this rank reads for the model's hash."""
    names: list[str] = []
    hash_tensor = weights._hash_tensor

    def counted(path: Path, name: str) -> bytes:
        names.append(name)
        return hash_tensor(path, name)

    with open_world(60) as world, patch.object(weights, "_hash_tensor", counted):
        hash_model(folder, read_model_config(folder, False), world)
    return names


def test_every_tensor_is_hashed_by_one_rank(ranks: Ranks, tmp_path: Path) -> None:
    folder = save_model(tmp_path, "qwen3")
    names = [name for names in ranks(3, hashed_names, folder) for name in names]
    assert sorted(names) == sorted(load_file(folder / "model.safetensors"))


def failing_load(folder: Path, rank: int) -> str:
    """The error of a rank where one rank of two copies cannot read."""
    with open_world(60, 2) as world:
        start_devices(world, 60)
        parallel = ParallelConfig(replicate=2)
        policy = build_policy(read_model_config(folder, False), parallel, "float32", make_mesh(world, parallel))
        broken = {"side_effect": OSError(5, "Input/output error")} if world.rank == rank else {"autospec": True}
        with patch.object(HuggingFaceStorageReader, "read_data", **broken), pytest.raises(RunError) as raised:
            load_weights(policy, folder)
        return str(raised.value)


def test_a_rank_that_cannot_read_ends_the_ranks_of_all_copies(ranks: Ranks, tmp_path: Path) -> None:
    folder = save_model(tmp_path, "llama")
    errors = set(ranks(4, failing_load, folder, 1))
    assert len(errors) == 1 and "rank 1: OSError: [Errno 5] Input/output error" in errors.pop()
