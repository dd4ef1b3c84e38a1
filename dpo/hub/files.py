"""The files of a model's repository on the hub that a program reads, and the files that a local folder lacks."""

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from dpo.base.errors import UserError, one_line
from dpo.base.sums import is_plain_name

CONFIG_FILE, INDEX, SINGLE = "config.json", "model.safetensors.index.json", "model.safetensors"
ADAPTER_CONFIG, ADAPTER_TENSORS = "adapter_config.json", "adapter_model.safetensors"
"""The files of a folder of adapters, which has no config.json: the base that it names has one."""

_SHARD = re.compile(r"model-(\d{5})-of-(\d{5})\.safetensors")
_OTHER_WEIGHTS = re.compile(r"(consolidated|adapter_model|optimizer).*|.*\.(fp16|bf16|fp32|8bit|int8|int4)[.-].*")
"""Names of top-level safetensors files that are not the model: Mistral's own form, an adapter, diffusers' variants."""
_CONFIG = re.compile(r"(config|generation_config)\.json|.*\.py")
_VOCABULARY = re.compile(r"tokenizer\.json|vocab\.(json|txt)|merges\.txt|[^/]*\.(model|tiktoken)")
_TOKENIZER = re.compile(
    r"tokenizer[^/]*\.json|(special_tokens_map|added_tokens|chat_template)\.json|chat_template\.jinja"
    r"|additional_chat_templates/.*\.jinja"
)
_LICENCE = re.compile(r"(licen[cs]e|notice|copying|use_policy)([._-][^/]*)?", re.IGNORECASE)
"""Names of top-level files that must go where the model goes; a README describes the model that it came with."""


def weight_files(names: Sequence[str], index_names: Sequence[str] | None) -> list[str]:
    """Returns the safetensors files of one model: the files that its index names, else model.safetensors, else the
    shards `model-00001-of-00002.safetensors` and so on, else all others at the top that have a model's name.

    Args:
        names: the paths of all files of the folder or repository.
        index_names: the files that model.safetensors.index.json names; None where there is no index.
    """
    if index_names is not None:
        return sorted(set(index_names))
    if SINGLE in names:
        return [SINGLE]
    top = sorted(name for name in names if re.fullmatch(r"[^/]*\.safetensors", name))
    shards = [name for name in top if _SHARD.fullmatch(name)]
    return shards or [name for name in top if not _OTHER_WEIGHTS.fullmatch(name)]


def config_files(names: Sequence[str], index_names: Sequence[str] | None) -> list[str]:
    """Returns the files that a model's config is read from, with the model's own code; see `weight_files`."""
    return [name for name in names if _CONFIG.fullmatch(name)]


def config_or_adapters(names: Sequence[str], index_names: Sequence[str] | None) -> list[str]:
    """Returns the files that a model's config is read from; of a repository of adapters their config, which names the
    model that they are for. See `weight_files`.
    """
    is_whole = CONFIG_FILE in names or ADAPTER_CONFIG not in names
    return config_files(names, index_names) if is_whole else [ADAPTER_CONFIG]


def tokenizer_files(names: Sequence[str], index_names: Sequence[str] | None) -> list[str]:
    """Returns the files that a tokenizer is read from, with the model's config and code; see `weight_files`."""
    return [name for name in names if any(form.fullmatch(name) for form in (_CONFIG, _TOKENIZER, _VOCABULARY))]


def model_companions(names: Sequence[str]) -> list[str]:
    """Returns the files beside config.json that a model trained from this one needs too, as they are: the generation
    config, its own code and its licence; see `tokenizer_companions`.
    """
    beside = [name for name in config_files(names, None) if name != CONFIG_FILE]
    return [*beside, *licence_files(names)]


def licence_files(names: Sequence[str]) -> list[str]:
    """Returns the files that hold a licence or its notices."""
    return [name for name in names if _LICENCE.fullmatch(name)]


def adapter_files(names: Sequence[str], index_names: Sequence[str] | None = None) -> list[str]:
    """Returns the files of a repository of adapters: config and tensors, tokenizer, licence; see `weight_files`."""
    own = [name for name in names if name in (ADAPTER_CONFIG, ADAPTER_TENSORS)]
    return sorted({*own, *tokenizer_companions(names), *licence_files(names)})


def is_of_adapters(folder: Path) -> bool:
    """Returns whether a folder holds adapters in peft's form, and no model."""
    return (folder / ADAPTER_CONFIG).is_file() and not (folder / CONFIG_FILE).is_file()


def tokenizer_companions(names: Sequence[str]) -> list[str]:
    """Returns the files of a tokenizer, chat templates included, without its own code."""
    return [name for name in names if any(form.fullmatch(name) for form in (_TOKENIZER, _VOCABULARY))]


