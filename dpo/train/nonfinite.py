"""The report of a step or an evaluation that is not finite: one line, and a file with the pairs.

RUN/nonfinite/step-000004.jsonl   the pairs of step 4, whose gradient, loss or metrics are NaN or infinite
RUN/nonfinite/eval-000004.jsonl   the pairs of the evaluation after step 4

Each line of a file is an object for one pair:

    step, rank, micro_batch            where it was computed, micro-batches from 1; of a step alone
    source, place, pair                key of the source; file and line, or path and row; number among the kept pairs
    logp_chosen, logp_rejected, loss   its values, nats; as a text, "nan" or "inf", where they are not finite
    prompt_ids, chosen_ids, rejected_ids
    prompt, chosen, rejected           the same as texts; null where there is no tokenizer, or it fails
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dpo.base.files import write_atomically
from dpo.batch.packing import PackedBatch
from dpo.batch.plan import StepPlan
from dpo.batch.trees import grow_trees
from dpo.command.exits import line_of
from dpo.config import Config
from dpo.distributed.collectives import on_main
from dpo.encode.tokenizer import load_tokenizer, tokenizer_is_here
from dpo.pairs.pair_set import PairSet
from dpo.pairs.report import SourceReport
from dpo.run_folder.files import NONFINITE
from dpo.step.evaluation import Evaluation
from dpo.step.nonfinite import Again, FailedStep, Found, StepPair, bad_alone, find_pairs
from dpo.step.update import StepResult
from dpo.terminal.console import say
from dpo.train.setup import Run

FILES_KEPT = 100
"""Files of reports that are kept, the first and as many of the last."""
MOST_SHOWN = 3
"""Pairs that the line names; the file has all."""
TEXTS = ("prompt", "chosen", "rejected")
"""The names of a pair's texts."""


@dataclass(frozen=True)
class Rows:
    """The data of a report: the pairs of a set, and the sources whose rows it counts."""

    pairs: PairSet
    sources: Sequence[SourceReport]
    has_losers: bool
    config: Config


def report_step(run: Run, step: int, batches: Sequence[PackedBatch], result: StepResult) -> str:
    """Writes the pairs that make a step not finite; returns the line that tells them. Every rank must get here, or the
    rest hang.

    Args:
        run: the run, with the weights of the failed step.
        step: its number.
        batches: its micro-batches of this lane, in host memory.
        result: its result, which has a fault.
    """
    failed = FailedStep(run.packer.plan(run.trees(step)), batches, result.values)
    found = find_pairs(_again(run, failed.plan), failed)
    data, path = run.inputs.data, run.dir / NONFINITE / f"step-{step:06d}.jsonl"
    rows = Rows(data.train, data.train_sources, run.config.loss.facts.compares, run.config)
    return on_main(run.world, lambda: _step_line(rows, path, f"step {step}: {result.fault}", found, step))


def report_evaluation(run: Run, step: int, result: Evaluation) -> str | None:
    """Writes the pairs of an evaluation that are not finite; returns the line that tells them, None where all metrics
    are finite. Every rank must get here, or the rest hang.
    """
    bad = [name for name, value in result.metrics.items() if not math.isfinite(value)]
    if not bad:
        return None
    ids = np.flatnonzero(~np.logical_and.reduce([np.isfinite(values) for values in result.pairs.values()])).tolist()
    pairs = run.inputs.data.eval.pairs(np.array(ids, np.int64))
    found, how = bad_alone(_again(run, run.packer.plan(grow_trees(pairs))), pairs)
    ids = [pair.id for pair in found if pair.id is not None]
    names = {"logp_chosen": "logps_chosen", "logp_rejected": "logps_rejected"}
    present = {name: result.pairs[array] for name, array in names.items() if array in result.pairs}
    values = [{name: float(array[i]) for name, array in present.items()} for i in ids]
    data, path = run.inputs.data, run.dir / NONFINITE / f"eval-{step:06d}.jsonl"
    rows = Rows(data.eval, data.eval_sources, run.config.loss.facts.compares, run.config)
    what = f"evaluation after step {step}: the {bad[0]} is {result.metrics[bad[0]]}"
    return on_main(run.world, lambda: _line(what, how, *_write(rows, path, ids, values)))


def _again(run: Run, plan: StepPlan) -> Again:
    return Again(run.policy, run.packer, plan, run.config.loss, run.hooks.stop_requested)


