"""From the sources of the config to the pairs of training and evaluation, in five stages.

1. Every source is opened: its raw rows with their lines, its columns, its format (`sources.py`, `records.py`).
2. Every row is tokenized, once: the result is cached on disk and memory-mapped (`token_rows.py`, `tokens.py`).
3. The first broken row stops the run; pairs without a preference are counted, or stop it (`report.py`).
4. Prompts are held out of training sources (`holdout.py`).
5. The sources are put one after the other and their kept pairs are numbered (`pair_set.py`).

Stages 4 and 5 and the counts are made once and cached too: a start on data that was seen before reads no row of it.
"""

import shutil
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np

from dpo.base.console import say
from dpo.base.errors import UserError
from dpo.base.files import make_folder_atomically
from dpo.config import Config, SourceConfig
from dpo.data.formats.examples import check_columns, detect_format, holds_ids
from dpo.data.holdout import Split, split_sources
from dpo.data.pair_set import PairSet, open_pair_set, write_pair_set
from dpo.data.report import DataReport, SourceReport, dropped_pairs, from_json, report_source, to_json
from dpo.data.sources import Source, cache_path, digest, open_source
from dpo.data.token_rows import raise_first_error, tokenize_source
from dpo.data.tokenizer import Encoder, check_vocabulary, ids_encoder, load_tokenizer, text_encoder
from dpo.data.tokens import limits_of

__all__ = ["DataReport", "PairSet", "PreferenceData", "prepare_data"]

FORMAT = 1
"""The version of the cached pairs and their counts: whoever changes what they hold raises it."""
TRAIN, EVAL, REPORT = "train", "eval", "report.json"


@dataclass(frozen=True, eq=False)
class PreferenceData:
    """The pairs to train on, the pairs to evaluate (sources of `data.eval`, then what was held out), and the counts."""

    train: PairSet
    eval: PairSet
    report: DataReport


@dataclass(frozen=True, eq=False)
class _Opened:
    """A source of the config, where it stands there, and its rows as they come."""

    key: str
    config: SourceConfig
    source: Source
    format: str


@dataclass(frozen=True, eq=False)
class _Tokenized(_Opened):
    """A source and its token rows."""

    rows: datasets.Dataset

    @property
    def files(self) -> list[str]:
        """Those that hold the rows, in order."""
        return [str(file["filename"]) for file in self.rows.cache_files]


def prepare_data(config: Config, model_config: Any) -> PreferenceData:
    """Read, tokenize, check and number all data of a run; deterministic, and from the cache where it was done before.

    `model_config`: the transformers config of the model (vocabulary, positions, BOS and EOS). Raises UserError for
    anything that is wrong with the data, the tokenizer, or with fewer training pairs than a step takes.
    """
    opened = [_open(source, f"data.train[{i}]") for i, source in enumerate(config.data.train)]
    opened += [_open(source, f"data.eval[{i}]") for i, source in enumerate(config.data.eval)]
    sources = _tokenize(opened, config, model_config)
    train, evals = sources[: len(config.data.train)], sources[len(config.data.train) :]
    folder = cache_path(f"pairs-{_content(train, evals, config.train.seed)}")
    prepared = _from_cache(folder, train, evals, config.train.seed)
    if config.data.on_bad_row == "stop":
        _raise_first_dropped(sources)
    _check_enough(prepared, config.batch.pairs_per_step)
    return prepared


def _open(config: SourceConfig, key: str) -> _Opened:
    source, where = open_source(config, key), f"{key}.format: {config.path}"
    if config.format == "auto":
        return _Opened(key, config, source, detect_format(source.columns, source.first_row(), where))
    check_columns(config.format, source.columns, where)
    return _Opened(key, config, source, config.format)


def _tokenize(opened: list[_Opened], config: Config, model_config: Any) -> list[_Tokenized]:
    """The token rows of every source; no tokenizer is loaded where all come as tokens."""
    limits = limits_of(config.data.max_length, config.data.max_prompt_length, model_config)
    encoders: dict[bool, Encoder] = {True: ids_encoder(model_config)}
    if not all(holds_ids(one.format) for one in opened):
        tokenizer = load_tokenizer(config.model.tokenizer or config.model.path, config.model.trust_remote_code)
        check_vocabulary(tokenizer, limits.vocab_size)
        encoders[False] = text_encoder(tokenizer)
    num_proc = config.data.num_proc
    return [
        _Tokenized(
            **vars(one),
            rows=tokenize_source(one.source, one.format, encoders[holds_ids(one.format)], limits, num_proc),
        )
        for one in opened
    ]


