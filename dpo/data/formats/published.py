"""Formats of published sets of texts, each with the prompt that its authors trained with."""

from dpo.base.errors import InvalidValue
from dpo.data.formats.example import PROMPTS_DIFFER, Example
from dpo.data.formats.row_fields import Row, field, list_of, mapping, shown, text_of

HH_ANSWER = "\n\nAssistant:"


def hh(row: Row) -> Example:
    """Reads {chosen, rejected}: dialogues in one text; the prompt ends after the last "\\n\\nAssistant:"."""
    (prompt, chosen), (other, rejected) = (_split_hh(text_of(field(row, k), k), k) for k in ("chosen", "rejected"))
    return Example(prompt, (chosen, rejected), ((0, 1),)) if prompt == other else PROMPTS_DIFFER


def shp(row: Row) -> Example:
    """Reads Stanford Human Preferences {history, human_ref_A, human_ref_B, labels}: label 1 prefers A, label 0 B."""
    history = text_of(field(row, "history"), "history")
    answers = tuple(" " + text_of(field(row, name), name) for name in ("human_ref_A", "human_ref_B"))
    label = _choice(field(row, "labels"), "labels")
    return Example(f"\n\nHuman: {history}{HH_ANSWER}", answers, ((0, 1) if label == 1 else (1, 0),))


def tldr(row: Row) -> Example:
    """Reads OpenAI's summarize_from_feedback comparisons {info, summaries, choice}; choice is the better summary's
    index.
    """
    info = mapping(field(row, "info"), "info")
    names = ("subreddit", "title", "post")
    subreddit, title, post = (text_of(field(info, name, "info."), f"info.{name}") for name in names)
    summaries = list_of(field(row, "summaries"), "summaries")
    if len(summaries) != 2:
        raise InvalidValue(f"summaries has {len(summaries)} items", "2")
    answers = []
    for i, value in enumerate(summaries):
        text = field(mapping(value, f"summaries[{i}]"), "text", f"summaries[{i}].")
        answers.append(" " + text_of(text, f"summaries[{i}].text").strip())
    choice = _choice(field(row, "choice"), "choice")
    prompt = f"SUBREDDIT: r/{subreddit}\n\nTITLE: {title}\n\nPOST: {post}\n\nTL;DR:"
    return Example(prompt, tuple(answers), ((choice, 1 - choice),))


def _split_hh(text: str, name: str) -> tuple[str, str]:
    """Returns the prompt, up to the last HH_ANSWER, and the answer of a dialogue."""
    prompt, mark, answer = text.rpartition(HH_ANSWER)
    if not mark:
        raise InvalidValue(f"{name} has no {HH_ANSWER!r}, after which the answer begins")
    return prompt + mark, answer


def _choice(value: object, name: str) -> int:
    """Returns a choice, 0 or 1."""
    if type(value) is not int or value not in (0, 1):
        raise InvalidValue(f"{name} is {shown(value)}", "0 or 1")
    return value
