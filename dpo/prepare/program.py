"""Downloads, checks and tokenizes all that a run reads, without GPUs, so that the run needs no network.

    python -m dpo.prepare --config FILE [--SECTION.KEY VALUE ...]

Meant for a login node or a CPU job: one process, with the lowest right to the processor, and as many processes that
tokenize as `data.num_proc` or OMP_NUM_THREADS allows. Running it again downloads what is new on the hub, and nothing
else. The run finds everything where HF_HOME and DPO_CACHE are the same.
"""

import os
import shlex
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import datasets
from huggingface_hub import HfApi, constants
from huggingface_hub.utils import disable_progress_bars  # type: ignore[attr-defined]  # documented
from transformers import PretrainedConfig

from dpo.base.errors import InvalidValue, RunError
from dpo.base.files import nearest_existing
from dpo.base.space import find_shortage
from dpo.base.units import shown_bytes
from dpo.batch.order import make_order
from dpo.checkpoint.folders import checkpoints_of
from dpo.command.line import split_options, words_of
from dpo.config import Config, SourceConfig
from dpo.disk.home import caches_of_run, describe_small_home
from dpo.disk.sizes import Sizes, sizes_of
from dpo.hub.snapshots import ANSWER_SECONDS, HubUnreachable, hub_failures
from dpo.model.model_config import read_model_config
from dpo.model.weights import tensor_files, tensor_paths
from dpo.pairs.prepare import PreferenceData, prepare_data
from dpo.prepare.arguments import read_arguments
from dpo.prepare.models import prepare_adapters, prepare_models, prepare_tokenizer
from dpo.ref_logps.blocks import ROW
from dpo.ref_logps.cache import cache_root
from dpo.ref_logps.fill import count_rows
from dpo.run.agreement import NamedModel, check_agreement
from dpo.sources.hub_sets import check_path, check_room_for, is_hub_source, prepared_folder
from dpo.sources.hub_sets import download as download_set
from dpo.terminal.console import harmless, in_one_line, is_quiet, say, warn

# --- data ------------------------------------------------------------------------------------------------------------


def keyed_sources(config: Config) -> list[tuple[str, SourceConfig]]:
    """Returns all sources with their keys in the config."""
    listed = [(f"data.train[{i}]", source) for i, source in enumerate(config.data.train)]
    return listed + [(f"data.eval[{i}]", source) for i, source in enumerate(config.data.eval)]


def prepare_sources(config: Config) -> None:
    """Downloads the newest revisions of the hub's data sets. Raises as `models.newest_snapshot` does."""
    wanted = {(source.path, source.name): (source, key) for key, source in reversed(keyed_sources(config))}
    for source, key in reversed(wanted.values()):  # splits of the same data set are downloaded together
        if not Path(source.path).expanduser().exists() and is_hub_source(source.path):
            _prepare_source(source, key)


def _prepare_source(source: SourceConfig, key: str) -> None:
    say(f"{source.path}: asking the hub for its newest revision, and downloading what is not in the cache")
    folder = prepared_folder(source)
    try:
        with hub_failures(source.path, () if folder else ("its rows",)):
            newest = HfApi().dataset_info(source.path, timeout=ANSWER_SECONDS).sha
    except HubUnreachable as failure:
        if folder is None:
            raise failure.at(f"{key}.path") from failure
        warn(f"{failure.what}; the revision in the cache is taken")
        newest = folder.name
    except InvalidValue as failure:
        raise failure.at(f"{key}.path") from failure
    if folder is None or folder.name != newest:
        check_room_for(source, key)
        download_set(source, key)
    print(in_one_line(f"{key} {source.path}: revision {str(newest)[:12]}, in {prepared_folder(source)}"))


def limited(config: Config) -> Config:
    """Returns the config with at most OMP_NUM_THREADS processes that tokenize, where `data.num_proc` is not set."""
    threads = os.environ.get("OMP_NUM_THREADS", "")
    if config.data.num_proc is not None or not threads.isdigit() or int(threads) < 1:
        return config
    return replace(config, data=replace(config.data, num_proc=int(threads)))


# --- the disk --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Place:
    """A folder that a run reads from or writes to."""

    name: str
    folder: Path
    contents: str
    """What is there, or will be."""
    needed: int
    """Bytes that the run will write there."""
    remedy: str
    """What helps where they are too many."""

    @property
    def device(self) -> int:
        """Returns the number of the file system."""
        return nearest_existing(self.folder).stat().st_dev

    def line(self) -> str:
        """Returns the place, its contents and its free space, for people."""
        free = shutil.disk_usage(nearest_existing(self.folder)).free
        return f"  {self.name:<16} {self.folder}: {self.contents}, {shown_bytes(free)} free"


