"""The house as `dpo/__init__.py` draws it: every file has a floor, and imports from lower floors only."""

import ast
import re
from pathlib import Path

import dpo

FOLDER = Path(dpo.__file__).parent
FLOORS = {name: int(floor) for floor, name in re.findall(r"^ +(\d+)  (\w+)\.py ", str(dpo.__doc__), re.MULTILINE)}


def imports_of(path: Path) -> set[str]:
    """The modules of the package that a file imports, also inside functions."""
    tree = ast.parse(path.read_text())
    froms = {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    plain = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    return {name.removeprefix("dpo.") for name in froms | plain if name.startswith("dpo.")}


def test_every_file_has_a_floor() -> None:
    assert set(FLOORS) == {path.stem for path in FOLDER.glob("*.py")} - {"__init__"}


def test_a_file_imports_from_lower_floors_only() -> None:
    upward = [
        f"{path.stem} (floor {FLOORS[path.stem]}) imports {name} (floor {FLOORS[name]})"
        for path in FOLDER.glob("*.py")
        for name in imports_of(path)
        if FLOORS[name] >= FLOORS[path.stem]
    ]
    assert not upward


def test_files_and_functions_are_small() -> None:
    """At most 300 lines a file and 60 a function."""
    long = [path.name for path in FOLDER.glob("*.py") if len(path.read_text().splitlines()) > 300]
    for path in FOLDER.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and (node.end_lineno or 0) - node.lineno >= 60:
                long.append(f"{path.name}: {node.name}")
    assert not long
