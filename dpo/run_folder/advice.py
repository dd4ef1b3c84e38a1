"""What is told after a stop: what is kept, and how to go on. Without torch."""

AFTER_TRAINING = "the same command goes on from the newest checkpoint, or starts again where there is none"
BEFORE_FIRST_STEP = "nothing is saved before the first step but computed rows of the reference, if any; "
"""Words before `AFTER_TRAINING`, where training had not begun."""
AFTER_REFERENCE = "the same command goes on: rows computed so far are in the cache"
