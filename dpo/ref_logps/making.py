"""What a reference log-probability depends on: the facts of its key, and how it was made."""

from collections.abc import Sequence

import torch

from dpo.model.attention import ATTENTION
from dpo.model.log_probs import has_float32_product
from dpo.ref_logps.blocks import Making


def numerics(policy_dtype: str, compute: torch.dtype, device: torch.device, tf32: bool) -> dict[str, str]:
    """The facts beside the model that change a log-probability's bits enough to matter.

    A fact that some numerics lack is left out of theirs: rows that were computed before it was known keep their key.
    """
    head = {"head": "float32 product"} if has_float32_product(device.type, compute) else {}
    path = "flex" if device.type == "cuda" else "segments"
    return {
        "dtype": policy_dtype,
        "compute_dtype": f"{compute}/tf32" if tf32 and device.type == "cuda" else str(compute),
        "device": device.type,
        "attention": f"{ATTENTION}/{path}",
    } | head


def making(device: torch.device, compiled: bool) -> Making:
    """How this process makes rows: what changes their last digits and is not in their key."""
    capability = "cpu"
    if device.type == "cuda":
        capability = "sm_{}{}".format(*torch.cuda.get_device_capability(device))
    return {"torch": str(torch.__version__), "device": capability, "compile": compiled}


def joined_making(makings: Sequence[Making]) -> Making:
    """How several ranks together make rows: where they differ, all that they say."""
    values = {name: sorted({str(making[name]) for making in makings}) for name in makings[0]}
    return {name: ", ".join(found) if len(found) > 1 else makings[0][name] for name, found in values.items()}


def difference(made: Sequence[Making | None], now: Making) -> str | None:
    """Describes how cached rows were computed differently from this run; None if they were not."""
    others = [
        "unknown" if making is None else ", ".join(f"{name} {making.get(name, 'unknown')}" for name in now)
        for making in made
        if making is None or any(making.get(name) != now[name] for name in now)
    ]
    return f"{'; '.join(others)}; this run: {', '.join(f'{name} {now[name]}' for name in now)}" if others else None
