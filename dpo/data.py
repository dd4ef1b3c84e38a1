"""From the sources of the config to the pairs of training and evaluation, in five stages.

1. Every source is opened: its raw rows with their lines, its columns, its format (`sources.py`, `records.py`).
2. Every row is tokenized, once: the result is cached on disk and memory-mapped (`token_rows.py`, `tokens.py`).
3. The first broken row stops the run; pairs without a preference are counted, or stop it (`report.py`).
4. Prompts are held out of training sources (`holdout.py`).
5. The sources are put one after the other and their kept pairs are numbered (`pair_set.py`).
"""

from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

import datasets
import numpy as np

from dpo.config import Config, SourceConfig
from dpo.errors import UserError
from dpo.holdout import Split, split_sources
from dpo.pair_set import PairSet, make_pair_set
from dpo.records import check_columns, detect_format
from dpo.report import DataReport, SourceReport, dropped_pairs, report_source
from dpo.sources import Source, open_source
from dpo.token_rows import column_keys, tokenize_source
from dpo.tokens import Encoder, check_vocabulary, ids_encoder, limits_of, load_tokenizer, text_encoder

__all__ = ["DataReport", "PairSet", "PreferenceData", "prepare_data"]


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


def prepare_data(config: Config, model_config: Any) -> PreferenceData:
    """Read, tokenize, check and number all data of a run; deterministic, and from the cache where it was done before.

    `model_config`: the transformers config of the model (vocabulary, positions, BOS and EOS). Raises UserError for
    anything that is wrong with the data, the tokenizer, or with fewer training pairs than a step takes.
    """
    opened = [_open(source, f"data.train[{i}]") for i, source in enumerate(config.data.train)]
    opened += [_open(source, f"data.eval[{i}]") for i, source in enumerate(config.data.eval)]
    rows = _tokenize(opened, config, model_config)
    if config.data.on_bad_row == "stop":
        _raise_first_dropped(opened, rows)
    num_train = len(config.data.train)
    holdouts = [(one.key, one_rows, one.config.holdout) for one, one_rows in zip(opened, rows, strict=True)]
    splits = split_sources(holdouts[:num_train], config.train.seed)
    train = make_pair_set(_joined(rows[:num_train]), np.concatenate([split.train for split in splits]))
    _check_enough(len(train), config.batch.pairs_per_step, rows[:num_train])
    evaluation = _eval_set(rows[:num_train], rows[num_train:], splits)
    reports = [report_source(one.key, one.source, one.format, r) for one, r in zip(opened, rows, strict=True)]
    reports[:num_train] = map(_with_split, reports, splits)
    report = DataReport(tuple(reports), len(train), len(evaluation), _num_shared_prompts(train, evaluation))
    return PreferenceData(train, evaluation, report)


def _open(config: SourceConfig, key: str) -> _Opened:
    source, where = open_source(config, key), f"{key}.format: {config.path}"
    if config.format == "auto":
        return _Opened(key, config, source, detect_format(source.columns, source.first_row(), where))
    check_columns(config.format, source.columns, where)
    return _Opened(key, config, source, config.format)


def _tokenize(opened: list[_Opened], config: Config, model_config: Any) -> list[datasets.Dataset]:
    """The token rows of every source; no tokenizer is loaded where all come as tokens."""
    limits = limits_of(config.data.max_length, config.data.max_prompt_length, model_config)
    encoders: dict[bool, Encoder] = {True: ids_encoder(model_config)}
    if any(one.format != "tokens" for one in opened):
        tokenizer = load_tokenizer(config.model.tokenizer or config.model.path, config.model.trust_remote_code)
        check_vocabulary(tokenizer, limits.vocab_size)
        encoders[False] = text_encoder(tokenizer)
    num_proc = config.data.num_proc
    return [
        tokenize_source(one.source, one.format, encoders[one.format == "tokens"], limits, num_proc) for one in opened
    ]


def _check_enough(num_pairs: int, pairs_per_step: int, rows: list[datasets.Dataset]) -> None:
    if num_pairs < pairs_per_step:
        what = f"{num_pairs} pairs to train on, fewer than batch.pairs_per_step {pairs_per_step}"
        dropped = Counter(reason for token_rows in rows for reason, _ in dropped_pairs(token_rows))
        if dropped:
            what += f" (dropped: {', '.join(f'{count} {reason}' for reason, count in dropped.items())})"
        fewer = f", or batch.pairs_per_step up to {num_pairs}" if num_pairs else ""
        raise UserError(f"data.train: {what}; valid: more pairs{fewer}")


def _raise_first_dropped(opened: list[_Opened], rows: list[datasets.Dataset]) -> None:
    for one, token_rows in zip(opened, rows, strict=True):
        for reason, where in dropped_pairs(token_rows):
            what = f"{reason}: a pair without a preference; valid: no such pair, or data.on_bad_row drop"
            raise UserError(f"{one.source.place(where)}: {what}")


def _eval_set(train: list[datasets.Dataset], evals: list[datasets.Dataset], splits: list[Split]) -> PairSet:
    """The pairs of the sources of `data.eval`, then those held out of training."""
    is_kept = [np.ones(len(rows), bool) for rows in evals] + [split.held for split in splits]
    return make_pair_set(_joined(evals + train), np.concatenate(is_kept))


def _joined(rows: list[datasets.Dataset]) -> datasets.Dataset:
    """One after the other; nothing is copied."""
    return datasets.concatenate_datasets(rows) if len(rows) > 1 else rows[0]


def _with_split(report: SourceReport, split: Split) -> SourceReport:
    held, removed = (int(split.pairs[mask].sum()) for mask in (split.held, split.removed))
    return replace(report, held_out_prompts=split.num_prompts, held_out_pairs=held, removed_pairs=removed)


def _num_shared_prompts(train: PairSet, evaluation: PairSet) -> int:
    """Prompts that stand in both sets; hold-out makes none, a source of `data.eval` may."""
    mine, other = (column_keys(pairs.rows, "prompt_key")[pairs.row_of_pair] for pairs in (train, evaluation))
    return len(np.intersect1d(mine, other))
