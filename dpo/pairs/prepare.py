"""From the sources of the config to the pairs of training and evaluation, in six stages.

1. Every source is opened: its raw rows with their lines, its columns, its format (`dpo.sources`).
2. Every row is tokenized once; the token rows are cached on disk and memory-mapped (`token_rows.py`, `tokens.py`).
3. The first broken row stops the run; pairs without a preference are counted, or stop the run (`report.py`).
4. Prompts are held out of training sources (`holdout.py`).
5. Of each training source, the pairs of an epoch are chosen (`shares.py`).
6. The sources are concatenated and their pairs are numbered (`numbering.py`, `pair_set.py`).

Stages 4 to 6 and the counts are cached too: a later start with the same data computes none of them again. What a cache
folder holds is compared with its SHA256SUMS before it is used (`dpo.sources.kept`).
"""

from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from dpo.base.arrow_files import open_rows
from dpo.base.errors import UserError
from dpo.base.files import write_file
from dpo.base.sums import read_sums
from dpo.config import Config, LossConfig, SourceConfig
from dpo.encode.chat import check_arguments
from dpo.encode.encoder import Encoder, ids_encoder, surplus_tokens, template_name, text_encoder, writes_date
from dpo.encode.stops import model_stop_ids
from dpo.encode.tokenizer import load_tokenizer
from dpo.pairs.holdout import Split, split_sources
from dpo.pairs.numbering import Part, write_pair_set
from dpo.pairs.pair_set import VALUES, PairSet, open_pair_set
from dpo.pairs.pair_values import named_values
from dpo.pairs.report import DataReport, SourceReport, dropped_pairs, from_json, report_source, to_json
from dpo.pairs.shares import describe_share, pairs_of_epoch
from dpo.pairs.token_rows import raise_first_error, tokenize_source
from dpo.pairs.tokens import limits_of
from dpo.sources.caching import cache_path, digest
from dpo.sources.formats.decision import decide_reading
from dpo.sources.formats.examples import FORMATS, holds_ids
from dpo.sources.formats.reading import Reading, check_template
from dpo.sources.kept import FindFault, find_fault, keep_folder
from dpo.sources.source import Source, open_source

__all__ = ["DataReport", "PairSet", "PreferenceData", "prepare_data"]

FORMAT = 4
"""The version of the cached pairs and their counts. A change of their contents or meaning must raise it."""
TRAIN, EVAL, REPORT = "train", "eval", "report.json"


@dataclass(frozen=True, eq=False)
class PreferenceData:
    """All data of a run."""

    train: PairSet
    """The pairs to train on."""
    eval: PairSet
    """The pairs to evaluate: of the sources of `data.eval`, then the held-out pairs of `data.train`."""
    report: DataReport
    """The counts that a run prints."""

    @property
    def train_sources(self) -> tuple[SourceReport, ...]:
        """Returns the sources whose rows the training set counts, in their order."""
        return tuple(source for source in self.report.sources if source.key.startswith("data.train"))

    @property
    def eval_sources(self) -> tuple[SourceReport, ...]:
        """Returns the sources whose rows the evaluation set counts, in their order: `data.eval`, then `data.train`."""
        sources = self.report.sources
        return tuple(sorted(sources, key=lambda source: source.key.startswith("data.train")))  # stable


@dataclass(frozen=True, eq=False)
class _Opened:
    """A source of the config and its raw rows."""

    key: str
    """Its key in the config, `data.train[0]`."""
    config: SourceConfig
    source: Source
    reading: Reading
    """The way in which its rows are read."""


@dataclass(frozen=True, eq=False)
class _Tokenized(_Opened):
    """A source and its token rows."""

    files: list[str]
    """The files of the token rows, in order."""
    encoder: Encoder

    @cached_property
    def rows(self) -> pa.Table:
        """Returns the token rows, mapped into memory."""
        return open_rows(self.files)


