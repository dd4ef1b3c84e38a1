"""The size of files and functions, and what benchmarks import. What a room may import is in pyproject.toml
(`[tool.importlinter]`), held by `make check`."""

import ast
import importlib.util
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


@pytest.mark.parametrize("path", sorted(Path(__file__).with_name("bench").glob("*.py")), ids=lambda path: path.stem)
def test_what_a_benchmark_imports_is_there(path: Path) -> None:
    """They run seldom, and some in an environment of their own: what they take from the project is looked up."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "dpo":
            module = importlib.import_module(node.module)
            for name in (alias.name for alias in node.names):
                assert hasattr(module, name) or importlib.util.find_spec(f"{node.module}.{name}"), name
