"""A row of a preference file becomes an `Example`: a prompt, its completions, the pairs (winner, loser) among them.

`FORMATS` has one entry per format; the readers stand in a file per family of formats.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

from dpo.base.errors import UserError
from dpo.sources.formats.demonstrations import ANSWERS as DEMONSTRATED
from dpo.sources.formats.demonstrations import DIALOGUES, demonstrations
from dpo.sources.formats.example import Example, Reader
from dpo.sources.formats.judged import ANSWERS, LISTS, VOTES, WINNERS, arena, helpsteer, judged, nectar, rated
from dpo.sources.formats.listed import PREFERENCES, grouped, tokens
from dpo.sources.formats.pairwise import preference, sharegpt
from dpo.sources.formats.published import HH_ANSWER, hh, shp, tldr, tldr_tokens
from dpo.sources.formats.row_fields import Row, few

Columns = frozenset[str]


@dataclass(frozen=True)
class Format:
    """An entry of `FORMATS`."""

    name: str
    """The choice of `data.train[i].format`."""
    needs: tuple[Columns, ...]
    """Alternatives of columns that a source must have."""
    shape: str
    """The same for people, in errors."""
    reader: Reader
    holds_ids: bool = False
    """Prompt and completions are token ids: no tokenizer is needed."""
    compares: bool = True
    """The rows have winners and losers, not demonstrations alone."""
    fits: Callable[[set[str], Row], bool] = lambda columns, first_row: True
    """(columns, first row) -> whether `auto` may take this format where another one needs the same columns."""

    @property
    def reads(self) -> Columns:
        """Every column that the reader looks at."""
        return frozenset().union(*self.needs)

    def has_columns(self, columns: set[str]) -> bool:
        """Returns whether a source with these columns has one of the alternatives."""
        return any(needed <= columns for needed in self.needs)


LABELS = frozenset({"label", "labels", "rejected"})
"""Columns that make rows with one answer something else than demonstrations: answers judged good or bad, or pairs."""


def _columns(*names: str) -> Columns:
    return frozenset(names)


def _is_conversation(columns: set[str], first_row: Row) -> bool:
    """Returns whether chosen and rejected without a prompt are lists of messages, not the texts of `hh`."""
    return "prompt" in columns or isinstance(first_row.get("chosen"), list)


def _has_marks(columns: set[str], first_row: Row) -> bool:
    """Returns whether chosen and rejected have the mark after which the answer of `hh` begins."""
    return all(HH_ANSWER in str(first_row.get(name)) for name in ("chosen", "rejected"))


_ENTRIES = (
    Format(
        name="tokens",
        needs=(
            _columns("prompt_ids", "chosen_ids", "rejected_ids"),
            *(_columns("prompt_ids", "completion_ids", key) for key in PREFERENCES),
        ),
        shape="{prompt_ids, chosen_ids, rejected_ids} or {prompt_ids, completion_ids, pairs|scores|ranking}",
        reader=tokens,
        holds_ids=True,
    ),
    Format(
        name="grouped",
        needs=tuple(_columns("prompt", "completions", key) for key in PREFERENCES),
        shape="{prompt, completions, pairs|scores|ranking}",
        reader=grouped,
    ),
    Format(
        name="sharegpt",
        needs=(_columns("conversations", "chosen", "rejected"),),
        shape="{conversations, chosen, rejected}",
        reader=sharegpt,
    ),
    Format(
        name="preference",
        needs=(_columns("prompt", "chosen", "rejected"), _columns("chosen", "rejected")),
        shape="{prompt, chosen, rejected} or {chosen, rejected} as conversations",
        reader=preference,
        fits=_is_conversation,
    ),
    Format(
        name="hh",
        needs=(_columns("chosen", "rejected"),),
        shape="{chosen, rejected} as texts",
        reader=hh,
        fits=_has_marks,
    ),
    Format(
        name="shp",
        needs=(_columns("history", "human_ref_A", "human_ref_B", "labels"),),
        shape="{history, human_ref_A, human_ref_B, labels}",
        reader=shp,
    ),
    Format(
        name="tldr",
        needs=(_columns("info", "summaries", "choice"),),
        shape="{info, summaries, choice}",
        reader=tldr,
    ),
    Format(
        name="judged",
        needs=tuple(
            _columns("prompt", *answers, *winner)
            for answers in ANSWERS
            for winner in (*((name,) for name in WINNERS), tuple(VOTES), tuple(VOTES)[:2])
        ),
        shape="{prompt, response_a, response_b, winner}, other names of answers "
        + ", ".join(f"{{{', '.join(names)}}}" for names in ANSWERS[1:])
        + f", of the winner {{better_response_id}}, {{{', '.join(VOTES)}}}",
        reader=judged,
    ),
    Format(
        name="arena",
        needs=tuple(_columns("conversation_a", "conversation_b", name) for name in WINNERS),
        shape="{conversation_a, conversation_b, winner|better_response_id}",
        reader=arena,
    ),
    Format(
        name="helpsteer",
        needs=(_columns("context", "response1", "response2", "overall_preference"),),
        shape="{context, response1, response2, overall_preference}",
        reader=helpsteer,
    ),
    Format(
        name="nectar",
        needs=(_columns("prompt", "answers"),),
        shape="{prompt, answers}: a dialogue in one text, and a list of answers with their rank",
        reader=nectar,
        fits=lambda columns, first_row: HH_ANSWER in str(first_row.get("prompt")),
    ),
    Format(
        name="rated",
        needs=tuple(_columns("prompt", name, "ratings") for name in LISTS),
        shape=f"{{prompt, {'|'.join(LISTS)}, ratings}}",
        reader=rated,
    ),
    Format(
        name="tldr_tokens",
        needs=(
            _columns(
                "query_chosen_token",
                "query_chosen_token_response_label",
                "query_rejected_token",
                "query_rejected_token_response_label",
            ),
        ),
        shape="{query_chosen_token, query_chosen_token_response_label, query_rejected_token, "
        "query_rejected_token_response_label}",
        reader=tldr_tokens,
        holds_ids=True,
    ),
    Format(
        name="demonstrations",
        needs=(*map(_columns, DIALOGUES), *(_columns("prompt", answer) for answer in DEMONSTRATED)),
        shape="{prompt, completion|chosen} or {messages|conversations}, for loss.name sft",
        reader=demonstrations,
        fits=lambda columns, first_row: not columns & LABELS,
        compares=False,
    ),
)

FORMATS: Mapping[str, Format] = {format.name: format for format in _ENTRIES}
"""The formats by name, in the order in which `auto` tries them."""

GENERAL = ("preference", "tokens", "grouped", "sharegpt", "judged", "rated")
"""The formats of files that people write themselves. An error names the nearest of them, or of the other formats one
of which the source has two columns; of equally near ones the first."""


def detect_format(columns: set[str], first_row: Row, where: str, own: Collection[str] = ()) -> str:
    """Returns the first format of the table that a source fits.

    Args:
        columns: the columns of the source, the union over all rows.
        first_row: the first row, whose values tell formats with equal columns apart.
        where: the place of the source, with which the error begins.
        own: the source's own names of its columns, for the error, where they differ.

    Returns:
        The format's name, a key of `FORMATS`.

    Raises:
        UserError: no format fits.
    """
    for format in FORMATS.values():
        if format.has_columns(columns) and format.fits(columns, first_row):
            return format.name
    nearest, lacks = _nearest(columns)
    what = f"no format fits the columns {few(sorted(own or columns))}; the nearest is {nearest.name} {nearest.shape}"
    mapped = ", ".join(f"{name}: NAME" for name in lacks)
    alone = "; for loss.name sft columns: {completion: NAME}" if "prompt" in columns and "chosen" in lacks else ""
    valid = f"columns: {{{mapped}}} with names of this source{alone}, or the columns of {', '.join(FORMATS)}"
    raise UserError(
        where, f"{what}, which lacks {' and '.join(filter(None, (', '.join(lacks[:-1]), lacks[-1])))}", valid
    )


def _nearest(columns: set[str]) -> tuple[Format, list[str]]:
    """Returns the format of which the fewest columns are missing, and these; see GENERAL.

    Where a source has no column of that format, all its columns are missing, also those that a row can do without.
    """
    names = (*GENERAL, *(name for name in FORMATS if name not in GENERAL))
    options = [
        (needed, FORMATS[name])
        for name in names
        for needed in FORMATS[name].needs
        if needed - columns and (name in GENERAL or len(needed & columns) > 1)
    ]
    needed, format = min(options, key=lambda option: (len(option[0] - columns), -len(option[0])))
    if not needed & columns:
        needed = max(format.needs, key=len)
    return format, sorted(needed - columns)


def check_columns(format: str, columns: set[str], where: str, own: Collection[str] = ()) -> None:
    """Raises UserError if the columns of a source lack any that its format needs.

    Args:
        format: a key of `FORMATS`.
        columns: the columns of the source, the union over all rows.
        where: the place of the source, with which the error begins.
        own: the source's own names of its columns, for the error, where they differ.

    Raises:
        UserError: a column is missing.
    """
    if not FORMATS[format].has_columns(columns):
        what = f"the columns {few(sorted(own or columns))} are not those of {format}"
        raise UserError(where, what, FORMATS[format].shape)


def holds_ids(format: str) -> bool:
    """Returns whether the rows of a format are token ids, which need no tokenizer; false for `auto`."""
    return format in FORMATS and FORMATS[format].holds_ids


def to_example(format: str, row: Row) -> Example:
    """Returns a row by known names as the format reads it; a null field is a missing one. Raises InvalidValue."""
    return FORMATS[format].reader({key: value for key, value in row.items() if value is not None})
