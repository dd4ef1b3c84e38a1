"""The plans of saving, which torch makes for the first checkpoint of a run and caches for the next ones."""

from typing import Any

import torch.distributed.checkpoint as dcp


def save_planner(plans: str) -> dcp.DefaultSavePlanner:
    """Returns a planner that caches the plan of the first checkpoint under the name `plans`, and reuses it.

    Without the cache rank 0 gathers, deduplicates and validates the plans of all ranks at every checkpoint. This Python
    code takes longer with more ranks and tensors, and holds the GIL that rank 0's training thread needs. With the cache
    each rank only reports that its tensors are laid out as before; where they are not, all ranks plan again.

    torch caches plans per process in the planner's class, by default under the class's name. So `plans` must be a
    name that no other process group and no other run uses.
    """
    planner = dcp.DefaultSavePlanner(enable_plan_caching=True)
    planner._cached_plans_key = plans
    return planner


def forget_plans(plans: str) -> None:
    """Removes the plans that `save_planner` caches under a name."""
    planner = dcp.DefaultSavePlanner
    caches: tuple[dict[str, Any], ...] = (
        planner._cached_save_plan,
        planner._cached_final_save_plan,
        planner._cached_all_plans,
        planner._cached_global_plan,
        planner._cached_metadata,
    )
    for cache in caches:
        cache.pop(plans, None)
