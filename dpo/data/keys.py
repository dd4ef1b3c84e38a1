"""Sixteen bytes that stand for a prompt, or for a completion after its prompt, by their token ids."""

import hashlib

import numpy as np


def prompt_key(prompt_ids: np.ndarray) -> bytes:
    """16 bytes that stand for a prompt's ids."""
    return hashlib.blake2b(np.asarray(prompt_ids, "<i4").tobytes(), digest_size=16).digest()


def completion_key(prompt_ids: np.ndarray, completion_ids: np.ndarray) -> bytes:
    """16 bytes that stand for a completion after a prompt: blake2b over both lengths and the ids, little-endian."""
    lengths = np.asarray([len(prompt_ids), len(completion_ids)], "<i8")
    ids = (np.asarray(ids, "<i4").tobytes() for ids in (prompt_ids, completion_ids))
    return hashlib.blake2b(b"".join([lengths.tobytes(), *ids]), digest_size=16).digest()
