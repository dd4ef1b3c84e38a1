"""After which steps a run acts.

A run of six steps with `train.eval_every` 3 and `checkpoint.save_every` 2:

    step        .  1  2  3  4  5  6
    evaluation  x        x        x
    checkpoint        x     x     x
"""


def is_time(step: int, every: int | None, last_step: int) -> bool:
    """Returns whether an action is due after `step`: before the first step, every `every` steps, after the last.

    Args:
        step: updates made so far.
        every: steps from one action to the next; None: never in between.
        last_step: the number of steps of the whole run.
    """
    return step in (0, last_step) or (every is not None and step % every == 0)