def prepare_data(config: Config, model_config: Any, fault_of: FindFault = find_fault) -> PreferenceData:
    """Reads, tokenizes, checks and numbers all data of a run; deterministic, and cached.

    Args:
        config: the config of the run.
        model_config: the transformers config of the model, for its vocabulary, positions, BOS and EOS.
        fault_of: checks each folder of the cache, see `dpo.sources.kept`.

    Raises:
        UserError: the data or the tokenizer is wrong.
    """
    opened = [_open(source, f"data.train[{i}]", fault_of) for i, source in enumerate(config.data.train)]
    opened += [_open(source, f"data.eval[{i}]", fault_of) for i, source in enumerate(config.data.eval)]
    _check_losers(opened, config.loss)
    sources = _tokenize(opened, config, model_config, fault_of)
    train, evals = sources[: len(config.data.train)], sources[len(config.data.train) :]
    content = _content(train, evals, config)
    folder = cache_path(f"pairs-{content}")
    keep_folder(folder, lambda draft: _number(draft / content, train, evals, config), fault_of)
    prepared = _read(folder / content, train, evals)
    prepared = replace(prepared, report=_with_facts(prepared.report, sources, model_config))
    if config.data.on_bad_row == "stop":
        _raise_first_dropped(sources)
    return prepared


def _open(config: SourceConfig, key: str, fault_of: FindFault) -> _Opened:
    """Opens a source and decides how its rows are read."""
    source = open_source(config, key, fault_of)
    reading = decide_reading(config, source.columns, source.first_row(), not source.has_lines, key)
    return _Opened(key, config, source, reading)


def _check_losers(opened: list[_Opened], loss: LossConfig) -> None:
    """Raises UserError for a source of demonstrations, where the loss compares winners with losers."""
    for entry in opened:
        if loss.facts.compares and not FORMATS[entry.reading.format].compares:
            what = f"{entry.config.path} has demonstrations, rows without rejected, and loss.name {loss.name} compares"
            valid = "rows with chosen and rejected (columns: {rejected: NAME}), or loss.name sft"
            raise UserError(f"{entry.key}.path", what, valid)


def _tokenize(opened: list[_Opened], config: Config, model_config: Any, fault_of: FindFault) -> list[_Tokenized]:
    """Tokenizes every source. Loads no tokenizer where all sources have the format `tokens`."""
    limits = limits_of(config.data.max_length, config.data.max_prompt_length, model_config)
    stops = model_stop_ids(model_config, config.model.path)
    encoders: dict[bool, Encoder] = {True: ids_encoder(model_config, stops)}
    if not all(holds_ids(entry.reading.format) for entry in opened):
        tokenizer = load_tokenizer(config.model.tokenizer or config.model.path, config.model.trust_remote_code)
        encoders[False] = text_encoder(tokenizer, stops)
        for entry in opened:
            check_template(entry.reading, bool(tokenizer.chat_template), f"{entry.key}: {entry.config.path}")
            if tokenizer.chat_template:
                check_arguments(tokenizer, entry.reading.arguments, f"{entry.key}: {entry.config.path}")
    tokenized = []
    for entry in opened:
        encoder = encoders[holds_ids(entry.reading.format)]
        files = tokenize_source(entry.source, entry.reading, encoder, limits, config.data.num_proc, fault_of)
        tokenized.append(_Tokenized(**vars(entry), files=files, encoder=encoder))
    return tokenized


def _raise_first_dropped(sources: list[_Tokenized]) -> None:
    """Raises UserError for the first pair without a preference, where `data.on_bad_row` is `stop`."""
    for entry in sources:
        for reason, where in dropped_pairs(entry.rows):
            what = f"{reason}: a pair without a preference"
            raise UserError(entry.source.place(where), what, "no such pair, or data.on_bad_row drop")


# --- the pairs and their counts, cached -------------------------------------------------------------------------------


def _content(train: list[_Tokenized], evals: list[_Tokenized], config: Config) -> str:
    """Returns a hash of everything that `_number` depends on, 32 hex digits.

    The SHA-256 of each file of token rows stands for its rows, and for the places in it that the pair set holds.
    """
    layout = [read_sums(Path(entry.files[0]).parent) for entry in train + evals]
    num_files = [len(entry.files) for entry in train], [len(entry.files) for entry in evals]
    holdouts = [entry.config.holdout for entry in train]
    shares = [(entry.config.weight, entry.config.count) for entry in train]
    facts = (layout, (*num_files, holdouts, shares), config.train.seed, config.loss.facts.compares)
    return digest([f"pairs {FORMAT}", repr(facts)])