def _raise_first_dropped(sources: list[_Tokenized]) -> None:
    for one in sources:
        for reason, where in dropped_pairs(one.rows):
            what = f"{reason}: a pair without a preference"
            raise UserError(one.source.place(where), what, "no such pair, or data.on_bad_row drop")


def _check_enough(data: PreferenceData, pairs_per_step: int) -> None:
    num_pairs = len(data.train)
    if num_pairs < pairs_per_step:
        what = f"{num_pairs} pairs to train on, fewer than batch.pairs_per_step {pairs_per_step}"
        dropped: Counter[str] = Counter()
        for source in data.report.sources:
            dropped.update(source.dropped if source.key.startswith("data.train") else {})
        if dropped:
            what += f" (dropped: {', '.join(f'{count} {reason}' for reason, count in dropped.items())})"
        fewer = f", or batch.pairs_per_step up to {num_pairs}" if num_pairs else ""
        raise UserError("data.train", what, f"more pairs{fewer}")


# --- the pairs and their counts, cached -------------------------------------------------------------------------------


def _content(train: list[_Tokenized], evals: list[_Tokenized], seed: int) -> str:
    """32 hex digits of all that `_number` depends on. The name of a file of token rows says what is in it, its size and
    time of change whether it is still the one in which the places of ids were looked up.
    """
    files = [(path.name, path.stat()) for one in train + evals for path in map(Path, one.files)]
    layout = [(name, info.st_size, info.st_mtime_ns) for name, info in files]
    facts = [len(one.files) for one in train], [len(one.files) for one in evals], [one.config.holdout for one in train]
    return digest([f"pairs {FORMAT}", repr((layout, facts, seed))])


def _from_cache(folder: Path, train: list[_Tokenized], evals: list[_Tokenized], seed: int) -> PreferenceData:
    """What the folder holds; it is made where it is not there, and again where it is damaged."""

    def make() -> None:
        make_folder_atomically(folder, lambda draft: _number(draft, train, evals, seed))

    if not folder.is_dir():
        make()
    try:
        return _read(folder, train, evals)
    except (OSError, ValueError) as failure:  # something is cut off or missing
        say(f"{folder} is damaged and made again: {failure}")
        shutil.rmtree(folder)
        make()
        return _read(folder, train, evals)


def _number(draft: Path, train: list[_Tokenized], evals: list[_Tokenized], seed: int) -> None:
    """Writes the pair sets of training and evaluation, and the report."""
    for one in train + evals:
        raise_first_error(one.rows, one.source)
    splits = split_sources([(one.key, one.rows, one.config.holdout) for one in train], seed)
    is_kept = [split.train for split in splits]
    mine = write_pair_set(draft / TRAIN, _files(train), np.concatenate(is_kept))
    is_kept = [np.ones(len(one.rows), bool) for one in evals] + [split.held for split in splits]
    others = write_pair_set(draft / EVAL, _files(evals + train), np.concatenate(is_kept))
    reports = [report_source(one.key, one.source, one.format, one.rows) for one in train + evals]
    reports[: len(train)] = map(_with_split, reports, splits)
    shared = len(np.intersect1d(mine.prompts, others.prompts))  # hold-out makes none, a source of `data.eval` may
    report = DataReport(tuple(reports), mine.num_pairs, others.num_pairs, shared)
    (draft / REPORT).write_text(to_json(report), encoding="utf-8")


def _read(folder: Path, train: list[_Tokenized], evals: list[_Tokenized]) -> PreferenceData:
    report = (folder / REPORT).read_text(encoding="utf-8")
    return PreferenceData(
        open_pair_set(folder / TRAIN, _files(train)),
        open_pair_set(folder / EVAL, _files(evals + train)),  # what is held out comes after the sources of `data.eval`
        from_json(report, [one.config.path for one in train + evals]),
    )


def _files(sources: list[_Tokenized]) -> list[str]:
    return [name for one in sources for name in one.files]


def _with_split(report: SourceReport, split: Split) -> SourceReport:
    held, removed = (int(split.pairs[mask].sum()) for mask in (split.held, split.removed))
    return replace(report, held_out_prompts=split.num_prompts, held_out_pairs=held, removed_pairs=removed)
