"""Hashes, reads and writes the tensors of model folders in Hugging Face's form, each rank its own shards."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import MappingProxyType

import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError, safe_open
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.filesystem import FileSystem
from transformers import PretrainedConfig

from dpo.adapters.nf4_linear import NF4Linear
from dpo.base.errors import UserError
from dpo.distributed.collectives import all_gather, on_main, together
from dpo.distributed.copies import fill_copies
from dpo.distributed.shards import local
from dpo.distributed.world import World
from dpo.hub.files import INDEX, read_weight_map, stored_weights
from dpo.model.matching import Names, StoredTensor, match
from dpo.model.nf4_reading import QuantizingPlanner
from dpo.watch.failures import storage_errors

CONFIG_NOISE = {"_name_or_path", "name_or_path", "transformers_version", "dtype", "torch_dtype", "architectures"}
"""Keys of a model's config that do not change the model's results in our dtypes."""

FILE_BYTES = 5 * 2**30
"""The size of a file of an exported model, in bytes, above which another file is begun."""


# --- hashed ----------------------------------------------------------------------------------------------------------


def hash_model(folder: Path, config: PretrainedConfig, world: World) -> str:
    """Returns a hash of the model's content: every tensor's name, dtype, shape and bytes, and the config without names.

    It does not depend on how the tensors are divided into files. Each rank hashes a part of the tensors. Every rank
    must get here, or the rest hang.

    Args:
        folder: the Hugging Face folder of the model.
        config: its transformers config.

    Returns:
        64 hex digits, the same on every rank.
    """
    digests = {
        name: digest for part in all_gather(together(lambda: _hash_tensors(folder, world))) for name, digest in part
    }
    settings = {k: v for k, v in config.to_dict().items() if k not in CONFIG_NOISE}
    content = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    for name in sorted(digests):
        content.update(digests[name])
    return content.hexdigest()


def _hash_tensors(folder: Path, world: World) -> list[tuple[str, bytes]]:
    """Returns (name, hash) of this rank's part of the tensors; the largest are dealt to the ranks first."""
    files = tensor_files(folder)
    own_names = sorted(files, key=lambda name: (-files[name].shape.numel(), name))[world.rank :: world.size]
    return [(name, _hash_tensor(files[name].file, name)) for name in own_names]


def tensor_files(folder: Path) -> dict[str, StoredTensor]:
    """Returns the tensors in the files of a folder, by name; reads no values. Raises UserError for a broken file, and
    for a tensor that is in two files.
    """
    tensors: dict[str, StoredTensor] = {}
    for path in tensor_paths(folder):
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():
                    if name in tensors:
                        both = f"{name} is in {tensors[name].file.name} and in {path.name}"
                        raise UserError(str(folder), both, f"each tensor in one file, or an {INDEX} of the right files")
                    header = file.get_slice(name)
                    tensors[name] = StoredTensor(path, torch.Size(header.get_shape()), header.get_dtype())
        except FileNotFoundError as failure:
            cause = f"{folder / INDEX} lists it" if not path.is_symlink() else f"it is a link to {path.readlink()}"
            raise UserError(str(path), f"there is no such file, but {cause}", "a folder with all files") from failure
        except (SafetensorError, OSError) as failure:
            raise UserError(str(path), f"not a readable safetensors file: {failure}") from failure
    return tensors


