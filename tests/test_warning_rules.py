"""Which filters hold: errors under the pinned versions, and no kind of warning ignored as a whole."""

import builtins

import pytest

from tests.warning_rules import IGNORED, JUDGED, filters

PINS = "torch==2.13.0\ntransformers==5.23.0\nnumpy==2.4.6\n"


@pytest.mark.parametrize(
    ("torch", "transformers", "is_judged"),
    [
        ("2.13.0", "5.23.0", True),
        ("2.13.0+cpu", "5.23.0", True),
        ("2.14.1", "5.23.0", False),
        ("2.13.0", "5.24.0", False),
    ],
)
def test_warnings_are_errors_under_the_pinned_versions(torch: str, transformers: str, is_judged: bool) -> None:
    lines = filters(dict(zip(JUDGED, (torch, transformers), strict=True)), PINS)
    assert lines == (["error", *IGNORED] if is_judged else ["ignore"])


@pytest.mark.parametrize("line", IGNORED)
def test_a_filter_names_its_message(line: str) -> None:
    """A whole category would hide what the project itself does wrong, such as a file that it leaves open."""
    action, message, category = line.split(":")
    assert action == "ignore"
    assert message
    assert issubclass(getattr(builtins, category), Warning)
