"""The tested versions of torch, transformers and Python, compared with the installed versions.

Only the metadata of packages is read. Nothing is imported, so this is fast and does not fail on a broken package.
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
"""Name -> the oldest and the newest version that the tests run with; those of packages are pinned in
constraints-oldest.txt and constraints-newest.txt. The newest version counts with as many numbers as it has: Python
3.13.5 is within "3.13".
"""


def untested_versions(tested: Mapping[str, tuple[str, str]] = TESTED) -> str | None:
    """Returns one line that names the installed versions outside of the tested ranges, with these ranges; None if all
    are tested. Packages that are not installed are left out: their import fails anyway.
    """
    installed = {name: _installed(name) for name in tested}
    untested = [
        f"{name} {have} (tested: {' to '.join(tested[name])})"
        for name, have in installed.items()
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
    """Returns the release of a version: (2, 11, 0) for 2.11, 2.11.0+cu130 and 2.11.0a0+git. Suffixes of builds and
    pre-releases are ignored.
    """
    numbers = re.match(r"\d+(?:\.\d+)*", text)
    parts = [int(part) for part in numbers[0].split(".")] if numbers else []
    return tuple((*parts, 0, 0, 0)[:3])
