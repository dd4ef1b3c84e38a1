"""Tells ids of the Hugging Face hub from local paths, by their form alone."""

import re


def is_hub_id(path: str) -> bool:
    """Returns whether `path` has the form of a hub id, org/name. Other paths must be local files or folders."""
    return bool(re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", path))


def is_tokenizer_id(path: str) -> bool:
    """Returns whether `path` has the form of a tokenizer's hub id: org/name, or a name alone such as gpt2."""
    return is_hub_id(path) or is_hub_id(f"org/{path}")
