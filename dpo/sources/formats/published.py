"""Formats of published sets of texts, each with the prompt that its authors trained with."""

from dpo.base.errors import InvalidValue
from dpo.sources.formats.example import PROMPTS_DIFFER, Example
from dpo.sources.formats.numbers import whole_number
from dpo.sources.formats.row_fields import Row, field, list_of, mapping, text_of, token_ids

HH_ANSWER = "\n\nAssistant:"


def hh(row: Row) -> Example:
    """Reads {chosen, rejected}: dialogues in one text; the prompt ends after the last "\\n\\nAssistant:"."""
    (prompt, chosen), (other, rejected) = (_split_hh(text_of(field(row, k), k), k) for k in ("chosen", "rejected"))
    return Example(prompt, (chosen, rejected), ((0, 1),)) if prompt == other else PROMPTS_DIFFER


def shp(row: Row) -> Example:
    """Reads Stanford Human Preferences {history, human_ref_A, human_ref_B, labels}: label 1 prefers A, label 0 B."""
    history = text_of(field(row, "history"), "history")
    answers = tuple(" " + text_of(field(row, name), name) for name in ("human_ref_A", "human_ref_B"))
    label = whole_number(field(row, "labels"), "labels", range(2))
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
    choice = whole_number(field(row, "choice"), "choice", range(2))
    prompt = f"SUBREDDIT: r/{subreddit}\n\nTITLE: {title}\n\nPOST: {post}\n\nTL;DR:"
    return Example(prompt, tuple(answers), ((choice, 1 - choice),))


def tldr_tokens(row: Row) -> Example:
    """Reads the token ids of the public TL;DR reproduction, as its authors trained: {query_chosen_token,
    query_rejected_token}, and the same with _response_label, where the ids of the prompt are padding.

    The ids are those of Pythia's tokenizer, padded at the end; an answer that was not cut ends with EOS.
    https://huggingface.co/datasets/vwxyzjn/summarize_from_feedback_oai_preprocessing_1706381144, which tldr_dataset.py
    of https://github.com/vwxyzjn/summarize_from_feedback_details writes and dpo.py reads.
    """
    prompt, chosen = _split_labelled(row, "query_chosen_token")
    other, rejected = _split_labelled(row, "query_rejected_token")
    return Example(prompt, (chosen, rejected), ((0, 1),)) if prompt == other else PROMPTS_DIFFER


def _split_labelled(row: Row, name: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Returns the ids of the prompt, whose labels are padding, and those of the answer without padding."""
    mask = f"{name}_response_label"
    ids, labels = (token_ids(field(row, column), column) for column in (name, mask))
    if len(ids) != len(labels) or ids[:1] == labels[:1]:
        raise InvalidValue(f"{mask} does not begin with padding", f"the ids of {name}, with padding for the prompt's")
    length = next((i for i, label in enumerate(labels) if label != labels[0]), len(labels))
    return ids[:length], tuple(token for token in ids[length:] if token != labels[0])


def _split_hh(text: str, name: str) -> tuple[str, str]:
    """Returns the prompt, up to the last HH_ANSWER, and the answer of a dialogue."""
    prompt, mark, answer = text.rpartition(HH_ANSWER)
    if not mark:
        raise InvalidValue(f"{name} has no {HH_ANSWER!r}, after which the answer begins")
    return prompt + mark, answer
