"""A row of a preference file becomes an `Example`: a prompt, its completions, the pairs (winner, loser) among them.

One adapter a format, which raises `ValueError("what is wrong")`; the caller adds file and line.
A field that is null counts as missing. What a format needs stands in `NEEDS`, all that it reads in `READS`.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from dpo.base.errors import UserError
from dpo.data.formats.row_fields import (
    ASSISTANT,
    Message,
    Row,
    answer_message,
    field,
    list_of,
    mapping,
    messages_of,
    sharegpt_message,
    shown,
    text_of,
    text_or_messages,
    token_ids,
)

Index = tuple[int, int]  # (winner, loser)

HH_ANSWER = "\n\nAssistant:"
PREFERENCES = ("pairs", "scores", "ranking")

# Alternatives of needed columns, in the order in which `auto` tries them.
NEEDS: dict[str, tuple[frozenset[str], ...]] = {
    "tokens": (
        frozenset({"prompt_ids", "chosen_ids", "rejected_ids"}),
        *(frozenset({"prompt_ids", "completion_ids", key}) for key in PREFERENCES),
    ),
    "grouped": tuple(frozenset({"prompt", "completions", key}) for key in PREFERENCES),
    "sharegpt": (frozenset({"conversations", "chosen", "rejected"}),),
    "preference": (frozenset({"prompt", "chosen", "rejected"}), frozenset({"chosen", "rejected"})),
    "hh": (frozenset({"chosen", "rejected"}),),
    "shp": (frozenset({"history", "human_ref_A", "human_ref_B", "labels"}),),
    "tldr": (frozenset({"info", "summaries", "choice"}),),
}
SHAPES = {  # the same for people
    "tokens": "{prompt_ids, chosen_ids, rejected_ids} or {prompt_ids, completion_ids, pairs|scores|ranking}",
    "grouped": "{prompt, completions, pairs|scores|ranking}",
    "sharegpt": "{conversations, chosen, rejected}",
    "preference": "{prompt, chosen, rejected} or {chosen, rejected} as conversations",
    "hh": "{chosen, rejected} as texts",
    "shp": "{history, human_ref_A, human_ref_B, labels}",
    "tldr": "{info, summaries, choice}",
}
READS = {name: frozenset().union(*alternatives) for name, alternatives in NEEDS.items()}


@dataclass(frozen=True)
class Example:
    """One prompt, its K completions, and the pairs among them.

    Text: prompt and completions are strings. Chat: the prompt is a tuple of messages, a completion the assistant's
    message. Tokens: both are tuples of ids. `dropped` has one reason a pair that carries no preference by the row alone
    (`tie`, `prompts_differ`); where the prompts differ there is no prompt and no completion.
    """

    prompt: str | tuple[Message, ...] | tuple[int, ...]
    completions: tuple[str | Message | tuple[int, ...], ...]
    pairs: tuple[Index, ...]
    dropped: tuple[str, ...] = ()


PROMPTS_DIFFER = Example("", (), (), ("prompts_differ",))


def detect_format(columns: set[str], first_row: Row, where: str) -> str:
    """The format of a source whose rows have these columns (the union over all rows).

    `hh` and `preference` without a prompt share their columns; the first row tells them apart: text is `hh`, a list of
    messages `preference`. Raises UserError, beginning with `where`, if no format fits.
    """
    is_hh = "prompt" not in columns and not isinstance(first_row.get("chosen"), list)
    for name, alternatives in NEEDS.items():
        if any(needed <= columns for needed in alternatives) and not (name == "preference" and is_hh):
            return name
    valid = "; ".join(f"{name} {shape}" for name, shape in SHAPES.items())
    raise UserError(where, f"no format fits the columns {', '.join(sorted(columns))}", valid)


def check_columns(format: str, columns: set[str], where: str) -> None:
    """Raise UserError, beginning with `where`, if the columns of a source lack what its format needs."""
    if not any(needed <= columns for needed in NEEDS[format]):
        what = f"the columns {', '.join(sorted(columns))} are not those of {format}"
        raise UserError(where, what, SHAPES[format])


# --- adapters -------------------------------------------------------------------------------------------------------


def tokens(row: Row) -> Example:
    """{prompt_ids, chosen_ids, rejected_ids}, or {prompt_ids, completion_ids} with pairs, scores or ranking."""
    prompt = token_ids(field(row, "prompt_ids"), "prompt_ids")
    if "chosen_ids" in row or "rejected_ids" in row:
        if "completion_ids" in row:
            raise ValueError("completion_ids beside chosen_ids and rejected_ids; valid: one of the two ways")
        names = ("chosen_ids", "rejected_ids")
        return Example(prompt, tuple(token_ids(field(row, name), name) for name in names), ((0, 1),))
    listed = list_of(field(row, "completion_ids"), "completion_ids")
    completions = tuple(token_ids(ids, f"completion_ids[{i}]") for i, ids in enumerate(listed))
    return Example(prompt, completions, *_preferences(row, len(completions)))


def grouped(row: Row) -> Example:
    """{prompt, completions} with pairs [[winner, loser]…], scores (higher is better) or ranking (1 is best)."""
    prompt = text_or_messages(field(row, "prompt"), "prompt")
    listed = list_of(field(row, "completions"), "completions")
    completions = tuple(_answer(value, f"completions[{i}]", prompt) for i, value in enumerate(listed))
    return Example(prompt, completions, *_preferences(row, len(completions)))


def sharegpt(row: Row) -> Example:
    """{conversations, chosen, rejected} whose messages have `from` and `value`."""
    prompt = messages_of(field(row, "conversations"), "conversations", sharegpt_message)
    answers = (answer_message(field(row, name), name, sharegpt_message) for name in ("chosen", "rejected"))
    return Example(prompt, tuple(answers), ((0, 1),))


def preference(row: Row) -> Example:
    """{prompt, chosen, rejected} as text or chat, or chosen and rejected as whole conversations.

    A whole conversation holds the prompt: all its messages but the last. A `prompt` text beside it is not used (sets
    like UltraFeedback repeat the question there); a `prompt` of messages must be the conversation's own.
    """
    chosen, rejected, prompt = field(row, "chosen"), field(row, "rejected"), row.get("prompt")
    is_list = isinstance(chosen, list) and isinstance(rejected, list)
    if is_list and not (isinstance(prompt, list) and len(chosen) == len(rejected) == 1):
        return _conversations(chosen, rejected, prompt)
    prompt = text_or_messages(field(row, "prompt"), "prompt")
    return Example(prompt, (_answer(chosen, "chosen", prompt), _answer(rejected, "rejected", prompt)), ((0, 1),))


def hh(row: Row) -> Example:
    """{chosen, rejected}: dialogues in one text; the prompt ends after the last "\\n\\nAssistant:"."""
    (prompt, chosen), (other, rejected) = (_split_hh(text_of(field(row, k), k), k) for k in ("chosen", "rejected"))
    return Example(prompt, (chosen, rejected), ((0, 1),)) if prompt == other else PROMPTS_DIFFER


def shp(row: Row) -> Example:
    """Stanford Human Preferences {history, human_ref_A, human_ref_B, labels}: labels 1 means A is preferred, 0 B."""
    history = text_of(field(row, "history"), "history")
    answers = tuple(" " + text_of(field(row, name), name) for name in ("human_ref_A", "human_ref_B"))
    label = _choice(field(row, "labels"), "labels")
    return Example(f"\n\nHuman: {history}{HH_ANSWER}", answers, ((0, 1) if label == 1 else (1, 0),))


def tldr(row: Row) -> Example:
    """OpenAI's summarize_from_feedback comparisons {info, summaries, choice}; choice is the index of the better one."""
    info = mapping(field(row, "info"), "info")
    names = ("subreddit", "title", "post")
    subreddit, title, post = (text_of(field(info, name, "info."), f"info.{name}") for name in names)
    summaries = list_of(field(row, "summaries"), "summaries")
    if len(summaries) != 2:
        raise ValueError(f"summaries has {len(summaries)} items; valid: 2")
    answers = []
    for i, value in enumerate(summaries):
        text = field(mapping(value, f"summaries[{i}]"), "text", f"summaries[{i}].")
        answers.append(" " + text_of(text, f"summaries[{i}].text").strip())
    choice = _choice(field(row, "choice"), "choice")
    prompt = f"SUBREDDIT: r/{subreddit}\n\nTITLE: {title}\n\nPOST: {post}\n\nTL;DR:"
    return Example(prompt, tuple(answers), ((choice, 1 - choice),))


