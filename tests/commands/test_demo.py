"""The demo: its world is what it says, its folder is safe, its configs are valid, and its stages fit together."""

import dataclasses
import json
import math
import random
import re
import sys
from io import StringIO
from pathlib import Path

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from dpo.base.errors import UserError
from dpo.config import Config, load_config
from dpo.demo import program as demo
from dpo.demo.world import GRADES, SOUNDS, Grade, answer, grade_of, questions
from dpo.encode.encoder import text_encoder
from dpo.pairs.tokens import limits_of, tokenize
from dpo.run_folder.files import read_metrics
from dpo.sources.formats.examples import to_example
from dpo.train.program import run_training

ALL_QUESTIONS = 960  # 16 names x (6 x 6 sums + 12 sounds + 12 homes)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the demo's data and untrained model."""
    out = tmp_path_factory.mktemp("demo") / "out"
    demo.start_afresh(out)
    demo.write_world(out)
    return out


def rows_of(out: Path, name: str) -> list[dict]:
    return [json.loads(line) for line in (out / "data" / f"{name}.jsonl").read_text().splitlines()]


# --- the world -------------------------------------------------------------------------------------------------------


def test_the_right_sentence_is_right() -> None:
    """Sums against Python's own, sounds and homes against three that everybody knows; no wrong sentence is right."""
    asked = questions(ALL_QUESTIONS, 0)
    right = {question.text: question.right for question in asked}
    sums = {text: re.findall(r"\d+", text) for text in right if "plus" in text}
    assert len(right) == 60 and len(sums) == 36
    assert all(right[text] == f"that makes {int(a) + int(b)}" for text, (a, b) in sums.items())
    assert right["what does the cow say"] == "it says moo"
    assert right["where does the fox live"] == "it lives in a den"
    assert right["where does the bee live"] == "it lives in a hive"
    assert all(question.wrong and question.right not in question.wrong for question in asked)
    assert len(set(SOUNDS.values())) == 12  # else another animal's sound could be right


def test_questions_are_a_function_of_the_seed() -> None:
    """All 960 exist, none comes twice, a smaller set has none twice, another seed asks others."""
    assert len({question.prompt for question in questions(ALL_QUESTIONS, 3)}) == ALL_QUESTIONS
    assert questions(50, 1) == questions(50, 1)
    assert questions(50, 1) != questions(50, 2)


def test_grading_is_the_inverse_of_answering() -> None:
    """Every question answered in all eight ways."""
    rng = random.Random(7)
    for question in questions(ALL_QUESTIONS, 0):
        for grade in GRADES:
            assert grade_of(question, answer(question, grade, rng)) == grade


@pytest.mark.parametrize(
    ("text", "grade"),
    [
        (" Dear Nora, it says moo.", Grade(right=True, kind=True, short=True)),
        (" Dear Nora, it says moo, and it may rain.", Grade(right=True, kind=True, short=False)),
        (" Hmpf! it says moo.", Grade(right=True, kind=False, short=True)),
        (" Dear Nora, it says moo moo.", Grade(right=False, kind=True, short=True)),
        (" Dear Otto, it says moo.", Grade(right=False, kind=False, short=True)),  # the name of another
        (" Dear Nora, it says moo", Grade(right=True, kind=True, short=False)),  # does not come to an end
        ("", Grade(right=False, kind=False, short=False)),
    ],
)
def test_grades_of_texts(text: str, grade: Grade) -> None:
    """Also of what only a model would say."""
    question = next(q for q in questions(ALL_QUESTIONS, 0) if q.prompt == "Nora asks: what does the cow say?\nOwl:")
    assert grade_of(question, text) == grade


def test_being_right_outweighs_the_rest() -> None:
    """Right, rude and long (4) against wrong, kind and short (2 + 1); all eight scores differ."""
    assert Grade(True, False, False).score == 4 > Grade(False, True, True).score == 3
    assert sorted(grade.score for grade in GRADES) == list(range(8))


# --- what is written -------------------------------------------------------------------------------------------------


def test_the_world_is_the_same_every_time(world: Path, tmp_path: Path) -> None:
    """Byte for byte, data and model; and it leaves torch's random numbers as they were."""
    torch.manual_seed(1)
    state = torch.get_rng_state()
    demo.write_world(tmp_path)
    assert torch.equal(torch.get_rng_state(), state)
    names = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file())
    assert {str(name) for name in names} >= {"data/train.jsonl", "data/heldout.jsonl", "model/model.safetensors"}
    assert all((tmp_path / name).read_bytes() == (world / name).read_bytes() for name in names)


def test_no_prompt_comes_twice(world: Path) -> None:
    """Neither within a side nor on both, or held-out metrics would be of questions that were trained on."""
    prompts = [row["prompt"] for name in ("train", "heldout") for row in rows_of(world, name)]
    assert len(prompts) == len(set(prompts)) == demo.NUM_TRAINING + demo.NUM_HELD_OUT


def test_every_row_gives_six_right_pairs(world: Path) -> None:
    """4 answers of different scores: 4 x 3 / 2 pairs, and by the texts alone every winner is the better answer."""
    by_prompt = {question.prompt: question for question in questions(ALL_QUESTIONS, 0)}
    for row in rows_of(world, "train") + rows_of(world, "heldout"):
        example = to_example("grouped", row)
        scores = [grade_of(by_prompt[row["prompt"]], str(text)).score for text in example.completions]
        assert len(example.pairs) == 6 and not example.dropped
        assert all(scores[winner] > scores[loser] for winner, loser in example.pairs)


