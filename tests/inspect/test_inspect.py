"""What `python -m dpo.inspect` shows, on a terminal and on a page."""

import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from rich.console import Console
from tokenizers import decoders
from transformers import LlamaConfig

from dpo.encode.tokenizer import load_tokenizer
from dpo.inspect import program as inspect
from dpo.inspect.arguments import Arguments, read_arguments
from dpo.inspect.findings import findings
from dpo.inspect.shown_pairs import INCOMPLETE, token_texts
from dpo.inspect.terminal import bars, print_inspection
from dpo.inspect.words import count_rows
from dpo.model.download import find_model_config
from dpo.terminal.console import visible
from tests.support.data_fixtures import BOS, EOS, VOCAB_SIZE, make_config, make_tokenizer, write_jsonl
from tests.support.runs import changed, error_lines, exit_code_of

pytest_plugins = ["tests.support.data_plugin"]
pytestmark = pytest.mark.usefixtures("hf_cache")


@pytest.fixture
def model(tmp_path: Path) -> str:
    """A model folder that holds nothing but a config."""
    return save_config(tmp_path / "model", VOCAB_SIZE)


def save_config(folder: Path, vocab_size: int) -> str:
    LlamaConfig(vocab_size=vocab_size, bos_token_id=BOS, eos_token_id=EOS).save_pretrained(folder)
    return str(folder)


def save_tokenizer(folder: Path) -> str:
    """The tokenizer whose ids can be told by hand; decoding puts its tokens side by side."""
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.decoder = decoders.Fuse()
    tokenizer.save_pretrained(folder)
    return str(folder)


def run(model: str, *words: str, **sections) -> int:
    """The exit code of the program; `sections` are written to the YAML of its config."""
    path = Path(model).with_name("x.yaml")
    path.write_text(json.dumps({"model": {"path": model}} | sections))
    return exit_code_of(inspect.main, "dpo.inspect", "--config", str(path), *words)


# --- tokens as they are shown -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tok-smollm2", "stories260K"])
def test_token_texts_give_the_text(shared_data, name):
    """Also where a character takes several tokens (byte level, and byte fallback), and where a space comes first."""
    tokenizer = load_tokenizer(str(shared_data / name))
    text = " One café, 🦉🦉 and\n\n日本語  two"
    texts = token_texts(tokenizer, tokenizer(text, add_special_tokens=False)["input_ids"])
    whole = {"tok-smollm2": text, "stories260K": f" {text}"}[name]  # the second puts a space before every text
    assert "".join(part for part in texts if part != INCOMPLETE) == whole
    assert INCOMPLETE in texts and " and" in texts


def test_what_is_not_seen_is_made_visible():
    assert visible("a\tb\n\x1b[31m\u202ec\u200b") == "a⇥b↵\n␛[31m<U+202E>c<U+200B>"


def test_bars():
    """The highest of 8 is two lines of eight eighths, 4 is one line; 1 of 8 is 2 eighths; what is not 0 is seen."""
    assert bars([8, 4, 1, 0], 2) == ["█   ", "██▂ "]
    assert bars([1000, 1], 1) == ["█▁"]
    assert bars([0, 0], 1) == ["  "]


# --- the program ------------------------------------------------------------------------------------------------------


