"""`python -m dpo.sample`: answers as the plain model gives them to prompts encoded by hand, and what is refused."""

import contextlib
import io
import json
import shutil
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from dpo.base.errors import UserError
from dpo.encode.encoder import text_encoder
from dpo.pairs.tokens import Limits
from dpo.sample import program as sample
from dpo.sample import questions
from tests.machine.test_toolchain import facts
from tests.model.test_generation import plain_draw, plain_greedy
from tests.support.data_fixtures import BOS, EOS, VOCAB_SIZE, ids, make_tokenizer, write_jsonl
from tests.support.models import family_config, plain_model, save_model, save_pairs
from tests.support.peft_folders import adapted_model, save_adapter
from tests.support.ranks import Ranks
from tests.support.runs import exit_code_of, make_config
from tests.support.runs import run as run_training

NEW = 6


def save_talker(folder: Path, family: str, seed: int, **tokenizer: Any) -> Path:
    """A model with the tokenizer of one character a token, which adds BOS unless it is told otherwise."""
    config = family_config(family)
    config.vocab_size = VOCAB_SIZE
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    make_tokenizer(**({"bos": True} | tokenizer)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """policy/ and reference/, of two families; gpt2/ with 256 positions; tuned/ and other/, adapters of policy/, and
    gpt2-tuned/.
    """
    root = tmp_path_factory.mktemp("sample")
    save_talker(root / "policy", "llama", 0)
    save_talker(root / "reference", "gpt-neox", 1)
    save_talker(root / "gpt2", "gpt2", 2)
    save_adapter(root / "tuned", root / "policy", seed=1)
    save_adapter(root / "other", root / "policy", seed=2, use_dora=True)
    save_adapter(root / "gpt2-tuned", root / "gpt2", seed=3)
    return root


def run(*argv: str) -> int:
    return exit_code_of(sample.main, "dpo.sample", *argv)


def text(answer: list[int]) -> str:
    """An answer by hand: up to EOS, a space between the characters, since that tokenizer has no other decoder."""
    answer = answer[: answer.index(EOS)] if EOS in answer else answer
    return " ".join(chr(token + 29) for token in answer if token > 2)


def rows_of(stdout: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in stdout.splitlines()]


# --- answers ---------------------------------------------------------------------------------------------------------


def test_lines_of_text(folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each is BOS and its characters; blank lines are passed over, blanks within are kept; both models answer."""
    (tmp_path / "prompts.txt").write_text("ab\n\n  \nWhy? \r\nno [bold]end")
    given = ["ab", "Why? ", "no [bold]end"]
    argv = ["--prompts", str(tmp_path / "prompts.txt"), "--max-new-tokens", str(NEW), "--json"]
    assert run("--model", str(folders / "policy"), "--reference", str(folders / "reference"), *argv) == 0
    models = {name: plain_model(folders / name) for name in ("policy", "reference")}
    expected = [
        {"prompt": prompt}
        | {name: text(plain_greedy(model, [BOS, *ids(prompt)], NEW)) for name, model in models.items()}
        for prompt in given
    ]
    assert rows_of(capsys.readouterr().out) == expected
    assert len({row["policy"] for row in expected} | {row["reference"] for row in expected}) > 3


def test_rows_of_texts_and_messages_are_drawn(
    folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Messages as the chat template writes them, up to where the assistant begins, and without a BOS of the tokenizer;
    other columns of a preference file do not matter.
    """
    messages = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "a"},
        {"role": "user", "content": "b"},
    ]
    path = write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": "ab\n", "chosen": "x"}, {"prompt": messages}])
    argv = ["--prompts", path, "--max-new-tokens", str(NEW), "--temperature", "2", "--seed", "4", "--json"]
    assert run("--model", str(folders / "policy"), *argv) == 0
    chat = [*ids("[user]hi"), EOS, *ids("[assistant]a"), EOS, *ids("[user]b"), EOS, *ids("[assistant]")]
    model = plain_model(folders / "policy")
    says = [text(plain_draw(model, prompt, 4, 2.0, NEW)) for prompt in ([BOS, *ids("ab\n")], chat)]
    expected = [{"prompt": "ab\n", "policy": says[0]}, {"prompt": messages, "policy": says[1]}]
    assert rows_of(capsys.readouterr().out) == expected


