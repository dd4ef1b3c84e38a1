"""The table of private parts against the source, the tests that it names and the installed libraries."""

import ast
import importlib
import inspect
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.private_parts import FOREIGN_TEXTS, PRIVATE_PARTS, ForeignText, PrivatePart

ROOT = Path(__file__).parents[1]
OURS = ("dpo", "launch")
FILES = sorted(path.relative_to(ROOT).as_posix() for name in OURS for path in (ROOT / name).rglob("*.py"))

UNDOCUMENTED = (
    "submitit.core",
    "tensorboard.compat",
    "tensorboard.plugins",
    "tensorboard.summary.writer",
    "tensorboard.util",
    "transformers.conversion_mapping",
    "transformers.core_model_loading",
    "transformers.modeling_layers",
    "datasets.packaged_modules",
)
"""Modules without an underscore of which no documentation speaks."""

DOCUMENTED = ("os._exit", "sys._getframe", "sys._current_frames", "._replace")
"""Names with an underscore that Python documents; the last is a named tuple's."""

DOTTED = re.compile(r"\b[a-z]\w*(?:\.[a-z]\w*)*\._\w+(?:\.\w+)*")


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name != "_"


def is_private_path(path: str) -> bool:
    return any(map(is_private, path.split("."))) or path.startswith(tuple(f"{module}." for module in UNDOCUMENTED))


def private_uses(source: str) -> set[str]:
    """Returns the private parts of libraries that a source file uses: whole paths where the file says them, `.NAME`
    where the owner is a value.
    """
    tree = ast.parse(source)
    aliases = dict(_aliases(tree))
    uses = {path for path in aliases.values() if is_private_path(path)}
    own = _own_names(tree)
    attributes = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
    longer = {id(node.value): node for node in attributes}
    for node in attributes:
        path = _full_path(node, longer, aliases)
        if (is_private(node.attr) and not _is_own(node, own)) or path.startswith(UNDOCUMENTED):
            uses.add(path)
    for text in _texts(tree):
        uses |= {f".{text}"} if is_private(text) and text.isidentifier() else set(DOTTED.findall(text))
    return {use for use in uses if use not in DOCUMENTED and not use.startswith(OURS)}


