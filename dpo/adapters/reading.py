"""Reads adapter_config.json of a folder of adapters in peft's form."""

import json
from pathlib import Path

from dpo.adapters.spec import AdapterSpec
from dpo.base.errors import UserError

ADAPTER_CONFIG = "adapter_config.json"


def read_spec(folder: Path) -> AdapterSpec:
    """Returns the adapters that a folder holds. Raises UserError where they are of another kind than LoRA."""
    path = folder / ADAPTER_CONFIG
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as failure:
        raise UserError(str(path), f"cannot be read: {failure}") from failure
    targets = settings["target_modules"]
    return AdapterSpec(
        rank=settings["r"],
        alpha=settings["lora_alpha"],
        target_modules=targets if isinstance(targets, str) else tuple(targets),
        rslora=settings.get("use_rslora", False),
        dora=settings.get("use_dora", False),
        folder=folder,
    )
