"""A reference pass that dies, a cache that is damaged, not to be written, not shared, or shared with other jobs."""

import threading
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest

from dpo.base.errors import RunError
from dpo.config import Config
from dpo.distributed import shared
from dpo.ref_logps import fill as reference_pass
from dpo.sources.kept import trust
from tests.support.models import save_model, save_pairs
from tests.support.ranks import Ranks
from tests.support.runs import (
    afresh,
    cache_folders,
    error_lines,
    exit_code,
    make_config,
    reference_line,
    run,
    same_weights,
)

pytest_plugins = ["tests.support.data_plugin"]
NUM_PAIRS = 8
ALL = 2 * NUM_PAIRS
"""Every pair of `save_pairs` has a prompt and two completions of its own."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """model/ and pairs.jsonl."""
    root = tmp_path_factory.mktemp("cache")
    save_model(root / "model", "llama")
    save_pairs(root / "pairs.jsonl", NUM_PAIRS)
    return root


@pytest.fixture
def config(folders: Path, tmp_path: Path) -> Config:
    """One step on four of the eight pairs."""
    return make_config(
        folders / "model", folders / "pairs.jsonl", tmp_path / "run", batch__pairs_per_step=4, train__steps=1
    )


def test_a_build_that_died_goes_on(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks are written after every chunk, a chunk is one completion, and the 6th chunk fails: 5 rows are there."""
    monkeypatch.setattr(reference_pass, "SECONDS_BETWEEN_BLOCKS", 0)
    monkeypatch.setattr(reference_pass, "_chunks", lambda items, tokens: ([item] for item in items))
    whole, calls = reference_pass._run, []

    def fail_at_sixth(*args: object) -> object:
        calls.append(1)
        if len(calls) == 6:
            raise RunError("the power is gone")
        return whole(*args)

    with monkeypatch.context() as patch:
        patch.setattr(reference_pass, "_run", fail_at_sixth)
        assert exit_code(config) == 1
    assert reference_line(run(config)) == (ALL - 5, 5)


def test_blocks_are_written_on_the_way(config: Config, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """With a long time between blocks there is one at the end, with none one after each chunk."""
    monkeypatch.setattr(reference_pass, "_chunks", lambda items, tokens: ([item] for item in items))
    run(config)
    assert len(list(cache_folders(tmp_path)[0].glob("rows-*"))) == 1
    monkeypatch.setattr(reference_pass, "SECONDS_BETWEEN_BLOCKS", 0)
    monkeypatch.setenv("DPO_CACHE", str(tmp_path / "reference-cache" / "second"))
    run(afresh(config))
    assert len(list((tmp_path / "reference-cache" / "second").rglob("rows-*"))) == ALL


def test_a_damaged_block_is_computed_again(config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = run(config)
    (block,) = cache_folders(tmp_path)[0].glob("rows-*")
    content = bytearray(block.read_bytes())
    content[40] ^= 1
    block.write_bytes(content)
    second = run(afresh(config))
    assert "is damaged" in capsys.readouterr().err
    assert reference_line(second) == (ALL, 0)
    assert same_weights(first / "final", second / "final")
    assert reference_line(run(afresh(config))) == (0, ALL)


def flip_the_last_id(path: Path) -> None:
    """Flips a bit of the last completion's first id in a file of token rows, whose ids stand one after another."""
    last = prepared_pair(path)
    content = bytearray(path.read_bytes())
    content[content.rindex(last.tobytes())] ^= 1
    path.write_bytes(content)


def prepared_pair(path: Path) -> np.ndarray:
    """The ids of the last completion of a file of token rows."""
    return np.asarray(datasets.Dataset.from_file(str(path))[-1]["completion_ids"][-1], np.int32)


def test_flipped_ids_are_made_again_before_rows_are_computed(
    config: Config, hf_cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With an empty reference cache, a changed id used to be computed at every start, and found at none."""
    first = run(config)
    (path,) = hf_cache.rglob("tokens-*/*.arrow")
    flip_the_last_id(path)
    second = run(afresh(config, reference__cache_dir=str(hf_cache / "empty")))
    assert f"{path.parent} is damaged and made again: {path.name} has changed" in capsys.readouterr().err
    assert reference_line(second) == (ALL, 0)
    assert same_weights(first / "final", second / "final")


@pytest.mark.parametrize("is_filled", [False, True])
def test_ids_that_change_after_the_check_end_the_run_by_name(
    config: Config, hf_cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], is_filled: bool
) -> None:
    """In the reference pass, and where every row is there in the step that meets them; the next start mends it."""
    run(config)
    (path,) = hf_cache.rglob("tokens-*/*.arrow")
    flip_the_last_id(path)
    cache = str(hf_cache / "empty")
    if is_filled:
        cache = str(cache_folders(hf_cache.parent)[0].parent)
    config = afresh(config, reference__cache_dir=cache, train__steps=2)
    with monkeypatch.context() as patch:
        patch.setattr("dpo.run.inputs.find_fault", trust)
        assert exit_code(config) == 1
    (error,) = error_lines(capsys.readouterr().err)
    assert "after this start checked them; start again" in error
    assert ("has no row" if is_filled else f"of pair {NUM_PAIRS - 1} have changed") in error
    assert exit_code(config) == 0


# --- shared ----------------------------------------------------------------------------------------------------------


def test_a_cache_that_cannot_be_written_is_one_line(
    config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    assert exit_code(afresh(config, reference__cache_dir=str(tmp_path / "file" / "cache"))) == 2
    errors = error_lines(capsys.readouterr().err)
    assert len(errors) == 1
    assert errors[0].startswith(f"error: CONFIG: reference.cache_dir: cannot write to {tmp_path / 'file' / 'cache'}")


def test_two_jobs_may_probe_at_the_same_time(config: Config, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Another job probes between this one's writing and looking: its probe must not be taken for ours."""
    written = shared._write_probe

    def with_company(*args: Any) -> shared.Probe:
        probe = written(*args)
        other = threading.Thread(target=lambda: written(*args))
        other.start()
        other.join()
        return probe

    monkeypatch.setattr(shared, "_write_probe", with_company)
    assert reference_line(run(config)) == (ALL, 0)
    assert len(list(tmp_path.glob(".probe-*"))) == 2  # the other's, for the run and for the cache; ours are gone


def train_as_rank(config: Config) -> None:
    """A rank of a run."""
    from dpo.train.program import run_training

    run_training(config)


@pytest.mark.xdist_group("ranks")
def test_the_number_of_ranks_is_not_in_the_key(config: Config, ranks: Ranks, tmp_path: Path) -> None:
    """Computed by 3 ranks on 8 prompts, found by 2 and by 1."""
    for size, expected in ((3, (ALL, 0)), (2, (0, ALL))):
        layout = afresh(config)
        ranks(size, train_as_rank, layout)
        assert reference_line(str(layout.train.run_dir)) == expected
    assert reference_line(run(afresh(config))) == (0, ALL)
    assert len(cache_folders(tmp_path)) == 1
