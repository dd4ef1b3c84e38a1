"""Finds and loads the tokenizer of a folder or hub id."""

from pathlib import Path
from typing import Any

import transformers

from dpo.base.errors import InvalidValue, UserError
from dpo.hub.files import TOKENIZER
from dpo.hub.ids import is_tokenizer_id
from dpo.hub.snapshots import cached_snapshot, find_code, find_snapshot, offline


def load_tokenizer(path: str, trust_remote_code: bool = False) -> Any:
    """Returns the tokenizer of a folder or hub id. Raises UserError if it cannot be loaded or has no EOS token."""
    try:
        folder = find_tokenizer_folder(path)
        if not has_tokenizer(folder):
            raise OSError("it holds none")  # transformers would make an empty tokenizer from the model's config
        if trust_remote_code:
            find_code(folder)
        with offline():
            tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
        tokenizer("a")  # a damaged setting may show in use alone
    except InvalidValue as failure:
        raise failure.at("model.tokenizer") from failure
    except UserError:
        raise
    except Exception as error:  # of a broken file tokenizers raises Exception itself, and transformers many classes
        what = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(" :")[:300]
        raise UserError("model.tokenizer", f"{path}: cannot be loaded: {what}", "a tokenizer's folder") from error
    tokenizer.name_or_path = path  # for errors: of a hub repository its id, not the folder in the cache
    if tokenizer.eos_token_id is None:
        raise UserError("model.tokenizer", f"{path}: the tokenizer has no EOS token", "one with an eos_token")
    return tokenizer


def find_tokenizer_folder(path: str) -> Path:
    """Returns the local folder of a tokenizer: `path` itself, or a hub repository, of which the tokenizer's files are
    downloaded where the hub's cache lacks them.

    Raises UserError where there is no such folder, and as `find_snapshot` does.
    """
    if Path(path).is_dir():
        return Path(path)
    if not is_tokenizer_id(path):
        raise UserError("model.tokenizer", f"{path}: no such folder", "a folder with a tokenizer, a hub id org/name")
    return find_snapshot(path, TOKENIZER)


def tokenizer_is_here(path: str) -> bool:
    """Returns whether the tokenizer of a folder or hub id can be loaded without a request."""
    if Path(path).is_dir() or not is_tokenizer_id(path):
        return has_tokenizer(Path(path))
    snapshot = cached_snapshot(path)
    return snapshot is not None and has_tokenizer(snapshot)


def has_tokenizer(folder: Path) -> bool:
    """Returns whether a folder has files of a tokenizer."""
    return any(folder.glob("tokenizer*")) or any(folder.glob("*vocab*"))
