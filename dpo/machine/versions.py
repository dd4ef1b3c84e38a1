"""The versions of torch, transformers and Python that are tested, and whether the installed ones are among them.

Reads the metadata of packages alone: importing neither takes time nor fails.
"""

import platform
import re
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version

TESTED: Mapping[str, tuple[str, str]] = {
    "torch": ("2.11.0", "2.14.1"),
    "transformers": ("5.17.0", "5.24.0"),
    "Python": ("3.11", "3.13"),
}
"""Of each the oldest and the newest version that the tests run with; of the packages they are those of
constraints-oldest.txt and of constraints-newest.txt. Only as many numbers count as the newest version names: 3.13.5 is
tested.
"""


def untested_versions(tested: Mapping[str, tuple[str, str]] = TESTED) -> str | None:
    """One line that names the installed versions outside of the tested ranges and these ranges; None if there are
    none. A package that is not installed is left out: its import tells.
    """
    found = {name: _installed(name) for name in tested}
    untested = [
        f"{name} {have} (tested: {' to '.join(tested[name])})"
        for name, have in found.items()
        if have is not None and not _lies_within(have, *tested[name])
    ]
    return f"not tested with {', '.join(untested)}" if untested else None


def _installed(name: str) -> str | None:
    if name == "Python":
        return platform.python_version()
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _lies_within(have: str, oldest: str, newest: str) -> bool:
    return _release(oldest) <= _release(have) and _release(have)[: len(newest.split("."))] <= _release(newest)


def _release(text: str) -> tuple[int, ...]:
    """(2, 11, 0) of 2.11, of 2.11.0+cu130 and of 2.11.0a0+git: what a build or a pre-release adds says nothing here."""
    numbers = re.match(r"\d+(?:\.\d+)*", text)
    parts = [int(part) for part in numbers[0].split(".")] if numbers else []
    return tuple((*parts, 0, 0, 0)[:3])
