"""The recipes of configs/recipes: each is read, estimated on the published shape of its model, and rehearsed, which is
two steps of a tiny model on rows in the shape of its data. The results of a recipe are not predicted.

The hub is not asked: `load_dataset` is replaced, and must be asked for the recipe's sets, configurations and splits.
"""

import json
import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from dpo.config import Config
from dpo.config.load import load_config
from dpo.estimate import program
from tests.support.data_fixtures import EOS, VOCAB_SIZE, ids, make_tokenizer
from tests.support.runs import changed, exit_code_of, run, train_lines

pytest_plugins = ["tests.support.data_plugin"]
FOLDER = Path(__file__).parents[2] / "configs" / "recipes"
RECIPES = sorted(file.stem for file in FOLDER.glob("*.yaml"))


def read(recipe: str, *words: str) -> Config:
    return load_config(["--config", str(FOLDER / f"{recipe}.yaml"), *words], prog="dpo.train")


# --- the files -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_says_what_it_follows(recipe: str) -> None:
    """Its source and its published number, each with an address or "none found"; what differs; its command."""
    text = (FOLDER / f"{recipe}.yaml").read_text().replace("\n#  ", "")
    for word in ("Source", "Published", "Differs"):
        assert len(re.findall(rf"^# {word}: ", text, re.MULTILINE)) == 1
    for word, others in (("Source", ()), ("Published", ("none found",))):
        (line,) = re.findall(rf"^# {word}: (.*)$", text, re.MULTILINE)
        assert "https://" in line or any(other in line for other in others)
    assert f"-m dpo.train --config configs/recipes/{recipe}.yaml\n" in text


PUBLISHED = {
    "olmo-3-7b-instruct": ("dpo", 5.0, 1e-6, 128),
    "pythia-1b_tldr": ("dpo", 0.05, 3e-6, 512),
    "simpo_llama-3-8b-instruct": ("simpo", 2.5, 1e-6, 128),
    "smollm3-3b": ("apo_zero", 0.05, 1e-6, 32),
    "tulu-3-8b": ("dpo", 5.0, 5e-7, 128),
    "zephyr-7b": ("dpo", 0.01, 5e-7, 128),
}
"""Loss, beta, learning rate and pairs per step by the sources."""


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_has_the_published_values(recipe: str) -> None:
    config = read(recipe)
    found = (config.loss.name, config.loss.beta, config.optim.lr, config.batch.pairs_per_step)
    assert found == PUBLISHED[recipe] and config.optim.name == "adamw"


def test_the_shares_of_the_sources() -> None:
    """260,000 pairs of ten sources: 2 x 125,000 and 2 x (1,250 + 938 + 312 + 2,500); a half and a quarter of two."""
    counts = [source.count for source in read("olmo-3-7b-instruct").data.train]
    assert len(counts) == 10 and sum(count or 0 for count in counts) == 260_000
    assert [source.weight for source in read("smollm3-3b").data.train] == [0.5, 0.25]
    assert read("simpo_llama-3-8b-instruct").loss.gamma == pytest.approx(0.55 * 2.5)


# --- estimated -------------------------------------------------------------------------------------------------------