@pytest.mark.parametrize("flags", [[], ["--as-chat"]])
def test_texts_for_a_model_with_a_chat_template(
    flags: list[str], folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """They are given as they are with a warning, or with --as-chat as a user's message. A text that spells a control
    token, as a template writes it, is no text to warn of.
    """
    (tmp_path / "prompts.txt").write_text("hi\nab\n[user]hi</s>[assistant]\n")
    argv = ["--prompts", str(tmp_path / "prompts.txt"), "--max-new-tokens", str(NEW), "--json", *flags]
    assert run("--model", str(folders / "policy"), *argv) == 0
    captured = capsys.readouterr()
    chat, model = [*ids("[user]hi"), EOS, *ids("[assistant]")], plain_model(folders / "policy")
    prompt = chat if flags else [BOS, *ids("hi")]
    assert rows_of(captured.out)[0]["policy"] == text(plain_greedy(model, prompt, NEW))
    warnings = [line for line in captured.err.splitlines() if line.startswith("WARNING")]
    assert len(warnings) == (0 if flags else 1)
    for words in ("2 prompts are texts", "without its chat template", "--as-chat", "as_chat: true"):
        assert flags or words in warnings[0]


def test_generation_ends_at_every_stop_token(folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """At a stop token that generation_config.json alone names, the second of the plain model's answer."""
    folder = Path(shutil.copytree(folders / "policy", tmp_path / "model"))
    answer = plain_greedy(plain_model(folder), [BOS, *ids("ab")], NEW)
    assert len(answer) == NEW and answer[1] not in (answer[0], EOS)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [EOS, answer[1]]}))
    (tmp_path / "prompts.txt").write_text("ab\n")
    argv = ["--prompts", str(tmp_path / "prompts.txt"), "--max-new-tokens", str(NEW), "--json"]
    assert run("--model", str(folder), *argv) == 0
    assert rows_of(capsys.readouterr().out)[0]["policy"].split() == text(answer[:1]).split()


