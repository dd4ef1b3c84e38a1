"""The layout of a start: the devices and settings by which its steps are computed."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch

from dpo.config import Config
from dpo.distributed.collectives import all_gather, on_main
from dpo.distributed.world import World
from dpo.run.folder import Start, read_starts
from dpo.run_folder.files import PROVENANCE
from dpo.terminal.console import say


def layout_here(config: Config, world: World) -> dict[str, Any]:
    """Returns the layout of this start. Every rank must get here, or the rest hang."""
    kind = torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else world.device.type
    return layout_of(config, all_gather(kind))


def with_earlier_choice(config: Config, start: Start, world: World) -> Config:
    """Returns the config of `earlier_choice`, as rank 0 decides it. Every rank must get here, or the rest hang.

    Args:
        config: the config, in which keys of `parallel` may be auto.
        start: the start that `find_start_together` found.
        world: the ranks.
    """
    layout = layout_here(config, world)
    return on_main(world, lambda: earlier_choice(config, start, layout))


def layout_of(config: Config, devices: Sequence[str]) -> dict[str, Any]:
    """Returns the facts on which the bits of a step depend: a run that resumes with the same layout resumes bitwise.

    `devices`: the kind of device of each rank.
    """
    parallel = {key: value for key, value in asdict(config.parallel).items() if not key.endswith("timeout_seconds")}
    tokens = {"tokens_per_micro_batch": config.batch.tokens_per_micro_batch}
    return {"devices": dict(sorted(Counter(devices).items()))} | tokens | parallel


def earlier_choice(config: Config, start: Start, layout: Mapping[str, Any]) -> Config:
    """Replaces `auto` by the values that it had when this run was last started with the same `layout`; reports them.

    Without such a start the keys stay `auto`. Without a checkpoint the config is returned as it is.

    The values of `auto` depend on free memory, which differs between starts. Without this function an interrupted run
    would not resume bitwise.

    Args:
        config: the config, in which keys of `parallel` may be auto.
        start: the start that `find_start_together` found.
        layout: the layout of this start, from `layout_here`.
    """
    undecided = config.parallel.undecided
    if start.checkpoint is None or not undecided:
        return config
    starts = read_starts(start.checkpoint.parent.parent / PROVENANCE) or []
    layouts = [each["layout"] for each in reversed(starts) if isinstance(each.get("layout"), dict)]
    fixed = {key: value for key, value in layout.items() if key not in undecided}
    same = next((earlier for earlier in layouts if fixed.items() <= earlier.items()), None)
    if same is None:
        why = _changes(layouts[0], fixed) if layouts else "no earlier layout is recorded"
        say(f"parallel (auto): decided again: {why}")
        return config
    values = {key: same[key] for key in undecided}
    words = ", ".join(f"{key} {value}" for key, value in values.items())
    say(f"parallel (auto): {words}: kept from the last start on the same devices")
    return replace(config, parallel=replace(config.parallel, **values))


def _changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    changed = [key for key, value in now.items() if before.get(key) != value]
    return ", ".join(f"{key} {_shown(before.get(key))} -> {_shown(now[key])}" for key in changed)


def _shown(value: Any) -> str:
    """Returns a value of a layout as text; the devices of ranks as `4 sm_90`."""
    return " and ".join(f"{count} {kind}" for kind, count in value.items()) if isinstance(value, dict) else str(value)
