"""The shape of the code by its syntax trees: `python -m tests.bench.house [CHECKOUT]`, of this checkout by default."""

import ast
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path

Function = ast.FunctionDef | ast.AsyncFunctionDef


def functions_of(tree: ast.Module) -> Iterator[Function]:
    """Yields all functions and methods."""
    return (node for node in ast.walk(tree) if isinstance(node, Function))


def lines_of(function: Function) -> int:
    """Returns the lines of a function without its docstring."""
    first = function.body[0]
    doc = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str)
    docstring = (first.end_lineno or 0) - first.lineno + 1 if doc else 0
    return (function.end_lineno or 0) - function.lineno + 1 - docstring


def parameters_of(function: Function) -> int:
    """Returns the number of parameters, self and cls left out."""
    names = [a.arg for a in (*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs)]
    return len([name for name in names if name not in ("self", "cls")])


def own_imports(tree: ast.Module) -> set[str]:
    """Returns the modules of the project that a file imports."""
    modules = {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    return {name for name in modules if name.split(".")[0] in ("dpo", "launch")}


def describe(root: Path, package: str) -> str:
    """Returns one line for a package."""
    paths = [path for path in (root / package).rglob("*.py") if not path.name.startswith("__")]
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in paths]
    lengths = [len(path.read_text(encoding="utf-8").splitlines()) for path in paths]
    functions = [function for tree in trees for function in functions_of(tree)]
    lines, parameters = [lines_of(f) for f in functions], [parameters_of(f) for f in functions]
    size = f"{len(paths)} files, {sum(lengths)} lines, at most {max(lengths)} per file"
    long = f"{len(functions)} functions of {statistics.median(lines):g} lines (median), at most {max(lines)}"
    wide = f"at most {max(parameters)} parameters, {sum(count > 6 for count in parameters)} functions with more than 6"
    return f"{package}: {size}; {long}; {wide}"


def main() -> None:
    """Prints the figures of both packages and the imports of the training program."""
    root = Path(sys.argv[1] if len(sys.argv) > 1 else ".")
    for package in ("dpo", "launch"):
        print(describe(root, package))
    files = [path for path in (root / "dpo").glob("*.py") if path.name != "__init__.py"]
    folders = list((root / "dpo").glob("*/__init__.py"))
    print(f"dpo/: {len(files)} files beside {len(folders)} folders")
    imports = own_imports(ast.parse((root / "dpo" / "train" / "program.py").read_text(encoding="utf-8")))
    print(f"dpo/train/program.py imports {len(imports)} modules of the project")


if __name__ == "__main__":
    main()