def _step_line(rows: Rows, path: Path, what: str, found: Found, step: int) -> str:
    """Writes the pairs of a step, and returns the line that tells them. For rank 0 alone."""
    ids = [pair.id for pair in found.pairs]
    places, note = _write(rows, path, ids, [_facts(pair, step) for pair in found.pairs])
    if not found.are_bad:
        return _line(what, found.how, [], note)
    first = found.pairs[0]
    of_first = [where for where, pair in zip(places, found.pairs, strict=True) if pair.place == first.place]
    others = len({pair.place for pair in found.pairs}) - 1
    where = f"{what}: rank {first.place[0]}, micro-batch {first.place[1]}"
    more = f"{len(places) - len(of_first)} more in {others} other micro-batch{'es' if others > 1 else ''}"
    more = more if others else ""
    return _line(where, "; ".join(filter(None, (more, found.how))), of_first, note)


def _facts(pair: StepPair, step: int) -> dict[str, Any]:
    values = {"logp_chosen": pair.logp_chosen, "logp_rejected": pair.logp_rejected, "loss": pair.loss}
    return {"step": step, "rank": pair.place[0], "micro_batch": pair.place[1]} | values


def _line(what: str, how: str, places: Sequence[str], note: str) -> str:
    """Returns the line: what is not finite, where, its first pairs, how they were found, and the file."""
    shown = ", ".join(places[:MOST_SHOWN])
    left = f" and {len(places) - MOST_SHOWN} more" if len(places) > MOST_SHOWN else ""
    pairs = f": {'pair' if len(places) == 1 else 'pairs'} {shown}{left}" if places else ": no single pair"
    return f"{what}{pairs}{f'; {how}' if how else ''} ({note})"


def _write(rows: Rows, path: Path, ids: Sequence[int], values: Sequence[Mapping[str, Any]]) -> tuple[list[str], str]:
    """Writes the file of a report. Returns the place of each pair, and the path of the file, or why it is not written:
    that must not hide what the report is about.
    """
    objects = [_object(rows, number, of_pair) for number, of_pair in zip(ids, values, strict=True)]
    texts, note = _texts(rows.config, objects)
    lines = [json.dumps(each | of_each) + "\n" for each, of_each in zip(objects, texts, strict=True)]
    try:
        write_atomically(path, "".join(lines).encode())
    except OSError as failure:
        return [each["place"] for each in objects], f"their texts are not kept: {line_of(failure)}"
    with suppress(OSError):  # a folder from which nothing can be removed
        _drop_others(path.parent)
    return [each["place"] for each in objects], f"{path}{note}"


def _drop_others(folder: Path) -> None:
    """Removes files of reports but the first and the last FILES_KEPT, and says so: a run may skip steps for weeks."""
    reports = sorted(folder.glob("*-*.jsonl"), key=lambda path: (path.stat().st_mtime_ns, path.name))
    for path in reports[FILES_KEPT:-FILES_KEPT]:
        path.unlink()
        say(f"removed {path}: of such reports the first {FILES_KEPT} and the last {FILES_KEPT} are kept")


def _object(rows: Rows, number: int, values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the object of a pair but for its texts."""
    (pair,) = rows.pairs.pairs(np.array([number]))
    row = int(rows.pairs.row_of_pair[number])
    source = rows.sources[int(np.searchsorted(np.cumsum([each.rows for each in rows.sources]), row, side="right"))]
    where = rows.pairs.row(row)["where"]
    return {
        **{name: _json_number(value) for name, value in values.items()},
        "source": source.key,
        "place": f"{source.path}:{where}" if source.has_lines else f"{source.path}:row {where}",
        "pair": number,
        "prompt_ids": pair.prompt_ids.tolist(),
        "chosen_ids": pair.chosen_ids.tolist(),
        "rejected_ids": pair.rejected_ids.tolist() if rows.has_losers else None,
    }


def _json_number(value: Any) -> Any:
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _texts(config: Config, objects: Sequence[Mapping[str, Any]]) -> tuple[list[dict[str, str | None]], str]:
    """Returns the texts of each object, None where no tokenizer is at hand or it fails, and a note that says so."""
    try:
        decode = _decoder(config)
        return [{name: decode(each[f"{name}_ids"]) for name in TEXTS} for each in objects], ""
    # Whatever a tokenizer raises, its own code too: it must not hide what the report is about, and would end rank 0
    # alone, while the others wait for its line.
    except Exception as failure:
        return [dict.fromkeys(TEXTS) for _ in objects], f", without texts: {line_of(failure)}"


def _decoder(config: Config) -> Callable[[Sequence[int] | None], str | None]:
    """Returns a function from ids to their text, special tokens included; to None where no tokenizer is at hand."""
    path = config.model.tokenizer or config.model.path
    tokenizer = load_tokenizer(path, config.model.trust_remote_code) if tokenizer_is_here(path) else None

    def decode(ids: Sequence[int] | None) -> str | None:
        if ids is None or tokenizer is None:
            return None
        return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    return decode
