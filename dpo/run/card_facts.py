"""The facts of a model card, read from files: the run's folder, the base's folder, the exported folder.

Folders are named without the path to them, since cards are published.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from dpo.config import Config
from dpo.encode.tokenizer import has_tokenizer
from dpo.hub.files import ADAPTER_CONFIG, CONFIG_FILE, is_of_adapters, licence_files
from dpo.hub.ids import is_hub_id
from dpo.hub.snapshots import repository_of
from dpo.run.folder import read_starts
from dpo.run_folder.files import PROVENANCE, read_metrics

README = "README.md"
_LICENCES = {"apache-2.0": r"Apache License\s+Version 2\.0", "mit": r"MIT License|Permission is hereby granted, free"}
"""The hub's names of licences by a pattern of their text's beginning."""
_LICENCE_KEYS = ("license", "license_name", "license_link")


@dataclass(frozen=True)
class Base:
    """The model from which the policy started, as its folder tells."""

    name: str
    """Its hub id, or its folder's short name."""
    is_on_hub: bool
    hub_id: str | None
    """Its hub id; of a folder that is not from the hub, the nearest ancestor on the hub that the folder's card names;
    None where none is known."""
    licence: Mapping[str, str]
    """The keys of its card that name the licence; empty where no file tells it."""


@dataclass(frozen=True)
class Exported:
    """The exported folder, as far as it changes how the model is loaded."""

    has_tokenizer: bool
    has_own_code: bool
    adapters: Mapping[str, Any] | None = None
    """adapter_config.json of a folder of adapters; None: a whole model."""


@dataclass(frozen=True)
class CardFacts:
    """Everything that a model card tells."""

    config: Config
    step: int
    """Updates after which the model was exported."""
    base: Base
    exported: Exported
    origin: Mapping[str, Any]
    """The entry of the run's last start in provenance.json; empty where the file is damaged."""
    metrics: Sequence[Mapping[str, float]]
    """The lines of metrics.jsonl."""


def read_facts(config: Config, step: int, base: Path, exported: Path) -> CardFacts:
    """Returns the facts of a model card.

    Args:
        config: the run's config.
        step: the updates after which the model was exported.
        base: the folder of the model from which the policy started.
        exported: the exported folder, but for its card.

    Raises:
        RunError: metrics.jsonl is damaged.
    """
    run_dir = Path(str(config.train.run_dir))
    starts = read_starts(run_dir / PROVENANCE) or [{}]
    facts = read_exported(exported, base)
    return CardFacts(config, step, read_base(config.model.path, base), facts, starts[-1], read_metrics(run_dir))


def read_exported(folder: Path, base: Path) -> Exported:
    """Returns the facts of an exported folder; adapters run the code of their base, where it has code of its own."""
    adapters = _read(folder / ADAPTER_CONFIG) if is_of_adapters(folder) else None
    settings = _read((folder if adapters is None else base) / CONFIG_FILE)
    return Exported(has_tokenizer(folder), bool(settings.get("auto_map")), adapters)


def _read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


def read_base(path: str, folder: Path) -> Base:
    """Returns the facts of a base.

    Args:
        path: the name that the config gives it, a folder or hub id.
        folder: its local folder.
    """
    card = front_matter_of(folder / README)
    own_id = repository_of(folder)
    ancestor = card.get("base_model")
    named = ancestor if isinstance(ancestor, str) and is_hub_id(ancestor) else None
    licence = {key: str(card[key]) for key in _LICENCE_KEYS if card.get(key)}
    return Base(own_id or short_name(path), own_id is not None, own_id or named, licence or _licence_of(folder))


def front_matter_of(card: Path) -> dict[str, Any]:
    """Returns the keys at the top of a model card; none where it is not there or has none that can be read."""
    text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
    found = re.match(r"---\s*\n(.*?)\n---\s*\n", text, re.DOTALL)
    try:
        keys = yaml.safe_load(found[1]) if found else None
    except (yaml.YAMLError, ValueError):  # ValueError: a date that does not exist
        return {}
    return keys if isinstance(keys, dict) else {}


def _licence_of(folder: Path) -> dict[str, str]:
    """Returns the keys of a card that name the licence whose text lies in a folder."""
    names = licence_files(sorted(path.name for path in folder.iterdir() if path.is_file()))
    if not names:
        return {}
    text = (folder / names[0]).read_text(encoding="utf-8", errors="replace")[:2000]
    known = next((name for name, pattern in _LICENCES.items() if re.search(pattern, text)), None)
    return {"license": known} if known else {"license": "other", "license_link": names[0]}


def short_name(path: str) -> str:
    """Returns a path as a card names it: the last two parts of an absolute path, and any other path as it is."""
    return "/".join(Path(path).parts[-2:]) if Path(path).is_absolute() else path
