"""The counts of kept, dropped and truncated pairs of every source, which a run prints before its first step."""

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from dpo.base.errors import UserError
from dpo.pairs.token_rows import blocks, lists, pairs_of
from dpo.sources.formats.reading import Reading
from dpo.sources.formats.row_fields import few
from dpo.sources.source import Source

NUM_PLACES = 3
"""The number of dropped pairs of each reason that are named with their place."""
COUNTS = ("prompt_truncated", "completions_truncated", "over_positions", "repeated_pairs", "contradicting_pairs",
          "boundary_merges", "chats", "texts", "rendered_chats", "control_texts", "written_bos", "two_bos",
          "trimmed_ends", "unwritten")  # fmt: skip


@dataclass(frozen=True)
class SourceReport:
    """The counts of one source."""

    key: str
    path: str
    format: str
    reading: str
    """The way in which the rows are read, for people."""
    rows: int
    pairs: int
    """Pairs that carry a preference, also held-out and removed ones."""
    rows_without_pair: int
    """Rows that list no pair, neither a kept nor a dropped one."""
    dropped: dict[str, int]
    """Pairs without a preference, by reason."""
    places: dict[str, tuple[str, ...]]
    """The places of the first dropped pairs by reason: `:line` or `:row N`."""
    ignored_columns: tuple[str, ...]
    prompt_truncated: int
    """Truncated prompts of rows with a kept pair."""
    completions_truncated: int
    """Truncated completions in a kept pair."""
    over_positions: int
    """Completions in a kept pair that end after the model's max_position_embeddings (RoPE)."""
    repeated_pairs: int
    contradicting_pairs: int
    boundary_merges: int
    """Completions in a kept pair that the tokenizer merges with their prompt where it is given both as one text."""
    chats: int
    """Rows with a kept pair whose messages went through the chat template; so for the next two."""
    texts: int
    """Rows of texts whose prompt has no control token but BOS."""
    rendered_chats: int
    """Rows of texts whose prompt has control tokens."""
    control_texts: int
    """Rows in which the text of a control token stays text."""
    written_bos: int
    """Prompts that bring their BOS, so that the tokenizer's was left out."""
    two_bos: int
    """Prompts that begin with two BOS."""
    trimmed_ends: int
    """Rows with an answer whose text goes on after the stop token that ends it."""
    unwritten: int
    """Rows with a content or a tool call that the chat template leaves out."""
    held_out_prompts: int = 0
    held_out_pairs: int = 0
    """Kept pairs that were moved to evaluation."""
    template: str = ""
    """The tokenizer's chat template, by its content; empty where there is none, and for rows of ids."""
    template_args: Mapping[str, Any] = field(default_factory=dict)
    """The source's arguments of the chat template."""
    writes_date: bool = False
    """Whether the chat template may write the date of the day."""
    max_positions: int | None = None
    """The model's max_position_embeddings."""
    has_lines: bool = True
    """Whether a row is named by its line or by its number, as in `Source`."""
    removed_pairs: int = 0
    """Kept pairs that are neither trained on nor evaluated: their prompt is held out of another source, or equals a
    held-out prompt after truncation."""
    epoch_pairs: int = 0
    """Pairs that an epoch has, a repeated one as many times as it stands in it; 0 for a source of `data.eval`."""
    share: str = ""
    """The key that gives the source's share of an epoch, and its value: `weight 0.5`; "" where there is none."""

    @property
    def train_pairs(self) -> int:
        """Returns the kept pairs that are neither held out nor removed, each once."""
        return self.pairs - self.held_out_pairs - self.removed_pairs

    def lines(self) -> list[str]:
        """Returns the counts as short lines for people, without counts of zero."""
        dropped = sum(self.dropped.values())
        counts = f"{self.rows:,} rows, {self.pairs:,} pairs kept, {dropped:,} dropped"
        lines = [f"{self.key} {self.path} ({self.format}): {counts}", f"  {self.reading}"]
        for reason, count in self.dropped.items():
            more = ", …" if count > len(self.places[reason]) else ""
            lines.append(f"  dropped, {reason}: {count:,} (at {', '.join(self.places[reason])}{more})")
        facts = (
            (self.rows_without_pair, "rows without a pair"),
            (self.repeated_pairs, "pairs that repeat an earlier pair of their row"),
            (self.contradicting_pairs, "pairs whose opposite is listed too"),
            (self.prompt_truncated, "prompts cut at their beginning"),
            (self.completions_truncated, "completions cut at their end"),
            (self.held_out_prompts, f"prompts held out, with {self.held_out_pairs:,} pairs"),
            (self.removed_pairs, "pairs removed from training: their prompt is held out"),
            (self.boundary_merges, "completions tokenized apart from their prompt: as one text, both share a token"),
            (self.written_bos, "prompts bring their BOS: the tokenizer's was left out, so that there is one"),
            (self.two_bos, "prompts begin with two BOS: a WARNING"),
            (self.rendered_chats, "prompts of texts spell control tokens, which are read as control tokens"),
            (self.control_texts, "rows spell a control token in a message or an answer, where it stays text"),
            (self.trimmed_ends, "rows with text after the stop token that ends an answer, which was left out"),
            (self.unwritten, "rows have a message or a tool call that the chat template leaves out: a WARNING"),
        )
        lines += [f"  {count:,} {text}" for count, text in facts if count]
        if self.over_positions:
            lines.append(f"  WARNING: {self.over_positions_words()}")
        lines += self._template_lines()
        if self.ignored_columns:
            lines.append(f"  columns not used: {few(self.ignored_columns)}")
        if self.share:
            lines.append(f"  {self._epoch()}")
        return lines

    def _template_lines(self) -> Iterator[str]:
        """Yields what became of messages and texts: which chat template, or none."""
        if self.chats:
            args = f", template_args {json.dumps(self.template_args)}" if self.template_args else ""
            yield f"  messages by the tokenizer's chat template {self.template}{args}"
        if self.chats and self.writes_date and "date_string" not in self.template_args:
            what = "the chat template may write today's date: tomorrow the same file would have other tokens"
            yield f"  WARNING: {what}; {self.key}.template_args: {{date_string: '26 Jul 2024'}} fixes it for Llama 3.1"
        if self.lacks_template:
            what = f"{self.texts:,} rows of texts do not go through the tokenizer's chat template"
            yield f"  WARNING: {what}; {self.key}.as_chat: true reads them as conversations"
        elif self.texts or self.rendered_chats:
            yield "  chat template: none, the rows are texts"

    def over_positions_words(self) -> str:
        """Returns how many completions end after the model's positions, and the key that cuts them."""
        what = f"{self.over_positions:,} completions end after the model's {self.max_positions} positions"
        return f"{what} (max_position_embeddings); data.max_length {self.max_positions} cuts them"

    @property
    def lacks_template(self) -> bool:
        """Returns whether texts are given as they are to a model that has a chat template."""
        return bool(self.texts and self.template)

    @property
    def share_is_empty(self) -> bool:
        """Returns whether the source has a share of an epoch, which is no pair."""
        return bool(self.share) and not self.epoch_pairs

    def _epoch(self) -> str:
        """Returns how many of the pairs an epoch has, and how many times where that is more than once."""
        line = f"of {self.train_pairs:,} pairs kept for training an epoch has {self.epoch_pairs:,}: {self.share}"
        if self.epoch_pairs <= self.train_pairs:
            return line
        passes, rest = divmod(self.epoch_pairs, self.train_pairs)
        return f"{line}, each {passes} or {passes + 1} times" if rest else f"{line}, each {passes} times"


