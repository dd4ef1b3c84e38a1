"""The files beside the weights of a run's models: their SHA-256, which a run's identity has, and what has changed.

No checkpoint has them: each start reads them anew where its models lie, and the exported model gets copies. So they
must stay as they are from the first start of a run to its end. By config key, for example:

    model.path        config.json, generation_config.json, modeling_own.py, LICENSE
    model.tokenizer   tokenizer.json, tokenizer_config.json, chat_template.jinja
    reference.path    modeling_own.py (its config has a part in the reference's hash, with the weights)

and, where it may be run, org/other/modeling.py of another repository of the hub, by model.trust_remote_code.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from dpo.base.sums import sha256_of
from dpo.checkpoint.companions import companions_of_model, companions_of_tokenizer, is_code, repositories_of_code
from dpo.config import Config
from dpo.encode.tokenizer import find_tokenizer_folder, tokenizer_is_here
from dpo.hub.snapshots import cached_snapshot
from dpo.terminal.console import warn

MODEL, TOKENIZER, REFERENCE, CODE = "model.path", "model.tokenizer", "reference.path", "model.trust_remote_code"
OWNER_OF = {
    MODEL: "the model",
    TOKENIZER: "the tokenizer (of model.path where model.tokenizer is null)",
    REFERENCE: "the reference (of model.path where reference.path is null)",
    CODE: "the code that a config takes from another repository",
}
"""Whose files they are, by config key."""
SHOWN = 3
"""The maximum number of files that a line names."""

Digests = Mapping[str, Mapping[str, str]]
"""Config key -> name of a file -> its SHA-256."""


def hash_model_files(config: Config, model: Path, reference: Path) -> dict[str, dict[str, str]]:
    """Returns the digests of the files beside the weights that a run uses or passes on. For rank 0 alone, which copies
    them.

    Args:
        config: names the tokenizer.
        model: the folder of the model from which the policy starts.
        reference: the folder of the reference, if the loss has one.
    """
    digests = hash_copied_files(config, model)
    if config.loss.facts.uses_reference:
        digests[REFERENCE] = _hash(reference, filter(is_code, companions_of_model(reference)))
    if config.model.trust_remote_code:
        digests[CODE] = _hash_other_code([model, reference, _tokenizer_folder(config, model) or model])
    return digests


def hash_copied_files(config: Config, model: Path) -> dict[str, dict[str, str]]:
    """Returns the digests of the files that an exported model gets; see `hash_model_files`."""
    tokenizer = _tokenizer_folder(config, model)
    of_tokenizer = _hash(tokenizer, companions_of_tokenizer(tokenizer)) if tokenizer else {}
    return {MODEL: _hash(model, companions_of_model(model)), TOKENIZER: of_tokenizer}


def _tokenizer_folder(config: Config, model: Path) -> Path | None:
    """Returns the folder of the tokenizer; None where it is not here, as may be for data of token ids."""
    name = config.model.tokenizer or str(model)
    return find_tokenizer_folder(name) if tokenizer_is_here(name) else None


def _hash_other_code(folders: Iterable[Path]) -> dict[str, str]:
    """Returns the digests of the code in other repositories that configs in these folders name: `org/name/FILE`."""
    repositories = {name for folder in folders for name in repositories_of_code(folder)}
    snapshots = {name: cached_snapshot(name) for name in sorted(repositories)}
    return {
        f"{repository}/{name}": digest
        for repository, folder in snapshots.items()
        if folder
        for name, digest in _hash(folder, sorted(path.name for path in folder.glob("*.py"))).items()
    }


def _hash(folder: Path, names: Iterable[str]) -> dict[str, str]:
    return {name: sha256_of(folder / name) for name in names}


def tell_changes(before: Digests, config: Config, model: Path) -> None:
    """Warns where a file that an exported model gets is not as it was at the start of the run. For rank 0 alone.

    Args:
        before: the digests that a start or a checkpoint recorded; empty in a checkpoint of an older version.
        config: names the tokenizer.
        model: the folder of the model from which the policy started.
    """
    found = find_change(before, hash_copied_files(config, model))
    if found:
        warn(f"the exported model gets files that have changed: {found[0]}: {found[1]}")


def find_change(before: Digests, now: Digests) -> tuple[str, str] | None:
    """Returns the config key of files that have changed or are gone, and a text that names them; None where all files
    that were there before are as they were. Keys that are not in both are left out.
    """
    for key, owner in _in_both(before, now).items():
        old, new = before[key], now[key]
        changed = [
            f"{name} has changed (SHA-256 {old[name][:8]}, now {new[name][:8]})"
            if name in new
            else f"{name} is missing"
            for name in sorted(old)
            if old[name] != new.get(name)
        ]
        if changed:
            return key, f"{owner} is not as it was: {_listed(changed)}"
    return None


def added_files(before: Digests, now: Digests) -> list[str]:
    """Returns a text for each config key with files that were not there before. They damage nothing: where they give
    other token ids, the pairs are others, which the identity has too.
    """
    new = {owner: sorted(now[key].keys() - before[key].keys()) for key, owner in _in_both(before, now).items()}
    return [f"new files of {owner}: {_listed(names)}" for owner, names in new.items() if names]


def _in_both(before: Digests, now: Digests) -> dict[str, str]:
    """Returns the owners of the files that are compared, by config key."""
    return {key: owner for key, owner in OWNER_OF.items() if key in before and key in now}


def _listed(parts: Sequence[str]) -> str:
    more = [f"{len(parts) - SHOWN} more"] if len(parts) > SHOWN else []
    return ", ".join([*parts[:SHOWN], *more])
