"""The name that a mistyped word was probably meant to be."""

import difflib
from collections.abc import Iterable


def closest(word: str, names: Iterable[str], likeness: float = 0.6) -> str | None:
    """Returns the name that `word` was probably meant to be; None where none is like it.

    Args:
        word: as it was typed.
        names: the valid names.
        likeness: the least ratio of difflib, from 0 to 1.
    """
    found = difflib.get_close_matches(word, list(names), 1, likeness)
    return found[0] if found else None


def meant(name: str | None) -> str:
    """Returns the end of an error that asks whether `name` was meant; empty for None."""
    return f"; did you mean {name}?" if name else ""
