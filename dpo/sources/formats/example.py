"""A row of a preference file, read: an `Example`."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from dpo.sources.formats.row_fields import Message, Row

Index = tuple[int, int]
"""(winner, loser): indices of an example's completions."""


@dataclass(frozen=True)
class Example:
    """One prompt, its K completions, and the pairs among them.

    Text: prompt and completions are strings. Chat: the prompt is a tuple of messages, a completion the assistant's
    message. Tokens: both are tuples of ids. `dropped` has one reason per pair that carries no preference by the row
    alone (`tie`, `prompts_differ`); where the prompts differ there is no prompt and no completion.
    """

    prompt: str | tuple[Message, ...] | tuple[int, ...]
    completions: tuple[str | Message | tuple[int, ...], ...]
    pairs: tuple[Index, ...]
    """(winner, loser); of a demonstration, which is compared with nothing, the loser is the winner itself."""
    dropped: tuple[str, ...] = ()
    template_args: Mapping[str, Any] = field(default_factory=dict)
    """Arguments of the chat template for this row, `tools` among them; empty for texts and tokens."""


PROMPTS_DIFFER = Example("", (), (), ("prompts_differ",))

Reader = Callable[[Row], Example]
"""Reads a row, in which a null field is missing. Raises InvalidValue; the caller adds file and line."""
