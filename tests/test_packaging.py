"""What pyproject.toml says of the package: every room is in the wheel, and the changelog has the version."""

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_every_room_is_packaged() -> None:
    """setuptools takes the packages that are listed, and leaves out a forgotten one without a word."""
    rooms = [init.parent for package in ("dpo", "launch") for init in (ROOT / package).rglob("__init__.py")]
    names = {".".join(room.relative_to(ROOT).parts) for room in rooms}
    assert set(PYPROJECT["tool"]["setuptools"]["packages"]) == names | {"dpo.configs"}


def test_the_changelog_begins_with_the_version() -> None:
    """Its newest section is the version's, or what is not released yet."""
    sections = re.findall(r"^## \[?([^\]\s]+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert PYPROJECT["project"]["version"] in sections[:2]
    assert sections[0] in ("Unreleased", PYPROJECT["project"]["version"])