ADAPTERS: dict[str, Callable[[Row], Example]] = {
    "tokens": tokens, "grouped": grouped, "sharegpt": sharegpt, "preference": preference, "hh": hh, "shp": shp,
    "tldr": tldr,
}  # fmt: skip


def to_example(format: str, row: Row) -> Example:
    """The row as the format reads it; a null field is a missing one. Raises ValueError("what is wrong")."""
    return ADAPTERS[format]({key: value for key, value in row.items() if value is not None})


# --- preferences ----------------------------------------------------------------------------------------------------


def _preferences(row: Row, num: int) -> tuple[tuple[Index, ...], tuple[str, ...]]:
    """The pairs among `num` completions and the reasons of those dropped, from the one key of the row that tells."""
    given = [key for key in PREFERENCES if key in row]
    if len(given) != 1:
        raise ValueError(f"{' and '.join(given) or 'nothing'} given; valid: exactly one of {', '.join(PREFERENCES)}")
    values = list_of(row[given[0]], given[0])
    if given == ["pairs"]:
        return tuple(_pair(value, f"pairs[{i}]", num) for i, value in enumerate(values)), ()
    if len(values) != num:
        raise ValueError(f"{given[0]} has {len(values)} items for {num} completions")
    if given == ["scores"]:
        return _ordered([_score(value, f"scores[{i}]") for i, value in enumerate(values)])
    return _ordered([-_rank(value, f"ranking[{i}]") for i, value in enumerate(values)])


