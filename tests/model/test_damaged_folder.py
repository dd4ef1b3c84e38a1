"""Model folders whose files do not belong together or are damaged: read as by transformers, told, or refused."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from dpo.base.errors import UserError
from dpo.config import ParallelConfig
from dpo.distributed.startup import open_world
from dpo.distributed.world import World, make_mesh
from dpo.model.build import build_policy, load_weights
from dpo.model.model_config import read_model_config
from dpo.model.weights import tensor_files
from tests.support.models import plain_model, save_model

INDEX = "model.safetensors.index.json"
HEAD, NORM = "lm_head.weight", "model.norm.weight"  # alone in its file; in a file with others


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with open_world(60) as world:
        yield world


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in several files with an index; to be copied."""
    root = tmp_path_factory.mktemp("model")
    plain_model(save_model(root / "one", "llama")).save_pretrained(root / "many", max_shard_size="20KB")
    return root


@pytest.fixture
def folder(stored: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(stored / "many", tmp_path / "model"))


def load(world: World, folder: Path) -> dict[str, torch.Tensor]:
    """The weights of a folder as this trainer reads them."""
    config = ParallelConfig()
    policy = build_policy(read_model_config(folder, False), config, "float32", make_mesh(world, config))
    load_weights(policy, folder)
    return {name: parameter.full_tensor() for name, parameter in policy.model.named_parameters()}


def is_as_transformers_reads(loaded: dict[str, torch.Tensor], folder: Path) -> bool:
    wanted = dict(plain_model(folder, torch.float32).named_parameters())
    return loaded.keys() == wanted.keys() and all(torch.equal(loaded[name], wanted[name]) for name in wanted)


def change_index(folder: Path, **files: str | None) -> None:
    """Lists tensors in other files; None: not at all."""
    path = folder / INDEX
    index = json.loads(path.read_text())
    weight_map = {name: file for name, file in (index["weight_map"] | files).items() if file is not None}
    path.write_text(json.dumps(index | {"weight_map": weight_map}))


@pytest.mark.parametrize("name", ["aaa.safetensors", "zzz.safetensors", "model.fp16.safetensors"])
@pytest.mark.parametrize("form", ["one", "many"])
def test_a_second_file_with_the_same_tensors_is_not_read(form, name, stored, world, tmp_path) -> None:
    """Zeros beside the model. torch's reader of a folder reads every file in it, and the last one wins."""
    folder = Path(shutil.copytree(stored / form, tmp_path / "model"))
    tensors = {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
    expected = load(world, folder)
    save_file({name: torch.zeros_like(tensor) for name, tensor in tensors.items()}, folder / name)
    loaded = load(world, folder)
    assert all(torch.equal(loaded[name], expected[name]) for name in expected)
    assert is_as_transformers_reads(loaded, folder)


def test_a_tensor_in_two_files_of_the_model_is_refused(folder: Path, world: World) -> None:
    first, second = sorted(folder.glob("*.safetensors"))[:2]
    name = min(load_file(first))
    save_file({**load_file(second), name: torch.zeros(3)}, second)
    with pytest.raises(UserError, match=f"^{folder}: {name} is in {first.name} and in {second.name}; valid: ") as error:
        tensor_files(folder)
    assert "\n" not in str(error.value)


def test_an_index_that_says_nothing_wrong_says_nothing(folder: Path, world: World, capsys) -> None:
    loaded = load(world, folder)
    assert capsys.readouterr().err == ""
    assert is_as_transformers_reads(loaded, folder)


@pytest.mark.parametrize(
    ("listed", "told"),
    [
        ({NORM: None}, f"does not list {NORM}, which is in its files and read all the same"),
        ({NORM: "FIRST"}, f"lists {NORM}, which is in another file: listed in FIRST, read from HOLDER"),
        ({"x": "FIRST", "y": "FIRST"}, "lists 2 tensors, the first x, that are in no file"),
    ],
)
def test_an_index_that_differs_from_its_files_is_told(
    listed: dict[str, Any], told: str, folder: Path, world: World, capsys
) -> None:
    """The files are read, as by transformers."""
    holder = next(file.name for file in folder.glob("*.safetensors") if NORM in load_file(file))
    first = next(file.name for file in sorted(folder.glob("*.safetensors")) if file.name != holder)
    change_index(folder, **{name: file and first for name, file in listed.items()})
    loaded = load(world, folder)
    told = told.replace("FIRST", first).replace("HOLDER", holder)
    assert capsys.readouterr().err == f"WARNING: {folder / INDEX} {told}\n"
    assert is_as_transformers_reads(loaded, folder)


def test_a_tensor_that_only_the_index_has_is_missing(folder: Path, world: World) -> None:
    """Neither listed in its file any more, nor there; transformers would begin with random weights."""
    file = next(file for file in folder.glob("*.safetensors") if HEAD in load_file(file))
    tensors = load_file(file)
    del tensors[HEAD]
    save_file({**tensors, "other": torch.zeros(1)}, file)
    with pytest.raises(UserError, match=f"^{folder}: 1 tensors of the model are missing, the first is {HEAD}"):
        load(world, folder)


def test_a_file_that_only_the_index_has_is_named(folder: Path, world: World) -> None:
    change_index(folder, **{HEAD: "gone.safetensors"})
    what = f"there is no such file, but {folder / INDEX} lists it"
    with pytest.raises(UserError, match=f"^{folder}/gone.safetensors: {what}; valid: a folder with all files"):
        load(world, folder)


def test_a_link_that_leads_nowhere_is_named(folder: Path, world: World) -> None:
    """As in a snapshot of the hub whose blob is gone."""
    file = max(folder.glob("*.safetensors"))
    file.unlink()
    file.symlink_to("../blobs/0123")
    with pytest.raises(UserError, match=f"^{file}: there is no such file, but it is a link to ../blobs/0123; valid: "):
        load(world, folder)


@pytest.mark.parametrize(
    "content",
    ["", "[]", "null", "[" * 100_000, '{"model_type": "llama", "hidden_size": "x"}', '{"model_type": []}'],
    ids=["empty", "list", "null", "deep", "text for a number", "no name"],
)
def test_a_broken_config_is_one_line(content: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(UserError, match=f"^{tmp_path}/config.json: ") as error:
        read_model_config(tmp_path, False)
    assert len(str(error.value)) < 500 and "\n" not in str(error.value)


@pytest.mark.parametrize("change", [{"hidden_size": -64}, {"hidden_act": "sil|u"}])
@pytest.mark.parametrize("family", ["llama", "llama-tied"])
def test_a_config_of_no_model_is_one_line(change: dict[str, Any], family: str, world: World, tmp_path: Path) -> None:
    """What transformers finds only when it builds the model; that of a tied head is built earlier."""
    path = save_model(tmp_path, family) / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError, match=f"^{path}: "):
        load(world, tmp_path)
