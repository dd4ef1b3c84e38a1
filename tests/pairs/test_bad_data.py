"""What is wrong with data: one line that names the place."""

from pathlib import Path

import datasets
import pytest

from dpo.base.errors import UserError
from dpo.config import SourceConfig
from dpo.pairs.prepare import prepare_data
from dpo.pairs.report import check_enough
from tests.support.data_fixtures import (
    ROWS,
    TOKENS,
    TinyModelConfig,
    make_config,
    write_jsonl,
)

pytest_plugins = ["tests.support.data_plugin"]
pytestmark = pytest.mark.usefixtures("hf_cache")
MODEL = TinyModelConfig()


BAD = Path(__file__).parents[1] / "bad_inputs" / "data"


@pytest.mark.parametrize("path", sorted(BAD.rglob("*.txt")), ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_bad_inputs(path, tokenizer_folder, monkeypatch):
    """Each file gives the one line beside it; those in `stop` with data.on_bad_row: stop."""
    monkeypatch.chdir(path.parent)
    source = next(file.name for file in path.parent.glob(f"{path.stem}.*") if file != path)
    on_bad_row = "stop" if path.parent.name == "stop" else "drop"
    with pytest.raises(UserError) as error:
        prepare_data(make_config(source, tokenizer=tokenizer_folder, on_bad_row=on_bad_row), MODEL)
    assert f"{error.value}\n" == path.read_text()
    if on_bad_row == "stop":
        config = make_config(source, tokenizer=tokenizer_folder, pairs_per_step=0)
        assert sum(prepare_data(config, MODEL).report.sources[0].dropped.values()) == 1


def test_first_bad_row_in_file_order(tmp_path, tokenizer_folder):
    """Whatever process found it, and also from the cache."""
    rows = [*ROWS, {"prompt": 1, "completions": [], "pairs": []}, *ROWS, {"prompt": 2, "completions": [], "pairs": []}]
    config = make_config(write_jsonl(tmp_path / "a.jsonl", rows), tokenizer=tokenizer_folder, num_proc=2)
    for _ in range(2):
        with pytest.raises(UserError, match=r"a\.jsonl:11: prompt is a number \(1\)"):
            prepare_data(config, MODEL)


def test_bad_row_of_parquet(tmp_path, tokenizer_folder):
    """A column that is null in one row; rows are numbered from 0."""
    rows = [{"chosen": "a\n\nAssistant: b", "rejected": "a\n\nAssistant: c"}, {"chosen": "a\n\nAssistant: b"}]
    datasets.Dataset.from_list(rows).to_parquet(str(tmp_path / "a.parquet"))
    with pytest.raises(UserError, match=r"a\.parquet:row 1: missing or null field rejected; the row has: chosen$"):
        prepare_data(make_config(str(tmp_path / "a.parquet"), tokenizer=tokenizer_folder), MODEL)


def test_learned_positions_stop(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", TOKENS)
    config = TinyModelConfig(max_position_embeddings=2, rope_parameters=None)
    with pytest.raises(
        UserError, match=rf"^{path}:1: prompt and completion have 3 tokens, the model's positions end at 2"
    ):
        prepare_data(make_config(path), config)
    assert len(prepare_data(make_config(path, max_length=2), config).train) == 80


def test_fewer_pairs_than_a_step(tmp_path):
    """80 pairs and one dropped one. Source a holds out 1 prompt of 2 pairs; source b has the same rows, so that 2 are
    removed, and a share of 50 of the other 78. The report is told before the error.
    """
    path = write_jsonl(tmp_path / "a.jsonl", [*TOKENS, {"prompt_ids": [9], "chosen_ids": [5], "rejected_ids": [5]}])
    config = make_config(SourceConfig(path=path, holdout=1), SourceConfig(path=path, count=50))
    report, told = prepare_data(config, MODEL).report, []
    check_enough(report, 128, told.append)
    assert told == []
    with pytest.raises(UserError) as error:
        check_enough(report, 129, told.append)
    assert str(error.value) == (
        "data.train: 128 pairs to train on, fewer than batch.pairs_per_step 129; not trained on: "
        "2 dropped (identical), 2 held out for evaluation, 2 removed because their prompt is held out, "
        "28 left out by weight or count; valid: more pairs, or batch.pairs_per_step up to 128"
    )
    assert told == report.lines()


def test_a_share_of_no_pair(tmp_path):
    """round(0.006 x 80) = 0: an error, also where the other source has enough pairs."""
    path = write_jsonl(tmp_path / "a.jsonl", TOKENS)
    report = prepare_data(make_config(path, SourceConfig(path=path, weight=0.006)), MODEL).report
    told = []
    with pytest.raises(
        UserError, match=rf"^data\.train\[1\]\.weight: {path}: 0.006 of 80 pairs kept for training is none"
    ):
        check_enough(report, 4, told.append)
    assert told == report.lines()


def test_format_that_is_not_the_files(tmp_path, tokenizer_folder):
    path = write_jsonl(tmp_path / "a.jsonl", ROWS)
    config = make_config(SourceConfig(path=path, format="hh"), tokenizer=tokenizer_folder)
    with pytest.raises(
        UserError, match=r"^data\.train\[0\]\.format: .*: the columns completions, pairs, prompt are not"
    ):
        prepare_data(config, MODEL)


def test_only_tokens_that_occur_must_be_in_the_model(tmp_path, tokenizer_folder):
    """Ids up to 83 occur ("p" is 112 − 29) of the tokenizer's 100. "~" is 97."""
    path = write_jsonl(tmp_path / "a.jsonl", ROWS)
    config, model = make_config(path, tokenizer=tokenizer_folder), TinyModelConfig(vocab_size=84)
    prepared = prepare_data(config, model)
    assert len(prepared.train) == len(prepare_data(config, MODEL).train)
    assert "the tokenizer has 16 tokens that the model has not; no row has them" in prepared.report.lines()
    write_jsonl(tmp_path / "a.jsonl", [*ROWS, {"prompt": "a~", "completions": ["a", "b"], "pairs": [[0, 1]]}])
    with pytest.raises(
        UserError, match=r"a\.jsonl:11: token id 97 is outside of the model's vocabulary; valid: 0 to 83"
    ):
        prepare_data(config, model)
