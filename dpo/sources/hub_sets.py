"""Data sets of the Hugging Face hub: downloaded once, then read from the cache of `datasets` without a request.

`load_dataset` asks the hub at each call, and where packets are dropped it waits. A note in our cache therefore names
the folder in which `datasets` keeps the rows.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from huggingface_hub import HfApi, constants

from dpo.base.errors import UserError
from dpo.base.files import write_atomically
from dpo.base.sums import lies_within
from dpo.config import SourceConfig
from dpo.hub.ids import is_hub_id
from dpo.hub.snapshots import check_room
from dpo.sources.caching import cache_path, datasets_cache, digest, load, one_error
from dpo.sources.hub_sums import forget_digests

if TYPE_CHECKING:
    import datasets

DATA_SUFFIXES = (".json", ".jsonl", ".ndjson", ".gz", ".parquet", ".arrow", ".csv", ".tsv", ".txt", ".zst", ".zip")


def is_hub_source(path: str) -> bool:
    """Returns whether a path that is not here has the form of a data set's hub id."""
    return is_hub_id(path) and not path.endswith(DATA_SUFFIXES)


def check_path(path: str, key: str) -> None:
    """Raises UserError for a path that is not here and has not the form of a hub id; `key` is that of its source."""
    if not Path(path).expanduser().exists() and not is_hub_source(path):
        raise UserError(f"{key}.path", f"no such file or folder: {path}", "a file, a folder, a hub id org/name")


def is_here(config: SourceConfig) -> bool:
    """Returns whether a source can be read without a request: a file, a folder, or a hub's data set in the cache."""
    return Path(config.path).expanduser().exists() or (
        is_hub_source(config.path) and prepared_folder(config) is not None
    )


def download(config: SourceConfig, key: str) -> "datasets.Dataset":
    """Asks the hub for the newest revision of a data set, downloads what the cache lacks of it, and returns the rows.

    Notes in the cache the folder in which `datasets` keeps the rows of all splits: `prepared_folder` finds it.

    Raises UserError where the hub cannot be reached, has no such data set or split, or its files cannot be read.
    """
    before = prepared_folder(config)
    rows = load(config.path, key, config.path, config.name, split=config.split)
    for file in rows.cache_files[:1]:
        folder = Path(file["filename"]).parent
        write_atomically(_note(config), str(folder.relative_to(datasets_cache())).encode())
        if before is None:
            forget_digests(folder)
    return rows


def prepared_folder(config: SourceConfig) -> Path | None:
    """Returns the folder in which `datasets` keeps the rows of a hub's data set, whose name is the revision; None where
    none was noted, or it is not there.
    """
    try:
        place = _note(config).read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return None
    folder = datasets_cache() / place
    return folder if lies_within(place) and folder.is_dir() else None


def _note(config: SourceConfig) -> Path:
    """Returns the file that names the folder of a hub's data set."""
    return cache_path(f"hub-{digest([config.path, str(config.name)])}")


def read_prepared(folder: Path, config: SourceConfig, key: str) -> "datasets.Dataset":
    """Returns the rows of a split in a folder of `datasets`, as `load_dataset` would, which asks the hub first."""
    from datasets.packaged_modules.cache.cache import Cache

    name, version, revision = folder.parts[-3:]
    options = {"config_name": name, "version": version, "hash": revision}
    with one_error(config.path, key):
        builder = Cache(dataset_name=config.path.split("/")[-1], repo_id=config.path, **options)
        return builder.as_dataset(split=config.split)


def check_room_for(config: SourceConfig, key: str) -> None:
    """Raises RunError where the disk has no room for a data set that is not in the cache: its files, and as much again,
    or the size that the hub tells, for the rows in the form of `datasets`.

    Asks the hub. Raises UserError where it cannot be reached, or has no such data set.
    """
    import datasets

    with one_error(config.path, key):
        builder = datasets.load_dataset_builder(config.path, config.name)
        if Path(builder.cache_dir).is_dir():
            return
        info = HfApi().dataset_info(config.path, revision=builder.hash, files_metadata=True)
    sizes = {file.rfilename: file.size or 0 for file in info.siblings or []}
    urls = [str(url) for split in (builder.config.data_files or {}).values() for url in split]
    num_bytes = sum(sizes.get(url.split("@", 1)[-1].partition("/")[2], 0) for url in urls)
    needed = num_bytes + (builder.info.dataset_size or num_bytes)
    check_room(Path(constants.HF_HUB_CACHE), needed, f"the download of {config.path}", "HF_HOME")
