"""Downloads and checks the models, tokenizers and adapters of a run."""

from pathlib import Path

import torch
from transformers import PretrainedConfig

from dpo.adapters.choice import find_adapters
from dpo.adapters.targets import find_targets
from dpo.base.errors import InvalidValue
from dpo.base.units import shown_bytes
from dpo.config import Config
from dpo.encode.tokenizer import load_tokenizer
from dpo.hub.files import ADAPTERS, MODEL, TOKENIZER, Need
from dpo.hub.ids import is_hub_id, is_tokenizer_id
from dpo.hub.snapshots import Download, HubUnreachable, cached_snapshot, download
from dpo.model.build import build_on_meta
from dpo.model.download import check_id, checked_model
from dpo.terminal.console import in_one_line, say, warn


def prepare_models(config: Config) -> list[Path]:
    """Downloads the newest revisions of the policy's and the reference's model; returns the folders, one where they are
    the same. Raises UserError where there is no such model.
    """
    paths = {"model.path": config.model.path, "reference.path": config.reference.path}
    return [_prepare_model(path, key) for key, path in paths.items() if path is not None]


def _prepare_model(path: str, key: str) -> Path:
    if Path(path).exists():
        return checked_model(Path(path), path, key)
    check_id(path, key)
    return checked_model(newest_snapshot(path, key, MODEL), path, key)


def prepare_tokenizer(config: Config) -> None:
    """Downloads the newest revision of a tokenizer that `model.tokenizer` names by its hub id. Raises UserError where
    it cannot be loaded.
    """
    path = config.model.tokenizer
    if path is not None:
        if not Path(path).is_dir() and is_tokenizer_id(path):
            newest_snapshot(path, "model.tokenizer", TOKENIZER)
        load_tokenizer(path, config.model.trust_remote_code)


def newest_snapshot(repository: str, key: str, need: Need) -> Path:
    """Returns the folder of the newest revision of a repository, with the files that are needed; says which it is.

    Where the hub does not answer, the revision in the cache is taken, with a warning, if it is complete.

    Args:
        repository: the hub id.
        key: the key of the config that names it, for errors.
        need: the files.

    Raises:
        UserError: there is no such repository, or the hub does not answer and the cache lacks files.
        RunError: the disk has no room for the download.
    """
    say(f"{repository}: asking the hub for its newest revision, and downloading what is not in the cache")
    cached = cached_snapshot(repository)
    missing = need.missing(cached) if cached else [need.first]
    try:
        found = download(repository, need, missing=missing)
    except HubUnreachable as failure:
        if cached is None or missing:
            raise failure.at(key) from failure
        warn(f"{failure.what}; the revision in the cache is taken")
        found = Download(cached, 0)
    except InvalidValue as failure:
        raise failure.at(key) from failure
    revision = f"revision {found.folder.name[:12]}, {_downloaded(found.num_bytes)}, in {found.folder}"
    print(in_one_line(f"{key} {repository}: {revision}"))
    return found.folder


def _downloaded(num_bytes: int) -> str:
    return f"{shown_bytes(num_bytes)} downloaded" if num_bytes else "in the cache already"


def prepare_adapters(config: Config, model_config: PretrainedConfig) -> None:
    """Downloads the newest revision of the adapters that `lora.path` names by their hub id, and finds the layers that
    the adapters of the run are for. Raises UserError where they cannot be used, or the model has no such layers.
    """
    path = config.lora.path
    if path is not None and not Path(path).exists() and is_hub_id(path):
        newest_snapshot(path, "lora.path", ADAPTERS)
    adapters = find_adapters(config)
    if adapters is None:
        return
    dtype = getattr(torch, config.model.dtype)
    targets = find_targets(build_on_meta(model_config, dtype, config.model.trust_remote_code), adapters)
    found = f"lora.path {config.lora.path}: in {adapters.folder}, " if adapters.folder else "lora: "
    kinds = ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in targets))
    print(in_one_line(f"{found}rank {adapters.rank}, alpha {adapters.alpha:g}, for {kinds or 'no layers'}"))