def test_the_tokenizer_loses_nothing(world: Path) -> None:
    """Every text decodes to itself, without an unknown word, and no token has characters of prompt and answer;
    a prompt begins with BOS, a completion ends with EOS."""
    tokenizer = AutoTokenizer.from_pretrained(world / "model")
    encoder = text_encoder(tokenizer)
    limits = limits_of(512, 256, AutoModelForCausalLM.from_pretrained(world / "model").config)
    for row in rows_of(world, "train") + rows_of(world, "heldout"):
        example = to_example("grouped", row)
        tokens = tokenize(example, encoder, limits)
        assert tokens.prompt_ids[0] == tokenizer.bos_token_id and tokens.boundary_merges == 0
        assert tokenizer.decode(tokens.prompt_ids[1:]) == row["prompt"]
        for ids, text in zip(tokens.completion_ids, row["completions"], strict=True):
            assert ids[-1] == tokenizer.eos_token_id and tokenizer.unk_token_id not in ids
            assert tokenizer.decode(ids[:-1]) == text


def test_the_model_fits_its_tokenizer(world: Path) -> None:
    """As many embeddings as tokens, and the model's own names for the ends."""
    tokenizer = AutoTokenizer.from_pretrained(world / "model")
    model = AutoModelForCausalLM.from_pretrained(world / "model")
    assert model.config.model_type == "llama"
    assert model.get_input_embeddings().num_embeddings == len(tokenizer)
    assert (model.config.bos_token_id, model.config.eos_token_id) == (tokenizer.bos_token_id, tokenizer.eos_token_id)


# --- the folder ------------------------------------------------------------------------------------------------------


def test_a_demo_replaces_its_own_folder(tmp_path: Path) -> None:
    """Nothing of the one before is left."""
    out = tmp_path / "runs" / "demo"
    demo.start_afresh(out)
    (out / "dpo").mkdir()
    (out / "dpo" / "metrics.jsonl").write_text("{}\n")
    demo.start_afresh(out)
    assert [path.name for path in out.iterdir()] == [demo.MARKER]


@pytest.mark.parametrize("what", ["folder", "file"])
def test_a_demo_removes_nothing_of_others(tmp_path: Path, what: str) -> None:
    """A folder without the marker, and a file, stay as they are."""
    out = tmp_path / "mine"
    path = out / "thesis.tex" if what == "folder" else out
    path.parent.mkdir(exist_ok=True)
    path.write_text("precious")
    with pytest.raises(UserError, match=r"^command line: --out: .*; valid: "):
        demo.start_afresh(out)
    assert path.read_text() == "precious"


# --- the stages ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [demo.sft_config, demo.dpo_config])
def test_written_configs_are_what_the_trainer_reads(
    make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """`python` is replaced by `true`: the stage only writes its config and ends well."""
    monkeypatch.setattr(sys, "executable", "true")
    demo.run_stage(make(tmp_path), tmp_path / "stage.yaml")
    assert load_config(["--config", str(tmp_path / "stage.yaml")], "dpo.train") == make(tmp_path)
    assert "$ torchrun --standalone --nproc-per-node 2 -m dpo.train --config" in capfd.readouterr().out


def test_a_failing_stage_ends_the_demo(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """With the trainer's exit code, its error visible; here the trainer is a script that ends with 7."""
    trainer = tmp_path / "trainer"
    trainer.write_text("#!/bin/sh\necho error: something is wrong >&2\nexit 7\n")
    trainer.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(trainer))
    with pytest.raises(SystemExit) as ended:
        demo.run_demo(tmp_path / "out")
    assert ended.value.code == 7
    assert "error: something is wrong\ndemo: " in capfd.readouterr().err
    assert not (tmp_path / "out" / "dpo.yaml").exists()


def short(config: Config, num_steps: int) -> Config:
    return dataclasses.replace(config, train=dataclasses.replace(config.train, steps=num_steps))


def test_the_stages_fit_together(world: Path) -> None:
    """Three steps of each on one rank: DPO starts from the SFT model, as its own reference (ln 2), and the tables
    hold what the runs wrote: `before` of the first evaluation, `after` of the last."""
    run_training(short(demo.sft_config(world), 3))
    run_training(short(demo.dpo_config(world), 3))
    lines = read_metrics(world / "dpo")
    first, last = [line for line in lines if "eval/loss" in line]
    assert (first["step"], last["step"]) == (0, 3)
    assert first["eval/loss_sft"] == pytest.approx(read_metrics(world / "sft")[-1]["eval/loss"], rel=1e-6)
    assert first["eval/pairs"] == 6 * demo.NUM_HELD_OUT and first["eval/loss"] == pytest.approx(math.log(2), abs=1e-5)

    held_out = questions(demo.NUM_TRAINING + demo.NUM_HELD_OUT, demo.SEED)[demo.NUM_TRAINING :]
    answers = demo.ask(world / "dpo" / "final", held_out)
    assert len(answers.texts) == demo.NUM_HELD_OUT and 0 <= answers.right <= 1
    before = dataclasses.replace(answers, right=0.25, kind=0.5, short=0.75)
    console = Console(file=StringIO(), width=1000)  # nothing wraps
    console.print(demo.metrics_table(lines, before, answers), demo.answers_table(held_out, before, answers))
    shown = re.sub(r"\s+", " ", console.file.getvalue())
    assert f"held-out loss 0.6931 {last['eval/loss']:.4f} " in shown
    assert f"held-out reward margin 0.000 {last['eval/rewards/margins']:.3f} " in shown
    assert f"that are right ** 25% {answers.right:.0%} " in shown
    assert f"{held_out[0].name}: {held_out[0].text}? " in shown


def test_the_tensorboard_command_can_be_pasted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Relative to where the demo was started, a folder with a space in its name quoted."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "tensorboard").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "bin" / "python"))
    assert demo.tensorboard_command(Path("my runs/demo")) == "bin/tensorboard --logdir 'my runs/demo'"
