"""dpo.config: what is accepted, what is refused and in which words, and the help."""

import ast
import dataclasses
import inspect
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import get_type_hints

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo.base.errors import UserError
from dpo.config import (
    Config,
    DataConfig,
    LoraConfig,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    SourceConfig,
    TrainConfig,
    load_config,
    lora_fields,
    to_yaml,
    with_place,
)
from dpo.config import fields as config_fields
from dpo.config.rules import validate
from dpo.config.strict_yaml import dump_yaml, parse_yaml
from dpo.reference.arguments import read_arguments

REPO = Path(__file__).parents[2]
CORPUS = REPO / "tests" / "bad_inputs" / "config"
SHIPPED = sorted([*(REPO / "configs").glob("*.yaml"), *(REPO / "tests" / "configs").glob("*.yaml")])
REQUIRED = ["--model.path", "m", "--data.train", "[{path: a.jsonl}]"]


def load(*argv: str) -> Config:
    return load_config(list(argv), prog="dpo.train")


def reload(config: Config, folder: Path) -> Config:
    file = folder / "again.yaml"
    file.write_text(to_yaml(config), encoding="utf-8")
    return load("--config", str(file))


def command_lines() -> list[tuple[str, str]]:
    """(command line, expected line): blocks of two lines, after a comment."""
    blocks = (CORPUS / "command_lines.txt").read_text().split("\n\n")[1:]
    return [(block.splitlines()[0], block.splitlines()[1]) for block in blocks]


