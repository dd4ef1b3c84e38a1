"""Repositories of the Hugging Face hub -> local folders, from which programs read without asking the hub again.

A repository in the hub's cache (HF_HUB_CACHE, by default under HF_HOME) has a folder of files per revision, its
snapshot. A program that needs some of the files takes the snapshot of the newest revision in the cache as it is, where
that has them: compute nodes often drop packets to the internet, so that each request would cost minutes of waiting.
Only `python -m dpo.prepare` asks the hub for a newer revision.
"""

import functools
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants, hf_hub_download, snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

from dpo.base.errors import InvalidValue, RunError, UserError
from dpo.base.files import naming
from dpo.base.space import find_shortage
from dpo.base.units import shown_bytes
from dpo.hub.files import CONFIG_FILE, INDEX, MODEL, Need, config_files, files_that_prove, read_index
from dpo.hub.reasons import has_answered, reason_of

PREPARE = "dpo prepare FILE.yaml on a machine with internet and the same HF_HOME"
"""The way to get files that a machine without internet lacks."""
ANSWER_SECONDS = 20.0
"""The time in which the hub must answer the first request for a repository. Without a limit, the hub's client waits as
long as the kernel tries to connect, which is minutes where packets are dropped.
"""


class HubUnreachable(InvalidValue):
    """The hub does not answer, or the program may not ask it."""


# --- found -----------------------------------------------------------------------------------------------------------


def find_snapshot(repository: str, need: Need) -> Path:
    """Returns the local folder of a hub repository. Asks the hub only where the cache lacks files that the folder is
    known to need, and then downloads all that are wanted, of the same revision.

    Args:
        repository: org/name, or a name alone.
        need: the files.

    Raises:
        InvalidValue: the hub has no such repository.
        HubUnreachable: files are missing, and the hub does not answer.
        RunError: the disk has no room for the download.
    """
    folder = cached_snapshot(repository)
    missing = need.missing(folder) if folder else [need.first]
    if folder and not missing:
        return folder
    return download(repository, need, folder.name if folder else None, missing).folder


def cached_snapshot(repository: str) -> Path | None:
    """Returns the folder of a repository's newest revision in the hub's cache, complete or not, without a request; None
    where there is none.
    """
    try:
        with offline():
            return Path(snapshot_download(repository, local_files_only=True, allow_patterns=[]))
    except (LocalEntryNotFoundError, HFValidationError):
        return None


@contextmanager
def offline() -> Iterator[None]:
    """Lets huggingface_hub, transformers and `datasets` read from local folders and caches alone inside of the block: a
    request fails at once, where some of their functions would ask the hub and wait.
    """
    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


# --- downloaded ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Download:
    """A repository as a download left it."""

    folder: Path
    """The snapshot; its name is the revision, a commit."""
    num_bytes: int
    """The bytes that were not in the cache before."""


def download(repository: str, need: Need, revision: str | None = None, missing: Sequence[str] = ()) -> Download:
    """Downloads the wanted files of a repository that the cache lacks, and returns its folder.

    Args:
        repository: org/name, or a name alone.
        need: the files.
        revision: a commit; None: the newest, which the hub is asked for.
        missing: files that are known to be missing, for errors.

    Raises:
        InvalidValue: the hub has no such repository.
        HubUnreachable: the hub does not answer.
        RunError: the disk has no room for the download.
    """
    with hub_failures(repository, missing):
        info = HfApi().model_info(repository, revision=revision, timeout=ANSWER_SECONDS)
        names = [file.rfilename for file in info.siblings or []]
        index = _fetch_index(repository, info.sha) if INDEX in names and need is MODEL else None
        wanted = need.wanted(names, index)
        plan = snapshot_download(repository, revision=info.sha, allow_patterns=wanted, dry_run=True)
        num_bytes = sum(file.file_size or 0 for file in plan if file.will_download)
        check_room(Path(constants.HF_HUB_CACHE), num_bytes, f"the download of {repository}", "HF_HOME")
        last = files_that_prove(wanted)
        for group in (sorted(set(wanted) - set(last)), last):
            with naming(Path(constants.HF_HUB_CACHE), num_bytes):
                folder = Path(snapshot_download(repository, revision=info.sha, allow_patterns=group))
        if cached_snapshot(repository) != folder:
            snapshot_download(repository, allow_patterns=wanted)  # notes in the cache which revision is the newest
    return Download(folder, num_bytes)


