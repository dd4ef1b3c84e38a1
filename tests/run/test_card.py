"""Model cards: read back by huggingface_hub, against the config and the files from which they are written."""

import json
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from dpo.config import Config, LossConfig, OptimConfig
from dpo.export import program as export
from dpo.run import card_facts
from dpo.run.card import card_text, front_matter
from dpo.run.card_facts import Base, CardFacts, Exported, read_base
from tests.support.runs import changed, eval_lines, exit_code_of, make_config, run, save_six_steps, six_steps

ORIGIN = {
    "version": "9.8.7",
    "commit": "abc123",
    "dirty": True,
    "torch": "2.13.0",
    "transformers": "5.23.0",
    "data": {
        "train_pairs": 1754,
        "eval_pairs": 40,
        "sources": [
            {
                "key": "data.train[0]",
                "path": "Anthropic/hh-rlhf",
                "hub": True,
                "pairs": 1794,
                "dropped": {"empty": 4, "prompts_differ": 2},
                "held_out_pairs": 40,
            },
            {
                "key": "data.eval[0]",
                "path": "/home/me/secret/pairs.jsonl",
                "hub": False,
                "pairs": 7,
                "dropped": {},
                "held_out_pairs": 0,
            },
        ],
    },
}
METRICS = [
    {"step": step, "eval/loss": loss, "eval/rewards/accuracies": accuracy, "eval/rewards/margins": margin}
    for step, loss, accuracy, margin in ((0, 0.6931, 0.0, 0.0), (50, 0.61, 0.6, 0.2), (100, 0.5125, 0.75, 0.875))
]
HUB_BASE = Base("org/base", True, "org/base", {"license": "apache-2.0"})


def facts_of(**changes: object) -> CardFacts:
    """The facts of a run of 100 steps on a base of the hub, with changes of its config."""
    config = make_config("org/base", "Anthropic/hh-rlhf", "runs/my-run", **changes)
    return CardFacts(config, 100, HUB_BASE, Exported(True, False), ORIGIN, METRICS)


def rows(text: str) -> dict[str, list[str]]:
    """The rows of all tables of a card by their first cell."""
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    return {first: rest for first, *rest in cells}


def test_the_hub_reads_its_keys() -> None:
    card = ModelCard(card_text(facts_of()))
    assert card.data.to_dict() == {
        "base_model": "org/base",
        "base_model_relation": "finetune",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "license": "apache-2.0",
        "datasets": ["Anthropic/hh-rlhf"],
        "tags": ["dpo", "preference-optimization", "rlhf", "generated_from_trainer"],
    }


def test_the_text_tells_the_run() -> None:
    text = card_text(facts_of(loss__beta=0.3, optim__lr=5e-7, optim__schedule="cosine", train__seed=7))
    found = rows(text)
    assert "# my-run\n" in text and "arxiv.org/abs/2305.18290" in text and "@inproceedings{rafailov2023direct" in text
    assert found["base"] == ["[org/base](https://huggingface.co/org/base)"] and found["reference"] == ["the base"]
    assert found["loss"] == ["dpo, beta 0.3"]
    assert found["optimizer"] == ["rmsprop, learning rate 5e-07, warm-up over 150 steps, then cosine to 0 of it"]
    assert found["steps"] == ["100, each of 64 pairs, seed 7"]
    assert found["[Anthropic/hh-rlhf](https://huggingface.co/datasets/Anthropic/hh-rlhf)"] == [
        *("training", "1,794", "4 empty, 2 prompts_differ", "40")
    ]
    assert "An epoch has 1,754 pairs; 40 pairs are evaluated." in text
    assert (found["0"], found["100"]) == (["0.6931", "0.0000", "0.0000"], ["0.5125", "0.7500", "0.8750"])
    assert "50" not in found
    assert "dpo 9.8.7 (commit abc123, with changes), torch 2.13.0, transformers 5.23.0\n" in text


def test_an_earlier_checkpoint_has_the_result_of_its_step() -> None:
    found = rows(card_text(replace(facts_of(), step=99)))
    assert found["steps"] == ["99, each of 64 pairs, seed 0"]
    assert found["50"][0] == "0.6100" and "100" not in found


def test_a_card_tells_no_path_of_the_machine() -> None:
    facts = facts_of(reference__path="/home/me/secret/models/sft")
    facts = replace(facts, config=changed(facts.config, model__path="/home/me/secret/models/sft"))
    facts = replace(facts, base=Base("models/sft", False, None, {}))
    text = card_text(facts)
    assert "/home" not in text and "me/secret" not in text
    assert rows(text)["base"] == rows(text)["reference"] == ["`models/sft`"]
    assert rows(text)["`secret/pairs.jsonl`"] == ["evaluation", "7", "0", "0"]
    assert not {"base_model", "base_model_relation", "license"} & set(front_matter(facts))


