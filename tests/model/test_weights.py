"""Model folders: read into sharded masters whatever their form, refused where they do not fit, hashed by content."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import Gemma3Config

from dpo.base.errors import UserError
from dpo.config import ParallelConfig
from dpo.distributed.startup import open_world
from dpo.distributed.world import World, make_mesh
from dpo.model.build import build_policy, load_weights
from dpo.model.download import find_model
from dpo.model.model_config import read_model_config
from dpo.model.policy import Policy
from dpo.model.weights import hash_model, tensor_files
from tests.support.models import FAMILIES, plain_model, save_model

CONFIG = ParallelConfig()


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with open_world(60) as world:
        yield world


def load(world: World, folder: Path, dtype: str = "float32") -> Policy:
    policy = build_policy(read_model_config(folder, False), CONFIG, dtype, make_mesh(world, CONFIG))
    load_weights(policy, folder)
    return policy


def masters(policy: Policy) -> dict[str, Tensor]:
    return {name: parameter.full_tensor() for name, parameter in policy.model.named_parameters()}


def assert_masters(policy: Policy, folder: Path, dtype: torch.dtype = torch.float32) -> None:
    """Bit by bit what plain `from_pretrained` loads, in the masters' dtype."""
    wanted = dict(plain_model(folder, dtype).named_parameters())
    found = masters(policy)
    assert found.keys() == wanted.keys()
    assert all(found[name].dtype == dtype and torch.equal(found[name], wanted[name]) for name in wanted)


# --- read ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_read_as_plain_transformers_reads_it(family: str, world: World, tmp_path: Path) -> None:
    assert_masters(load(world, save_model(tmp_path, family)), tmp_path)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16])
def test_half_precision_on_disk_is_widened(stored: torch.dtype, dtype: str, world: World, tmp_path: Path) -> None:
    """Masters are never narrower than float32, and exactly the stored values."""
    policy = load(world, save_model(tmp_path, "llama", dtype=stored), dtype)
    on_disk = load_file(tmp_path / "model.safetensors")
    assert {tensor.dtype for tensor in on_disk.values()} == {stored}
    wanted = getattr(torch, dtype)
    assert all(t.dtype == wanted and torch.equal(t, on_disk[name].to(wanted)) for name, t in masters(policy).items())


def test_several_files(world: World, tmp_path: Path) -> None:
    folder = split_files(save_model(tmp_path / "one", "gpt-neox"), tmp_path / "many")
    assert len(list(folder.glob("*.safetensors"))) > 2
    assert_masters(load(world, folder), tmp_path / "one")


def split_files(folder: Path, into: Path) -> Path:
    """The same model in files of at most 20 kB."""
    plain_model(folder).save_pretrained(into, max_shard_size="20KB")
    return into


