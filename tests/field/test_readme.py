"""The rows of the table of formats in configs/README.md are read as the format that stands beside them."""

import json
import re
from pathlib import Path

import pytest

from dpo.config import SourceConfig
from dpo.sources.formats.decision import decide_reading
from dpo.sources.formats.examples import FORMATS
from dpo.sources.formats.reading import read_row

README = (Path(__file__).parents[2] / "configs" / "README.md").read_text(encoding="utf-8")
SECTION = README.partition("## Preference files")[2].partition("\n## ")[0]
LINES = re.findall(r"^\| `(\w+)` \| (.*) \|$", SECTION, re.MULTILINE)
ROWS = [(name, code) for name, text in LINES for code in re.findall(r'`(\{".*?\})`', text)]


def test_every_format_has_a_line() -> None:
    assert [name for name, _ in LINES] == list(FORMATS)
    assert {name for name, _ in ROWS} == FORMATS.keys() - {"tldr_tokens"}, "whose row is a list of hundreds of ids"


@pytest.mark.parametrize(("name", "code"), ROWS)
def test_a_row_is_read_as_its_format(name: str, code: str) -> None:
    """A loser is the worse answer by its text; a demonstration is compared with itself."""
    row = json.loads(code)
    reading = decide_reading(SourceConfig("rows.jsonl"), row.keys(), row, False, "data.train[0]")
    assert reading.format == name
    example = read_row(reading, row)
    for winner, loser in example.pairs:
        assert winner == loser or winner < loser or name == "helpsteer", (
            "each row of the table has the better answer first"
        )
    assert example.pairs and all(example.completions)
