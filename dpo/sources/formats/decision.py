"""The columns and the first row of a source -> its `Reading`: decided once, before any row is tokenized."""

from collections.abc import Mapping, Set
from dataclasses import replace

from dpo.base.errors import InvalidValue, UserError
from dpo.config import SourceConfig
from dpo.sources.formats.chat import check_args
from dpo.sources.formats.columns import (
    PAIR,
    ROW,
    TEMPLATE_ARGS,
    Names,
    check_left_out,
    check_mapped,
    known_names,
    prompt_columns,
)
from dpo.sources.formats.examples import FORMATS, check_columns, detect_format, to_example
from dpo.sources.formats.json_text import is_broken_messages
from dpo.sources.formats.reading import (
    ANSWER_FIELDS,
    TEXT_OR_MESSAGES,
    Reading,
    is_kept_as_text,
    known_row,
    with_messages,
    with_prompt,
)
from dpo.sources.formats.row_fields import Row


def decide_reading(config: SourceConfig, own: Set[str], first_row: Row, has_types: bool, key: str) -> Reading:
    """Returns how the rows of a source are read.

    Args:
        config: the source: its format, columns, as_chat and template_args.
        own: the columns of the source that are not empty in every row.
        first_row: the first row as the source has it.
        has_types: whether the source has columns with types, as Parquet has.
        key: the key of the source in the config, `data.train[0]`.

    Raises:
        UserError: `columns`, `as_chat` or `template_args` do not fit the source, no format fits, the columns are not
            those of the format, or a column that looks like part of the prompt would not be read.
    """
    names = known_names(own, config.columns, f"{key}.columns")
    prompt_from = prompt_columns(names)
    row = _with_prompt(known_row(first_row, names, has_types), prompt_from)
    as_text = tuple(name for name in TEXT_OR_MESSAGES if is_kept_as_text(row.get(name)))
    row = with_messages(row, as_text)
    _check_broken_messages(row, f"{key}.columns: {config.path}")
    format = _format(config, {*names, *(["prompt"] if prompt_from else [])}, row, own, key)
    prompt_from = prompt_from if "prompt" in FORMATS[format].reads else ()
    names_read = _names_read(format, names, prompt_from, config.columns)
    check_mapped(config.columns, names_read, format, f"{key}.columns")
    if FORMATS[format].holds_ids:
        _check_no_chat(config, format, key)
        return _with_line(Reading(format, names_read), config, False)
    has_whole = all(isinstance(row.get(name), list) and len(row[name]) > 1 for name in ("chosen", "rejected"))
    left_out = {
        name for name in names.keys() - names_read.keys() if not _is_in_prompt(row.get(name), row.get("prompt"))
    }
    check_left_out(left_out, has_whole, f"{key}.columns: {config.path}")
    if has_whole:
        own_prompt = names_read.get("prompt") or ", ".join(names_read[name] for name in prompt_from)
        _check_prompt_text(row, own_prompt, f"{key}.columns: {config.path}")
    reading = Reading(
        format, names_read, prompt_from, as_text, _is_text(format, row), "", config.template_args, has_types
    )
    return _with_line(replace(reading, chat_reason=_chat_reason(config, reading, key)), config, has_whole)


def _with_prompt(row: Row, prompt_from: tuple[str, ...]) -> Row:
    """Returns the first row with its prompt; a broken one without, whose error comes with the rows."""
    try:
        return with_prompt(row, prompt_from)
    except InvalidValue:
        return row


def _is_in_prompt(value: object, prompt: object) -> bool:
    """Returns whether a text of the first row is part of its prompt text, so that it need not be read again."""
    return isinstance(value, str) and isinstance(prompt, str) and bool(value.strip()) and value.strip() in prompt


def _check_broken_messages(first_row: Row, place: str) -> None:
    """Raises UserError where the answers of the first row are messages, kept as text, that cannot be read."""
    answers = {name: first_row[name] for name in ANSWER_FIELDS if name in first_row}
    items = [item for value in answers.values() for item in (value if isinstance(value, list) else [value])]
    if items and all(map(is_broken_messages, items)):
        what = f"{next(iter(answers))} looks like messages kept as text, but cannot be read: {str(items[0])[:60]!r}"
        raise UserError(place, what, "json.dumps of a list of {role, content}, or the list itself in JSONL or Parquet")


def _format(config: SourceConfig, columns: set[str], first_row: Row, own: Set[str], key: str) -> str:
    """Returns the format of a source, which is detected where its config says `auto`."""
    where = f"{key}.format: {config.path}"
    if config.format == "auto":
        return detect_format(columns, first_row, where, own)
    check_columns(config.format, columns, where, own)
    return config.format