def _fetch_index(repository: str, revision: str | None) -> list[str] | None:
    return read_index(Path(hf_hub_download(repository, INDEX, revision=revision)))


def check_room(folder: Path, num_bytes: int, what: str, variable: str) -> None:
    """Raises RunError where a folder, which may not exist yet, has no room for `what`, or a quota does not allow it.

    Args:
        folder: the folder that is written to.
        num_bytes: the bytes that are needed.
        what: the purpose of the bytes, for the error.
        variable: the environment variable or key that chooses another folder.
    """
    shortage = find_shortage(folder, num_bytes)
    if shortage:
        needs = f"{what} needs {shown_bytes(num_bytes)}; {shortage.room}"
        raise RunError(f"{folder}: {needs}; what helps: {variable} in a folder with more room, or free space there")


@contextmanager
def hub_failures(repository: str, missing: Sequence[str]) -> Iterator[None]:
    """Raises InvalidValue for a failure of the hub or of the network in the block; failures of the disk pass.

    Args:
        repository: the repository that the block asks for.
        missing: its files that are known to be missing.
    """
    try:
        yield
    except (UserError, InvalidValue, RunError):
        raise
    except Exception as failure:  # the hub's client and its http client raise classes without a common base
        if isinstance(failure, OSError) and failure.errno is not None:
            raise
        raise _explained(failure, repository, missing) from failure


def _explained(failure: Exception, repository: str, missing: Sequence[str]) -> InvalidValue:
    """Returns the error of a user for a failure of the hub (which has answered) or of the network."""
    reason = reason_of(failure)
    if has_answered(failure) or isinstance(failure, HFValidationError):
        what = f"{repository} is no folder here and the hub did not give it ({reason})"
        return InvalidValue(what, "a local folder or hub id; of a private or gated one after `hf auth login`")
    more = f" and {len(missing) - 1} more files" if len(missing) > 1 else ""
    lacks = f"lacks {missing[0]}{more}" if missing else "may have an older revision"
    what = f"{repository}: the cache {constants.HF_HUB_CACHE} {lacks}, and the hub does not answer ({reason})"
    return HubUnreachable(what, PREPARE)


# --- a model's own code ----------------------------------------------------------------------------------------------


def find_code(folder: Path) -> None:
    """Downloads the code that the config or tokenizer of a folder names in `auto_map`, where the cache lacks it. Must
    only be called where `model.trust_remote_code` is set.

    Raises as `find_snapshot` does.
    """
    for reference in _references(folder):
        owner, _, name = reference.rpartition("--")
        repository, module = owner or repository_of(folder), f"{name.partition('.')[0]}.py"
        if repository is not None:
            find_snapshot(repository, Need(config_files, functools.partial(_absent, module)))


def _absent(name: str, folder: Path) -> list[str]:
    return [] if (folder / name).is_file() else [name]


def _references(folder: Path) -> list[str]:
    """Returns the classes that the configs of a folder name: `module.Class`, or `org/name--module.Class` of another
    repository.
    """
    found: set[str] = set()
    for path in (folder / CONFIG_FILE, folder / "tokenizer_config.json"):
        settings: Any = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        for value in settings.get("auto_map", {}).values():
            found |= {name for name in (value if isinstance(value, list) else [value]) if name}
    return sorted(found)


def repository_of(folder: Path) -> str | None:
    """Returns the id of the hub repository whose snapshot a folder is; None for another folder."""
    if len(folder.parts) < 3 or folder.parent.name != "snapshots":
        return None
    kind, _, name = folder.parents[1].name.partition("--")
    return name.replace("--", "/", 1) if kind == "models" else None
