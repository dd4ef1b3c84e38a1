"""The files beside the weights of a run's models: their SHA-256, which a run's identity has, and what has changed.

No checkpoint has them: each start reads them anew where its models lie, and the exported model gets copies. So they
must stay as they are from the first start of a run to its end. By config key, for example:

    model.path        config.json, generation_config.json, modeling_own.py, LICENSE
    model.tokenizer   tokenizer.json, tokenizer_config.json, chat_template.jinja
    reference.path    modeling_own.py (its config has a part in the reference's hash, with the weights)
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from dpo.base.sums import sha256_of
from dpo.checkpoint.companions import companions_of_model, companions_of_tokenizer, is_code
from dpo.config import Config
from dpo.encode.tokenizer import find_tokenizer_folder, tokenizer_is_here
from dpo.terminal.console import warn

MODEL, TOKENIZER, REFERENCE = "model.path", "model.tokenizer", "reference.path"
OWNER_OF = {
    MODEL: "the model",
    TOKENIZER: "the tokenizer (of model.path where model.tokenizer is null)",
    REFERENCE: "the reference (of model.path where reference.path is null)",
}
"""Whose files they are, by config key."""
COPIED = (MODEL, TOKENIZER)
"""The keys whose files an exported model gets."""
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
    return digests


def hash_copied_files(config: Config, model: Path) -> dict[str, dict[str, str]]:
    """Returns the digests of the files that an exported model gets; see `hash_model_files`. A tokenizer need not be
    there: data of token ids is trained on without one.
    """
    digests = {MODEL: _hash(model, companions_of_model(model)), TOKENIZER: {}}
    tokenizer = config.model.tokenizer or str(model)
    if tokenizer_is_here(tokenizer):
        folder = find_tokenizer_folder(tokenizer)
        digests[TOKENIZER] = _hash(folder, companions_of_tokenizer(folder))
    return digests


def _hash(folder: Path, names: Iterable[str]) -> dict[str, str]:
    return {name: sha256_of(folder / name) for name in names}


def tell_changes(before: Digests, config: Config, model: Path) -> None:
    """Warns where a file that an exported model gets is not as it was at the start of the run. For rank 0 alone.

    Args:
        before: the digests that a start or a checkpoint recorded; empty in a checkpoint of an older version.
        config: names the tokenizer.
        model: the folder of the model from which the policy started.
    """
    found = find_change({key: before.get(key, {}) for key in COPIED}, hash_copied_files(config, model))
    if found:
        warn(f"the exported model gets files that have changed: {found[0]}: {found[1]}")


def find_change(before: Digests, now: Digests) -> tuple[str, str] | None:
    """Returns the config key of files that have changed or are gone, and a text that names them; None where all files
    that were there before are as they were.
    """
    for key, owner in OWNER_OF.items():
        old, new = before.get(key, {}), now.get(key, {})
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
    new = {key: sorted(now.get(key, {}).keys() - before.get(key, {}).keys()) for key in OWNER_OF}
    return [f"new beside the weights of {OWNER_OF[key]}: {_listed(names)}" for key, names in new.items() if names]


def _listed(parts: Sequence[str]) -> str:
    more = [f"{len(parts) - SHOWN} more"] if len(parts) > SHOWN else []
    return ", ".join([*parts[:SHOWN], *more])
