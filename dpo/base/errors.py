"""The ways in which a program of this package ends early; `dpo.base.command` has their exit codes.

A message that a user reads is made here, of the fields of a UserError, and nowhere taken apart again: whoever needs the
place of an error reads `place`.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager


class UserError(ValueError):
    """The user's input is wrong: exit code 2. Its text is one line, `PLACE: WHAT; valid: VALID`.

    It keeps its fields where it is pickled, as when one rank sends it to the others.

    Args:
        place: where it is wrong, the wider place first: a key of the config (`data.train[0].path`) or a flag, after the
            file or `command line` that gave it where that is known (`run.yaml: loss.beta`, `command line: --out`);
            `file:line`; a file or folder; a host.
        what: what is wrong there.
        valid: what would be right; empty where `what` says it, or nobody can know.
    """

    def __init__(self, place: str, what: str, valid: str = ""):
        super().__init__(place, what, valid)  # what pickle makes it anew from
        self.place, self.what, self.valid = place, what, valid

    def __str__(self) -> str:
        return one_line(f"{self.place}: {self.what}" + (f"; valid: {self.valid}" if self.valid else ""))

    def at(self, place: str) -> "UserError":
        """Returns the same error at another place."""
        return UserError(place, self.what, self.valid)


class RunError(RuntimeError):
    """Something was found while running (a gradient that is not finite, a failed self-check): exit code 1."""


class Preempted(Exception):
    """The run was asked to stop and has saved what it had, after `step` updates: exit code 0."""

    def __init__(self, step: int):
        super().__init__(f"stopped after step {step}; the same command resumes from here")
        self.step = step


@contextmanager
def renamed_places(places: Mapping[str, str]) -> Iterator[None]:
    """Raises a UserError of the block that has a place of `places` with the name that `places` gives it: for a program
    that takes from a flag of its own what stands under a key of the config elsewhere.
    """
    try:
        yield
    except UserError as failure:
        if failure.place not in places:
            raise
        raise failure.at(places[failure.place]) from failure


def one_line(text: str) -> str:
    """Returns the text with every run of white space as one space."""
    return " ".join(text.split())
