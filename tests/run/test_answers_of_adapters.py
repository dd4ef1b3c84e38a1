"""The sampled answers of a run of adapters, against plain models with adapters as peft loads them."""

import json
from pathlib import Path
from typing import Any

import pytest

from dpo.config import Config, SourceConfig
from tests.model.test_generation import plain_greedy
from tests.support.data_fixtures import EOS, make_tokenizer
from tests.support.models import plain_model, save_model, save_pairs
from tests.support.peft_folders import adapted_model, save_adapter
from tests.support.runs import changed, make_config, run

NEW = 5


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """model/ with a tokenizer of one character a token, sft/, its adapters, pairs.jsonl, and eval.jsonl."""
    root = tmp_path_factory.mktemp("answers")
    make_tokenizer().save_pretrained(save_model(root / "model", "llama"))
    save_adapter(root / "sft", root / "model", use_dora=True)
    save_pairs(root / "pairs.jsonl", 4)
    save_pairs(root / "eval.jsonl", 3, seed=1)
    return root


@pytest.fixture
def config(root: Path, tmp_path: Path) -> Config:
    """A run whose few steps are so large that its answers change."""
    facts = {
        "data__eval": [SourceConfig(str(root / "eval.jsonl"))],
        "batch__pairs_per_step": 4,
        "train__steps": 3,
        "optim__lr": 0.03,
        "optim__warmup_steps": 0,
        "eval__samples": 3,
        "eval__max_new_tokens": NEW,
    }
    return make_config(root / "model", root / "pairs.jsonl", tmp_path / "run", **facts)


def said(model: Any, root: Path) -> list[str]:
    """The oracle's answers, decoded by hand: a space between the characters, special tokens left out."""
    prompts = [json.loads(line)["prompt_ids"] for line in (root / "eval.jsonl").read_text().splitlines()]
    answers = [plain_greedy(model, prompt, NEW) for prompt in prompts]
    cut = [ids[: ids.index(EOS)] if EOS in ids else ids for ids in answers]
    return [" ".join(chr(token + 29) for token in ids if token > 2) for ids in cut]


def answers(folder: Path, step: int) -> tuple[list[str], list[str]]:
    """The policy's and the reference's answers after `step` steps, as the run folder has them."""
    rows = [json.loads(line) for line in (folder / "answers" / f"step-{step:06d}.jsonl").read_text().splitlines()]
    return [row["policy"] for row in rows], [row["reference"] for row in rows]


def test_of_fresh_adapters(config: Config, root: Path) -> None:
    """The base's before the first step, and beside all later ones; then those of the trained adapters."""
    folder = run(changed(config, lora__rank=4))
    base = said(plain_model(root / "model"), root)
    assert answers(folder, 0) == (base, base)
    assert answers(folder, 3) == (said(adapted_model(root / "model", folder / "final"), root), base)
    assert answers(folder, 3)[0] != base


@pytest.mark.parametrize("adapter", ["start", "base"])
def test_of_given_adapters(adapter: Any, config: Config, root: Path) -> None:
    """The start's before the first step, beside those of the reference."""
    folder = run(changed(config, lora__path=str(root / "sft"), reference__adapter=adapter, loss__name="ipo"))
    start = said(adapted_model(root / "model", root / "sft"), root)
    reference = {"start": start, "base": said(plain_model(root / "model"), root)}[adapter]
    assert answers(folder, 0) == (start, reference)
    assert answers(folder, 3) == (said(adapted_model(root / "model", folder / "final"), root), reference)
    assert start != said(plain_model(root / "model"), root)
