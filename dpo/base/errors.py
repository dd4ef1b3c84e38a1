"""The ways in which a program of this package ends early; `dpo.command.exits` has their exit codes.

`UserError` renders its own message from its fields. No code parses a message: it reads the fields.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager


class UserError(ValueError):
    """The user's input is wrong: exit code 2. Its text is one line, `PLACE: WHAT; valid: VALID`.

    Pickling keeps the fields, so that one rank can send the error to the others.

    Args:
        place: a key of the config (`data.train[0].path`) or a flag, after the file or the words `command line` that
            gave it where that is known (`run.yaml: loss.beta`, `command line: --out`); or `file:line`; or a file, a
            folder or a host.
        what: the fault at that place.
        valid: the valid values or forms; empty where `what` names them, or where none is known.
    """

    def __init__(self, place: str, what: str, valid: str = ""):
        super().__init__(place, what, valid)  # the arguments that pickle calls the class with
        self.place, self.what, self.valid = place, what, valid

    def __str__(self) -> str:
        return one_line(f"{self.place}: {render(self.what, self.valid)}")

    def at(self, place: str) -> "UserError":
        """Returns the same error at another place."""
        return UserError(place, self.what, self.valid)


class InvalidValue(ValueError):
    """A value is wrong whose place the reader does not know; a caller that knows it raises the error `at` the place.

    Args:
        what: the fault, with the name of the value.
        valid: as in `UserError`.
    """

    def __init__(self, what: str, valid: str = ""):
        super().__init__(what, valid)
        self.what, self.valid = what, valid

    def __str__(self) -> str:
        return render(self.what, self.valid)

    def at(self, place: str) -> UserError:
        """Returns the error with its place."""
        return UserError(place, self.what, self.valid)


class RunError(RuntimeError):
    """A failure while running (a gradient that is not finite, a failed self-check): exit code 1."""


class FolderLost(OSError):
    """Another start has taken this run's folder: exit code 1. An OSError, since rank 0 meets it alone and must end the
    run as it does for a full disk.
    """


class Preempted(Exception):
    """The run was asked to stop, and ends after `step` updates: exit code 0.

    Args:
        step: updates made so far, by this start and by earlier ones.
        is_saved: whether this start has saved a checkpoint after `step` updates; False before its first step.
    """

    def __init__(self, step: int, is_saved: bool):
        kept = f"after step {step}; the same command resumes from here"
        resumed = f"before its first step; the same command resumes from step {step}"
        begun = "before the first step; the same command starts again; computed rows of the reference, if any, are kept"
        super().__init__(f"stopped {kept if is_saved else resumed if step else begun}")
        self.step, self.is_saved = step, is_saved


@contextmanager
def renamed_places(places: Mapping[str, str]) -> Iterator[None]:
    """Renames the place of a UserError that is raised in the block: each key of `places` becomes its value.

    Used by programs that take the value of a config key from a flag of their own.
    """
    try:
        yield
    except UserError as failure:
        if failure.place not in places:
            raise
        raise failure.at(places[failure.place]) from failure


def render(what: str, valid: str, label: str = "valid") -> str:
    """Returns `WHAT; LABEL: VALID`, or `WHAT` alone where `valid` is empty. After a question there is no semicolon.

    Args:
        what: the error.
        valid: the values that would be right; may be empty.
        label: the word before them.
    """
    return f"{what}{'' if what.endswith('?') else ';'} {label}: {valid}" if valid else what


def one_line(text: str) -> str:
    """Returns the text with every run of white space as one space."""
    return " ".join(text.split())
