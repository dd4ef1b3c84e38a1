"""The reasons for which the hub fails, in a few words."""

from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub import constants
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, OfflineModeIsEnabled

from dpo.base.errors import InvalidValue
from dpo.hub.files import MODEL
from dpo.hub.reasons import has_answered, reason_of
from dpo.hub.snapshots import PREPARE, find_snapshot


def answer(status: int, kind: type[HfHubHTTPError] = HfHubHTTPError) -> HfHubHTTPError:
    response: Any = SimpleNamespace(status_code=status, headers={}, request=None)
    return kind(f"{status} Client Error\n\n" + "a long text with an address " * 20, response=response)


def test_a_model_of_the_hub_without_a_network_is_one_short_line() -> None:
    """The tests run with HF_HUB_OFFLINE; the hub's own text is 150 characters, of which 200 were shown."""
    with pytest.raises(InvalidValue) as failure:
        find_snapshot("org/absent", MODEL)
    lacks = f"the cache {constants.HF_HUB_CACHE} lacks config.json"
    assert failure.value.what == f"org/absent: {lacks}, and the hub does not answer (HF_HUB_OFFLINE is set)"
    assert failure.value.valid == PREPARE


@pytest.mark.parametrize(
    ("failure", "reason", "answered"),
    [
        (answer(404), "404: there is no such repository, file or revision", True),
        (answer(403, GatedRepoError), "it is gated: ask for access on its page, then `hf auth login`", True),
        (answer(418), "418", True),
        (answer(502), "502", False),
        (OfflineModeIsEnabled("a long text"), "HF_HUB_OFFLINE is set", False),
        (OSError(111, "Connection refused"), "Connection refused", False),
        (TimeoutError(), "TimeoutError", False),
        (ValueError("x" * 500), "x" * 100, False),
    ],
)
def test_reasons(failure: Exception, reason: str, answered: bool) -> None:
    assert reason_of(failure) == reason
    assert has_answered(failure) is answered
