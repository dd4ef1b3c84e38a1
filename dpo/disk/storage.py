"""Checks a run's folders before its weights are read: shared by all nodes, and with room for the files of the run.

check_folders   before the data is read    all nodes see train.run_dir and reference.cache_dir
check_space     when the steps are known   checkpoints and exported model fit in train.run_dir: a warning where not all
                                           do; an error where one checkpoint and the export do not
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from dpo.base.errors import UserError
from dpo.base.files import nearest_existing
from dpo.base.space import find_shortage
from dpo.base.units import shown_bytes
from dpo.checkpoint.export import draft_of
from dpo.checkpoint.folders import CHECKPOINTS, checkpoints_until, drafts_of
from dpo.config import Config
from dpo.disk.home import caches_of_run, describe_small_home
from dpo.disk.sizes import (
    BYTES_PER_STEP,
    Sizes,
    checkpoint_words,
    disk_words,
    evaluations_after,
    export_words,
    other_words,
    saves_after,
    sizes_of,
)
from dpo.distributed.collectives import on_main
from dpo.distributed.shared import find_unseen
from dpo.distributed.world import World
from dpo.ref_logps.cache import cache_root
from dpo.run.folder import Start
from dpo.run.inputs import Inputs
from dpo.run_folder.evaluations import BYTES_PER_PAIR
from dpo.run_folder.files import FINAL
from dpo.sources.caching import datasets_cache
from dpo.terminal.console import say, warn

# --- shared ----------------------------------------------------------------------------------------------------------

RUN_DIR, CACHE, DATA_CACHE = "train.run_dir", "reference.cache_dir", "HF_HOME"

VALID = {
    RUN_DIR: "a folder to write in, which all nodes share",
    CACHE: "a folder to write in, which all nodes share (DPO_CACHE names it where the key is null)",
    DATA_CACHE: "a folder to write in",
}
"""Key -> the folders that are valid."""


def check_folders(config: Config, world: World) -> None:
    """Checks that rank 0 can write to the run folder and to the cache of the reference, and that all nodes see them.

    Every rank must get here, or the rest hang.

    Raises:
        UserError: on every rank, with the key and the hosts that do not see the folder.
    """
    _check({RUN_DIR: Path(str(config.train.run_dir))} | _cache_of(config), world)


def check_cache(config: Config, world: World) -> None:
    """Does the same as `check_folders` for the cache of the reference alone. Every rank must get here, or the rest
    hang.
    """
    _check(_cache_of(config), world)


def _cache_of(config: Config) -> dict[str, Path]:
    return {CACHE: cache_root(config)} if config.loss.facts.uses_reference else {}


def _check(folders: Mapping[str, Path], world: World) -> None:
    """Raises UserError for a folder that is not shared. On several nodes, rank 0 also says where the cache of data sets
    is not shared: each node then needs its own.
    """
    data_cache, is_one_node = datasets_cache(), world.local_size == world.size
    # Rank 0 decides which folders get a probe; it may lack the right to write to a cache that is complete.
    has_probe = not is_one_node and (not world.is_main or os.access(nearest_existing(data_cache), os.W_OK))
    unseen = find_unseen({**folders, **({DATA_CACHE: data_cache} if has_probe else {})}, VALID, world)
    for key in folders:
        if key in unseen:
            raise UserError(key, str(unseen[key]), VALID[key])
    if world.is_main and DATA_CACHE in unseen:
        say(f"{DATA_CACHE}: {unseen[DATA_CACHE]}: each node tokenizes the data, and needs its own models of the hub")


# --- with room for the files -----------------------------------------------------------------------------------------


def check_space(config: Config, start: Start, inputs: Inputs, world: World) -> None:
    """Checks that the files fit that the run will still write to its folder, and warns where not all of them do; rank 0
    also tells of a small home folder.

    Every rank must get here, or the rest hang.

    Args:
        config: the run's.
        start: the start that `find_start_together` found.
        inputs: gives the model and the number of steps.
        world: all ranks.

    Raises:
        UserError: on every rank, where a checkpoint and the export, twice the exported model, do not fit on the disk or
            in a quota.
    """
    on_main(world, lambda: _check_space(config, start, inputs))


def _check_space(config: Config, start: Start, inputs: Inputs) -> None:
    sizes, places = _needs_of(config, start, inputs)
    for place in places:
        shortage = _check_room(place)
        if shortage:
            warn(shortage)
    small_home = describe_small_home(caches_of_run(), sizes.num_parameters)
    if small_home:
        say(small_home)


def least_beside(folder: Path, config: Config, start: Start, inputs: Inputs) -> int:
    """Returns the bytes that the run cannot do without on the file system of `folder`, for files of its run folder. Not
    less than 0: drafts that the run will remove make no room for files that are written before.
    """
    device = _device_of(folder)
    return sum(
        max(place.least, 0) for place in _needs_of(config, start, inputs)[1] if _device_of(place.folder) == device
    )


@dataclass(frozen=True)
class _Place:
    """A folder of the run, and the bytes that the run still writes there."""

    folder: Path
    needed: int
    words: str
    """The parts of `needed`."""
    least: int
    """Bytes without which the run cannot save a checkpoint or export the model."""
    least_words: str


def _needs_of(config: Config, start: Start, inputs: Inputs) -> tuple[Sizes, list[_Place]]:
    """Returns the sizes of the run's files, and the folders where they go: the checkpoints may be on another disk."""
    run_dir = Path(str(config.train.run_dir))
    checkpoints, present = run_dir / CHECKPOINTS, len(checkpoints_until(run_dir, start.step))
    saves = present + saves_after(config, start.step, inputs.last_step)
    evaluations = evaluations_after(config, start.step, inputs.last_step) * len(inputs.data.eval) * BYTES_PER_PAIR
    records = max(inputs.last_step - start.step, 0) * BYTES_PER_STEP
    sizes = sizes_of(config, inputs.model.config, inputs.last_step)
    sizes = replace(sizes, num_saves=saves, evaluations=evaluations, records=records)
    drafts, draft = _bytes_of(drafts_of(run_dir)), _bytes_of([draft_of(run_dir / FINAL)])
    if _device_of(checkpoints) == _device_of(run_dir):
        needed, least, removed = sizes.disk_bytes(present), sizes.least_bytes(present), drafts + draft
        alone = f"one checkpoint and {export_words(sizes)}, take {shown_bytes(least)}"
        words = f"{shown_bytes(needed)} in {run_dir}, {disk_words(sizes, present)}"
        return sizes, [_Place(run_dir, needed - removed, words, least - removed, alone)]
    needed, least = sizes.checkpoint_bytes(present), min(sizes.checkpoint_bytes(present), sizes.checkpoint)
    words = f"{shown_bytes(needed)} in {checkpoints}, {checkpoint_words(sizes, present)}"
    one = _Place(checkpoints, needed - drafts, words, least - drafts, f"one checkpoint takes {shown_bytes(least)}")
    words, alone = f"{shown_bytes(sizes.other_bytes)} in {run_dir}, {other_words(sizes)}", "the export alone takes "
    least = sizes.export
    other = _Place(run_dir, sizes.other_bytes - draft, words, least - draft, f"{alone}{shown_bytes(least)}")
    return sizes, [one, other]


def _device_of(folder: Path) -> int:
    return nearest_existing(folder).stat().st_dev


def _check_room(place: _Place) -> str | None:
    """Returns a warning where not all files of the run fit in a folder; None where they do.

    Raises:
        UserError: the least does not fit.
    """
    shortage = find_shortage(place.folder, place.needed)
    if shortage is None:
        return None
    what = f"the run needs {place.words}; {shortage.room}"
    if find_shortage(place.folder, place.least):
        raise UserError(RUN_DIR, f"{shortage.cause}: {what}, and {place.least_words}", "a folder with more room")
    end = "the quota will be used up" if shortage.is_quota else "the disk will be full"
    return f"{RUN_DIR}: {what}: {end} before the run ends; free some, or lower checkpoint.keep"


def _bytes_of(folders: list[Path]) -> int:
    """Returns the bytes of the files in folders that the run will remove before it writes; a folder may not exist."""
    return sum(path.stat().st_size for folder in folders for path in folder.rglob("*") if path.is_file())
