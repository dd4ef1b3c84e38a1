"""Changes that speed up a step that is bound by traffic and not by arithmetic, as with few tokens per rank on many
ranks.

Each change is timed by the same formulas as the step. A change that is no faster, or does not fit, is left out.
"""

from collections.abc import Callable, Iterator
from typing import Any

from dpo.base.units import shown_seconds
from dpo.estimate.changes import Keys, with_keys, words_of
from dpo.estimate.needs import Trial
from dpo.estimate.speed import Speed

LEAST_GAIN = 0.02
"""Share of the step's time that a change must save to be listed."""


def advice(trial: Trial, speed: Callable[[Trial], Speed], fits: Callable[[Trial], bool]) -> list[str]:
    """Returns the advice for a step that is bound by traffic: a heading and one line per change that helps.

    Args:
        trial: the step to improve.
        speed: returns the speed of a trial.
        fits: returns whether a trial fits its devices. It may take seconds, and is asked only about faster trials.

    Returns:
        The lines; none where arithmetic takes longer than traffic.
    """
    now = speed(trial)
    traffic = sum(part.seconds for part in now.parts if part.bytes)
    arithmetic = now.serial - traffic
    if traffic <= arithmetic:
        return []
    lines = [f"bound by traffic: {shown_seconds(traffic)} of traffic, {shown_seconds(arithmetic)} of arithmetic"]
    for keys, reason in _faster(trial):
        changed = with_keys(trial, keys)
        seconds = speed(changed).serial
        if seconds < (1 - LEAST_GAIN) * now.serial and fits(changed):
            lines.append(f"  {words_of(keys)}: {shown_seconds(seconds)} per step; {reason}")
    return lines + _fewer_ranks(trial, now, speed, fits)


def _faster(trial: Trial) -> Iterator[tuple[Keys, str]]:
    """Yields each change that reduces traffic, and why it does."""
    parallel = trial.config.parallel
    if parallel.reshard_after_forward:
        yield (
            {"parallel.reshard_after_forward": False},
            "weights are all-gathered once per step and stay unsharded during it",
        )
    if parallel.reduce_dtype == "float32":
        yield (
            {"parallel.reduce_dtype": "bfloat16"},
            "gradients take half the bytes; their sums over ranks are rounded more",
        )
    if parallel.sync_gradients == "every_micro_batch":
        yield (
            {"parallel.sync_gradients": "last_micro_batch"},
            "gradients are reduced once per step and stay unsharded until then",
        )


def _fewer_ranks(trial: Trial, now: Speed, speed: Callable[[Trial], Speed], fits: Callable[[Trial], bool]) -> list[str]:
    """Returns the line for half the ranks, each of which computes twice as much and sends as much as before; none where
    this number of ranks is impossible, does not fit or costs more GPU time.
    """
    parallel = trial.config.parallel
    if trial.num_ranks % (2 * parallel.replicate) or (parallel.shard or 2) % 2:
        return []
    keys: dict[str, Any] = {"ranks": trial.num_ranks // 2}
    if parallel.shard is not None:
        keys["parallel.shard"] = parallel.shard // 2
    half = with_keys(trial, keys)
    seconds = speed(half).serial
    if seconds > 2 * (1 - LEAST_GAIN) * now.serial or not fits(half):
        return []
    share = seconds / 2 / now.serial
    return [
        f"  {words_of(keys)}: {shown_seconds(seconds)} per step; half the GPUs, {share:.0%} of the GPU time per step"
    ]
