"""The few answers that a run shows: to which prompts, whose, and what a resume keeps of them."""

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import astuple, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dpo.board.sink import Answer
from dpo.config import Config, SourceConfig
from dpo.distributed.startup import open_world
from dpo.distributed.world import World
from dpo.model.build import load_policy
from dpo.model.model_config import read_model_config
from dpo.model.policy import Policy
from dpo.report.record import read_record
from dpo.run.answers import (
    AnswerBook,
    Questions,
    answer,
    choose_prompts,
    open_answers,
    prepare_answers,
    prompt_text,
    read_answers,
)
from dpo.run.inputs import Inputs, read_inputs
from dpo.run_folder.files import answers_path
from tests.model.test_generation import plain_draw, plain_greedy
from tests.support.data_fixtures import BOS, EOS, ids, make_tokenizer
from tests.support.models import plain_model, save_model, save_pairs
from tests.support.runs import changed, make_config, run, run_until

NEW = 5


@pytest.fixture
def world() -> Iterator[World]:
    with open_world(60) as world:
        yield world


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """model/ with a tokenizer of one character a token, other/, pairs.jsonl, and eval.jsonl with 7 prompts of two pairs
    each.
    """
    root = tmp_path_factory.mktemp("answers")
    make_tokenizer().save_pretrained(save_model(root / "model", "llama"))
    save_model(root / "other", "llama-tied", seed=1)
    save_pairs(root / "pairs.jsonl", 4)
    save_pairs(root / "eval.jsonl", 7, seed=1, completions=3, pairs_each=2)
    return root


@pytest.fixture
def config(folders: Path, tmp_path: Path) -> Config:
    return make_config(
        folders / "model",
        folders / "pairs.jsonl",
        tmp_path / "run",
        data__eval=[SourceConfig(str(folders / "eval.jsonl"))],
        batch__pairs_per_step=4,
        eval__samples=3,
        eval__max_new_tokens=NEW,
    )


@pytest.fixture
def inputs(config: Config, world: World) -> Inputs:
    return read_inputs(config, world)


def load(config: Config, world: World, folder: Path) -> Policy:
    return load_policy(config, world, read_model_config(folder, False), folder)


def never() -> Policy:
    raise AssertionError("the reference is asked again")


def eval_prompts(folders: Path) -> list[list[int]]:
    return [json.loads(line)["prompt_ids"] for line in (folders / "eval.jsonl").read_text().splitlines()]


def text(ids: list[int]) -> str:
    """The characters of ids by hand (see `data_fixtures.ids`), a space between them, since that tokenizer has no other
    decoder; ids before 3 are special and not shown.
    """
    return " ".join(chr(token + 29) for token in ids if token > 2)


# --- the questions ---------------------------------------------------------------------------------------------------


def test_prompts_are_different_and_spread_over_the_set(inputs: Inputs, folders: Path) -> None:
    """Of 7 prompts in file order 3 are numbers 0, 7/3 and 14/3, rounded down; never one twice, though each has two
    pairs.
    """
    prompts = eval_prompts(folders)
    assert choose_prompts(inputs.data.eval, 3) == [prompts[0], prompts[2], prompts[4]]
    assert choose_prompts(inputs.data.eval, 1) == [prompts[0]]
    assert choose_prompts(inputs.data.eval, 7) == choose_prompts(inputs.data.eval, 100) == prompts
    assert choose_prompts(inputs.data.eval, 0) == []


@pytest.mark.parametrize("marks", [[], [EOS]], ids=["text", "the end of a turn before it"])
def test_a_prompt_is_shown_without_its_bos(marks: list[int]) -> None:
    """Other special tokens stay, as those of a chat must; the characters have a space between them (`text`)."""
    shown = ["</s>"] * len(marks) + ["H", "i"]
    assert prompt_text(make_tokenizer(), [BOS, *marks, *ids("Hi")]) == " ".join(shown)
    assert prompt_text(make_tokenizer(), [*marks, *ids("Hi")]) == " ".join(shown)


def test_an_answer_ends_with_the_tokenizers_eos_and_the_models(config: Config, world: World, folders: Path) -> None:
    """Also with the stop tokens of generation_config.json, which the model's config.json does not name."""
    folder = Path(shutil.copytree(folders / "model", folders / "stops"))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, EOS, 9]}))
    now = changed(config, model__path=str(folder))
    book = prepare_answers(now, world, read_inputs(now, world), lambda: load(now, world, folder))
    assert book and book.questions.rule.eos_ids == (EOS, 7, 9)


