"""The values that must not change when a run resumes, and the key that an error names."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dpo.adapters.spec import AdapterSpec
from dpo.base.errors import UserError
from dpo.checkpoint.state import SHARES, RunState
from dpo.config import SourceConfig
from dpo.run.folder import Start
from dpo.run.identity import adapter_facts, check_identity, shares_of
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


# --- adapters --------------------------------------------------------------------------------------------------------


def facts(spec: AdapterSpec | None, base: str = "0" * 32) -> dict[str, object]:
    inputs: Any = SimpleNamespace(model=SimpleNamespace(adapters=spec, base_hash=base))
    return adapter_facts(inputs) | {SHARES: {}}


SPEC = AdapterSpec(rank=4, alpha=8.0, target_modules=("q_proj", "v_proj"))


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"rank": 8}, "lora.rank: {}4 {}, 8 now"),
        ({"alpha": 4.0}, "lora.alpha: {}8.0 {}, 4.0 now"),
        ({"target_modules": ("q_proj",)}, "lora.target_modules: {}['q_proj', 'v_proj'] {}, ['q_proj'] now"),
        ({"target_parameters": ("experts.down_proj",)}, "lora.target_parameters: {}[] {}, ['experts.down_proj'] now"),
        ({"exclude_modules": ("layers.0.*",)}, "lora.exclude_modules: {}[] {}, ['layers.0.*'] now"),
        ({"rslora": True}, "lora.rslora: {}False {}, True now"),
        ({"dora": True}, "lora.dora: {}False {}, True now"),
        ({"embeddings": True}, "lora.train_embeddings: {}False {}, True now"),
        ({"rank_pattern": {"q_proj": 2}}, "lora.path: {}{{'rank_pattern': {{}}, "),
        ({"layers_to_transform": (1,)}, "lora.path: {}{{'rank_pattern': {{}}, "),
        ({"trained_modules": ("lm_head",)}, "lora.path: {}{{'rank_pattern': {{}}, "),
    ],
)
def test_each_value_of_the_adapters_is_named(changes: dict[str, Any], line: str) -> None:
    """By the key of the config, or lora.path for what only a folder says."""
    now = facts(AdapterSpec(**{"rank": 4, "alpha": 8.0, "target_modules": ("q_proj", "v_proj")} | changes))
    expected = line.format("cannot resume from C: ", "when the checkpoint was written")
    assert refusal(facts(SPEC), now).startswith(expected)


def test_adapters_that_are_the_same() -> None:
    """In another order, from another folder; and none, also for a checkpoint that is older than adapters."""
    same = AdapterSpec(rank=4, alpha=8, target_modules=("v_proj", "q_proj"), folder=Path("elsewhere"))
    assert refusal(facts(SPEC), facts(same)) == ""
    assert refusal({}, facts(None)) == ""


def test_a_run_with_adapters_is_no_full_run() -> None:
    assert refusal({}, facts(SPEC)).startswith(
        "lora.rank: cannot resume from C: None when the checkpoint was written, 4"
    )
    assert refusal(facts(SPEC), facts(None)).startswith("lora.rank: cannot resume from C: 4 when")


def test_another_base_is_named() -> None:
    line = refusal(facts(SPEC), facts(SPEC, "1" * 32))
    assert line.startswith("model.path: cannot resume from C: the content of the model that the adapters are for has")


# --- the README ------------------------------------------------------------------------------------------------------


def test_the_readme_quotes_the_refusal_as_it_is_printed() -> None:
    quoted = refusal({"loss.beta": 0.1}, {"loss.beta": 0.5, SHARES: {}}).partition(" C: ")[0]
    readme = Path(__file__).parents[2] / "README.md"
    assert f"| `{quoted} ...` |" in readme.read_text(encoding="utf-8")