@dataclass(frozen=True)
class DataReport:
    """The counts of all data of a run."""

    sources: tuple[SourceReport, ...]
    """The sources of `data.train`, then the sources of `data.eval`."""
    train_pairs: int
    """Pairs of an epoch, N."""
    eval_pairs: int
    eval_prompts_in_training: int = 0
    """Prompts of training that a source of `data.eval` has too."""
    surplus_tokens: int = 0
    """Tokens of the tokenizer that the model has no embedding for."""

    def lines(self) -> list[str]:
        """Returns the counts as lines for people."""
        lines = [line for source in self.sources for line in source.lines()]
        lines.append(f"{self.train_pairs:,} pairs to train on, {self.eval_pairs:,} to evaluate")
        if self.surplus_tokens:
            lines.append(f"the tokenizer has {self.surplus_tokens:,} tokens that the model has not; no row has them")
        if self.eval_prompts_in_training:
            lines.append(f"WARNING: {self.eval_prompts_in_training:,} prompts of data.eval are in training data too")
        return lines


def check_enough(report: DataReport, pairs_per_step: int, tell: Callable[[str], None] = lambda line: None) -> None:
    """Raises UserError where an epoch has fewer pairs than a step takes, or none of a source that has a share.

    Args:
        report: the counts of all data.
        pairs_per_step: `batch.pairs_per_step`.
        tell: called with each line of the report before the error.
    """
    num_pairs, absent = report.train_pairs, [source for source in report.sources if source.share_is_empty]
    if num_pairs >= pairs_per_step and not absent:
        return
    for line in report.lines():
        tell(line)
    for source in absent:
        key, share = source.share.split()
        what = f"{source.path}: {share} of {source.train_pairs:,} pairs kept for training is none"
        raise UserError(f"{source.key}.{key}", what, "a larger share of more pairs, or a list without this source")
    what = f"{num_pairs} pairs to train on, fewer than batch.pairs_per_step {pairs_per_step}"
    reasons = ", ".join(f"{count:,} {reason}" for reason, count in _not_trained(report).items() if count)
    fewer = f", or batch.pairs_per_step up to {num_pairs}" if num_pairs else ""
    raise UserError("data.train", f"{what}; not trained on: {reasons}" if reasons else what, f"more pairs{fewer}")