def places_of(config: Config, sizes: Sizes, data: PreferenceData, folders: Sequence[Path]) -> list[Place]:
    """Returns the folders of a run: models, rows, checkpoints, reference cache.

    Args:
        config: the run's.
        sizes: the bytes of its checkpoints and exported model.
        data: its data.
        folders: the folders of its models, each once.
    """
    run_dir = Path(str(config.train.run_dir)).expanduser()
    present = len(checkpoints_of(run_dir))
    token_files = {Path(file.name) for pairs in (data.train, data.eval) for file in pairs.token_files}
    models = sum(path.stat().st_size for folder in folders for path in tensor_paths(folder))
    rows = sum(path.stat().st_size for path in token_files)
    hub, cache = Path(constants.HF_HUB_CACHE), Path(datasets.config.HF_DATASETS_CACHE)
    parts = f"checkpoints of {shown_bytes(sizes.checkpoint)}, exported model of {shown_bytes(sizes.final)}"
    kept = f"{shown_bytes(sizes.disk_bytes(present))} needed: {parts}"
    remedy = "a train.run_dir with more room, a smaller checkpoint.keep"
    places = [
        Place("models", hub, f"weights of {shown_bytes(models)}, with local folders", 0, ""),
        Place("data", cache, f"token rows of {shown_bytes(rows)}", 0, ""),
        Place("run folder", run_dir, kept, sizes.least_bytes(present), remedy),
    ]
    if config.loss.facts.uses_reference:
        num_rows = count_rows([data.train, data.eval])
        num_bytes = 2 * ROW.itemsize * num_rows  # in blocks as computed, and in the sorted table of the run
        kept = f"{shown_bytes(num_bytes)} needed: {num_rows:,} rows of {ROW.itemsize} bytes, and their table"
        remedy = "a reference.cache_dir, or DPO_CACHE, with more room"
        places.append(Place("reference cache", cache_root(config), kept, num_bytes, remedy))
    return places


def check_places(places: Sequence[Place]) -> None:
    """Raises RunError for the first file system that does not take what the run cannot do without in all places on it,
    by its free space or by a quota (`space.find_shortage`).
    """
    for place in places:
        together = [other for other in places if other.device == place.device and other.needed]
        shortage = find_shortage(place.folder, sum(other.needed for other in together)) if place.needed else None
        if shortage:
            names = " and ".join(other.name for other in together)
            verb = "needs" if len(together) == 1 else "need"
            what = f"{names} {verb} {shown_bytes(shortage.needed)}; {shortage.room}"
            raise RunError(f"{place.folder}: {what}; what helps: {place.remedy}")


# --- the program -----------------------------------------------------------------------------------------------------


def prepare(config: Config) -> None:
    """Downloads, reads, checks and tokenizes everything, and prints the counts, the steps and the disk.

    Raises:
        UserError: any input is wrong, or not there.
        RunError: the disk has no room for a download or for the run.
    """
    for key, source in keyed_sources(config):
        check_path(source.path, key)  # before gigabytes of models are downloaded
    folders = prepare_models(config)
    prepare_tokenizer(config)
    configs = [read_model_config(folder, config.model.trust_remote_code) for folder in folders]
    prepare_adapters(config, configs[0])
    for folder in folders:
        tensor_files(folder)  # reads the header of each file, so that a cut one is told here
    for model_config in configs:
        sizes_of(config, model_config)  # refuses a model that cannot be trained, before the data is read
    _tell_small_home(config, configs[0])
    prepare_sources(config)
    say("data: reading, and tokenizing rows that are not in the cache")
    data = prepare_data(config, configs[0])
    policy = NamedModel("model.path", folders[0], configs[0])
    reference = NamedModel("reference.path", folders[-1], configs[-1])
    check_agreement(config, policy, reference, data)
    print("\n".join(map(in_one_line, data.report.lines())))
    _, last_step, _ = make_order(config, data)
    print(f"the run: {last_step:,} steps of {config.batch.pairs_per_step} pairs")
    places = places_of(config, sizes_of(config, configs[0], last_step), data, list(dict.fromkeys(folders)))
    print("disk:", *(in_one_line(place.line()) for place in places), sep="\n")
    check_places(places)


def _tell_small_home(config: Config, model_config: PretrainedConfig) -> None:
    small_home = describe_small_home(caches_of_run(), sizes_of(config, model_config).num_parameters)
    if small_home:
        print(harmless(small_home))


def next_line(argv: Sequence[str]) -> str:
    """Returns the commands that start the run, with the words of this command line."""
    options = [option for option in split_options(argv) if option.key != "quiet"]
    words = shlex.join(words_of(options))
    return f"next: dpo train {words} --gpus 8, or dpo submit {words} --nodes N --gpus-per-node 8 --time TIME"


def main() -> None:
    """Runs `python -m dpo.prepare`."""
    config = read_arguments()
    if is_quiet() or not sys.stderr.isatty():
        datasets.disable_progress_bars()
        disable_progress_bars()
    prepare(limited(config))
    print(in_one_line(next_line(sys.argv[1:])))