@pytest.mark.parametrize("family", ["gpt2", "llama-tied"])
def test_a_checkpoint_of_the_bare_body(family: str, world: World, tmp_path: Path) -> None:
    """As the hub's gpt2 is stored: names without `transformer.`, and no head, which is the embedding."""
    model = plain_model(save_model(tmp_path / "whole", family))
    model.base_model.save_pretrained(tmp_path / "body")
    (tmp_path / "body" / "config.json").write_bytes((tmp_path / "whole" / "config.json").read_bytes())
    names = load_file(tmp_path / "body" / "model.safetensors").keys()
    assert not any(name.startswith(model.base_model_prefix) for name in names)
    assert_masters(load(world, tmp_path / "body"), tmp_path / "whole")


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    """Changes the tensors of a folder of one file."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_surplus_tensors_are_ignored(world: World, tmp_path: Path) -> None:
    """As the buffers that old checkpoints carry."""
    folder = save_model(tmp_path, "gpt2")
    rewrite(folder, lambda tensors: tensors.update({"transformer.h.0.attn.masked_bias": torch.tensor(-1e4)}))
    assert_masters(load(world, folder), folder)


# --- refused ---------------------------------------------------------------------------------------------------------

UP = "model.layers.1.mlp.up_proj.weight"


def test_a_missing_tensor_is_named(world: World, tmp_path: Path) -> None:
    folder = save_model(tmp_path, "llama")
    rewrite(folder, lambda tensors: tensors.pop(UP))
    with pytest.raises(UserError, match=f"^{folder}: 1 tensors of the model are missing, the first is {UP}$"):
        load(world, folder)


@pytest.mark.parametrize("shape", [(47, 32), (32, 48)])
def test_a_wrong_shape_is_named(shape: tuple[int, int], world: World, tmp_path: Path) -> None:
    """Also one with the right number of elements: the config wants (48, 32)."""
    folder = save_model(tmp_path, "llama")
    rewrite(folder, lambda tensors: tensors.update({UP: torch.zeros(shape)}))
    message = rf"model.safetensors: {UP} has shape \({shape[0]}, {shape[1]}\) .* wants \(48, 32\)$"
    with pytest.raises(UserError, match=message):
        load(world, folder)


def test_a_broken_file_is_named(world: World, tmp_path: Path) -> None:
    folder = save_model(tmp_path, "llama")
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UserError, match=f"^{file}: not a readable safetensors file"):
        load(world, folder)


def test_a_folder_without_safetensors_is_refused_with_the_command_that_converts_it(
    world: World, tmp_path: Path
) -> None:
    folder = save_model(tmp_path, "llama")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"^model\.path: .* has no \*\.safetensors; convert it with: python -c "):
        find_model(str(folder), "model.path", world)


def test_a_folder_without_any_weights_is_refused_as_such(world: World, tmp_path: Path) -> None:
    """Nothing can be converted there."""
    (save_model(tmp_path, "llama") / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"^model\.path: .* has no weights: no \*\.safetensors; valid: the "):
        find_model(str(tmp_path), "model.path", world)


@pytest.mark.parametrize("path", ["./nowhere", "nowhere", "/no/where"])
def test_a_missing_folder_is_refused(path: str, world: World) -> None:
    with pytest.raises(UserError, match=rf"^reference\.path: no such folder: {path}; valid: "):
        find_model(path, "reference.path", world)


# --- hashed ----------------------------------------------------------------------------------------------------------


def hashed(folder: Path, world: World) -> str:
    return hash_model(folder, read_model_config(folder, False), world)


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_the_hash_does_not_depend_on_files_and_folder(world: World, tmp_path: Path) -> None:
    one = save_model(tmp_path / "one", "llama")
    assert hashed(one, world) == hashed(split_files(one, tmp_path / "many"), world)


def test_the_hash_depends_on_every_byte(world: World, tmp_path: Path) -> None:
    """The last byte of the file is the last of some weight; put back, the hash is the old one."""
    folder = save_model(tmp_path, "llama")
    file, before = folder / "model.safetensors", hashed(folder, world)
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert hashed(folder, world) != before
    file.write_bytes(content)
    assert hashed(folder, world) == before


def test_the_hash_depends_on_names_and_dtype(world: World, tmp_path: Path) -> None:
    """Two layers' norms exchanged; half the bits a number; another shape; another name: every byte as it was."""
    folder = save_model(tmp_path, "llama")
    hashes = {hashed(folder, world)}
    names = [f"model.layers.{layer}.input_layernorm.weight" for layer in (0, 1)]
    rewrite(folder, lambda tensors: tensors.update({names[0]: tensors[names[1]], names[1]: tensors[names[0]]}))
    hashes.add(hashed(folder, world))
    rewrite(folder, lambda tensors: tensors.update({names[0]: tensors[names[0]].view(torch.float16)}))
    hashes.add(hashed(folder, world))
    rewrite(folder, lambda tensors: tensors.update({names[0]: tensors[names[0]].reshape(2, 32)}))
    hashes.add(hashed(folder, world))
    rewrite(folder, lambda tensors: tensors.update({UP + "s": tensors.pop(UP)}))
    hashes.add(hashed(folder, world))
    assert len(hashes) == 5


@pytest.mark.parametrize(
    "change", [{"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}, {"rms_norm_eps": 1e-5}]
)
def test_the_hash_depends_on_the_config(change: dict[str, Any], world: World, tmp_path: Path) -> None:
    folder = save_model(tmp_path, "llama")
    before = hashed(folder, world)
    edit_config(folder, **change)
    assert hashed(folder, world) != before


@pytest.mark.parametrize(
    "change",
    [
        {"_name_or_path": "elsewhere"},
        {"transformers_version": "4.0.0"},
        {"architectures": ["Other"]},
        {"dtype": "bfloat16"},
        {"torch_dtype": "bfloat16"},
    ],
    ids=lambda change: next(iter(change)),
)
def test_the_hash_does_not_depend_on_names_and_versions(change: dict[str, Any], world: World, tmp_path: Path) -> None:
    folder = save_model(tmp_path, "llama")
    before = hashed(folder, world)
    edit_config(folder, **change)
    assert hashed(folder, world) == before


def test_a_second_copy_in_another_form_is_not_part_of_the_model(tmp_path: Path) -> None:
    """Mistral's repositories hold consolidated.safetensors beside the files of the index: neither read nor hashed."""
    folder = save_model(tmp_path / "model", "mistral")
    before = sorted(tensor_files(folder))
    save_file({"layers.0.attention.wq.weight": torch.zeros(3)}, folder / "consolidated.safetensors")
    assert sorted(tensor_files(folder)) == before


def test_more_than_a_language_model_is_refused(tmp_path: Path) -> None:
    Gemma3Config().save_pretrained(tmp_path)
    with pytest.raises(UserError, match="gemma3 models are not supported: they are more than a language model"):
        read_model_config(tmp_path, False)
