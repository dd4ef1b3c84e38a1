"""What config, sweeps and the documentation say of losses follows the table of facts."""

import dataclasses
import re
from pathlib import Path

import pytest

from dpo.base.errors import UserError
from dpo.config import Config, DataConfig, LossConfig, ModelConfig, SourceConfig
from dpo.config.keys import keys_of
from dpo.config.loss_facts import LOSS_FACTS, LossFacts, losses_that
from dpo.config.rules import validate
from launch.sweep import PlannedRun, reference_passes

README = Path(__file__).parents[2] / "configs" / "README.md"


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """A loss `new` in the table: without a reference, smoothed, with the SFT term in it."""
    monkeypatch.setitem(LOSS_FACTS, "new", LossFacts(False, None, smooths=True, normalizes=False, includes_sft=True))


def config_of(**loss: object) -> Config:
    return Config(model=ModelConfig("m"), data=DataConfig([SourceConfig("a")]), loss=LossConfig(**loss))  # type: ignore[arg-type]


# --- the rules -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (
            {"name": "ipo", "label_smoothing": 0.1},
            "loss.label_smoothing: loss.name ipo has no label smoothing, got 0.1; valid: 0, or loss.name dpo, robust"
            " or new",
        ),
        (
            {"name": "new", "length_normalized": True},
            "loss.length_normalized: loss.name new is not divided by lengths, got true; valid: false, or loss.name"
            " dpo, ipo, hinge, robust, apo_zero, apo_down or dpop",
        ),
        (
            {"name": "new", "sft_weight": 0.5},
            "loss.sft_weight: loss.name new has this term with weight 1, got 0.5; valid: 0, or loss.name dpo, ipo,"
            " hinge, robust, apo_zero, apo_down, dpop or simpo",
        ),
    ],
)
def test_the_rules_know_a_new_loss(registered: None, loss: dict[str, object], message: str) -> None:
    """What it does not take is refused, and it is named among the losses that take what another does not."""
    with pytest.raises(UserError) as failure:
        validate(config_of(**loss))
    assert str(failure.value) == f"config: {message}"


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (
            {"name": "orpo", "gamma": 1.0},
            "loss.gamma: loss.name orpo does not take it, got 1.0; valid: 0.5, or loss.name simpo",
        ),
        (
            {"name": "dpo", "dpop_lambda": 0.0},
            "loss.dpop_lambda: loss.name dpo does not take it, got 0.0; valid: 50.0, or loss.name dpop",
        ),
        ({"name": "simpo", "gamma": -1.0}, "loss.gamma: must be >= 0, got -1.0; valid: a number >= 0"),
        (
            {"name": "simpo", "length_normalized": True},
            "loss.length_normalized: loss.name simpo is not divided by lengths, got true; valid: false, or loss.name"
            " dpo, ipo, hinge, robust, apo_zero, apo_down or dpop",
        ),
        (
            {"name": "orpo", "sft_weight": 1.0},
            "loss.sft_weight: loss.name orpo has this term with weight 1, got 1.0; valid: 0, or loss.name dpo, ipo,"
            " hinge, robust, apo_zero, apo_down, dpop or simpo",
        ),
    ],
)
def test_keys_that_a_loss_does_not_take(loss: dict[str, object], message: str) -> None:
    with pytest.raises(UserError) as failure:
        validate(config_of(**loss))
    assert str(failure.value) == f"config: {message}"


@pytest.mark.parametrize(
    "loss", [{"name": "simpo", "gamma": 1.4, "sft_weight": 0.1}, {"name": "dpop", "dpop_lambda": 5.0}, {"gamma": 0.5}]
)
def test_keys_that_a_loss_takes(loss: dict[str, object]) -> None:
    """A default is no mistake under any loss."""
    validate(config_of(**loss))


@pytest.mark.parametrize("part", ["train", "eval"])
def test_margins_are_for_dpo_only(part: str) -> None:
    source = SourceConfig("a", columns={"margin": "gap"})
    data = DataConfig([source]) if part == "train" else DataConfig([SourceConfig("a")], [source])
    validate(dataclasses.replace(config_of(), data=data))
    with pytest.raises(UserError) as failure:
        validate(dataclasses.replace(config_of(name="hinge"), data=data))
    what = "loss.name hinge takes no margin of a pair, got margin: gap; valid: no margin, or loss.name dpo"
    assert str(failure.value) == f"config: data.{part}[0].columns: {what}"


def test_the_rules_let_pass_what_a_new_loss_takes(registered: None) -> None:
    validate(config_of(name="new", label_smoothing=0.1))


def test_where_one_loss_alone_takes_a_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(LOSS_FACTS, "robust", dataclasses.replace(LOSS_FACTS["robust"], smooths=False))
    with pytest.raises(UserError, match=r"; valid: 0, or loss\.name dpo$"):
        validate(config_of(name="robust", label_smoothing=0.1))


# --- a sweep ---------------------------------------------------------------------------------------------------------


def test_a_sweep_of_a_new_loss_without_a_reference_has_no_reference_pass(registered: None) -> None:
    """Beside a run of dpo there is one, with that run's words."""
    runs = [
        PlannedRun(Path(name), (name,), config_of(name=name, label_smoothing=eps))
        for name, eps in (("new", 0.0), ("new", 0.1), ("dpo", 0.0))
    ]
    assert reference_passes(runs[:2]) == []
    assert reference_passes(runs) == [("dpo",)]


# --- the documentation -----------------------------------------------------------------------------------------------


def doc_of(key: str) -> str:
    return next(found.text for found in keys_of(LossConfig) if found.name == key)


def losses_in(text: str) -> list[str]:
    return [word for word in re.findall(r"\w+", text) if word in LOSS_FACTS]


def test_the_help_tells_of_every_loss() -> None:
    """`NAME: formula` of each, in order; which take a key, or do not."""
    assert re.findall(r"(?:^|; )(\w+):", doc_of("name")) == list(LOSS_FACTS)
    assert losses_in(doc_of("label_smoothing").partition("; for ")[2]) == losses_that(lambda facts: facts.smooths)
    assert losses_in(doc_of("length_normalized").partition("; not for ")[2]) == losses_that(
        lambda facts: not facts.normalizes
    )
    assert losses_in(doc_of("sft_weight").partition("; 0 for ")[2]) == losses_that(lambda facts: facts.includes_sft)


def test_the_readme_lists_every_loss() -> None:
    row = next(line for line in README.read_text(encoding="utf-8").splitlines() if line.startswith("| `loss` |"))
    (names,) = re.findall(r"`name` \((.*?)\)", row)
    assert names.split(", ") == list(LOSS_FACTS)
