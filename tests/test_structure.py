"""The house as `dpo/__init__.py` draws it: every room, a file or a package, has a floor, and imports from lower floors
only."""

import ast
import importlib.util
import re
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import dpo

FOLDER = Path(dpo.__file__).parent
FLOORS = {name: int(floor) for floor, name in re.findall(r"^ +(\d+)  (\w+)(?:\.py|/) ", str(dpo.__doc__), re.MULTILINE)}
FILES = [path for path in FOLDER.rglob("*.py") if path != FOLDER / "__init__.py"]


def room_of(path: Path) -> str:
    """The file's own name, or that of its package."""
    return path.relative_to(FOLDER).parts[0].removesuffix(".py")


def imports_of(path: Path) -> set[str]:
    """The modules of the package that a file imports, also inside functions: `policy`, `board.charts`."""
    tree = ast.parse(path.read_text())
    froms = {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    plain = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    return {name.removeprefix("dpo.") for name in froms | plain if name.startswith("dpo.")}


def test_every_room_has_a_floor() -> None:
    assert set(FLOORS) == {room_of(path) for path in FILES}


def test_a_room_imports_from_lower_floors_only() -> None:
    wanted = {(room_of(path), name.partition(".")[0]) for path in FILES for name in imports_of(path)}
    upward = [
        f"{room} (floor {FLOORS[room]}) imports {name} (floor {FLOORS[name]})"
        for room, name in wanted
        if room != name and FLOORS[name] >= FLOORS[room]
    ]
    assert not upward


@pytest.mark.parametrize("package", sorted({path.parent.name for path in FILES} - {FOLDER.name}))
def test_no_circle_inside_a_package(package: str) -> None:
    graph = {f"{package}.{path.stem}": imports_of(path) for path in (FOLDER / package).glob("*.py")}
    TopologicalSorter(graph).prepare()


def test_nothing_is_imported_from_a_package_as_a_whole() -> None:
    """`from dpo import policy` hides from the tests above what is imported."""
    assert not [
        path for path in FILES if re.search(r"^\s*(from dpo import|import dpo$)", path.read_text(), re.MULTILINE)
    ]


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