@pytest.mark.parametrize("file", sorted(CORPUS.glob("*.yaml")), ids=lambda file: file.stem)
def test_bad_file_is_one_line(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file's first line holds the whole error."""
    expected = file.read_bytes().split(b"\n")[0].decode().removeprefix("# error: ")
    monkeypatch.chdir(CORPUS)
    with pytest.raises(UserError) as caught:
        load("--config", file.name)
    assert str(caught.value) == expected


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("my-run.yaml", "my_run.yaml"),
        ("my_run.yml", "my_run.yaml"),
        ("hh.yaml", str(REPO / "configs" / "data" / "hh.yaml")),  # a shipped one by its name alone
        ("configs/pythia-2.8b_hhh.yaml", str(REPO / "configs" / "pythia-2.8b_hh.yaml")),
        ("xyzzyx.yaml", None),
    ],
)
def test_a_config_that_is_not_there(
    typed: str, meant: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Names the nearest file, if there is one; the list is that of `dpo configs`."""
    (tmp_path / "my_run.yaml").touch()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as caught:
        load(typed)
    question = f"; did you mean {meant}?" if meant else ""
    assert caught.value.what == f"cannot read {typed!r} (No such file or directory){question}"
    assert "`dpo configs`" in caught.value.valid


@pytest.mark.parametrize(("line", "expected"), command_lines(), ids=lambda text: text[-60:])
def test_bad_command_line_is_one_line(line: str, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(CORPUS)
    with pytest.raises(UserError) as caught:
        load(*([] if line == "(nothing)" else shlex.split(line)))
    assert str(caught.value) == expected


@pytest.mark.parametrize("line", [line for _, line in command_lines()])
def test_every_error_says_what_is_valid(line: str) -> None:
    assert line.startswith("command line: ") and re.split("[;?] valid: ", line)[1]


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: file.stem)
def test_shipped_config_loads_and_round_trips(file: Path, tmp_path: Path) -> None:
    config = load("--config", str(file))
    assert config.train.run_dir == f"runs/{file.stem}"
    assert config.batch.pairs_per_step == 64
    assert reload(config, tmp_path) == config


@pytest.mark.parametrize("file", sorted((REPO / "configs").glob("*.yaml")), ids=lambda file: file.stem)
def test_shipped_config_says_how_it_is_launched(file: Path) -> None:
    assert f"-m dpo.train --config configs/{file.name}" in file.read_text()


def test_only_the_keys_of_a_file_differ_from_the_defaults() -> None:
    """TL;DR: the issue asks for beta 0.5; the paper's optimizer stays as the design has it."""
    config = load("--config", str(REPO / "configs" / "pythia-2.8b_tldr.yaml"))
    assert config.loss == config_fields.LossConfig(beta=0.5)
    assert config.optim == OptimConfig(name="rmsprop", lr=1e-6, warmup_steps=150, max_grad_norm=10.0)


def test_command_line_goes_over_the_file_and_replaces_lists(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("model: {path: m}\ndata: {train: [{path: a}, {path: b}]}\nloss: {beta: 1e-1, name: ipo}\n")
    config = load("--loss.beta=0.5", "--config", str(file), "--data.train", "[{path: c, holdout: 0.25}]")
    assert config.loss == config_fields.LossConfig(name="ipo", beta=0.5)
    assert config.data.train == [SourceConfig("c", holdout=0.25)]
    assert config.train.run_dir == "runs/mine"


def test_a_default_is_not_blamed_on_the_file(tmp_path: Path) -> None:
    """max_prompt_length is 256 by default; what does not fit it came from the command line."""
    file = tmp_path / "mine.yaml"
    file.write_text("model: {path: m}\ndata: {train: [{path: a}]}\n")
    with pytest.raises(UserError, match=r"^command line: data\.max_prompt_length: must be < data\.max_length"):
        load("--config", str(file), "--data.max_length", "128")


@pytest.mark.parametrize(
    ("text", "number"), [("1e-6", 1e-6), ("1E-6", 1e-6), ("3", 3.0), ("+.5", 0.5), ("2.e1", 20.0), ("1.5e+2", 150.0)]
)
def test_numbers_as_people_write_them(text: str, number: float) -> None:
    config = load(*REQUIRED, "--optim.lr", text)
    assert config.optim.lr == number and type(config.optim.lr) is float


def test_text_stays_text_on_the_command_line() -> None:
    config = load(*REQUIRED, "--model.tokenizer", "007", "--train.run_dir", "1e-6", "--reference.path", "null")
    assert (config.model.tokenizer, config.train.run_dir, config.reference.path) == ("007", "1e-6", None)


def test_bare_words_are_the_config_and_its_keys(tmp_path: Path) -> None:
    """The same command line in both forms; `run_dir` shows that the file's name was read."""
    file = tmp_path / "mine.yaml"
    file.write_text("model: {path: m}\ndata: {train: [{path: a}]}\n")
    bare = load(str(file), "loss.beta=0.5", "data.train=[{path: b=c}]", "--optim.lr", "1e-5")
    dashed = load("--config", str(file), "--loss.beta", "0.5", "--data.train", "[{path: b=c}]", "--optim.lr=1e-5")
    assert bare == dashed
    assert (bare.loss.beta, bare.data.train, bare.train.run_dir) == (0.5, [SourceConfig("b=c")], "runs/mine")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("q_proj", "q_proj"),
        ("all-linear", "all-linear"),
        ("[q_proj, v_proj]", ["q_proj", "v_proj"]),
        ("null", None),
        (r".*\.[0-3]\.mlp\..*", r".*\.[0-3]\.mlp\..*"),
        ("123", "123"),
    ],
)
def test_targets_are_one_text_or_a_list(text: str, value: object, tmp_path: Path) -> None:
    """Alike on the command line and in a file, where a text is quoted; a bracket begins a list."""
    line = load(*REQUIRED, "--lora.rank", "4", "--lora.target_modules", text, "--lora.exclude_modules", text)
    assert line.lora == LoraConfig(rank=4, target_modules=value, exclude_modules=value)  # type: ignore[arg-type]
    assert reload(line, tmp_path) == line
    file = tmp_path / "mine.yaml"
    quoted = text if value is None or isinstance(value, list) else f"'{text}'"
    file.write_text(
        f"model: {{path: m}}\ndata: {{train: [{{path: a.jsonl}}]}}\n"
        f"lora:\n  rank: 4\n  target_modules: {quoted}\n  exclude_modules: {quoted}\n"
    )
    assert load(str(file)).lora == line.lora


@pytest.mark.parametrize(
    "words",
    [
        ["lora.rank=8", "lora.alpha=0.5", "lora.train_embeddings=true", "lora.target_parameters=[experts.down_proj]"],
        ["lora.path=sft", "reference.adapter=base"],
        ["lora.path=sft", "lora.alpha=16", "lora.dora=false"],
        ["lora.rslora=false", "lora.dora=false"],
        ["lora.rank=8", "reference.path=other"],
    ],
)
def test_right_keys_of_adapters(words: list[str], tmp_path: Path) -> None:
    """Switches that are off say nothing that is wrong where there are no adapters."""
    config = load(*REQUIRED, *words)
    assert reload(config, tmp_path) == config


def test_run_dir_without_a_file() -> None:
    assert load(*REQUIRED).train.run_dir == "runs/train"


def test_validate_names_config_as_the_place_of_a_built_one() -> None:
    config = Config(model=ModelConfig("m"), data=DataConfig([]))
    with pytest.raises(UserError, match=r"^config: data\.train: must name at least one source"):
        validate(config)