LLAMA_3 = {
    "model_type": "llama", "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "tie_word_embeddings": False,
    "max_position_embeddings": 131072,
}  # fmt: skip
SHAPES: dict[str, tuple[dict[str, Any], int, str]] = {
    "olmo-3-7b-instruct": (
        LLAMA_3
        | {"model_type": "olmo3", "vocab_size": 100278, "intermediate_size": 11008, "num_key_value_heads": 32,
           "max_position_embeddings": 65536, "sliding_window": 4096},
        32, "7.30",
    ),
    "pythia-1b_tldr": (
        {"model_type": "gpt_neox", "vocab_size": 50304, "hidden_size": 2048, "intermediate_size": 8192,
         "num_hidden_layers": 16, "num_attention_heads": 8, "tie_word_embeddings": False,
         "max_position_embeddings": 2048},
        8, "1.01",
    ),
    "simpo_llama-3-8b-instruct": (LLAMA_3, 8, "8.03"),
    "smollm3-3b": (
        LLAMA_3
        | {"model_type": "smollm3", "hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36,
           "num_attention_heads": 16, "num_key_value_heads": 4, "tie_word_embeddings": True},
        16, "3.08",
    ),
    "tulu-3-8b": (LLAMA_3 | {"vocab_size": 128264}, 8, "8.03"),
    "zephyr-7b": (
        LLAMA_3 | {"model_type": "mistral", "vocab_size": 32000, "max_position_embeddings": 32768,
                   "sliding_window": 4096},
        8, "7.24",
    ),
}  # fmt: skip
"""config.json of the model, GPUs of the recipe, and its published number of parameters in billions."""


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_is_estimated(recipe: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """On the H100s of its source, where it fits; the data is not here, so that its length limits are assumed."""
    shape, num_ranks, billions = SHAPES[recipe]
    (tmp_path / "config.json").write_text(json.dumps(shape))
    words = ["--config", str(FOLDER / f"{recipe}.yaml"), "--model.path", str(tmp_path), "--ranks", str(num_ranks)]
    words += ["--parallel.activation_checkpointing", "full", "--parallel.sync_gradients", "every_micro_batch"]
    assert exit_code_of(program.main, "dpo.estimate", *words) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert f"{billions} billion parameters, one copy over {num_ranks} H100" in shown
    assert "fits: " in shown and "is not here" in shown


# --- rehearsed -------------------------------------------------------------------------------------------------------


def conversation(number: int, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": f"What is {number}?"}, {"role": "assistant", "content": answer}]


def sides(number: int) -> dict[str, Any]:
    return {"chosen": conversation(number, "A number."), "rejected": conversation(number, f"No {number}!")}


def zephyr(number: int) -> dict[str, Any]:
    prompt = f"What is {number}?"
    return sides(number) | {
        "prompt": prompt, "prompt_id": "5e", "messages": sides(number)["chosen"],
        "score_chosen": 8.0, "score_rejected": 8.0,
    }  # fmt: skip


def tulu(number: int) -> dict[str, Any]:
    return sides(number) | {"id": str(number), "prompt": f"What is {number}?", "source": "wildchat"}


def smollm3(number: int) -> dict[str, Any]:
    """The system message and the way of thinking of each row are arguments of the chat template."""
    arguments = {"custom_instructions": "", "enable_thinking": False, "python_tools": [], "xml_tools": []}
    return sides(number) | {"prompt": f"What is {number}?", "chat_template_kwargs": arguments}


def olmo(number: int) -> dict[str, Any]:
    return sides(number) | {"prompt_id": str(number), "chosen_model": "m", "rejected_model": "n"}


def simpo(number: int) -> dict[str, Any]:
    generated = {"all_generated_responses": ["A number.", f"No {number}!"], "all_rm_scores": [0.5, -0.25]}
    return sides(number) | {"prompt_id": "5e", "prompt": f"What is {number}?"} | generated


def tldr(number: int) -> dict[str, Any]:
    """Ids, padded at the end with one that no text has; and the columns of OpenAI's set beside them."""
    pad = VOCAB_SIZE - 2
    query = f"POST: What is {number}? TL;DR:"
    row: dict[str, Any] = {"info": {"id": "1"}, "summaries": [], "choice": 0, "query": query}
    for side, answer in (("chosen", " A number."), ("rejected", f" No {number}!")):
        answer_ids = [*ids(answer), EOS]
        padding = [pad] * (20 - len(answer_ids))
        row[f"query_{side}_token"] = [*ids(query), *answer_ids, *padding]
        row[f"query_{side}_token_response_label"] = [*[pad] * len(query), *answer_ids, *padding]
    return row


ROWS: dict[str, Callable[[int], dict[str, Any]]] = {
    "olmo-3-7b-instruct": olmo,
    "pythia-1b_tldr": tldr,
    "simpo_llama-3-8b-instruct": simpo,
    "smollm3-3b": smollm3,
    "tulu-3-8b": tulu,
    "zephyr-7b": zephyr,
}
"""A row in the shape of the recipe's data, with the columns of its set's card."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with the tokenizer of the tests, whose chat template writes [role]content</s>."""
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    shape = {"vocab_size": VOCAB_SIZE, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 32768}
    LlamaForCausalLM(LlamaConfig(**shape, **heads, bos_token_id=1, eos_token_id=EOS)).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_is_rehearsed(
    recipe: str, model: Path, tmp_path: Path, hf_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two steps of four pairs with its loss, optimizer and schedule. The first loss is that of an indifferent policy,
    ln 2, for APO 1, where there is a reference; SimPO's is the log of 1 + exp(gamma - margin).
    After one step of warm-up, lr/2, the rate of both schedules is half way at step 2; without, 3/4 and 1/4 of lr.
    """
    asked = []

    def load(*args: Any, split: str) -> datasets.Dataset:
        asked.append((*args, split))
        return datasets.Dataset.from_list([ROWS[recipe](number) for number in range(100, 116)])

    monkeypatch.setattr(datasets, "load_dataset", load)
    config = read(recipe, "--model.path", str(model), "--train.run_dir", str(tmp_path / "run"))
    count = max(2, 8 // len(config.data.train))
    train = [replace(source, count=source.count and count) for source in config.data.train]
    short = {"data__train": train, "data__num_proc": 1, "batch__pairs_per_step": 4, "eval__samples": 0}
    length = {"train__steps": 2, "train__epochs": None, "reference__cache_dir": str(tmp_path / "cache")}
    lines = train_lines(run(changed(config, **short, **length)))
    sources = [*config.data.train, *config.data.eval]
    assert sorted(asked, key=str) == sorted(((source.path, source.name, source.split) for source in sources), key=str)
    first, second = lines
    if config.loss.name == "simpo":
        assert first["train/loss"] == pytest.approx(math.log1p(math.exp(config.loss.gamma)), abs=0.5)
    else:
        assert first["train/loss"] == pytest.approx(1.0 if config.loss.name == "apo_zero" else math.log(2), abs=1e-4)
    floor, lr = config.optim.min_lr_ratio, config.optim.lr
    factors = (0.75, 0.25) if config.optim.warmup_steps == 0 else (0.5, floor + (1 - floor) * 0.5)
    assert [first["train/lr"], second["train/lr"]] == pytest.approx([lr * factor for factor in factors])