def test_each_model_reads_with_its_own_tokenizer(
    folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Unless --tokenizer names one for both."""
    save_talker(tmp_path / "model", "llama", 0, bos=False)
    (tmp_path / "prompts.txt").write_text("ab\n")
    model = plain_model(tmp_path / "model")
    argv = ["--model", str(tmp_path / "model"), "--prompts", str(tmp_path / "prompts.txt"), "--json"]
    argv += ["--temperature", "2", "--max-new-tokens", str(NEW)]
    for more, prompt in (([], ids("ab")), (["--tokenizer", str(folders / "policy")], [BOS, *ids("ab")])):
        assert run(*argv, *more) == 0
        assert rows_of(capsys.readouterr().out) == [
            {"prompt": "ab", "policy": text(plain_draw(model, prompt, 0, 2.0, NEW))}
        ]


def test_a_serving_node_needs_no_compiler(folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is compiled. A torch without kernels for the GPU is refused all the same."""
    (tmp_path / "prompts.txt").write_text("ab")
    argv = ["--model", str(folders / "policy"), "--prompts", str(tmp_path / "prompts.txt"), "--max-new-tokens", "1"]
    for found, code in ((facts(compiler=None, has_python_h=False), 0), (facts(archs=("sm_80",)), 2)):
        monkeypatch.setattr("dpo.run.inputs.gather_facts", lambda device, found=found: found)
        assert run(*argv) == code


def test_a_table_for_people(folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Prompts and answers stand side by side, marks and all; who answers is told beside it."""
    path = write_jsonl(
        tmp_path / "prompts.jsonl", [{"prompt": "x [red]y[/red]"}, {"prompt": [{"role": "user", "content": "hi"}]}]
    )
    argv = ["--prompts", path, "--max-new-tokens", "2", "--temperature", "1"]
    assert run("--model", str(folders / "policy"), "--reference", str(folders / "reference"), *argv) == 0
    captured = capsys.readouterr()
    assert max(len(line) for line in captured.out.splitlines()) <= sample.COLUMNS
    header, first, second = (
        line for line in captured.out.splitlines() if any(w in line for w in ("prompt", "red", "hi"))
    )
    assert header.split("┃")[1].strip() == "prompt"
    assert [part.strip() for part in header.split("┃")[2:4]] == ["policy", "reference"]
    assert first.split("│")[1].strip() == "x [red]y[/red]"
    assert second.split("│")[1].strip() == "user: hi"
    assert f"{folders / 'policy'} answers 2 prompts" in captured.err


def test_a_message_without_content_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    """The call of a tool stands beside its content, which may be absent."""
    call = {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "f"}}]}
    sample.show_table([sample.Question("x:1", ({"role": "user", "content": "hi"}, call))], {"policy": ["yes"]})
    assert "user: hi" in capsys.readouterr().out


def test_a_dialogue_in_one_text_becomes_turns_as_in_training(tmp_path: Path) -> None:
    rows = [{"prompt": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:"}, {"prompt": "a"}]
    path = Path(write_jsonl(tmp_path / "prompts.jsonl", rows))
    turns, single = (question.prompt for question in questions.read_questions(path, as_chat=True))
    assert [tuple(turn.values()) for turn in turns] == [("user", "a"), ("assistant", "b"), ("user", "c")]
    assert single == ({"role": "user", "content": "a"},)


def test_a_model_cannot_steer_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    sample.show_table(
        [sample.Question("x:1", "a\tb\nc\x1b[31m")],
        {
            "policy": [
                "\x07\x9b2J",
            ]
        },
    )
    out = capsys.readouterr().out
    assert "␛[31m" in out and "␇<U+009B>2J" in out
    assert not any(character in out for character in "\x1b\x07\x9b")


# --- adapters --------------------------------------------------------------------------------------------------------


def answers_to(prompts: list[str], folder: Path, *words: str, capsys: Any) -> list[dict[str, Any]]:
    """What the program prints for lines of text."""
    (folder / "prompts.txt").write_text("\n".join(prompts))
    capsys.readouterr()
    assert run(*words, "--prompts", str(folder / "prompts.txt"), "--max-new-tokens", str(NEW), "--json") == 0
    return rows_of(capsys.readouterr().out)


@pytest.mark.parametrize(("policy", "reference"), [("tuned", "other"), ("tuned", "policy"), ("gpt2-tuned", "gpt2")])
def test_adapters_answer_as_peft_does(policy: str, reference: str, folders: Path, tmp_path: Path, capsys: Any) -> None:
    """A folder of adapters is its base with them; two folders of one base, and one beside the base itself."""
    bases = {"tuned": "policy", "other": "policy", "gpt2-tuned": "gpt2"}
    words = ("--model", str(folders / policy), "--reference", str(folders / reference))
    found = answers_to(["ab", "Why?"], tmp_path, *words, capsys=capsys)
    for name, folder in (("policy", policy), ("reference", reference)):
        base = folders / bases.get(folder, folder)
        model = adapted_model(base, folders / folder) if folder in bases else plain_model(base)
        assert [row[name] for row in found] == [
            text(plain_greedy(model, [BOS, *ids(prompt)], NEW)) for prompt in ("ab", "Why?")
        ]
    assert [row["policy"] for row in found] != [row["reference"] for row in found]


def test_one_model_is_in_memory_at_a_time(folders: Path, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    """Also where both models have the same base."""
    models: list[weakref.ref[Any]] = []
    alive: list[int] = []
    build = sample.build_policy

    def counted(*args: Any, **more: Any) -> Any:
        alive.append(sum(model() is not None for model in models))
        policy = build(*args, **more)
        models.append(weakref.ref(policy.model))
        return policy

    monkeypatch.setattr(sample, "build_policy", counted)
    words = ("--model", str(folders / "tuned"), "--reference", str(folders / "other"))
    answers_to(["ab"], tmp_path, *words, capsys=capsys)
    assert alive == [0, 0]


def test_the_tokenizer_of_the_adapters(folders: Path, tmp_path: Path, capsys: Any) -> None:
    """With which they were trained: this one writes no BOS. Without one the base's is taken."""
    own = Path(shutil.copytree(folders / "tuned", tmp_path / "own"))
    make_tokenizer(bos=False).save_pretrained(own)
    model = adapted_model(folders / "policy", own)
    words = ("--temperature", "2", "--model")
    (found,) = answers_to(["ab"], tmp_path, *words, str(own), capsys=capsys)
    assert found["policy"] == text(plain_draw(model, ids("ab"), 0, 2.0, NEW))
    (found,) = answers_to(["ab"], tmp_path, *words, str(folders / "tuned"), capsys=capsys)
    assert found["policy"] == text(plain_draw(model, [BOS, *ids("ab")], 0, 2.0, NEW))


@pytest.mark.parametrize("lora", [{}, {"lora__rank": 4}])
def test_the_folder_of_a_run_is_its_final_model(
    lora: dict[str, Any], folders: Path, tmp_path: Path, capsys: Any
) -> None:
    """Of a run of adapters these on the base, to whose answers training at this rate has made a difference."""
    pairs = save_pairs(tmp_path / "pairs.jsonl", 8)
    fast = {"batch__pairs_per_step": 8, "train__steps": 4, "optim__lr": 0.03, "optim__warmup_steps": 0}
    folder = run_training(make_config(folders / "policy", pairs, tmp_path / "run", **fast, **lora))
    model = adapted_model(folders / "policy", folder / "final") if lora else plain_model(folder / "final")
    (found,) = answers_to(["ab"], tmp_path, "--model", str(folder), capsys=capsys)
    says = [text(plain_greedy(one, [BOS, *ids("ab")], NEW)) for one in (model, plain_model(folders / "policy"))]
    assert found["policy"] == says[0] != says[1]


# --- ranks -----------------------------------------------------------------------------------------------------------


def output_of(*argv: str) -> tuple[int, str]:
    """On a rank: the exit code, and what it printed."""
    with contextlib.redirect_stdout(io.StringIO()) as stdout:
        return run(*argv), stdout.getvalue()


@pytest.mark.xdist_group("ranks")
def test_on_ranks(ranks: Ranks, folders: Path, tmp_path: Path) -> None:
    """Three ranks print the same once, and all know when a file is refused."""
    (tmp_path / "prompts.txt").write_text("ab\nWhy?\n")
    argv = [
        "--model",
        str(folders / "policy"),
        "--max-new-tokens",
        str(NEW),
        "--temperature",
        "2",
        "--json",
        "--prompts",
    ]
    ((code, alone),) = ranks(1, output_of, *argv, str(tmp_path / "prompts.txt"))
    assert code == 0 and len(rows_of(alone)) == 2
    assert ranks(3, output_of, *argv, str(tmp_path / "prompts.txt")) == [(0, alone), (0, ""), (0, "")]
    assert ranks(3, output_of, *argv, str(tmp_path / "none.txt")) == [(2, "")] * 3


# --- refused ---------------------------------------------------------------------------------------------------------

REFUSED: dict[str, tuple[str, str, list[str], str]] = {
    # file name (IT in the error), its content, further words, the error
    "no file": ("", "", [], "command line: --prompts: no such file: IT; valid: "),
    "no known ending": ("p.yaml", "a", [], "command line: --prompts: IT has no known ending; valid: .txt, .json, "),
    "no prompts": ("p.txt", "\n \n", [], "command line: --prompts: IT has no prompts; valid: "),
    "no rows": ("p.jsonl", "", [], "IT: empty, it has no rows; valid: "),
    "broken": ("p.jsonl", '{"prompt": "a"}\n{"prompt"', [], "IT:2: broken JSON: "),
    "no field": ("p.jsonl", '\n{"text": "a"}', [], "IT:2: missing or null field prompt; the row has: text"),
    "a number": ("p.jsonl", '{"prompt": 3}', [], "IT:1: prompt is a number (3); valid: a text or a list of messages"),
    "no role": ("p.jsonl", '{"prompt": [{"content": "a"}]}', [], "IT:1: missing or null field prompt[0].role; the row"),
    "too long": ("p.txt", "a\n" + "x" * 256, [], "IT:2: the prompt has 257 tokens, the model's positions end at 256; "),
    "no tokens": ("p.txt", "a", ["--max-new-tokens", "0"], "command line: --max-new-tokens: must be >= 1, got 0; "),
    "negative": ("p.txt", "a", ["--temperature", "-1"], "command line: --temperature: must be >= 0, got -1.0; "),
    "not finite": ("p.txt", "a", ["--temperature", "nan"], "command line: --temperature: must be >= 0, got nan; "),
    "no number": ("p.txt", "a", ["--seed", "x"], "command line: argument --seed: invalid int value: 'x'; valid: "),
    "no reference": ("p.txt", "a", ["--reference", "/no"], "command line: --reference: no such folder: /no; valid: "),
    "no tokenizer": ("p.txt", "a", ["--tokenizer", "/no"], "command line: --tokenizer: /no: no such folder; valid: "),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_refused(what: str, folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In one line, exit code 2, before anything is printed."""
    name, content, more, error = REFUSED[what]
    if name:
        (tmp_path / name).write_text(content)
    capsys.readouterr()
    assert run("--model", str(folders / "gpt2"), "--prompts", str(tmp_path / name), *more) == 2
    captured = capsys.readouterr()
    (line,) = [line for line in captured.err.splitlines() if line.startswith("error:")]
    assert line.startswith("error: " + error.replace("IT", str(tmp_path / name))), line
    assert not captured.out


def test_models_and_templates_that_cannot_read_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Messages without a template, an empty text without BOS, a token that the model lacks, a folder of nothing."""
    save_talker(tmp_path / "plain", "llama", 0, bos=False, chat_template=None)
    make_tokenizer().save_pretrained(save_model(tmp_path / "small", "llama"))
    path = write_jsonl(tmp_path / "p.jsonl", [{"prompt": [{"role": "user", "content": "hi"}]}])
    empty = write_jsonl(tmp_path / "empty.jsonl", [{"prompt": ""}])
    tilde = write_jsonl(tmp_path / "tilde.jsonl", [{"prompt": "a~"}])
    cases = [
        ("plain", path, f"{path}:1: messages need a chat template, which the tokenizer lacks; valid: "),
        ("plain", empty, f"{empty}:1: the prompt has no token; valid: at least one"),
        ("small", tilde, f"{tilde}:1: token id 97 is outside of the model's vocabulary; valid: 0 to 96"),
        ("nothing", path, f"command line: --model: no such folder: {tmp_path / 'nothing'}; valid: "),
    ]
    for model, prompts, error in cases:
        capsys.readouterr()
        assert run("--model", str(tmp_path / model), "--prompts", prompts) == 2
        (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
        assert line.startswith(f"error: {error}"), line


def test_a_column_that_looks_like_part_of_the_prompt_is_refused(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"prompt": "Hi", "context": ""}, {"prompt": "Hi", "context": "x"}])
    with pytest.raises(UserError, match=r"a.jsonl:2: context: would not be read, .* valid: prompt, system, tools, "):
        questions.read_questions(Path(path), False)


@pytest.mark.parametrize(
    ("beside", "text"),
    [
        ({"system": None, "tools": []}, "Hi"),
        ({"system": "Be brief."}, "|[system]Be brief.[user]Hi>"),
        ({"tools": [{"name": "f"}]}, "f|[user]Hi>"),
        ({"chat_template_kwargs": {"end": "!"}}, "|[user]Hi!"),
    ],
)
@pytest.mark.parametrize("prompt", ["Hi", [{"role": "user", "content": "Hi"}]])
def test_columns_of_a_conversation_go_through_the_template(
    beside: dict[str, Any], text: str, prompt: Any, tmp_path: Path
) -> None:
    """As training reads them: by hand, what the template writes. A text without such a column stays as it is."""
    template = (
        "{% for t in tools or [] %}{{ t['name'] }}{% endfor %}|"
        "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}"
        "{% if add_generation_prompt %}{{ end or '>' }}{% endif %}"
    )
    if text == "Hi" and not isinstance(prompt, str):
        text = "|[user]Hi>"
    path = write_jsonl(tmp_path / "a.jsonl", [{"prompt": prompt} | beside])
    encoder = text_encoder(make_tokenizer(chat_template=template), (EOS,))
    limits = Limits(None, None, VOCAB_SIZE, None, False)
    [found] = questions.read_prompts(questions.read_questions(Path(path), False), encoder, limits)
    assert list(found) == ids(text)


def test_messages_that_are_kept_as_text(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "Hi"}]
    path = write_jsonl(tmp_path / "a.jsonl", [{"prompt": json.dumps(messages)}, {"prompt": "[1]"}])
    assert [question.prompt for question in questions.read_questions(Path(path), False)] == [tuple(messages), "[1]"]