def _hash_tensor(path: Path, name: str) -> bytes:
    """Returns a hash of a tensor's name, dtype, shape and bytes."""
    with safe_open(path, framework="pt") as file:
        tensor = file.get_tensor(name).contiguous()
    digest = hashlib.sha256(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
    digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return digest.digest()


# --- read and written ------------------------------------------------------------------------------------------------


def tensor_paths(folder: Path) -> list[Path]:
    """Returns the files of a model's tensors; see `dpo.hub.files.weight_files`.

    Some repositories have the same weights a second time, in a file of another form.
    """
    return [folder / name for name in stored_weights(folder)]


def index_findings(folder: Path) -> Iterator[str]:
    """Yields a line where the index of a folder does not describe its files: a model is what its files hold, here as in
    `from_pretrained`.
    """
    listed, stored = read_weight_map(folder / INDEX) or {}, tensor_files(folder)
    absent = sorted(set(listed) - set(stored))
    moved = sorted(name for name in set(listed) & set(stored) if stored[name].file.name != listed[name])
    unlisted = sorted(set(stored) - set(listed)) if listed else []
    if absent:
        yield f"{folder / INDEX} lists {_several(absent)} in no file"
    if moved:
        place = f"{listed[moved[0]]}, read from {stored[moved[0]].file.name}"
        yield f"{folder / INDEX} lists {_several(moved)} in another file: listed in {place}"
    if unlisted:
        yield f"{folder / INDEX} does not list {_several(unlisted)} in its files and read all the same"


def _several(names: Sequence[str]) -> str:
    return f"{len(names)} tensors, the first {names[0]}, that are" if len(names) > 1 else f"{names[0]}, which is"


class _FilesOfModel(FileSystem):
    """Lists the files of a model in place of all files of its folder, from which a storage reader would read them: a
    second file with the same tensors, such as model.fp16.safetensors, would then take the place of the first.
    """

    def __init__(self, folder: Path):
        self.files = [str(path) for path in tensor_paths(folder)]

    def ls(self, path: str | os.PathLike[str]) -> list[str]:
        """Returns the files of the model, whatever folder is asked for."""
        return self.files


def _reader(folder: Path) -> HuggingFaceStorageReader:
    """Returns a reader of the files of the model in a folder."""
    reader = HuggingFaceStorageReader(str(folder))
    reader.fs = _FilesOfModel(folder)
    return reader


def load_tensors(
    folder: Path,
    tensors: Mapping[str, torch.Tensor],
    names: Names,
    quantized: Mapping[torch.Tensor, NF4Linear] = MappingProxyType({}),
) -> Sequence[str]:
    """Fills tensors with the tensors of the same names in a folder. Of a DTensor each rank reads its shard alone; where
    there are several copies of the model, the ranks of the first read, and broadcast their shards to the others.

    Every rank must get here, or the rest hang.

    Args:
        folder: a model folder.
        tensors: the tensors to fill, by name.
        names: the names of the model's tensors in its folder.
        quantized: the layers that are filled in place of some tensors; see `dpo.model.nf4_reading`.

    Returns:
        The names of tensors in the folder for which the model has no place, sorted; see `matching.Match`.

    Raises:
        UserError: a tensor is missing, has another shape, or is quantized.
    """
    found = together(lambda: match(folder, tensor_files(folder), tensors, names))
    layers = {name: quantized[tensor] for name, tensor in found.tensors.items() if tensor in quantized}
    assert len(layers) == len(quantized), "a quantized weight is stored in parts"
    plain = {name: tensor for name, tensor in found.tensors.items() if name not in layers}
    load = partial(dcp.load, plain, storage_reader=_reader(folder), planner=QuantizingPlanner(layers))
    filled = [*plain.values(), *(layer.packed for layer in layers.values())]
    fill_copies(filled, lambda group: storage_errors(folder)(load)(process_group=group))
    return found.unused


def save_tensors(folder: Path, tensors: Mapping[str, torch.Tensor], dtype: torch.dtype, world: World) -> None:
    """Writes tensors (DTensors too) as safetensors in `folder`, in files of at most about FILE_BYTES with an index.

    Each rank writes its shards, then rank 0 joins them. Every rank must get here, or the rest hang.

    Args:
        folder: an existing folder, which all ranks see.
        tensors: the tensors by their names in the files; every rank passes the same names.
        dtype: the dtype in which floating-point tensors are written.

    Raises:
        RunError: a rank cannot write to the folder.
    """
    cast = {
        name: tensor.detach().to(dtype) if tensor.is_floating_point() else tensor for name, tensor in tensors.items()
    }
    sizes = {name: tensor.numel() * tensor.element_size() for name, tensor in cast.items()}
    writer = HuggingFaceStorageWriter(
        str(folder),
        fqn_to_index_mapping=_assign_files(sizes),
        save_distributed=True,
        enable_consolidation=True,
        thread_count_consolidation=8,
    )
    with storage_errors(folder, 2 * sum(sizes.values())):  # shards, and the files that these are joined to
        dcp.save(cast, storage_writer=writer)
    on_main(world, lambda: _tidy(folder))


def are_finite(tensors: Iterable[torch.Tensor]) -> bool:
    """Returns whether all elements of some tensors are finite; of a DTensor those of this rank's shard."""
    return all(bool(torch.isfinite(local(tensor)).all()) for tensor in tensors)


def _assign_files(sizes: Mapping[str, int]) -> dict[str, int]:
    """Returns the number of each tensor's file, from 1, by name; files are filled in the order of `sizes`, in bytes."""
    files, number, room = {}, 1, FILE_BYTES
    for name, size in sizes.items():
        if size > room and room < FILE_BYTES:
            number, room = number + 1, FILE_BYTES
        files[name], room = number, room - size
    return files


def _tidy(folder: Path) -> None:
    """Removes the shards; renames a single file to model.safetensors, which needs no index."""
    shutil.rmtree(folder / "sharded", ignore_errors=True)
    files = list(folder.glob("*.safetensors"))
    if len(files) == 1:
        files[0].rename(folder / "model.safetensors")
        for index in folder.glob("*.index.json"):
            index.unlink()
