"""YAML with the scalars of YAML 1.2, no repeated keys, and errors that name the line.

1e-6 is a number here, and yes, 010 and 12:30 are text; PyYAML alone reads text, true, 8 and 750.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import yaml

from dpo.base.errors import UserError
from dpo.terminal.console import harmless

_TAG = "tag:yaml.org,2002:"
_PLAIN = ("null", "bool", "int", "float", "str", "seq", "map")
_NUMBER_START = list("-+.0123456789")
_FLOAT = re.compile(r"[-+]?(?:(?:\.[0-9]+|[0-9]+\.[0-9]*)(?:[eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+)\Z")


class StrictLoader(yaml.SafeLoader):
    """A SafeLoader that builds plain data only, with the scalars of YAML 1.2, and refuses repeated keys."""

    yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {}
    yaml_constructors: ClassVar[dict[str | None, Any]] = {
        tag: make
        for tag, make in yaml.SafeLoader.yaml_constructors.items()
        if tag is None or tag.removeprefix(_TAG) in _PLAIN
    }

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        """Builds a dict as SafeLoader does, but raises ConstructorError where SafeLoader keeps the last of repeated
        keys.
        """
        first_lines: dict[str, int] = {}
        pairs = node.value if isinstance(node, yaml.MappingNode) else []
        for key in (key for key, _ in pairs if isinstance(key, yaml.ScalarNode)):
            if key.value in first_lines:
                problem = f"key {key.value!r} is a duplicate (first on line {first_lines[key.value]})"
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
            first_lines[key.value] = key.start_mark.line + 1
        pairs_read: dict[Any, Any] = super().construct_mapping(node, deep)
        return pairs_read


class StrictDumper(yaml.SafeDumper):
    """A SafeDumper that also quotes text which StrictLoader would read as a number."""


StrictLoader.add_implicit_resolver(_TAG + "null", re.compile(r"(?:~|null|Null|NULL|)\Z"), ["~", "n", "N", ""])
StrictLoader.add_implicit_resolver(_TAG + "bool", re.compile(r"(?:true|True|TRUE|false|False|FALSE)\Z"), list("tTfF"))
StrictLoader.add_implicit_resolver(_TAG + "int", re.compile(r"[-+]?(?:0|[1-9][0-9]*)\Z"), _NUMBER_START)
StrictLoader.add_implicit_resolver(_TAG + "float", re.compile(r"[-+]?\.(?:inf|nan)\Z", re.IGNORECASE), _NUMBER_START)
StrictLoader.add_implicit_resolver(_TAG + "float", _FLOAT, _NUMBER_START)
StrictDumper.add_implicit_resolver(_TAG + "float", _FLOAT, _NUMBER_START)


def read_yaml_file(path: str) -> Any:
    """Reads a YAML file as plain data. Raises OSError if the file cannot be read, UserError with file:line if it is not
    valid YAML in UTF-8.
    """
    data = Path(path).read_bytes()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        problem = f"byte {data[error.start]:#04x} is not UTF-8"
        raise UserError(f"{path}:{line}", problem, "a YAML file in UTF-8") from error
    return parse_yaml(text, lambda line: f"{path}:{line}", valid="lines of KEY: VALUE, each key once")


def parse_yaml(text: str, where: Callable[[int], str], valid: str) -> Any:
    """Reads YAML text as plain data.

    Args:
        text: the YAML text.
        where: the line number, from 1 -> the beginning of the UserError for invalid YAML.
        valid: the end of that UserError.
    """
    try:
        return yaml.load(text, Loader=StrictLoader)
    except yaml.reader.ReaderError as error:
        line, problem = text.count("\n", 0, error.position) + 1, f"character #x{error.character:04x} is not allowed"
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line, problem = mark.line + 1, ", ".join(part for part in (error.context, error.problem) if part)
    except (ValueError, KeyError):
        line, problem = 1, "a value does not fit its !!tag"
    except RecursionError:
        line, problem = 1, "brackets are nested too deep"
    raise UserError(where(line), f"not valid YAML: {problem}", valid)


def dump_yaml(tree: Any) -> str:
    """Returns YAML text that `parse_yaml` reads as `tree`. Keys keep their order. Where a text has characters that
    could steer a terminal, all that are not ASCII are escaped.
    """
    text: str = yaml.dump(tree, Dumper=StrictDumper, sort_keys=False, allow_unicode=True, width=1000)
    if text != harmless(text):
        text = yaml.dump(tree, Dumper=StrictDumper, sort_keys=False, allow_unicode=False, width=1000)
    return text
