"""The lines of a text file, which may be gzipped, with their numbers."""

import gzip
import zlib
from collections.abc import Iterator
from io import BufferedIOBase
from pathlib import Path

from dpo.base.errors import UserError

GZIP, BOM = b"\x1f\x8b", b"\xef\xbb\xbf"
SPACE = " \t\n\r"
"""White space as JSON defines it."""
PEEK_BYTES = 4096
Line = tuple[int, str]
"""(number from 1, text with its line end)."""


def text_lines(path: str, name: str) -> Iterator[Line]:
    """Yields the lines of a file in UTF-8, without its BOM and without blank lines at the beginning.

    Args:
        path: the file; gzip is recognized by its content.
        name: the file's name in errors.

    Raises:
        UserError: `name:line: what`, for bytes that are not UTF-8 and for a broken gzip.
    """
    number, has_begun = 0, False
    try:
        with _open(path) as file:
            for raw in file:
                number += 1
                text = (raw.removeprefix(BOM) if number == 1 else raw).decode("utf-8")
                has_begun = has_begun or bool(text.strip(SPACE))
                if has_begun:
                    yield number, text
    except UnicodeDecodeError as error:
        raise UserError(f"{name}:{number}", f"not UTF-8 ({error.reason})", "a file in UTF-8") from error
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{name}:{number + 1}", f"cannot be read: {error}") from error


def first_character(path: str) -> str:
    """Returns the first character of a file that is not white space, if it is ASCII; another one where it is not, and
    none where the file is empty or a broken gzip. Reads no more than it needs: the first line may be the whole file.
    """
    try:
        with _open(path) as file:
            while chunk := file.read(PEEK_BYTES):
                begin = chunk.removeprefix(BOM).lstrip(SPACE.encode())
                if begin:
                    return chr(begin[0])
    except (OSError, EOFError, zlib.error):
        pass  # the reader of the file raises it with its place
    return ""


def _open(path: str) -> BufferedIOBase:
    """Opens a file, or the content of a gzipped one."""
    with Path(path).open("rb") as raw:
        is_gzip = raw.read(len(GZIP)) == GZIP
    return gzip.open(path) if is_gzip else Path(path).open("rb")
