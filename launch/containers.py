"""Runs in a container: the folders that it must see, and the command that enters it.

Apptainer: the launcher stays outside, on the node, and starts torchrun inside. The ranks are visible to it, since
Apptainer shares the node's processes unless told otherwise:

    srun python -m submitit...            on the node; asks SLURM, sends signals
      apptainer exec --nv ... IMAGE       replaces ignored signals by the default
        sh -c 'trap "" USR2; exec ...'    ignores SIGUSR2 again, as ranks that still import must
          python3 -m torch.distributed.run
            ranks

pyxis: srun enters the image before the launcher, so the image must contain SLURM's scontrol and squeue.
"""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from dpo.base.errors import UserError
from dpo.base.files import default_cache_dir
from dpo.command.line import split_options
from dpo.config import Config
from launch.arguments import Request

_IGNORE_STOP = ("sh", "-c", 'trap "" USR2; exec "$@"', "sh")
"""Words before a command that is started with SIGUSR2 ignored."""


@dataclass(frozen=True)
class Bound:
    """A folder that the container must see under its own path."""

    path: Path
    reason: str


def bound_folders(configs: Sequence[Config], words: Sequence[str], environment: Mapping[str, str]) -> list[Bound]:
    """Returns the folders of the host that runs need; none lies inside another. Of a folder behind a link, such as a
    ~/.cache on another disk, both paths are needed.

    Args:
        configs: of the runs.
        words: the command line of the runs, which names the file of the config.
        environment: the variables of the ranks; `HF_HOME` and others name caches.

    Raises UserError for a folder that the options of containers cannot name.
    """
    found: dict[Path, str] = {}
    needed = [*(pair for config in configs for pair in _needed(config, environment)), *_config_folder(words)]
    for path, reason in needed:
        here = path.expanduser().absolute()
        for folder in (here, here.resolve()):
            found.setdefault(folder, reason)
    outer = [Bound(path, reason) for path, reason in found.items() if not any(other in path.parents for other in found)]
    _check_names(outer)
    return outer


def _check_names(folders: Sequence[Bound]) -> None:
    """Raises UserError for a folder that the options FROM:TO,FROM:TO of Apptainer and pyxis cannot name."""
    for bound in folders:
        if re.search("[,:]", str(bound.path)):
            what = f"{bound.path} has a comma or a colon, which divide folders in the options of containers"
            raise UserError(bound.reason, what, "a path without them")


def _needed(config: Config, environment: Mapping[str, str]) -> Iterator[tuple[Path, str]]:
    yield Path.cwd(), "the working directory"
    local = {
        "model.path": config.model.path,
        "model.tokenizer": config.model.tokenizer,
        "reference.path": config.reference.path,
        "lora.path": config.lora.path,
        **{f"data.train[{i}].path": source.path for i, source in enumerate(config.data.train)},
        **{f"data.eval[{i}].path": source.path for i, source in enumerate(config.data.eval)},
    }
    for key, name in local.items():
        path = Path(name).expanduser() if name else None
        if path and path.exists():
            for place in (path, path.resolve()):  # a file may be a link into another folder
                yield (place if place.is_dir() else place.parent), key
    yield Path(str(config.train.run_dir)), "train.run_dir"
    cache = environment.get("DPO_CACHE") or default_cache_dir()
    yield Path(config.reference.cache_dir or cache), "reference.cache_dir"
    yield Path(cache), "DPO_CACHE: kernels"
    yield Path(environment.get("HF_HOME") or "~/.cache/huggingface"), "HF_HOME: models and tokenized rows"
    for name in ("HF_HUB_CACHE", "HF_DATASETS_CACHE"):
        if environment.get(name):
            yield Path(environment[name]), name


def _config_folder(words: Sequence[str]) -> Iterator[tuple[Path, str]]:
    """Yields the folder of the config's file, which the ranks read again; a shipped config has none."""
    for option in split_options(words):
        if option.key == "config" and option.value and Path(option.value).is_file():
            yield Path(option.value).parent, "--config"


def interpreter(request: Request, folders: Sequence[Bound]) -> tuple[str, ...]:
    """Returns the words that start Python for torchrun: in the image of --apptainer, or on the node."""
    if request.apptainer is None:
        return ()
    further = [request.container_mounts] if request.container_mounts else []
    binds = ",".join([*(str(bound.path) for bound in folders), *further])
    options = ("--nv", "--bind", binds, "--pwd", os.fspath(Path.cwd()))
    return ("apptainer", "exec", *options, request.apptainer, *_IGNORE_STOP, request.python)


def pyxis_arguments(request: Request, folders: Sequence[Bound]) -> list[str]:
    """Returns srun's arguments for the image of --container-image; none without one."""
    if request.container_image is None:
        return []
    mounts = [f"{bound.path}:{bound.path}" for bound in folders]
    mounts += [request.container_mounts] if request.container_mounts else []
    here = Path.cwd()
    return [
        f"--container-image={request.container_image}",
        f"--container-mounts={','.join(mounts)}",
        f"--container-workdir={here}",
    ]


def make_folders(folders: Sequence[Bound]) -> None:
    """Makes the folders that do not exist yet: only a folder that exists can be bound."""
    for bound in folders:
        bound.path.mkdir(parents=True, exist_ok=True)


def lines_of(folders: Sequence[Bound]) -> list[str]:
    """Returns one line per folder, for the user."""
    return [f"bound   {bound.path}  ({bound.reason})" for bound in folders]
