"""What is wrong with data: one line that names the place."""

import dataclasses

import datasets
import pytest

from dpo.base.errors import UserError
from dpo.config import SourceConfig
from dpo.data.prepare import prepare_data
from tests.support.data_fixtures import (
    FIXTURES,
    ROWS,
    TOKENS,
    TinyModelConfig,
    make_config,
    write_jsonl,
)

pytest_plugins = ["tests.support.data_plugin"]
pytestmark = pytest.mark.usefixtures("hf_cache")
MODEL = TinyModelConfig()


BAD = FIXTURES.parent / "bad_inputs" / "data"


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
    """Counted after what is dropped and held out: 80 pairs, of which 2 are held out."""
    config = make_config(SourceConfig(path=write_jsonl(tmp_path / "a.jsonl", TOKENS), holdout=1), pairs_per_step=78)
    assert len(prepare_data(config, MODEL).train) == 78
    with pytest.raises(
        UserError, match=r"^data\.train: 78 pairs to train on, fewer than batch.pairs_per_step 79; valid"
    ):
        prepare_data(dataclasses.replace(config, batch=dataclasses.replace(config.batch, pairs_per_step=79)), MODEL)


def test_format_that_is_not_the_files(tmp_path, tokenizer_folder):
    path = write_jsonl(tmp_path / "a.jsonl", ROWS)
    config = make_config(SourceConfig(path=path, format="hh"), tokenizer=tokenizer_folder)
    with pytest.raises(
        UserError, match=r"^data\.train\[0\]\.format: .*: the columns completions, pairs, prompt are not"
    ):
        prepare_data(config, MODEL)


def test_tokenizer_of_another_model(tmp_path, tokenizer_folder):
    config = make_config(write_jsonl(tmp_path / "a.jsonl", ROWS), tokenizer=tokenizer_folder)
    with pytest.raises(
        UserError, match=r"^model\.tokenizer: .*: the tokenizer has 100 tokens, the model's vocabulary 9"
    ):
        prepare_data(config, TinyModelConfig(vocab_size=90))