texts = st.text(st.characters(codec="utf-8", categories=("L", "N", "P", "S", "Zs")), min_size=1, max_size=20)
tricky = st.sampled_from(
    ["null", "~", "1e-6", "010", "yes", "1", "true", "12:30", "=", "<<", "2024-01-01", " a ", "a: b", "#"]
)
holdouts = st.none() | st.integers(1, 10**6) | st.floats(1e-9, 0.999)
names = tricky.filter(lambda text: text != " a ") | texts.filter(str.isalnum)
"""Those that are valid as a regular expression."""
positive = st.floats(1e-300, 1e300)


@settings(deadline=None)
@given(
    path=texts | tricky,
    sources=st.lists(st.builds(SourceConfig, path=texts | tricky, name=texts | tricky, holdout=holdouts), min_size=1),
    optim=st.builds(OptimConfig, lr=positive, betas=st.tuples(st.floats(0, 0.999), st.floats(0, 0.999)), eps=positive),
    lora=st.builds(LoraConfig, rank=st.integers(1, 64), target_modules=st.none() | names | st.lists(names, min_size=1)),
    train=st.builds(
        TrainConfig, steps=st.none() | st.integers(1), seed=st.integers(0, 2**63 - 1), run_dir=texts | tricky
    ),
)
def test_to_yaml_round_trips(
    tmp_path_factory: pytest.TempPathFactory,
    path: str,
    sources: list[SourceConfig],
    optim: OptimConfig,
    lora: LoraConfig,
    train: TrainConfig,
) -> None:
    config = Config(model=ModelConfig(path), lora=lora, data=DataConfig(sources), optim=optim, train=train)
    assert reload(config, tmp_path_factory.getbasetemp()) == config


@settings(deadline=None)
@given(st.recursive(st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | texts | tricky, st.lists))
def test_yaml_reads_what_it_writes(tree: object) -> None:
    read = parse_yaml(dump_yaml(tree), lambda line: f"file:{line}", valid="")
    assert read == tree and repr(read) == repr(tree)