# --- the answers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.0, 2.0])
def test_answers_are_those_of_the_plain_models(
    temperature: float, config: Config, world: World, inputs: Inputs, folders: Path
) -> None:
    """Policy and reference side by side, decoded by hand; the folder has the same, one line an answer."""
    config = changed(config, eval__temperature=temperature, train__seed=8)
    book = prepare_answers(config, world, inputs, lambda: load(config, world, folders / "model"))
    assert isinstance(book, AnswerBook)
    open_answers(book, 0)
    found = answer(load(config, world, folders / "other"), book, 12)
    prompts = [eval_prompts(folders)[number] for number in (0, 2, 4)]
    expected = []
    for prompt in prompts:
        says = []
        for folder in ("model", "other"):
            model = plain_model(folders / folder)
            ids = plain_draw(model, prompt, 8, 2.0, NEW) if temperature else plain_greedy(model, prompt, NEW)
            says.append(text(ids[: ids.index(EOS)] if EOS in ids else ids))
        expected.append(Answer(text(prompt), *says))
    assert found == expected
    lines = (Path(str(config.train.run_dir)) / "answers" / "step-000012.jsonl").read_text().splitlines()
    assert [Answer(**json.loads(line)) for line in lines] == expected
    assert len({astuple(one)[1:] for one in expected}) == 3


def test_the_reference_answers_once(config: Config, world: World, inputs: Inputs, folders: Path) -> None:
    """The second start finds its answers in the folder; the policy was trained meanwhile."""
    policy = load(config, world, folders / "model")
    book = prepare_answers(config, world, inputs, lambda: policy)
    assert book
    open_answers(book, 0)
    with torch.no_grad():
        for parameter in policy.model.parameters():
            parameter.mul_(-1)
    again = prepare_answers(config, world, inputs, never)
    assert again and again.references == book.references
    assert [one.reference for one in answer(policy, again, 3)] == list(book.references)
    assert [one.policy for one in answer(policy, again, 3)] != list(book.references)


def test_before_training_both_answer_alike(config: Config, world: World, inputs: Inputs, folders: Path) -> None:
    policy = load(config, world, folders / "model")
    book = prepare_answers(config, world, inputs, lambda: policy)
    assert book
    answers = answer(policy, book, 0)
    assert [one.policy for one in answers] == [one.reference for one in answers]


CHANGES: dict[str, Callable[[Config, Inputs], tuple[Config, Inputs]]] = {
    "reference": lambda config, inputs: (config, replace(inputs, reference=replace(inputs.reference, hash="other"))),
    "questions": lambda config, inputs: (changed(config, eval__samples=2), inputs),
    "max_new_tokens": lambda config, inputs: (changed(config, eval__max_new_tokens=NEW + 1), inputs),
    "temperature": lambda config, inputs: (changed(config, eval__temperature=1.0), inputs),
}