class Page(HTMLParser):
    """Tags with their attributes, and the text outside of style."""

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.text = [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.text += "" if tag == "span" else " "  # cells are apart, tokens are not

    def handle_data(self, data):
        if self.tags and self.tags[-1][0] != "style":
            self.text += data

    def count(self, tag: str) -> int:
        return [name for name, _ in self.tags].count(tag)


HOSTILE = "<script>alert(1)</script> & {{ 7 * 7 }} [bold]\x1b[31m"


def hostile_sections(tmp_path: Path) -> dict:
    rows = [{"prompt": f"{HOSTILE} {i}", "chosen": HOSTILE, "rejected": "b" * 20} for i in range(4)]
    train = [{"path": write_jsonl(tmp_path / "<u>a.jsonl", rows), "holdout": 1}]
    data = {"train": train, "max_length": 70, "max_prompt_length": 60}
    return {"data": data, "batch": {"pairs_per_step": 2}}


def test_page_needs_nothing_else_and_escapes_data(tmp_path, model, capsys):
    words = ("--model.tokenizer", save_tokenizer(tmp_path / "t"), "--html", str(tmp_path / "x.html"), "--examples", "1")
    assert run(model, *words, **hostile_sections(tmp_path)) == 0
    page = Page((tmp_path / "x.html").read_text())
    assert not {"script", "link", "img", "iframe", "u"} & {tag for tag, _ in page.tags}
    assert not any({"src", "href", "onload"} & attributes.keys() for _, attributes in page.tags)
    assert "url(" not in (tmp_path / "x.html").read_text() and "@import" not in (tmp_path / "x.html").read_text()
    assert "<script>alert(1)</script> & {{ 7 * 7 }} [bold]" in page.text, "data are shown as they are"
    assert "<u>a.jsonl" in page.text and "\x1b" not in page.text
    assert "\x1b" not in capsys.readouterr().out


def test_text_and_page_show_the_same(tmp_path, model, capsys):
    """Every finding and every row of the counts; and on a page one heading and four histograms a set."""
    words = ("--model.tokenizer", save_tokenizer(tmp_path / "t"), "--html", str(tmp_path / "x.html"), "--examples", "2")
    assert run(model, *words, **hostile_sections(tmp_path)) == 0
    out, err = capsys.readouterr()
    page = Page((tmp_path / "x.html").read_text())
    text, html = (re.sub(r"\s+", " ", whole) for whole in (out, page.text))
    loaded = read_arguments_of(model, *words)
    inspection = inspect.inspect(loaded.config, loaded.examples)
    lines = [*findings(inspection), *(f"{name.strip()} {' '.join(cells)}" for name, cells in count_rows(inspection))]
    for line in [*lines, "BOS: <s> (id 1); the tokenizer does not add it", "1 prompts held out", "shuffled"]:
        assert " ".join(line.split()) in text and " ".join(line.split()) in html
    assert page.count("svg") == 8 and len(inspection.examples) == 2
    assert "the page is in" in err and "the page is in" not in out
    assert max(map(len, out.splitlines())) <= 100


def read_arguments_of(model: str, *words: str) -> Arguments:
    """What the program reads after `run`."""
    return read_arguments(["--config", str(Path(model).with_name("x.yaml")), *words])


def test_colors_on_a_terminal_and_no_line_too_long(tmp_path, model):
    """Chosen is green (32), rejected red (31), a special token magenta (35)."""
    write_jsonl(tmp_path / "a.jsonl", [{"prompt": "p " * 300, "chosen": "c " * 90, "rejected": "no"}] * 2)
    data = {"train": [{"path": str(tmp_path / "a.jsonl")}]}
    assert run(model, "--model.tokenizer", save_tokenizer(tmp_path / "t"), data=data, batch={"pairs_per_step": 2}) == 0
    inspection = inspect.inspect(read_arguments_of(model, "--model.tokenizer", str(tmp_path / "t")).config, 1)
    console = Console(file=io.StringIO(), force_terminal=True, color_system="standard", width=100, highlight=False)
    print_inspection(inspection, console)
    out = console.file.getvalue()
    for shown in ("\x1b[32mc", "\x1b[31mn", "\x1b[1;35m</s>"):
        assert shown in out
    plain = re.sub(r"\x1b\[[0-9;]*m", "", out)
    assert max(map(len, plain.splitlines())) <= 100
    assert "tokens …" in plain, "the middle of a long text is left out"


def test_examples_show_tokens_and_cut_ends(tmp_path, model):
    """Prompt of 5 cut to "3456" behind nothing (no BOS); room for 3: "abc" of "abcd" is cut, "xy" and EOS are not."""
    rows = [{"prompt": "23456", "chosen": "abcd", "rejected": "xy"}]
    config = make_config(write_jsonl(tmp_path / "a.jsonl", rows), max_length=7, max_prompt_length=4)
    config = changed(config, model__path=model, model__tokenizer=save_tokenizer(tmp_path / "t"))
    pair = inspect.inspect(config, 5).examples[0]
    shown = {name: getattr(pair, name) for name in ("prompt", "chosen", "rejected")}
    assert {name: [token.text for token in part.tokens] for name, part in shown.items()} == {
        "prompt": list("3456"),
        "chosen": list("abc"),
        "rejected": ["x", "y", "</s>"],
    }
    assert [part.is_cut for part in shown.values()] == [True, True, False]
    assert [token.is_special for token in pair.rejected.tokens] == [False, False, True]
    assert pair.place == f"data.train[0] {tmp_path / 'a.jsonl'}, row 0 (from 0)"


def test_rows_of_tokens_need_no_tokenizer(tmp_path, model, capsys):
    rows = [{"prompt_ids": [BOS, 41], "chosen_ids": [42, EOS], "rejected_ids": [43]}]
    data = {"train": [{"path": write_jsonl(tmp_path / "a.jsonl", rows)}]}
    assert run(model, data=data, batch={"pairs_per_step": 1}) == 0
    out = capsys.readouterr().out
    assert "1│41│" in out and "42│2│" in out and "43│" in out
    assert "the model's BOS: id 1; its EOS: id 2" in out
    assert "- training: 1 completions that end without a stop token and were not cut: add it to the rows" in out


def test_a_hub_model_needs_its_config_alone(tmp_path, monkeypatch):
    """Found in the cache of huggingface_hub, where there is no weight and no network."""
    snapshot = tmp_path / "hub" / "models--org--name" / "snapshots" / "abc"
    save_config(snapshot, VOCAB_SIZE)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("abc")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("transformers.utils.hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    config = make_config("absent.jsonl")
    assert find_model_config(changed(config, model__path="org/name")).vocab_size == VOCAB_SIZE


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--html"], "command line: argument --html: expected one argument; valid: see .* --help"),
        (["--html", "absent/x.html"], "command line: --html: cannot be written: absent/x.html; valid: .+"),
        (["--examples", "-1"], "command line: --examples: must be >= 0, got -1; valid: .+"),
        (["--htm", "x"], r"command line: --htm: unknown flag; did you mean --html\? valid: .+"),
        (
            ["--batch.pairs_per_step", "9"],
            ".*x.yaml: data.train: 1 pairs to train on, fewer than .+; valid: .+",
        ),
        (["--model.path", "absent"], "command line: model.path: no such folder: absent; valid: .+"),
        (["--data.train", "[{path: bad.jsonl}]"], "bad.jsonl:1: .+"),
    ],
)
def test_errors_are_one_line(words, line, tmp_path, model, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "bad.jsonl", [{"prompt_ids": "x", "chosen_ids": [3], "rejected_ids": [4]}])
    rows = [{"prompt_ids": [3], "chosen_ids": [4], "rejected_ids": [5]}]
    data = {"train": [{"path": write_jsonl(tmp_path / "a.jsonl", rows)}]}
    assert run(model, *words, data=data, batch={"pairs_per_step": 1}) == 2
    (error,) = error_lines(capsys.readouterr().err)
    assert re.fullmatch(f"error: {line}", error)