def test_print_config_prints_what_loads_again(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as caught:
        load(*REQUIRED, "--loss.beta", "0.25", "--print_config")
    assert caught.value.code == 0
    (tmp_path / "printed.yaml").write_text(capsys.readouterr().out)
    assert load("--config", str(tmp_path / "printed.yaml")) == load(*REQUIRED, "--loss.beta", "0.25")


def _text_of(statement: ast.stmt | None) -> str:
    value = statement.value if isinstance(statement, ast.Expr) else None
    return str(value.value) if isinstance(value, ast.Constant) else ""


def field_docs() -> list[tuple[str, str, str]]:
    """(class, field, docstring) as they stand in the source, read with ast and not with what prints the help."""
    docs = []
    for cls in (cls for module in (config_fields, lora_fields) for cls in ast.parse(inspect.getsource(module)).body):
        if not isinstance(cls, ast.ClassDef) or cls.name == "Config":
            continue
        for target, doc in zip(cls.body, [*cls.body[1:], None], strict=True):
            if isinstance(target, ast.AnnAssign) and isinstance(target.target, ast.Name):
                docs.append((cls.name, target.target.id, _text_of(doc)))
    return docs


def printed(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    with pytest.raises(SystemExit) as caught:
        read_arguments(words)
    assert caught.value.code == 0
    return capsys.readouterr().out


def test_help_documents_every_key(capsys: pytest.CaptureFixture[str]) -> None:
    """Without white space, since the help is wrapped."""
    text = "".join(printed(capsys, "--loss.bet", "1", "--help-config").split())
    prefixes = {cls.__name__: section for section, cls in get_type_hints(Config).items()}
    prefixes["SourceConfig"] = "data.train[i]"
    docs = field_docs()
    assert len(docs) == sum(len(dataclasses.fields(getattr(config_fields, name))) for name in prefixes)
    for cls, name, doc in docs:
        begin = text.index(f"{prefixes[cls]}.{name}:")
        assert len(doc.split()) >= 3 and "".join(doc.split()) in text[begin:], f"{cls}.{name}"


@pytest.mark.parametrize(
    "line",
    [
        "optim.lr: a number > 0 (default: 1e-06)",
        "batch.tokens_per_micro_batch: an integer >= 1 (default: 16384)",
        "model.path: text (not empty) (required)",
        "data.train: a list of the items below (required)",
        "data.eval: a list of the items below (default: [])",
        "optim.betas: two numbers, each >= 0 and < 1 (default: [0.9, 0.999])",
        "train.seed: an integer >= 0 and < 2^63 (default: 0)",
        "parallel.compile: true or false or auto (default: auto)",
        "data.train[i].columns: a mapping {NAME: VALUE, ...} (default: {})",
        "train.eval_every: null or an integer >= 1 (default: 100)",
        "lora.rank: null or an integer >= 1 and < 65536 (default: null)",
        "lora.alpha: null or a number > 0 (default: null)",
        "lora.target_modules: text (not empty) or a list of texts or null (default: null)",
        "lora.target_parameters: a list of texts or null (default: null)",
        "reference.adapter: start, base (default: start)",
    ],
)
def test_help_shows_types_bounds_and_defaults(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Read off `fields` and the paper's bounds by hand."""
    assert f"\n  {line}\n" in printed(capsys, "--help-config")


def test_help_shows_the_program_and_not_the_keys(capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(capsys, "--loss.bet", "1", "--help")
    assert text.startswith("usage: python -m dpo.reference FILE.yaml") and "into the cache." in text
    assert "example: python -m dpo.reference my.yaml loss.beta=0.5" in text
    assert "--help-config" in text and "optim.lr" not in text and len(text.splitlines()) < 30


def test_reading_a_config_needs_no_torch() -> None:
    code = (
        "import sys, dpo.config; sys.exit(any(name in sys.modules for name in ('torch', 'transformers', 'datasets')))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=REPO, check=False).returncode == 0


def test_float64_is_whole_or_not_at_all() -> None:
    exact = ParallelConfig(compute_dtype="auto", reduce_dtype="float64")
    validate(Config(model=ModelConfig("m", dtype="float64"), data=DataConfig([SourceConfig("a")]), parallel=exact))


FILE = ("--config", "a.yaml")


@pytest.mark.parametrize(
    ("place", "argv", "named"),
    [
        ("model.path", FILE, "a.yaml: model.path"),
        ("data.train[0].path", FILE, "a.yaml: data.train[0].path"),
        ("data.train[0].path", (*FILE, "--data.train=[{path: b}]"), "command line: data.train[0].path"),
        ("model.path", (*FILE, "--model.path", "b"), "command line: model.path"),
        ("model.path", (*FILE, "--model.tokenizer", "b"), "a.yaml: model.path"),
        ("model.path", ("--by-source", *FILE, "--json"), "a.yaml: model.path"),
        ("model.path", ("--json", "a.yaml"), "a.yaml: model.path"),
        ("model.path", ("--config", "absent.yaml"), "model.path"),
        ("parallel.shard", FILE, "parallel.shard"),
        ("parallel.shard", (*FILE, "parallel.shard=3"), "command line: parallel.shard"),
        ("model.path", ("--checkpoint", "c"), "model.path"),
        ("data.jsonl:3", FILE, "data.jsonl:3"),
        ("model.paths", FILE, "model.paths"),
        ("a.yaml: model.path", FILE, "a.yaml: model.path"),
    ],
)
def test_a_late_error_is_given_the_place_of_its_key(
    place: str, argv: tuple[str, ...], named: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file that has the key, or the command line where it overrode the file; nothing for a key that is at its
    default, and nothing for what is no key of the config or has its place.
    """
    monkeypatch.chdir(tmp_path)
    Path("a.yaml").write_text("model: {path: m}\ndata: {train: [{path: a}]}\n")
    found = with_place(UserError(place, "loss.beta: is elsewhere", "here"), argv)
    assert (found.place, found.what, found.valid) == (named, "loss.beta: is elsewhere", "here")


@pytest.mark.parametrize(
    ("text", "value"), [("auto", "auto"), ("true", True), ("false", False), ("True", True), ("'auto'", "auto")]
)
def test_compile_is_a_boolean_or_auto(text: str, value: object, tmp_path: Path) -> None:
    """Alike on the command line and in a file, where files from before `auto` hold booleans, and in config.yaml, which
    keeps what was given.
    """
    file = tmp_path / "config.yaml"
    file.write_text(f"model: {{path: m}}\ndata: {{train: [{{path: a.jsonl}}]}}\nparallel: {{compile: {text}}}\n")
    for config in (load("--config", str(file)), load(*REQUIRED, "--parallel.compile", text)):
        assert config.parallel.compile is value or config.parallel.compile == value == "auto"
        assert reload(config, tmp_path) == config
    assert load(*REQUIRED).parallel.compile == "auto"


@pytest.mark.parametrize("text", ["yes", "1", "null"])
def test_compile_is_nothing_else(text: str) -> None:
    with pytest.raises(UserError, match=r"^command line: parallel\.compile: .*; valid: true or false or auto$"):
        load(*REQUIRED, "--parallel.compile", text)
