"""The dtype of an exported model, against the dtype that plain transformers loads the base in."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from dpo.checkpoint.export_dtype import base_dtype, export_dtype
from dpo.config import CheckpointConfig
from dpo.disk.sizes import sizes_of
from dpo.model.model_config import read_model_config
from tests.support.models import save_model
from tests.support.runs import make_config

NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16", torch.float64: "float64"}


def says(folder: Path, **keys: object) -> None:
    """Replaces the dtype in config.json."""
    path = folder / "config.json"
    settings = json.loads(path.read_text())
    kept = {key: value for key, value in settings.items() if key not in ("dtype", "torch_dtype")}
    path.write_text(json.dumps(kept | keys))


def mixture(folder: Path, first: torch.dtype, rest: torch.dtype) -> Path:
    """A folder whose first tensor has another dtype than the rest."""
    path = save_model(folder, "llama") / "model.safetensors"
    tensors = load_file(path)
    names = sorted(tensors)
    save_file({name: tensors[name].to(rest if names.index(name) else first) for name in names}, path, {"format": "pt"})
    return folder


def loaded_dtype(folder: Path) -> str:
    """The oracle: the dtype of the model that `from_pretrained(dtype="auto")` gives."""
    return NAMES[AutoModelForCausalLM.from_pretrained(folder, dtype="auto").dtype]


@pytest.mark.parametrize(
    ("stored", "exported"),
    [
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float32),
        (torch.float64, torch.float32),
    ],
)
def test_a_base_of_one_dtype(tmp_path: Path, stored: torch.dtype, exported: torch.dtype) -> None:
    folder = save_model(tmp_path, "llama", dtype=stored)
    assert base_dtype(folder) == loaded_dtype(folder) == NAMES[stored]
    assert export_dtype(CheckpointConfig(), folder) == exported
    says(folder)  # nothing: only the tensors tell
    assert base_dtype(folder) == loaded_dtype(folder) == NAMES[stored]


@pytest.mark.parametrize("keys", [{}, {"dtype": "bfloat16"}, {"torch_dtype": "bfloat16"}, {"dtype": "float32"}])
@pytest.mark.parametrize("first", [torch.float32, torch.bfloat16])
def test_a_mixture_as_transformers_loads_it(tmp_path: Path, keys: dict[str, str], first: torch.dtype) -> None:
    rest = torch.float32 if first == torch.bfloat16 else torch.bfloat16
    folder = mixture(tmp_path, first, rest)
    says(folder, **keys)
    assert base_dtype(folder) == loaded_dtype(folder)


def test_the_tensors_count_where_config_says_otherwise(tmp_path: Path) -> None:
    """The weights of a base are float32 though config.json names bfloat16, as trainers with master weights leave it."""
    folder = save_model(tmp_path, "llama")
    says(folder, torch_dtype="bfloat16")
    assert export_dtype(CheckpointConfig(), folder) == torch.float32


def test_a_key_that_names_a_dtype(tmp_path: Path) -> None:
    folder = save_model(tmp_path, "llama", dtype=torch.bfloat16)
    assert export_dtype(CheckpointConfig(export_dtype="float32"), folder) == torch.float32
    assert export_dtype(CheckpointConfig(export_dtype="bfloat16"), save_model(tmp_path, "llama")) == torch.bfloat16


@pytest.mark.parametrize(("dtype", "itemsize"), [(torch.float32, 4), (torch.bfloat16, 2), (torch.float16, 4)])
def test_the_bytes_on_disk(tmp_path: Path, dtype: torch.dtype, itemsize: int) -> None:
    """Bytes per parameter of the export; without the weights, which an estimate does not need, by config.json."""
    folder = save_model(tmp_path / "model", "llama", dtype=dtype)
    shutil.copytree(folder, tmp_path / "config", ignore=shutil.ignore_patterns("*.safetensors"))
    for path in (folder, tmp_path / "config"):
        sizes = sizes_of(make_config(path, "", ""), read_model_config(path, False))
        assert sizes.final == itemsize * sizes.num_parameters