def _not_trained(report: DataReport) -> Counter[str]:
    """Returns the pairs of the training sources that an epoch does not have, by reason."""
    counts: Counter[str] = Counter()
    for source in report.sources:
        if source.key.startswith("data.train"):
            counts.update({f"dropped ({reason})": count for reason, count in source.dropped.items()})
            counts["held out for evaluation"] += source.held_out_pairs
            counts["removed because their prompt is held out"] += source.removed_pairs
            counts["left out by weight or count"] += max(0, source.train_pairs - source.epoch_pairs)
    return counts


def to_json(report: DataReport) -> str:
    """Returns the report as a text for `from_json`."""
    return json.dumps(asdict(report))


def from_json(text: str, paths: Sequence[str]) -> DataReport:
    """Returns the report that `to_json` wrote, with the present paths of its sources."""
    fields = json.loads(text)
    fields["sources"] = tuple(map(_source_of, fields["sources"], paths))
    return DataReport(**fields)


def _source_of(fields: dict[str, Any], path: str) -> SourceReport:
    """Returns a source's counts from their JSON, with the tuples that JSON has as lists."""
    tuples = {
        "places": {reason: tuple(where) for reason, where in fields["places"].items()},
        "ignored_columns": tuple(fields["ignored_columns"]),
    }
    return SourceReport(**fields | tuples | {"path": path})


def report_source(key: str, source: Source, reading: Reading, rows: pa.Table) -> SourceReport:
    """Returns the counts of a source, from its token rows; hold-out is not counted yet.

    Args:
        key: the source's key in the config, `data.train[0]`.
        source: its raw rows.
        reading: the way in which its rows are read.
        rows: its token rows.
    """
    num_pairs, empty_rows, counts = 0, 0, np.zeros(len(COUNTS), np.int64)
    dropped: dict[str, int] = {}
    places: dict[str, tuple[str, ...]] = {}
    for _, table in blocks(rows, ["pairs", "dropped", *COUNTS]):
        begins, pairs = pairs_of(table)
        num_pairs += len(pairs)
        empty_rows += int(np.sum((np.diff(begins) == 0) & (np.diff(lists(table, "dropped")[0]) == 0)))
        counts += [int(np.sum(table.column(name).to_numpy())) for name in COUNTS]
    for reason, where in dropped_pairs(rows):
        dropped[reason] = dropped.get(reason, 0) + 1
        if dropped[reason] <= NUM_PLACES:
            places[reason] = (*places.get(reason, ()), source.place(where).removeprefix(source.path))
    ignored = tuple(sorted(source.columns - reading.own_columns))
    counted: dict[str, Any] = dict(zip(COUNTS, counts.tolist(), strict=True))
    return SourceReport(
        key,
        source.path,
        reading.format,
        reading.line,
        len(rows),
        num_pairs,
        empty_rows,
        dropped,
        places,
        ignored,
        **counted,
    )


def dropped_pairs(rows: pa.Table) -> Iterator[tuple[str, int]]:
    """Yields (reason, line or row number) of every dropped pair, in file order."""
    for _, table in blocks(rows, ["dropped", "where"]):
        begins, reasons = lists(table, "dropped")
        where = np.repeat(table.column("where").to_numpy(), np.diff(begins))
        yield from zip(reasons.to_pylist(), where.tolist(), strict=True)