def _names_read(format: str, names: Names, prompt_from: tuple[str, ...], columns: Names) -> dict[str, str]:
    """Returns the columns that are read, those of a pair's weight and margin among them where `columns` names them."""
    read = {*FORMATS[format].reads, *prompt_from, *(() if FORMATS[format].holds_ids else ROW)}
    read |= set(PAIR) & columns.keys()
    return {known: own for known, own in names.items() if known in read}


def _check_prompt_text(first_row: Row, own_name: str, place: str) -> None:
    """Raises UserError where the first row has a prompt text that its whole conversations do not hold."""
    prompt = first_row.get("prompt")
    messages = [item for name in ("chosen", "rejected") for item in first_row[name] if isinstance(item, Mapping)]
    contents = [message.get("content", message.get("value")) for message in messages]
    if not isinstance(prompt, str) or not all(isinstance(content, str) for content in contents):
        return
    if not any(" ".join(prompt.split()) in " ".join(content.split()) for content in contents):
        what = f"chosen and rejected are whole conversations, in which the first row's {own_name} does not occur"
        valid = f"columns: {{unused: {own_name!r}}} to leave it out, or {{system: {own_name!r}}}"
        raise UserError(place, what, valid)


def _is_text(format: str, first_row: Row) -> bool | None:
    """Returns whether the first row is of texts; None where it is broken, or has no completion to tell it."""
    try:
        example = to_example(format, first_row)
    except InvalidValue:
        return None
    if example.completions:
        return isinstance(example.prompt, str)
    return True if isinstance(first_row.get("chosen"), str) else None


def _chat_reason(config: SourceConfig, reading: Reading, key: str) -> str:
    """Returns the reason for which texts are read as conversations; empty where there is none."""
    try:
        check_args(config.template_args, f"{key}.template_args")
    except InvalidValue as fault:
        raise fault.at(config.path) from fault
    if config.as_chat:
        return "as_chat is true"
    if reading.is_text is False:
        return ""
    names = [reading.names[name] for name in ROW if name in reading.names]
    if names:
        return f"rows have {' and '.join(names)}"
    return "template_args are given" if config.template_args else ""


def _check_no_chat(config: SourceConfig, format: str, key: str) -> None:
    """Raises UserError where `as_chat` or `template_args` are given to rows of token ids."""
    for name in ("as_chat", "template_args"):
        if getattr(config, name):
            raise UserError(
                f"{key}.{name}", f"{config.path} has token ids, of format {format}", "rows of texts or messages"
            )


# --- the reading for people -------------------------------------------------------------------------------------------


def _with_line(reading: Reading, config: SourceConfig, has_whole: bool) -> Reading:
    """Returns the reading with its line for the data report."""
    by = f", by its columns {_detected_by(reading)}" if config.format == "auto" else ""
    facts = [f"format {reading.format}{by}: {_kind(reading)}", *_facts(reading, has_whole)]
    return replace(reading, line="; ".join(facts))


def _detected_by(reading: Reading) -> str:
    """Returns the source's own names of the columns by which its format was detected."""
    columns = dict(reading.names)
    if reading.prompt_from:
        columns["prompt"] = reading.names[reading.prompt_from[0]]
    needed = next(needed for needed in FORMATS[reading.format].needs if needed <= columns.keys())
    return ", ".join(sorted(columns[name] for name in needed))


def _kind(reading: Reading) -> str:
    """Returns the kind of prompts and completions."""
    if FORMATS[reading.format].holds_ids:
        return "token ids"
    if reading.is_text is None and not reading.chat_reason:
        return "texts or conversations"
    if not reading.is_text:
        return "conversations"
    return f"texts read as conversations, since {reading.chat_reason}" if reading.chat_reason else "texts"


def _facts(reading: Reading, has_whole: bool) -> list[str]:
    """Returns what a reader of the data report could not tell from the names of the columns."""
    names, facts = reading.names, []
    if has_whole and reading.format == "preference":
        facts.append("prompt from chosen and rejected, without their last messages")
    elif reading.prompt_from:
        facts.append(f"prompt from {' and '.join(names[name] for name in reading.prompt_from)}")
    hidden = (*reading.prompt_from, "system")
    facts += [f"{known} from {own}" for known, own in sorted(names.items()) if known != own and known not in hidden]
    if reading.messages_as_text:
        facts.append(f"{' and '.join(reading.messages_as_text)} read from JSON text")
    if "system" in names:
        facts.append(f"{names['system']} is the first message")
    args = [names[name] for name in TEMPLATE_ARGS if name in names] + ["template_args"] * bool(reading.template_args)
    return [*facts, f"the chat template gets {' and '.join(args)}"] if args else facts
