"""The values that must not change when a run resumes, and the key that an error names."""

from pathlib import Path

import pytest

from dpo.base.errors import UserError
from dpo.checkpoint.state import SHARES, RunState
from dpo.config import SourceConfig
from dpo.run.folder import Start
from dpo.run.identity import check_identity, shares_of
from tests.support.runs import make_config


def shares(*given: dict[str, float]) -> dict[str, float]:
    sources = [SourceConfig("a.jsonl", **share) for share in given]
    return shares_of(make_config("model", "a.jsonl", "run", data__train=sources))


def refusal(before: dict[str, object], now: dict[str, object]) -> str:
    """The error of a start with the identity `now` after a checkpoint with `before`; empty where there is none."""
    try:
        check_identity(Start(Path("C"), RunState(4, before)), now)
    except UserError as error:
        return str(error)
    return ""


def test_shares_of_a_config() -> None:
    assert shares({}, {"weight": 0.5}, {"count": 7}) == {"data.train[1].weight": 0.5, "data.train[2].count": 7}


@pytest.mark.parametrize(
    ("before", "now", "line"),
    [
        ([{"weight": 0.5}, {}], [{"weight": 0.25}, {}], "data.train[0].weight: {}0.5 {}, 0.25 now"),
        ([{}, {"count": 7}], [{}, {"weight": 7}], "data.train[1].count: {}7 {}, null now"),
        ([{}], [{"count": 7}], "data.train[0].count: {}null {}, 7 now"),
        ([{"count": 7}], [{"count": 7}], "data.train: {}the content of the pairs (of data.train, its holdout"),
    ],
)
def test_other_pairs_name_the_share_that_changed(
    before: list[dict[str, float]], now: list[dict[str, float]], line: str
) -> None:
    """Only where the pairs differ; and a checkpoint that records no shares had none."""
    old, new = {"data.train": "0" * 32, SHARES: shares(*before)}, {"data.train": "1" * 32, SHARES: shares(*now)}
    expected = line.format("cannot resume from C: ", "when the checkpoint was written")
    assert refusal(old, new).startswith(expected)
    assert refusal(old | {"data.train": "1" * 32}, new) == ""
    assert refusal({"data.train": "0" * 32}, new | {SHARES: {}}).startswith("data.train: ")


def test_the_readme_quotes_the_refusal_as_it_is_printed() -> None:
    quoted = refusal({"loss.beta": 0.1}, {"loss.beta": 0.5, SHARES: {}}).partition(" C: ")[0]
    readme = Path(__file__).parents[2] / "README.md"
    assert f"| `{quoted} ...` |" in readme.read_text(encoding="utf-8")
