"""The record of what a tracker was sent, over all starts of a run: RUN/trackers/NAME.jsonl.

The first line holds the tracker's id of the run, and each further line a row that was sent:

    {"id": "3fa9c2d1"}
    {"step": 1, "row": "train/loss"}
"""

import json
import uuid
from collections.abc import Mapping
from pathlib import Path

from dpo.base.files import naming, write_atomically


class Journal:
    """Appends a line per row that was sent, and knows the last step of each row; a row goes by its first name."""

    def __init__(self, path: Path):
        path.parent.mkdir(parents=True, exist_ok=True)
        content = path.read_bytes() if path.exists() else b""
        whole = content[: content.rfind(b"\n") + 1]  # a crash may have cut off the last line
        lines = [json.loads(line) for line in whole.splitlines()] or [{"id": uuid.uuid4().hex[:8]}]
        self.id: str = lines[0]["id"]
        self.num_rows = len(lines) - 1
        self.last: Mapping[str, int] = {line["row"]: line["step"] for line in lines[1:]}
        if len(whole) < len(content):
            write_atomically(path, whole)
        self.file = path.open("a", encoding="utf-8")
        if not whole:
            self._append(lines[0])

    def has(self, step: int, row: str) -> bool:
        """Returns whether the row of this step, or of a later one, was sent."""
        return step <= self.last.get(row, -1)

    def add(self, step: int, row: str) -> None:
        """Records a row that was sent."""
        self.last = {**self.last, row: step}
        self._append({"step": step, "row": row})

    def close(self) -> None:
        """Closes the file."""
        with naming(Path(self.file.name)):
            self.file.close()

    def _append(self, line: Mapping[str, int | str]) -> None:
        text = json.dumps(line) + "\n"
        with naming(Path(self.file.name), len(text)):
            self.file.write(text)
            self.file.flush()