def test_what_is_not_known_is_left_out() -> None:
    """A run of an older version, which counted no data, and one that evaluated nothing."""
    text = card_text(replace(facts_of(), origin={}, metrics=[{"step": 1, "train/loss": 0.7}]))
    assert [line for line in text.splitlines() if line.startswith("## ")] == ["## Training", "## Use", "## Citation"]
    assert "datasets" not in ModelCard(text).data.to_dict()


@pytest.mark.parametrize(
    ("loss", "words", "tag"),
    [
        (LossConfig("dpo", label_smoothing=0.1), "dpo, beta 0.1, label_smoothing 0.1", "dpo"),
        (LossConfig("simpo", beta=2.0, gamma=1.5), "simpo, beta 2, gamma 1.5", "simpo"),
        (LossConfig("ipo", length_normalized=True), "ipo, beta 0.1, length_normalized", "ipo"),
        (LossConfig("sft"), "sft", "sft"),
    ],
)
def test_losses(loss: LossConfig, words: str, tag: str) -> None:
    facts = facts_of()
    facts = replace(facts, config=replace(facts.config, loss=loss))
    assert rows(card_text(facts))["loss"] == [words]
    assert ("reference" in rows(card_text(facts))) is loss.facts.uses_reference
    assert front_matter(facts)["tags"][0] == tag


def test_schedules() -> None:
    for optim, words in (
        (OptimConfig(warmup_steps=0), "no warm-up, then constant"),
        (OptimConfig(warmup_steps=0.1, schedule="linear", min_lr_ratio=0.2), "warm-up over 10% of the steps, then"),
    ):
        facts = facts_of()
        facts = replace(facts, config=replace(facts.config, optim=optim))
        assert words in rows(card_text(facts))["optimizer"][0]


# --- adapters --------------------------------------------------------------------------------------------------------