def _aliases(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """The names that imports bind, and the paths of what they are."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            yield from ((name.asname or name.name, f"{node.module}.{name.name}") for name in node.names)
        elif isinstance(node, ast.Import):
            for name in node.names:
                yield (name.asname, name.name) if name.asname else (name.name.split(".")[0], name.name.split(".")[0])


def _own_names(tree: ast.Module) -> set[str]:
    """Private names that the file itself gives to functions, classes and attributes of `self`."""
    defined = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    return defined | {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and isinstance(node.ctx, ast.Store)
        and isinstance(node.value, ast.Name)
        and node.value.id == "self"
    }


def _replaced(tree: ast.Module) -> set[str]:
    """Names of attributes that the file gives to objects, in place of those that a library gave them."""
    stores = (n for n in ast.walk(tree) if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Store))
    return {node.attr for node in stores}


def _is_own(node: ast.Attribute, own: set[str]) -> bool:
    return isinstance(node.value, ast.Name) and node.value.id in ("self", "cls") and node.attr in own


def _full_path(node: ast.Attribute, longer: dict[int, ast.Attribute], aliases: dict[str, str]) -> str:
    """`torch._inductor.list_options`, to its end, where the chain begins with an import, else `._inductor`."""
    whole = node
    while id(whole) in longer:
        whole = longer[id(whole)]
    root, *names = ast.unparse(whole).split(".")
    return ".".join([aliases[root], *names]) if root in aliases else f".{node.attr}"


def _texts(tree: ast.Module) -> Iterator[str]:
    """The texts of a file but docstrings."""
    docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    parts = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            yield f"{{}}{node.value}" if id(node) in parts else node.value


def covers(part: PrivatePart, use: str) -> bool:
    """Whether the row is of this use, of something in it (`import torch._inductor`), or of the module it comes from."""
    if use.startswith("."):
        return part.path.endswith(use)
    return f"{part.path}.".startswith(f"{use}.") or use.startswith(f"{part.path}.")


@pytest.mark.parametrize("file", FILES)
def test_every_use_stands_in_the_table(file: str) -> None:
    parts = [part for part in PRIVATE_PARTS if file in part.files]
    uses = private_uses((ROOT / file).read_text(encoding="utf-8"))
    assert not [use for use in uses if not any(covers(part, use) for part in parts)]


@pytest.mark.parametrize("part", PRIVATE_PARTS, ids=lambda part: part.path)
def test_every_row_is_used(part: PrivatePart) -> None:
    """Functions whose names are compared, and submodules that are run, stand in the file as text."""
    assert part.files
    for file in part.files:
        source = (ROOT / file).read_text(encoding="utf-8")
        tree = ast.parse(source)
        names = {text.rpartition(".")[2] for text in _texts(tree)} | _replaced(tree)
        named = part.path.rpartition(".")[2] in names
        assert named or any(covers(part, use) for use in private_uses(source)), file


@pytest.mark.parametrize("text", FOREIGN_TEXTS, ids=lambda text: f"{text.file}-{text.name}")
def test_every_text_is_read(text: ForeignText) -> None:
    """By the constant that is named, or as a text of the file."""
    tree = ast.parse((ROOT / text.file).read_text(encoding="utf-8"))
    constants = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    assert text.name in constants | set(_texts(tree))


@pytest.mark.parametrize("part", (*PRIVATE_PARTS, *FOREIGN_TEXTS), ids=lambda part: f"{part.test}")
def test_the_test_that_breaks_first_exists(part: PrivatePart | ForeignText) -> None:
    file, _, name = part.test.partition("::")
    tree = ast.parse((ROOT / "tests" / file).read_text(encoding="utf-8"))
    assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("part", PRIVATE_PARTS, ids=lambda part: part.path)
def test_it_is_there(part: PrivatePart) -> None:
    """In the installed versions; what the other tests find broken may follow from this."""
    assert is_there(part.path) or (part.instead and is_there(part.instead)), part.why


def is_there(path: str) -> bool:
    """Whether a module, class or function has the last name of the path, or its source speaks of `.NAME` or "NAME"."""
    *names, last = path.split(".")
    owner = _resolve(names)
    if owner is None:
        return False
    if hasattr(owner, last) or _resolve([*names, last]) is not None:
        return True
    return not inspect.ismodule(owner) and re.search(rf"[.\"']{last}\b", inspect.getsource(owner)) is not None


def _resolve(names: Sequence[str]) -> Any:
    """What a path of names leads to, None where it leads nowhere; its first part is a module that can be imported."""
    for count in range(len(names), 0, -1):
        try:
            found = importlib.import_module(".".join(names[:count]))
        except ImportError:
            continue
        for name in names[count:]:
            found = getattr(found, name, None)
        return found
    return None


@pytest.mark.parametrize(
    ("source", "uses"),
    [
        ("import torch\ntorch._check(x)", {"torch._check"}),
        ("import torch as t\nt.cuda._sleep(1)", {"torch.cuda._sleep"}),
        ("from torch._dynamo import config as c\nc.limit = 1", {"torch._dynamo.config"}),
        ("import torch._inductor\ntorch._inductor.options()", {"torch._inductor.options"}),
        ("from tensorboard.util import tensor_util", {"tensorboard.util.tensor_util"}),
        ("import submitit\nsubmitit.core.utils.Error", {"submitit.core.utils.Error"}),
        ("model.config._attn = 1", {"._attn"}),
        ("class A:\n    def f(self):\n        self._x = self._y", {"._y"}),
        ("from dpo.base.files import _own\n_own()", set()),
        ("import os\nos._exit(0)\nt._replace(a=1)\nx.__dict__", set()),
        ('"""Of torch._check."""\nname = "_submit"\nf"-m lib.core._submit {x}"', {"._submit", "lib.core._submit"}),
        ('hasattr(state, "_groups")', {"._groups"}),
        ('f"{prefix}_indices"', set()),
    ],
)
def test_uses_are_found(source: str, uses: set[str]) -> None:
    assert private_uses(source) == uses