def _number(draft: Path, train: list[_Tokenized], evals: list[_Tokenized], config: Config) -> None:
    """Writes the pair sets of training and evaluation, and the report. Raises UserError for the first broken row."""
    for entry in train + evals:
        raise_first_error(entry.rows, entry.source)
    draft.mkdir()
    seed, part = config.train.seed, partial(Part, has_losers=config.loss.facts.compares)
    splits = split_sources([(entry.key, entry.rows, entry.config.holdout) for entry in train], seed)
    both = list(zip(train, splits, strict=True))
    parts = [part(entry.files, split.train, pairs_of_epoch(entry.config, split.num_train)) for entry, split in both]
    train_set = write_pair_set(draft / TRAIN, parts, _values_of(train), seed)
    parts = [part(entry.files, np.ones(len(entry.rows), bool)) for entry in evals]
    parts += [part(entry.files, split.held) for entry, split in both]
    eval_set = write_pair_set(draft / EVAL, parts, _values_of(evals + train), seed)
    reports = [_report(entry) for entry in train + evals]
    reports[: len(train)] = [_with_share(report, *each) for report, each in zip(reports, both, strict=False)]
    shared = len(np.intersect1d(train_set.prompts, eval_set.prompts))  # from sources of `data.eval`, not from hold-out
    report = DataReport(tuple(reports), train_set.num_pairs, eval_set.num_pairs, shared)
    write_file(draft / REPORT, to_json(report).encode())


def _read(folder: Path, train: list[_Tokenized], evals: list[_Tokenized]) -> PreferenceData:
    """Returns the data that `_number` wrote."""
    report = (folder / REPORT).read_text(encoding="utf-8")
    every = evals + train  # held-out pairs come after the sources of `data.eval`
    return PreferenceData(
        open_pair_set(folder / TRAIN, _files(train), _values_of(train)),
        open_pair_set(folder / EVAL, _files(every), _values_of(every)),
        from_json(report, [entry.config.path for entry in train + evals]),
    )


def _values_of(sources: list[_Tokenized]) -> list[str]:
    """Returns the columns of VALUES that any of the sources names."""
    named = {name for entry in sources for name in named_values(entry.reading.names)}
    return [column for column, name in VALUES.items() if name in named]


def _files(sources: list[_Tokenized]) -> list[str]:
    """Returns the files of token rows of all sources, in order."""
    return [name for entry in sources for name in entry.files]


def _with_facts(report: DataReport, sources: list[_Tokenized], model_config: Any) -> DataReport:
    """Returns the report with the facts of tokenizer, model and files: the chat template of each source, the positions
    of the model, the tokens that it lacks.
    """
    max_positions = limits_of(None, None, model_config).max_positions
    described = [
        replace(
            source,
            template=template_name(entry.encoder),
            template_args=dict(entry.config.template_args),
            writes_date=writes_date(entry.encoder),
            max_positions=max_positions,
            has_lines=entry.source.has_lines,
        )
        for source, entry in zip(report.sources, sources, strict=True)
    ]
    surplus = max(surplus_tokens(entry.encoder, model_config.vocab_size) for entry in sources)
    return replace(report, sources=tuple(described), surplus_tokens=surplus)


def _report(entry: _Tokenized) -> SourceReport:
    """Returns the counts of a source, without those of hold-out and of its share of an epoch."""
    return report_source(entry.key, entry.source, entry.reading, entry.rows)


def _with_share(report: SourceReport, entry: _Tokenized, split: Split) -> SourceReport:
    """Returns the report of a training source with the counts of hold-out and of its share of an epoch."""
    held, removed = (int(split.pairs[mask].sum()) for mask in (split.held, split.removed))
    num, share = pairs_of_epoch(entry.config, split.num_train), describe_share(entry.config)
    report = replace(report, held_out_prompts=split.num_prompts, held_out_pairs=held, removed_pairs=removed)
    return replace(report, epoch_pairs=num, share=share)