ADAPTERS = {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"], "use_rslora": False, "use_dora": True}


def test_a_card_of_adapters() -> None:
    """The hub shows them below their base; peft loads them, onto a base that is loaded first."""
    settings = ADAPTERS | {"modules_to_save": ["embed_tokens", "lm_head"], "target_parameters": None}
    text = card_text(replace(facts_of(), exported=Exported(True, True, settings)))
    data = ModelCard(text).data
    assert (data.base_model, data["base_model_relation"], data.library_name) == ("org/base", "adapter", "peft")
    assert data.tags == ["dpo", "preference-optimization", "rlhf", "generated_from_trainer", "lora"]
    assert "These are LoRA adapters for [org/base](https://huggingface.co/org/base), trained by Direct" in text
    words = "rank 8, alpha 16, DoRA, on q_proj, v_proj, trained whole: embed_tokens, lm_head"
    assert rows(text)["adapters"] == [words]
    usage = text.partition("```python\n")[2].partition("```")[0].splitlines()
    assert usage == [
        "from peft import PeftModel",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        'base = AutoModelForCausalLM.from_pretrained("org/base", dtype="auto", trust_remote_code=True)',
        'model = PeftModel.from_pretrained(base, ".")  # this folder, or its id on the hub',
        'tokenizer = AutoTokenizer.from_pretrained(".", trust_remote_code=True)',
    ]


def test_a_card_of_a_model_that_adapters_were_added_to() -> None:
    """It is a model of its own; the config tells which adapters, or where they started."""
    keys = {"lora__rank": 4, "lora__rslora": True, "lora__target_parameters": ["experts.down_proj"]}
    text = card_text(facts_of(**keys))
    assert front_matter(facts_of(**keys))["base_model_relation"] == "finetune"
    assert "with LoRA adapters added to its weights, which were trained by Direct" in text
    assert 'AutoModelForCausalLM.from_pretrained("."' in text and "peft" not in text
    assert rows(text)["adapters"] == ["rank 4, alpha 8, rsLoRA, on all-linear, experts.down_proj"]
    found = rows(card_text(facts_of(lora__path="/home/me/secret/sft/final")))
    assert found["adapters"] == ["those of `sft/final`, trained further"]
    assert found["reference"] == ["the base with the adapters of `sft/final`"]
    found = rows(card_text(facts_of(lora__path="sft", reference__adapter="base")))
    assert found["reference"] == ["the base"]
    assert "adapters" not in rows(card_text(facts_of())) and "lora" not in front_matter(facts_of())["tags"]


# --- the base --------------------------------------------------------------------------------------------------------


def test_the_licence_of_the_base(tmp_path: Path) -> None:
    """By its card; else by the text of its licence; else by the name of the file; else not at all."""
    cases = {
        "card": {"README.md": "---\nlicense: other\nlicense_name: x\n---\n# Base\n", "LICENSE": "MIT License"},
        "apache": {"LICENSE": "                  Apache License\n            Version 2.0, January 2004", "NOTICE": "x"},
        "mit": {"license.txt": "MIT License\n\nCopyright (c) 2023"},
        "own": {"LICENSE.txt": "Community licence"},
        "none": {"README.md": "---\n[\n---\n"},
        "no date": {"README.md": "---\ndate: 2024-02-30\n---\n"},
    }
    for name, files in cases.items():
        (tmp_path / name).mkdir()
        for file, text in files.items():
            (tmp_path / name / file).write_text(text)
    found = {name: read_base("x", tmp_path / name).licence for name in cases}
    assert found == {
        "card": {"license": "other", "license_name": "x"},
        "apache": {"license": "apache-2.0"},
        "mit": {"license": "mit"},
        "own": {"license": "other", "license_link": "LICENSE.txt"},
        "none": {},
        "no date": {},
    }


def test_the_id_of_the_base(tmp_path: Path) -> None:
    """A snapshot of the hub's cache; a folder of a run, whose card names the hub's model that it comes from."""
    snapshot = tmp_path / "models--org--name" / "snapshots" / "0123"
    tuned = tmp_path / "runs" / "sft"
    for folder in (snapshot, tuned):
        folder.mkdir(parents=True)
    (tuned / "README.md").write_text("---\nbase_model: org/name\n---\n")
    assert read_base("org/name", snapshot) == Base("org/name", True, "org/name", {})
    assert read_base(str(tuned), tuned) == Base("runs/sft", False, "org/name", {})


# --- in a run --------------------------------------------------------------------------------------------------------


@pytest.fixture
def config(tmp_path: Path) -> Config:
    save_six_steps(tmp_path)
    return six_steps(tmp_path, tmp_path / "my-run", train__steps=2, train__eval_every=1)


def test_final_has_a_card_of_its_own(config: Config, tmp_path: Path) -> None:
    """Its numbers are those of metrics.jsonl and of the files; the card of the base is not copied over it."""
    (tmp_path / "model" / "README.md").write_text("---\nlicense: mit\n---\nthe card of the base\n")
    run_dir = run(config)
    card = ModelCard.load(run_dir / "final" / "README.md")
    assert "the card of the base" not in card.content
    assert card.data.license == "mit" and card.data.base_model is None
    first, *_, last = eval_lines(run_dir)
    found = rows(card.text)
    assert found["0"][0] == f"{first['eval/loss']:z.4f}" and found["2"][0] == f"{last['eval/loss']:z.4f}"
    assert found["steps"] == ["2, each of 4 pairs, seed 0"]
    assert "An epoch has 8 pairs; 2 pairs are evaluated." in card.text  # as `save_six_steps` writes them
    [start] = json.loads((run_dir / "provenance.json").read_text())
    assert [source["pairs"] for source in start["data"]["sources"]] == [8, 2]
    assert str(tmp_path) not in card.content


def test_adapters_have_a_card(config: Config, tmp_path: Path) -> None:
    """Of a run, with the version of peft; it tells no path of the machine, other than adapter_config.json."""
    run_dir = run(changed(config, lora__rank=2, lora__target_modules=["v_proj", "q_proj"]))
    card = ModelCard.load(run_dir / "final" / "README.md")
    assert rows(card.text)["adapters"] == ["rank 2, alpha 4, on q_proj, v_proj"]
    assert f", peft {version('peft')}, " in card.text and str(tmp_path) not in card.content
    assert str(tmp_path) in (run_dir / "final" / "adapter_config.json").read_text()
    [start] = json.loads((run_dir / "provenance.json").read_text())
    assert start["peft"] == version("peft")


def test_damaged_metrics_cost_the_card_alone(config: Config, capsys: pytest.CaptureFixture[str]) -> None:
    run_dir = run(config)
    (run_dir / "metrics.jsonl").write_text("no metrics\n")
    words = ("--checkpoint", str(run_dir / "checkpoints" / "step-000002"), "--out", str(run_dir / "again"))
    assert exit_code_of(export.main, "dpo.export", *words) == 0
    final, again = ({path.name for path in (run_dir / name).iterdir()} for name in ("final", "again"))
    assert final - again == {"README.md"} and again < final
    assert "WARNING: the exported model has no README.md: " in capsys.readouterr().err


def test_a_card_of_odd_names_costs_no_model(config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A base whose card has a date that does not exist, and a run folder whose name is no UTF-8."""
    (tmp_path / "model" / "README.md").write_text("---\ndate: 2024-02-30\nlicense: mit\n---\n")
    run_dir = run(changed(config, train__run_dir=str(tmp_path / "my\udcffrun")))
    text = (run_dir / "final" / "README.md").read_text(encoding="utf-8")
    assert "# my?run\n" in text and "license" not in text
    assert "has no README.md" not in capsys.readouterr().err


@pytest.mark.parametrize("failure", [PermissionError(13, "Permission denied", "README.md"), ZeroDivisionError("any")])
def test_a_card_that_fails_is_told_with_its_reason(
    config: Config, failure: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A base whose README cannot be read, and a fault of our own."""

    def unreadable(card: Path) -> None:
        raise failure

    monkeypatch.setattr(card_facts, "front_matter_of", unreadable)
    final = run(config) / "final"
    assert {"config.json", "model.safetensors"} < {path.name for path in final.iterdir()}
    assert not (final / "README.md").exists()
    told = f"WARNING: the exported model has no README.md: {type(failure).__name__}: {failure}"
    assert told in capsys.readouterr().err
