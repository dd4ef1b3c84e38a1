"""The numerics that are part of a row's key, and the circumstances of its computation that are not."""

from collections.abc import Sequence

import torch

from dpo.model.attention import ATTENTION
from dpo.model.log_probs import has_float32_product
from dpo.ref_logps.blocks import Circumstances


def numerics(policy_dtype: str, compute: torch.dtype, device: torch.device, tf32: bool) -> dict[str, str]:
    """Returns the facts beside the model that change a log-probability by more than rounding; they enter the key.

    A fact that does not apply is absent. So a fact that is added here leaves all other keys as they are, and rows that
    were computed before it existed stay in use.

    Args:
        policy_dtype: the dtype of the master weights.
        compute: the dtype of the forward pass.
        device: where it runs.
        tf32: whether float32 products use TF32 on CUDA.
    """
    head = {"head": "float32 product"} if has_float32_product(device.type, compute) else {}
    path = "flex" if device.type == "cuda" else "segments"
    return {
        "dtype": policy_dtype,
        "compute_dtype": f"{compute}/tf32" if tf32 and device.type == "cuda" else str(compute),
        "device": device.type,
        "attention": f"{ATTENTION}/{path}",
    } | head


def circumstances_here(device: torch.device, compiled: bool) -> Circumstances:
    """Returns how this process computes rows: facts that change their last digits and are not part of the key."""
    capability = "cpu"
    if device.type == "cuda":
        capability = "sm_{}{}".format(*torch.cuda.get_device_capability(device))
    return {"torch": str(torch.__version__), "device": capability, "compile": compiled}


def joined_circumstances(of_ranks: Sequence[Circumstances]) -> Circumstances:
    """Returns how several ranks together compute rows; where they differ, the different values joined by commas."""
    values = {name: sorted({str(facts[name]) for facts in of_ranks}) for name in of_ranks[0]}
    return {name: ", ".join(texts) if len(texts) > 1 else of_ranks[0][name] for name, texts in values.items()}


def difference(made: Sequence[Circumstances | None], now: Circumstances) -> str | None:
    """Returns a description of how cached rows were computed differently from this run; None where they were not."""
    others = [
        "unknown" if facts is None else ", ".join(f"{name} {facts.get(name, 'unknown')}" for name in now)
        for facts in made
        if facts is None or any(facts.get(name) != now[name] for name in now)
    ]
    return f"{'; '.join(others)}; this run: {', '.join(f'{name} {now[name]}' for name in now)}" if others else None
