"""Formats whose rows list the completions of a prompt, and say which is better: pairs, scores or a ranking."""

from dpo.base.errors import InvalidValue
from dpo.sources.formats.example import Example, Index
from dpo.sources.formats.numbers import number_of
from dpo.sources.formats.pairwise import answer_of
from dpo.sources.formats.row_fields import Row, field, list_of, shown, text_or_messages, token_ids

PREFERENCES = ("pairs", "scores", "ranking")
"""The columns that say which completion is better; a row has one of them."""


def tokens(row: Row) -> Example:
    """Reads {prompt_ids, chosen_ids, rejected_ids}, or {prompt_ids, completion_ids} with pairs, scores or ranking."""
    prompt = token_ids(field(row, "prompt_ids"), "prompt_ids")
    if "chosen_ids" in row or "rejected_ids" in row:
        if "completion_ids" in row:
            raise InvalidValue("completion_ids beside chosen_ids and rejected_ids", "one of the two ways")
        names = ("chosen_ids", "rejected_ids")
        return Example(prompt, tuple(token_ids(field(row, name), name) for name in names), ((0, 1),))
    listed = list_of(field(row, "completion_ids"), "completion_ids")
    completions = tuple(token_ids(ids, f"completion_ids[{i}]") for i, ids in enumerate(listed))
    return Example(prompt, completions, *_preferences(row, len(completions)))


def grouped(row: Row) -> Example:
    """Reads {prompt, completions} with pairs [[winner, loser]…], scores (higher is better) or ranking (1 is best)."""
    prompt = text_or_messages(field(row, "prompt"), "prompt")
    listed = list_of(field(row, "completions"), "completions")
    completions = tuple(answer_of(value, f"completions[{i}]", prompt) for i, value in enumerate(listed))
    return Example(prompt, completions, *_preferences(row, len(completions)))


# --- preferences ----------------------------------------------------------------------------------------------------


def _preferences(row: Row, num: int) -> tuple[tuple[Index, ...], tuple[str, ...]]:
    """Returns the pairs among `num` completions, and the reasons of dropped pairs, from the row's column of
    PREFERENCES.
    """
    given = [key for key in PREFERENCES if key in row]
    if len(given) != 1:
        raise InvalidValue(f"{' and '.join(given) or 'nothing'} given", f"exactly one of {', '.join(PREFERENCES)}")
    values = list_of(row[given[0]], given[0])
    if given == ["pairs"]:
        return tuple(_pair(value, f"pairs[{i}]", num) for i, value in enumerate(values)), ()
    if len(values) != num:
        raise InvalidValue(f"{given[0]} has {len(values)} items for {num} completions")
    if given == ["scores"]:
        return _ordered([_score(value, f"scores[{i}]") for i, value in enumerate(values)])
    return _ordered([-_rank(value, f"ranking[{i}]") for i, value in enumerate(values)])


def _ordered(scores: list[float]) -> tuple[tuple[Index, ...], tuple[str, ...]]:
    """Returns each pair of completions with different scores as (better, worse), by rising indices, and a `tie` for
    each pair with equal scores.
    """
    candidates = [(i, j) for i in range(len(scores)) for j in range(i + 1, len(scores))]
    pairs = tuple((i, j) if scores[i] > scores[j] else (j, i) for i, j in candidates if scores[i] != scores[j])
    return pairs, ("tie",) * (len(candidates) - len(pairs))


def _pair(value: object, name: str, num: int) -> Index:
    """Returns a listed [winner, loser], two different indices of `num` completions."""
    if not (isinstance(value, list) and len(value) == 2 and all(type(index) is int for index in value)):
        raise InvalidValue(f"{name} is {shown(value)}", "[winner, loser], two indices of completions")
    for index in value:
        if not 0 <= index < num:
            raise InvalidValue(f"{name}: index {index} is out of range", f"0 to {num - 1}")
    winner, loser = value
    if winner == loser:
        raise InvalidValue(f"{name}: winner and loser are both {winner}", "two different completions")
    return winner, loser


def _score(value: object, name: str) -> float:
    """Returns a score, a finite number that is not kept as text."""
    if isinstance(value, str):
        raise InvalidValue(f"{name} is {shown(value)}", "a finite number")
    return number_of(value, name)


def _rank(value: object, name: str) -> int:
    """Returns a rank, a whole number from 1 (best)."""
    if type(value) is not int or value < 1:
        raise InvalidValue(f"{name} is {shown(value)}", "a whole number from 1 (best)")
    return value
