"""The columns of a source by the names that the formats know, and the columns that look like part of the prompt.

A source names its columns with `columns: {prompt: question}`; without it, some common names stand for `prompt` and
`system`. `unused` is the known name of columns that shall not be read: `columns: {unused: "context, images"}`.
"""

from collections.abc import Mapping, Set

from dpo.base.errors import UserError
from dpo.sources.formats.examples import FORMATS
from dpo.sources.formats.row_fields import few

Names = Mapping[str, str]
"""The source's own name of each column by the name that a format knows."""

UNUSED = "unused"
PROMPT = (("question",), ("instruction", "input"), ("messages",))
"""The columns that are the prompt where there is no `prompt`: the first of these that a source has. The second column
is optional."""
SYSTEM = ("system_prompt", "system_message")
"""Other names of `system`."""
TEMPLATE_ARGS = ("tools", "chat_template_kwargs")
ROW = ("system", *TEMPLATE_ARGS)
"""Columns that a row of texts or messages may have in every format."""
PAIR = ("weight", "margin")
"""Columns that are read only where `columns` names them."""
PROMPT_LIKE = frozenset(
    ("system", *SYSTEM, *TEMPLATE_ARGS, "functions", "context", "contexts", "input", "inputs", "document", "documents",
     "passage", "passages", "schema", "image", "images", "image_path", "audio", "audios", "video", "videos")
)  # fmt: skip
"""Columns that look like part of the prompt, in small letters: none of them is left out in silence."""
DIALOGUE_LIKE = frozenset(
    ("conversation", "conversations", "dialog", "dialogue", "history", "chat_history", "conversation_history",
     "question", "instruction")
)  # fmt: skip
"""The same, except beside chosen and rejected that are whole conversations, which have their own beginning."""


def known_names(own: Set[str], columns: Names, place: str) -> dict[str, str]:
    """Returns the columns of a source by the names that the formats know.

    A column that `columns` does not map keeps its name, unless it is `unused`, or another column took its name.

    Args:
        own: the columns of the source.
        columns: `columns` of its config.
        place: the key of `columns`, for errors.

    Raises:
        UserError: `columns` has a name that no format knows, a column that the source lacks, or one column twice.
    """
    known_here = {UNUSED, *ROW, *SYSTEM, *PAIR, *(name for names in PROMPT for name in names)}
    known_here = known_here.union(*(format.reads for format in FORMATS.values()))
    unknown = sorted(columns.keys() - known_here)
    if unknown:
        raise UserError(f"{place}.{unknown[0]}", "no format knows this name", ", ".join(sorted(known_here)))
    unused = _unused(own, columns)
    mapped = {known: name for known, name in columns.items() if known != UNUSED}
    for known, name in [*mapped.items(), *((UNUSED, name) for name in unused)]:
        if name not in own:
            what = f"the source has no column {name!r}, or it is empty in every row"
            raise UserError(f"{place}.{known}", what, few(sorted(own)))
    taken = [*mapped.values(), *unused]
    twice = next((name for name in taken if taken.count(name) > 1), None)
    if twice is not None:
        both = " and ".join([known for known, name in mapped.items() if name == twice] + [UNUSED] * (twice in unused))
        raise UserError(place, f"{both} name the same column {twice!r}", "one name per column")
    names = {name: name for name in sorted(own - set(taken))} | mapped
    other = next((name for name in SYSTEM if name in names), None)
    return names if "system" in names or other is None else names | {"system": names.pop(other)}


def _unused(own: Set[str], columns: Names) -> list[str]:
    """Returns the columns that shall not be read: one, or several with commas between them."""
    text = columns.get(UNUSED)
    if text is None or text in own:
        return [] if text is None else [text]
    return [name.strip() for name in text.split(",")]


def prompt_columns(names: Names) -> tuple[str, ...]:
    """Returns the known names of the columns that are the prompt where a source has no `prompt`.

    None are where it has one, and where `question` and `instruction` both could be it.
    """
    if "prompt" in names or {"question", "instruction"} <= names.keys():
        return ()
    for first, *more in PROMPT:
        if first in names:
            return (first, *(name for name in more if name in names))
    return ()


def check_mapped(columns: Names, names_read: Names, format: str, place: str) -> None:
    """Raises UserError for a column that `columns` names and that the format does not read.

    Args:
        columns: `columns` of the source's config.
        names_read: the columns that are read.
        format: the format of the source.
        place: the key of `columns`, for errors.
    """
    for known, own in columns.items():
        if known != UNUSED and own not in names_read.values():
            what = f"the format {format} does not read {known} here"
            raise UserError(f"{place}.{known}", what, f"names that it reads: {', '.join(sorted(names_read))}")


def check_left_out(left_out: Set[str], has_conversations: bool, place: str) -> None:
    """Raises UserError where a column that is not read looks like part of the prompt.

    Args:
        left_out: the known names of the columns that are not read.
        has_conversations: whether chosen and rejected are whole conversations.
        place: the place of the source, with which the error begins.
    """
    suspects = PROMPT_LIKE if has_conversations else PROMPT_LIKE | DIALOGUE_LIKE
    names = sorted(name for name in left_out if name.lower() in suspects)
    if names:
        what = f"{few(names)}: would not be read, but looks like part of the prompt"
        ways = f"columns: {{unused: {', '.join(names)!r}}} to leave it out"
        read = f"columns: {{NAME: {names[0]}}} to read it, as prompt, system, tools, or input beside instruction"
        raise UserError(place, what, f"{read}; {ways}")
