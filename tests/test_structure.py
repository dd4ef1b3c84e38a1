"""The size of files and functions, and what benchmarks import. What a room may import is in pyproject.toml
(`[tool.importlinter]`), held by `make check`."""

import ast
import importlib.util
import re
from pathlib import Path

import pytest

import dpo
import launch

PACKAGES = tuple(Path(str(package.__file__)).parent for package in (dpo, launch))
FILES = [path for package in PACKAGES for path in package.rglob("*.py")]


def test_files_and_functions_are_small() -> None:
    """At most 300 lines a file and 60 a function."""
    long = [path.name for path in FILES if len(path.read_text().splitlines()) > 300]
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and (node.end_lineno or 0) - node.lineno >= 60:
                long.append(f"{path.name}: {node.name}")
    assert not long


def test_rooms_list_their_files() -> None:
    """Where a room's `__init__.py` has a table of files, every file stands in it, and no other."""
    for door in (path for path in FILES if path.name == "__init__.py"):
        listed = re.findall(r"^(\w+)\.py  ", ast.get_docstring(ast.parse(door.read_text())) or "", re.MULTILINE)
        present = {path.stem for path in door.parent.glob("*.py")} - {"__init__", "__main__"}
        assert not listed or (door.parent == PACKAGES[0]) or set(listed) == present, door


@pytest.mark.parametrize("path", sorted(Path(__file__).with_name("bench").glob("*.py")), ids=lambda path: path.stem)
def test_what_a_benchmark_imports_is_there(path: Path) -> None:
    """They run seldom, and some in an environment of their own: what they take from the project is looked up."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "dpo":
            module = importlib.import_module(node.module)
            for name in (alias.name for alias in node.names):
                assert hasattr(module, name) or importlib.util.find_spec(f"{node.module}.{name}"), name