def exported_files(names: Sequence[str]) -> list[str]:
    """Returns the files of an exported model, or of exported adapters, without which it is another one: config, weights
    with their index, and tokenizer.
    """
    configs = (CONFIG_FILE, ADAPTER_CONFIG, INDEX)
    of_weights = [name for name in names if name in configs or name.endswith(".safetensors")]
    return [*of_weights, *tokenizer_companions(names)]


def files_to_download(names: Sequence[str], index_names: Sequence[str] | None) -> list[str]:
    """Returns the files of a repository that a run reads or passes on: config, tokenizer, code, licence, the index and
    the weights. Weights in other forms (`.bin`, `.gguf`, `consolidated.safetensors`, folders like `fp16/` and
    `original/`) are left.

    Args:
        names: the paths of all files of the repository.
        index_names: the files that its index names; None where it has no index.

    Returns:
        The paths, sorted, each once.
    """
    index = [INDEX] if INDEX in names else []
    beside = {*config_or_adapters(names, None), *tokenizer_files(names, None), *model_companions(names)}
    return sorted({*beside, *index, *weight_files(names, index_names)})


# --- what a folder lacks ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Need:
    """The files of a model's repository that a program reads."""

    wanted: Callable[[Sequence[str], Sequence[str] | None], list[str]]
    """Returns the files to download, from the names of all files and the files of the index."""
    missing: Callable[[Path], list[str]]
    """Returns the files that a local folder lacks, as far as the folder tells."""
    first: str = CONFIG_FILE
    """The file that errors name where there is no folder."""


def read_weight_map(path: Path) -> dict[str, str] | None:
    """Returns the file of each tensor by an index; None where there is no index.

    Raises UserError for a broken one, and for one that names a file outside of its folder.
    """
    if not path.is_file():
        return None
    try:
        content: dict[str, str] = dict(json.loads(path.read_text(encoding="utf-8"))["weight_map"])
        outside = [name for name in content.values() if not is_plain_name(name)]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as failure:
        raise UserError(str(path), f"not an index of safetensors files: {one_line(str(failure))}") from failure
    if outside:
        raise UserError(str(path), f"names the file {outside[0]!r}", "names of files in the same folder")
    return content


def read_index(path: Path) -> list[str] | None:
    """Returns the files that an index names, sorted; None where there is no index. Raises UserError as
    `read_weight_map` does.
    """
    weight_map = read_weight_map(path)
    return None if weight_map is None else sorted(set(weight_map.values()))


def stored_weights(folder: Path) -> list[str]:
    """Returns the safetensors files of the model in a folder, whether or not they are there; see `weight_files`."""
    return weight_files([path.name for path in folder.glob("*.safetensors")], read_index(folder / INDEX))


def find_config(folder: Path) -> Path | None:
    """Returns the file that says what a folder holds: config.json of a model, adapter_config.json of adapters alone;
    None where there is neither.
    """
    return next((folder / name for name in (CONFIG_FILE, ADAPTER_CONFIG) if (folder / name).is_file()), None)


def _missing_config(folder: Path) -> list[str]:
    return [] if (folder / CONFIG_FILE).is_file() else [CONFIG_FILE]


def _missing_vocabulary(folder: Path) -> list[str]:
    return [] if any(_VOCABULARY.fullmatch(path.name) for path in folder.glob("*")) else ["tokenizer.json"]


def _missing_weights(folder: Path) -> list[str]:
    names = stored_weights(folder) or [SINGLE]
    totals = {int(found[2]) for found in map(_SHARD.fullmatch, names) if found}
    names += [f"model-{i:05d}-of-{total:05d}.safetensors" for total in totals for i in range(1, total + 1)]
    return _missing_config(folder) + sorted({name for name in names if not (folder / name).is_file()})


def _missing_adapters(folder: Path) -> list[str]:
    return [name for name in (ADAPTER_CONFIG, ADAPTER_TENSORS) if not (folder / name).is_file()]


CONFIG = Need(config_or_adapters, _missing_config)
TOKENIZER = Need(tokenizer_files, _missing_vocabulary, "tokenizer.json")
MODEL = Need(files_to_download, _missing_weights)
ADAPTERS = Need(adapter_files, _missing_adapters, ADAPTER_CONFIG)


def files_that_prove(names: Sequence[str]) -> list[str]:
    """Returns the files whose presence tells that a folder is complete: weights and vocabularies. A download fetches
    them last, so that an interrupted one is seen to be incomplete.
    """
    return [name for name in names if name.endswith(".safetensors") or _VOCABULARY.fullmatch(name)]
