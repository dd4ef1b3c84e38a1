"""Finds model folders: local ones, and repositories of the hub, which are downloaded where the cache lacks them."""

from pathlib import Path

from transformers import PretrainedConfig

from dpo.base.errors import InvalidValue, UserError
from dpo.config import Config
from dpo.config.peft_folder import base_of
from dpo.distributed.collectives import first_on_each_node
from dpo.distributed.world import World
from dpo.hub.files import CONFIG, CONFIG_FILE, MODEL, Need, is_of_adapters
from dpo.hub.ids import is_hub_id
from dpo.hub.snapshots import find_snapshot
from dpo.model.model_config import read_model_config
from dpo.model.weights import tensor_paths

VALID = "a Hugging Face model folder or hub id"


def find_model(path: str, key: str, world: World) -> Path:
    """Returns the local folder of a model: `path` itself, or a hub model, which is downloaded once per node where the
    hub's cache lacks files of it. A complete model in the cache is taken as it is, without a request.

    Every rank must get here, or the rest hang.

    Args:
        path: a local folder, or an id on the Hugging Face hub.
        key: the config key that gave `path`, for errors, such as `model.path`.
        world: the ranks.

    Raises:
        UserError: naming `key`: there is no such model, or it has no safetensors.
    """
    return first_on_each_node(world, lambda: _find_model(path, key))


def _find_model(path: str, key: str) -> Path:
    return checked_model(Path(path) if Path(path).exists() else _snapshot(path, key, MODEL), path, key)


def checked_model(folder: Path, path: str, key: str) -> Path:
    """Returns the folder. Raises UserError where it holds no config or no safetensors.

    Args:
        folder: the local folder.
        path: the name that the user gave it, a folder or hub id.
        key: the config key that gave `path`.
    """
    _check_config(folder, path, key)
    if not tensor_paths(folder):
        raise UserError(key, *_without_safetensors(folder, path))
    return folder


def _check_config(folder: Path, path: str, key: str) -> None:
    """Raises UserError where a folder has no config of a model, such as one of adapters; see `checked_model`."""
    if is_of_adapters(folder):
        base = base_of(folder)
        other = "a whole model; `dpo export --merge` writes one from the checkpoint of a run with adapters"
        both = f"model.path {base or 'BASE'} and lora.path {path}"
        raise UserError(key, f"{path} holds adapters, not a model", both if key == "model.path" else other)
    if not (folder / CONFIG_FILE).is_file():
        raise UserError(key, f"{path} has no config.json", VALID)


def _without_safetensors(folder: Path, path: str) -> tuple[str, str]:
    """Returns what is wrong with a folder without safetensors, and what would be right: weights in torch's own form can
    be converted.
    """
    if Path(path).exists() and not any(folder.glob("*.bin")):  # those of a hub model are not downloaded
        return f"{path} has no weights: no *.safetensors", "the folder of a trained model, or its hub id"
    command = (
        'python -c "from transformers import AutoModelForCausalLM as M, AutoTokenizer as T;'
        f" [x.from_pretrained('{path}').save_pretrained('{path}-safetensors') for x in (M, T)]\""
    )
    return f"{path} has no *.safetensors; convert it with: {command}", ""


def _snapshot(path: str, key: str, need: Need) -> Path:
    """Returns the local folder of a hub repository. Raises UserError for a path that is no hub id, or not found."""
    check_id(path, key)
    try:
        return find_snapshot(path, need)
    except InvalidValue as failure:
        raise failure.at(key) from failure


def check_id(path: str, key: str) -> None:
    """Raises UserError for a path that has not the form of a hub id: it must be a folder, and there is none."""
    if not is_hub_id(path):
        raise UserError(key, f"no such folder: {path}", VALID)


def find_model_config(config: Config) -> PretrainedConfig:
    """Returns the config of the model at `model.path`, a folder or hub id; needs no weights, and downloads none."""
    return read_named_config(config.model.path, "model.path", config.model.trust_remote_code)


def read_named_config(name: str, key: str, trust_remote_code: bool) -> PretrainedConfig:
    """Returns the config of a model, a folder or hub id.

    Args:
        name: the folder or hub id.
        key: the key of the trainer's config that names it, for errors.
        trust_remote_code: whether a model's own code may run.

    Raises:
        UserError: there is no such model, its config cannot be read, or this trainer cannot be exact for it.
    """
    folder = Path(name) if Path(name).exists() else _snapshot(name, key, CONFIG)
    _check_config(folder, name, key)
    return read_model_config(folder, trust_remote_code)
