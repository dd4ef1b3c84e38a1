"""Writes and reads the file of a report (`report.py`), and checks every value in it."""

import json
import math
import re
from dataclasses import asdict
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_type_hints

from dpo.base.errors import RunError, UserError
from dpo.base.files import write_atomically
from dpo.config.reading import fit
from dpo.estimate.report import FORMAT, VERSION, Report

# --- written ---------------------------------------------------------------------------------------------------------


def write_report(file: Path, report: Report) -> None:
    """Writes the report atomically. Raises RunError where a number is not finite; fails where a value is not of its
    declared type.
    """
    try:
        text = json.dumps(asdict(report), indent=2, allow_nan=False) + "\n"
    except ValueError as failure:
        raise RunError(f"{file} is not written: a measurement is not finite ({failure})") from failure
    assert parse(json.loads(text), str(file)) == report, "a report must read as it was written"
    write_atomically(file.absolute(), text.encode())


def plain_version(text: str) -> str:
    """Returns the version without a local label of its builder's: 2.13.0+cpu stays, 2.3.0a0+4ec1.nv24.03 is 2.3.0a0."""
    found = re.match(r"\d+(\.\d+)*((a|b|rc|\.dev|\.post)\d+)*(\+(cpu|cu\d+|rocm[\d.]+)$)?", text)
    return found[0] if found else "unknown"


# --- read ------------------------------------------------------------------------------------------------------------

WRITER = "a file that python -m dpo.doctor --report FILE wrote"


def read_report(path: str) -> Report:
    """Returns the report in a file. Raises UserError where it is no report, or one of another version."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as failure:
        raise UserError("command line: --measured", f"cannot read {path} ({failure.strerror})", WRITER) from failure
    except ValueError as failure:
        raise UserError(path, f"is not JSON ({failure})", WRITER) from failure
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise UserError(f"{path}: format", f"is not {FORMAT}", WRITER)
    if content.get("version") != VERSION:
        what = f"this is version {VERSION} of the program's format, the file has {content.get('version')}"
        raise UserError(f"{path}: version", what, "a report that the same version of dpo wrote")
    return parse(content, path)


def parse(content: dict[str, Any], place: str) -> Report:
    """Returns the report of parsed JSON. Raises UserError for a key that is missing or unknown, and for a value that is
    not of its type or out of its bounds.

    Args:
        content: the parsed file.
        place: the file's name, for errors.
    """
    hints = get_type_hints(Report)
    for key in {*content, *hints}:
        if key not in hints:
            raise UserError(f"{place}: {key}", "unknown key", ", ".join(hints))
        if key not in content:
            raise UserError(f"{place}: {key}", "is missing", WRITER)
    _check_bounds(content, place, "")
    return Report(**{key: _fit(content[key], hint, place, key) for key, hint in hints.items()})


def _fit(value: Any, hint: Any, place: str, key: str) -> Any:
    """Returns a section as its type, which may be null."""
    kinds = [kind for kind in get_args(hint) if kind is not NoneType]
    if NoneType in get_args(hint):
        return None if value is None else fit(value, kinds[0], place, key)
    return fit(value, hint, place, key)


def _check_bounds(value: Any, place: str, key: str) -> None:
    """Raises UserError for a negative number, for seconds or a rate of 0, and for an empty list of a measurement."""
    if isinstance(value, dict):
        for name, item in value.items():
            _check_bounds(item, place, f"{key}.{name}" if key else name)
    elif isinstance(value, list):
        if not value and "." in key:  # numbers of a measurement
            raise UserError(f"{place}: {key}", "is an empty list", WRITER)
        for number, item in enumerate(value):
            _check_bounds(item, place, f"{key}[{number}]")
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        must_be_positive = re.search(r"second", key) is not None
        if not math.isfinite(value) or value < 0 or (must_be_positive and value == 0):
            raise UserError(f"{place}: {key}", f"got {value}", f"a number {'>' if must_be_positive else '>='} 0")