def test_the_report_comes_before_an_error_about_too_few_pairs(tmp_path, model, capsys):
    rows = [{"prompt_ids": [5], "chosen_ids": [i + 6], "rejected_ids": [5]} for i in range(8)]
    source = {"path": write_jsonl(tmp_path / "a.jsonl", rows), "weight": 0.5}
    assert run(model, data={"train": [source]}) == 2
    told = capsys.readouterr().err
    report, error = "of 8 pairs kept for training an epoch has 4: weight 0.5", "data.train: 4 pairs to train on, fewer"
    assert 0 < told.index(report) < told.index(error) and "not trained on: 4 left out by weight or count" in told


def test_help_explains_its_own_words(capsys):
    with pytest.raises(SystemExit):
        read_arguments(["--help"])
    out = capsys.readouterr().out
    assert "--html FILE" in out and "--examples N" in out and "--help-config" in out


def test_real_hh(shared_data, tmp_path, capsys):
    """The figures of the contract: 1,800 rows, 2 `prompts_differ`, 4 `empty`, 1,794 kept; texts are not shown here."""
    model = save_config(tmp_path / "model", 49152)
    path = str(shared_data / "hh" / "public-0000-1799.jsonl.gz")
    tokenizer = ("--model.tokenizer", str(shared_data / "tok-smollm2"))
    page = tmp_path / "x.html"
    assert run(model, *tokenizer, "--examples", "0", "--html", str(page), data={"train": [{"path": path}]}) == 0
    out = capsys.readouterr().out
    text, html = (re.sub(r"\s+", " ", whole) for whole in (out, Page(page.read_text()).text))
    assert "1,800 rows, 1,794 pairs kept, 6 dropped" in text
    for shown in (text, html):
        assert "dropped, empty: 4" in shown and "dropped, prompts_differ: 2" in shown
        assert re.search(r"pairs 1,794 ", shown) and re.search(r"completions in a pair 3,588 ", shown)
        assert re.search(r"prompts that begin without BOS 1,794 ", shown)
    assert max(map(len, out.splitlines())) <= 100


