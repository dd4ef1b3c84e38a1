"""The launcher's house as `launch/__init__.py` draws it."""

import ast
import re
from pathlib import Path

import launch

FOLDER = Path(launch.__file__).parent
FLOORS = {name: int(floor) for floor, name in re.findall(r"^ +(\d+)  (\w+)\.py ", str(launch.__doc__), re.MULTILINE)}


def imports_of(path: Path) -> set[str]:
    """The modules of this package that a file imports, also as names of the package."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "launch":
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and str(node.module).startswith("launch."):
            found.add(str(node.module).removeprefix("launch."))
    return found


def test_every_file_has_a_floor_and_imports_from_lower_ones() -> None:
    assert set(FLOORS) == {path.stem for path in FOLDER.glob("*.py")} - {"__init__"}
    for path in FOLDER.glob("*.py"):
        for name in imports_of(path):
            assert path.stem == "__init__" or FLOORS[name] < FLOORS[path.stem], f"{path.stem} imports {name}"


def test_of_dpo_it_imports_what_its_docstring_names() -> None:
    """All of that without torch (`test_submit.test_it_needs_no_torch`)."""
    (named,) = re.findall(r"of dpo only (.*?)\.\n", str(launch.__doc__).replace("\nand ", ", "), re.DOTALL)
    found = set()
    for path in FOLDER.glob("*.py"):
        found |= set(re.findall(r"^from dpo\.([\w.]+) import", path.read_text(), re.MULTILINE))
    assert found == set(named.split(", "))


def test_files_and_functions_are_small() -> None:
    """At most 300 lines a file and 60 a function."""
    for path in FOLDER.glob("*.py"):
        assert len(path.read_text().splitlines()) <= 300, path
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                assert (node.end_lineno or 0) - node.lineno < 60, f"{path.name}: {node.name}"
