"""Failures of the Hugging Face hub and of the network to it, in a few words; the hub's own texts are paragraphs."""

from collections.abc import Mapping

from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, OfflineModeIsEnabled

from dpo.base.errors import one_line

_STATUS: Mapping[int, str] = {
    401: "no valid token, or there is no such repository",
    403: "the token has no right to it",
    404: "there is no such repository, file or revision",
    429: "too many requests",
}
LONGEST = 100
"""The maximum length of a text that the network gives."""


def reason_of(failure: BaseException) -> str:
    """Returns why the hub or the network failed, with the status of the answer where the hub has answered."""
    if isinstance(failure, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set"
    if isinstance(failure, GatedRepoError):
        return "it is gated: ask for access on its page, then `hf auth login`"
    if isinstance(failure, HfHubHTTPError):
        status = failure.response.status_code
        return f"{status}: {_STATUS[status]}" if status in _STATUS else str(status)
    text = one_line(str(failure)).partition("] ")  # of `[Errno 111] Connection refused` the words
    words = text[2] if text[0].startswith("[Errno") else "".join(text)
    return words[:LONGEST] or type(failure).__name__


def has_answered(failure: BaseException) -> bool:
    """Returns whether the failure is an answer of the hub, which is not one of a server that is down."""
    return isinstance(failure, HfHubHTTPError) and failure.response.status_code < 500