def test_a_run_of_adapters_has_the_same_data(model, tmp_path, capsys):
    """Neither their rank nor their folder, of which nothing is read here, changes what is shown."""
    save_tokenizer(Path(model))
    path = write_jsonl(tmp_path / "a.jsonl", [{"prompt": "p", "chosen": "ab", "rejected": "c"}] * 2)
    sections = {"data": {"train": [{"path": path}]}, "batch": {"pairs_per_step": 2}}
    shown = []
    for lora in ({}, {"rank": 4}, {"path": str(tmp_path / "sft")}):
        assert run(model, **sections, lora=lora) == 0
        shown.append(capsys.readouterr().out)
    assert shown[0] == shown[1] == shown[2] and "2 pairs kept" in shown[0]


# --- without losers ---------------------------------------------------------------------------------------------------


def test_demonstrations_are_shown_without_losers(model, tmp_path, capsys):
    """Two rows of a prompt of 1 token and an answer of 3 with EOS: 8 tokens, of which sharing saves none."""
    save_tokenizer(Path(model))
    path = write_jsonl(tmp_path / "a.jsonl", [{"prompt": p, "completion": "ab"} for p in "pq"])
    page = tmp_path / "page.html"
    sections = {"data": {"train": [{"path": path}]}, "loss": {"name": "sft"}, "batch": {"pairs_per_step": 2}}
    assert run(model, "--html", str(page), **sections) == 0
    shown = capsys.readouterr().out
    assert "another pair contradicts: loss" not in shown
    assert re.search(r"(?m)^every completion after its prompt, padded .* 8 *$", shown)
    for text in (shown, re.sub(r"(?s)<style>.*?</style>", "", page.read_text())):
        assert "chosen" in text and "rejected" not in text and "longer completion" not in text


def test_losers_that_are_not_computed_are_not_counted(model, tmp_path, capsys):
    save_tokenizer(Path(model))
    rows = [{"prompt": "p", "completions": ["ab", "c", "d"], "ranking": [1, 2, 3]}]
    sections = {"data": {"train": [{"path": write_jsonl(tmp_path / "a.jsonl", rows)}]}, "loss": {"name": "sft"}}
    assert run(model, batch={"pairs_per_step": 3}, **sections) == 0
    shown = capsys.readouterr().out
    assert re.search(r"completions in a pair +2\b", shown), "ab wins two pairs, c one, d none"
    assert re.search(r"that another pair contradicts +0\b", shown)
