"""What is an id of the Hugging Face hub, and not a path."""

import re


def is_hub_id(path: str) -> bool:
    """Whether a path that is not there may be one of the hub's, org/name; any other must be a file or folder."""
    return bool(re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", path))


def is_tokenizer_id(path: str) -> bool:
    """The same for tokenizers, of which old ones have no organization: gpt2."""
    return is_hub_id(path) or is_hub_id(f"org/{path}")
