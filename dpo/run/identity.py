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
    return plain | {"data.train": inputs.data.train.content_hash, "reference.path": inputs.reference.hash}


CONTENT_OF = {
    "data.train": "the pairs (of data.train, its holdout, data.max_length, data.max_prompt_length, model.tokenizer)",
    "reference.path": "the reference (of model.path where reference.path is null)",
}
"""The content that a hash in the identity belongs to, by config key."""


def check_identity(start: Start, identity: Mapping[str, Any]) -> None:
    """Raises UserError, naming the key, where a resumed run would not be the same run. A key of `loss` that the
    checkpoint does not record is newer than the checkpoint, and counts as its default.
    """
    if start.state is None:
        return
    recorded = loss_defaults() | start.state.identity
    for key, value in identity.items():
        before = recorded.get(key)
        if before != value:
            what = f"{before!r} when the checkpoint was written, {value!r} now"
            if key in CONTENT_OF:
                was = f"has changed since the checkpoint was written (hash {str(before)[:8]}, now {value[:8]})"
                what = f"the content of {CONTENT_OF[key]} {was}"
            raise UserError(
                key, f"cannot resume from {start.checkpoint}: {what}", "the same as before, or another train.run_dir"
            )


def loss_defaults() -> dict[str, Any]:
    """Returns the default of each key of `loss`, by config key."""
    return {f"loss.{field.name}": field.default for field in fields(LossConfig)}