def _ordered(worth: list[float]) -> tuple[tuple[Index, ...], tuple[str, ...]]:
    """Every two completions of different worth as (better, worse), by rising indices; a `tie` for every equal two."""
    twos = [(i, j) for i in range(len(worth)) for j in range(i + 1, len(worth))]
    pairs = tuple((i, j) if worth[i] > worth[j] else (j, i) for i, j in twos if worth[i] != worth[j])
    return pairs, ("tie",) * (len(twos) - len(pairs))


def _pair(value: object, name: str, num: int) -> Index:
    if not (isinstance(value, list) and len(value) == 2 and all(type(index) is int for index in value)):
        raise ValueError(f"{name} is {shown(value)}; valid: [winner, loser], two indices of completions")
    for index in value:
        if not 0 <= index < num:
            raise ValueError(f"{name}: index {index} is out of range; valid: 0 to {num - 1}")
    winner, loser = value
    if winner == loser:
        raise ValueError(f"{name}: winner and loser are both {winner}; valid: two different completions")
    return winner, loser


def _score(value: object, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{name} is {shown(value)}; valid: a finite number")
    return value


def _rank(value: object, name: str) -> int:
    if type(value) is not int or value < 1:
        raise ValueError(f"{name} is {shown(value)}; valid: a whole number from 1 (best)")
    return value


def _choice(value: object, name: str) -> int:
    if type(value) is not int or value not in (0, 1):
        raise ValueError(f"{name} is {shown(value)}; valid: 0 or 1")
    return value


# --- completions and conversations -----------------------------------------------------------------------------------


def _answer(value: object, name: str, prompt: str | Iterable[Message]) -> str | Message:
    """A completion of the same kind as the prompt; text after a prompt of messages is the assistant's."""
    if isinstance(prompt, str):
        return text_of(value, name)
    if isinstance(value, str):
        return {"role": ASSISTANT, "content": value}
    return answer_message(value, name)


def _conversations(chosen: object, rejected: object, prompt: object) -> Example:
    """Two whole conversations; one without a message before the answer is broken."""
    (context, answer), (other, worse) = (_split(v, k) for v, k in ((chosen, "chosen"), (rejected, "rejected")))
    if isinstance(prompt, list) and messages_of(prompt, "prompt") not in (context, other):
        raise ValueError("chosen and rejected do not begin with prompt; valid: whole conversations or one answer each")
    return Example(context, (answer, worse), ((0, 1),)) if context == other else PROMPTS_DIFFER


def _split(value: object, name: str) -> tuple[tuple[Message, ...], Message]:
    messages = messages_of(value, name)
    if len(messages) < 2:
        raise ValueError(f"{name} has one message; valid: a whole conversation, or a prompt of messages beside it")
    return messages[:-1], answer_message([messages[-1]], name)


def _split_hh(text: str, name: str) -> tuple[str, str]:
    prompt, mark, answer = text.rpartition(HH_ANSWER)
    if not mark:
        raise ValueError(f"{name} has no {HH_ANSWER!r}, after which the answer begins")
    return prompt + mark, answer
