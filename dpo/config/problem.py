"""A value of the config that is wrong beyond its type."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Problem:
    """A wrong value, described for the user in one line."""

    keys: tuple[str, ...]
    """The wrong key, then the keys whose values it conflicts with."""
    what: str
    valid: str
