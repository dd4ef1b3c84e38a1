"""Files that are never seen half-written."""

import os
import uuid
from pathlib import Path


def write_atomically(target: Path, content: bytes) -> None:
    """Writes a file in one step for all who look, whoever else writes it, even across a crash of the machine."""
    target.parent.mkdir(parents=True, exist_ok=True)
    draft = target.with_name(f".{uuid.uuid4().hex}.draft")  # without the target's name, by which readers would find it
    with draft.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    draft.replace(target)
