"""The identity of a run: the values that must not change when it resumes."""

from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Any

from dpo.adapters.spec import AdapterSpec, spec_of
from dpo.base.errors import UserError
from dpo.checkpoint.state import FILES, SHARES
from dpo.config import Config, LossConfig
from dpo.run.folder import Start
from dpo.run.inputs import Inputs
from dpo.run.model_files import Digests, added_files, find_change
from dpo.terminal.console import say


def identity_of(config: Config, inputs: Inputs) -> dict[str, Any]:
    """Returns the values that must not change when the run resumes, by config key. All others may change."""
    plain = {
        "data.order": config.data.order,
        "train.seed": config.train.seed,
        "batch.group_by_prompt": config.batch.group_by_prompt,
        "batch.pairs_per_step": config.batch.pairs_per_step,
        "optim.name": config.optim.name,
    } | {f"loss.{name}": value for name, value in asdict(config.loss).items()}
    # Last, since they change with others: a seed with the hold-out, the pairs with a tokenizer's file.
    hashes = {"data.train": inputs.data.train.content_hash, "reference.path": inputs.reference.hash}
    adapters = adapter_facts(inputs)
    return plain | adapters | {FILES: inputs.model_files} | hashes | {SHARES: shares_of(config)}


def adapter_facts(inputs: Inputs) -> dict[str, Any]:
    """Returns the facts of a run's adapters, by config key, and the content of their base; without adapters only that
    there are none. Lists are sorted, since the order of names has no meaning.
    """
    adapters = inputs.model.adapters
    if adapters is None:
        return NO_ADAPTERS
    facts = {name: sorted(value) if isinstance(value, list) else value for name, value in adapters.facts.items()}
    of_folder = {name: facts.pop(name) for name in IN_A_FOLDER_ALONE}
    renamed = {"lora.train_embeddings": facts.pop("embeddings"), "lora.path": of_folder}
    return {f"lora.{name}": value for name, value in facts.items()} | renamed | {"model.path": inputs.model.base_hash}


NO_ADAPTERS = {"lora.rank": None}
IN_A_FOLDER_ALONE = (
    "rank_pattern", "alpha_pattern", "layers_to_transform", "layers_pattern", "trained_modules", "ties", "of_peft",
)  # fmt: skip
"""The values of `AdapterSpec` for which the config has no key but lora.path, in whose folder they stand."""
PAIRS_DEPEND_ON = "data.train, its holdout and columns, data.max_length, data.max_prompt_length, model.tokenizer"
CONTENT_OF = {
    "data.train": f"the pairs (of {PAIRS_DEPEND_ON})",
    "model.path": "the model that the adapters are for",
    "reference.path": "the reference (of model.path, with the adapters of lora.path, where reference.path is null)",
}
"""The content that a hash in the identity belongs to, by config key."""


def shares_of(config: Config) -> dict[str, float]:
    """Returns every share of an epoch that the config gives, by config key."""
    given = {
        f"data.train[{i}].{name}": getattr(source, name)
        for i, source in enumerate(config.data.train)
        for name in ("weight", "count")
    }
    return {key: share for key, share in given.items() if share is not None}


def check_identity(start: Start, identity: Mapping[str, Any]) -> None:
    """Raises UserError, naming the key, where a resumed run would not be the same run. A key of `loss` that the
    checkpoint does not record is newer than the checkpoint, and counts as its default. Files beside the weights that it
    does not record are not compared, which is told.
    """
    if start.state is None:
        return
    recorded = loss_defaults() | NO_ADAPTERS | {FILES: {}, SHARES: {}} | start.state.identity
    for key in (key for key in identity if key != SHARES):
        found = _difference(key, recorded, identity)
        if found:
            key, what = found
            valid = "the same as before, or another train.run_dir"
            raise UserError(key, f"cannot resume from {start.checkpoint}: {what}", valid)
    for line in _unrecorded(recorded[FILES], identity.get(FILES, {})):
        say(f"{start.checkpoint}: {line}")


def _unrecorded(before: Digests, now: Digests) -> list[str]:
    """Returns lines about the files beside the weights that were not recorded when the checkpoint was written."""
    if now and not before:
        return ["an older version wrote it, without the SHA-256 of the files beside the weights: they are not compared"]
    return added_files(before, now)


def _difference(key: str, before: Mapping[str, Any], now: Mapping[str, Any]) -> tuple[str, str] | None:
    """Returns the key of the config at which two identities differ, and how: for other pairs the key of a share that
    differs. None where they do not differ.

    Args:
        key: the key of the identity that is compared.
        before: the identity that the checkpoint records.
        now: the identity of this start.
    """
    if before.get(key) == now[key]:
        return None
    if key == FILES:
        found = find_change(before[FILES], now[FILES])
        return found and (found[0], f"since the checkpoint was written, {found[1]}")
    old, new = before[SHARES], now[SHARES]
    shares = [share for share in {**old, **new} if old.get(share) != new.get(share)]
    if key == "data.train" and shares:
        was, value = (shown_share(share.get(shares[0])) for share in (old, new))
        return shares[0], f"{was} when the checkpoint was written, {value} now, which gives an epoch other pairs"
    if key in CONTENT_OF:
        hashes = f"hash {str(before.get(key))[:8]}, now {now[key][:8]}"
        return key, f"the content of {CONTENT_OF[key]} has changed since the checkpoint was written ({hashes})"
    return key, f"{before.get(key)!r} when the checkpoint was written, {now[key]!r} now"


def recorded_adapters(identity: Mapping[str, Any]) -> AdapterSpec | None:
    """Returns the adapters of the run whose checkpoint has this identity; None where its whole model was trained."""
    facts = {key.removeprefix("lora."): value for key, value in identity.items() if key.startswith("lora.")}
    if facts.get("rank") is None:
        return None
    return spec_of(facts | facts["path"] | {"embeddings": facts["train_embeddings"]})


def shown_share(share: float | None) -> str:
    """Returns a share as the config gives it."""
    return "null" if share is None else f"{share}"


def loss_defaults() -> dict[str, Any]:
    """Returns the default of each key of `loss`, by config key."""
    return {f"loss.{field.name}": field.default for field in fields(LossConfig)}
