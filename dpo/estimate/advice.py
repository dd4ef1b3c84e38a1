"""What would make a step faster whose time is traffic and not arithmetic: few tokens a rank on many ranks.

Each change is timed by the same formulas; those that are no faster, or do not fit, are left out.
"""

from collections.abc import Callable, Iterator
from typing import Any

from dpo.estimate.changes import Keys, with_keys, words_of
from dpo.estimate.needs import Layout
from dpo.estimate.speed import Speed
from dpo.estimate.words import shown_seconds

LEAST_GAIN = 0.02
"""Share of the step that a change must save to be named."""


def advice(layout: Layout, speed: Callable[[Layout], Speed], fits: Callable[[Layout], bool]) -> list[str]:
    """A line that says so where a step is bound by traffic, and one for each change that helps; else nothing.

    `speed` times a layout, `fits` says whether it fits: it may take seconds, and is asked only for what is faster.
    """
    now = speed(layout)
    traffic = sum(part.seconds for part in now.parts if part.bytes)
    arithmetic = now.most - traffic
    if traffic <= arithmetic:
        return []
    lines = [f"bound by traffic: {shown_seconds(traffic)} of it beside {shown_seconds(arithmetic)} of arithmetic"]
    for keys, reason in _faster(layout):
        changed = with_keys(layout, keys)
        seconds = speed(changed).most
        if seconds < (1 - LEAST_GAIN) * now.most and fits(changed):
            lines.append(f"  {words_of(keys)}: {shown_seconds(seconds)} a step; {reason}")
    return lines + _fewer_ranks(layout, now, speed, fits)


def _faster(layout: Layout) -> Iterator[tuple[Keys, str]]:
    """Changes that lessen traffic, and why."""
    parallel = layout.config.parallel
    if parallel.reshard_after_forward:
        yield {"parallel.reshard_after_forward": False}, "weights are gathered once a step, and stay whole meanwhile"
    if parallel.reduce_dtype == "float32":
        yield {"parallel.reduce_dtype": "bfloat16"}, "gradients take half the bytes; sums over ranks are rounded more"
    if parallel.sync_gradients == "every_micro_batch":
        yield {"parallel.sync_gradients": "last_micro_batch"}, "gradients are reduced once a step, and stay whole"


def _fewer_ranks(
    layout: Layout, now: Speed, speed: Callable[[Layout], Speed], fits: Callable[[Layout], bool]
) -> list[str]:
    """Half the ranks, which compute twice as much each and send as much as before."""
    parallel = layout.config.parallel
    if layout.num_ranks % (2 * parallel.replicate) or (parallel.shard or 2) % 2:
        return []
    keys: dict[str, Any] = {"ranks": layout.num_ranks // 2}
    if parallel.shard is not None:
        keys["parallel.shard"] = parallel.shard // 2
    half = with_keys(layout, keys)
    seconds = speed(half).most
    if seconds > 2 * (1 - LEAST_GAIN) * now.most or not fits(half):
        return []
    share = seconds / 2 / now.most
    return [f"  {words_of(keys)}: {shown_seconds(seconds)} a step; half the GPUs, {share:.0%} of the GPU time a step"]
