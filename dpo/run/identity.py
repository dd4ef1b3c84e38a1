"""The identity of a run: the values that must not change when it resumes."""

from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Any

from dpo.base.errors import UserError
from dpo.config import Config, LossConfig
from dpo.run.folder import Start
from dpo.run.inputs import Inputs


def identity_of(config: Config, inputs: Inputs) -> dict[str, Any]:
    """Returns the values that must not change when the run resumes, by config key. All others may change."""
    plain = {
        "data.order": config.data.order,
        "train.seed": config.train.seed,
        "batch.group_by_prompt": config.batch.group_by_prompt,
        "batch.pairs_per_step": config.batch.pairs_per_step,
        "optim.name": config.optim.name,
    } | {f"loss.{name}": value for name, value in asdict(config.loss).items()}
    # Last, since they change with others: a seed with the hold-out.
    hashes = {"data.train": inputs.data.train.content_hash, "reference.path": inputs.reference.hash}
    return plain | hashes | {SHARES: shares_of(config)}


PAIRS_DEPEND_ON = "data.train, its holdout and columns, data.max_length, data.max_prompt_length, model.tokenizer"
CONTENT_OF = {
    "data.train": f"the pairs (of {PAIRS_DEPEND_ON})",
    "reference.path": "the reference (of model.path where reference.path is null)",
}
"""The content that a hash in the identity belongs to, by config key."""
SHARES = "shares"
"""The key of the shares of an epoch in the identity. They may change where the pairs do not, as from null to weight 1;
an error about the pairs names them."""


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
    checkpoint does not record is newer than the checkpoint, and counts as its default.
    """
    if start.state is None:
        return
    recorded = loss_defaults() | {SHARES: {}} | start.state.identity
    for key in (key for key in identity if key != SHARES):
        if recorded.get(key) != identity[key]:
            key, what = _difference(key, recorded, identity)
            valid = "the same as before, or another train.run_dir"
            raise UserError(key, f"cannot resume from {start.checkpoint}: {what}", valid)


def _difference(key: str, before: Mapping[str, Any], now: Mapping[str, Any]) -> tuple[str, str]:
    """Returns the key of the config at which two identities differ, and how: for other pairs the key of a share that
    differs.

    Args:
        key: a key whose values differ.
        before: the identity that the checkpoint records.
        now: the identity of this start.
    """
    old, new = before[SHARES], now[SHARES]
    shares = [share for share in {**old, **new} if old.get(share) != new.get(share)]
    if key == "data.train" and shares:
        was, value = (shown_share(share.get(shares[0])) for share in (old, new))
        return shares[0], f"{was} when the checkpoint was written, {value} now, which gives an epoch other pairs"
    if key in CONTENT_OF:
        hashes = f"hash {str(before.get(key))[:8]}, now {now[key][:8]}"
        return key, f"the content of {CONTENT_OF[key]} has changed since the checkpoint was written ({hashes})"
    return key, f"{before.get(key)!r} when the checkpoint was written, {now[key]!r} now"


def shown_share(share: float | None) -> str:
    """Returns a share as the config gives it."""
    return "null" if share is None else f"{share}"


def loss_defaults() -> dict[str, Any]:
    """Returns the default of each key of `loss`, by config key."""
    return {f"loss.{field.name}": field.default for field in fields(LossConfig)}