@pytest.mark.parametrize("what", CHANGES)
def test_answers_of_something_else_are_made_again(
    what: str, config: Config, world: World, inputs: Inputs, folders: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By the reference, and it is said why; the file is then that of the new ones."""
    first = prepare_answers(config, world, inputs, lambda: load(config, world, folders / "model"))
    assert first
    open_answers(first, 0)
    other_config, other_inputs = CHANGES[what](config, inputs)
    capsys.readouterr()
    second = prepare_answers(other_config, world, other_inputs, lambda: load(config, world, folders / "other"))
    assert f"answers/reference.json does not match this run's {what}: " in capsys.readouterr().err
    assert second and second.references[:2] != first.references[:2]
    open_answers(second, 0)
    again = prepare_answers(other_config, world, other_inputs, never)
    assert again and again.references == second.references


def test_the_seed_matters_for_draws_alone(config: Config, world: World, inputs: Inputs, folders: Path) -> None:
    asked: list[None] = []

    def reference() -> Policy:
        asked.append(None)
        return load(config, world, folders / "model")

    for temperature in (0.0, 1.0):
        for seed in (0, 1, 1):
            now = changed(config, eval__temperature=temperature, train__seed=seed)
            book = prepare_answers(now, world, inputs, reference)
            assert book
            open_answers(book, 0)
    assert len(asked) == 1 + 2


@pytest.mark.parametrize("content", [b"", b"[]", b'{"belongs_to": 3}', b"\xff"])
def test_a_broken_file_is_no_answer(
    content: bytes, config: Config, world: World, inputs: Inputs, folders: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = Path(str(config.train.run_dir)) / "answers" / "reference.json"
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    book = prepare_answers(config, world, inputs, lambda: load(config, world, folders / "model"))
    assert book and len(book.references) == 3
    assert "answers/reference.json does not match this run's format: " in capsys.readouterr().err


def test_a_resume_keeps_what_came_before_it(config: Config, world: World, inputs: Inputs, folders: Path) -> None:
    """From step 4: answers after 0 and 4 stay, those of the future that is given up go, also beyond six digits; an
    evaluation that is made again replaces its answers.
    """
    policy = load(config, world, folders / "model")
    book = prepare_answers(config, world, inputs, lambda: policy)
    assert book
    for step in (0, 4, 8, 1_000_000):
        answer(policy, book, step)
    open_answers(book, 4)
    names = ["reference.json", "step-000000.jsonl", "step-000004.jsonl"]
    assert sorted(path.name for path in book.folder.iterdir()) == names
    answer(policy, book, 4)
    assert len((book.folder / "step-000004.jsonl").read_text().splitlines()) == 3


# --- in a run --------------------------------------------------------------------------------------------------------


@pytest.fixture
def short(config: Config) -> Config:
    """Four steps that move the weights visibly, with a checkpoint and answers after each, greedy and few."""
    steps = {"train__steps": 4, "train__eval_every": 1, "optim__lr": 1e-2, "optim__warmup_steps": 0}
    return changed(config, checkpoint__save_every=1, **steps)


def contents(run_dir: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (run_dir / "answers").iterdir()}


def test_a_resumed_run_has_the_answers_of_one_that_was_not_stopped(short: Config, tmp_path: Path) -> None:
    """To the byte; also where the reference's file is lost meanwhile: never the resumed policy answers for it."""
    whole = contents(run(short))
    assert sorted(whole) == ["reference.json", *(f"step-{step:06d}.jsonl" for step in range(5))]
    assert whole["step-000000.jsonl"] != whole["step-000004.jsonl"]
    parts = changed(short, train__run_dir=str(tmp_path / "parts"))
    shutil.copytree(run_until(parts, 3), tmp_path / "lost")
    (tmp_path / "lost" / "answers" / "reference.json").unlink()
    for config in (parts, changed(parts, train__run_dir=str(tmp_path / "lost"))):
        assert contents(run(config)) == whole


@pytest.mark.parametrize(("other", "times"), [(False, 5), (True, 6)])
def test_what_the_reference_said_is_not_asked_again(
    other: bool, times: int, short: Config, folders: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run of four steps asks the reference and, after each step, the policy; before the first step the policy too,
    where it is another than the reference.
    """
    asked: list[int] = []
    ask = Questions.ask
    monkeypatch.setattr(Questions, "ask", lambda *args: asked.append(1) or ask(*args))
    written = contents(run(changed(short, reference__path=str(folders / "other")) if other else short))
    assert len(asked) == times
    answers = [json.loads(line) for line in written["step-000000.jsonl"].splitlines()]
    assert len(answers) == 3 and all((one["policy"] != one["reference"]) == other for one in answers)


def test_another_reference_is_loaded_once_and_only_where_it_is_needed(
    short: Config, folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Models loaded by a run: policy and reference where the cache is empty, and where it is full, for the answers
    alone; on a resume the policy alone.
    """
    loaded: list[str] = []

    def count(config: Config, world: World, model_config: Any, folder: Path, adapters: Any) -> Policy:
        loaded.append(folder.name)
        return load_policy(config, world, model_config, folder, adapters)

    monkeypatch.setattr("dpo.model.warm_up.load_policy", count)
    short = changed(short, reference__path=str(folders / "other"), train__steps=2)
    run_until(short, 2)
    assert loaded == ["model", "other"]
    run(short)
    assert loaded == ["model", "other", "model"]
    run(changed(short, train__run_dir=str(tmp_path / "again")))
    assert loaded == ["model", "other", "model", "model", "other"]
    run(changed(short, train__run_dir=str(tmp_path / "silent"), eval__samples=0))
    assert loaded[5:] == ["model"]


# --- no answers ------------------------------------------------------------------------------------------------------


def test_none_without_a_tokenizer(
    config: Config, world: World, folders: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = changed(config, model__path=str(folders / "other"))
    inputs = read_inputs(config, world)
    capsys.readouterr()
    assert prepare_answers(config, world, inputs, never) is None
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("no sampled answers, which need a tokenizer: model.tokenizer: ")


@pytest.mark.parametrize("changes", [{"eval__samples": 0}, {"data__eval": []}])
def test_none_where_nothing_is_asked(
    changes: dict[str, Any], config: Config, world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    config = changed(config, **changes)
    inputs = read_inputs(config, world)
    capsys.readouterr()
    assert prepare_answers(config, world, inputs, never) is None
    assert capsys.readouterr().err == ""


def test_sft_stands_beside_the_model_before_training(config: Config, world: World, folders: Path) -> None:
    """Nothing is hashed for sft, so the answers belong to the model's folder."""
    config = changed(config, loss__name="sft")
    inputs = read_inputs(config, world)
    book = prepare_answers(config, world, inputs, lambda: load(config, world, folders / "model"))
    assert book and book.belongs_to["reference"] == str(folders / "model")


def test_answers_with_line_ends_of_their_own(tmp_path: Path) -> None:
    """Both readers, the run's and the report's: JSON keeps U+2028, U+2029 and U+0085 as they are."""
    text = "one\u2028two\u2029three\x85four\x0cfive"
    row = {"prompt": text, "reference": "", "policy": text}
    path = answers_path(tmp_path, 3)
    path.parent.mkdir()
    path.write_text(2 * (json.dumps(row, ensure_ascii=False) + "\n"), encoding="utf-8")
    book: Any = SimpleNamespace(folder=path.parent)
    assert read_answers(book, 3) == 2 * [Answer(**row)] and read_answers(book, 4) == []
    record = read_record(tmp_path)
    assert record.answers == {3: (row, row)} and not record.faults
