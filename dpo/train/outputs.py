"""Opens the files that a run writes: its folder, metrics, answers and checkpoints; exports the trained model."""

import socket
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from dpo.board.sinks import open_sinks
from dpo.board.writer import MetricsWriter
from dpo.checkpoint.export import Finish, export
from dpo.checkpoint.saver import Saver, open_saver
from dpo.checkpoint.store import open_shelf
from dpo.command.exits import line_of
from dpo.distributed.collectives import all_gather, on_main
from dpo.run.answers import open_answers
from dpo.run.card import model_card
from dpo.run.folder import open_run_folder
from dpo.run.layout import layout_here
from dpo.run.model_files import tell_changes
from dpo.run.provenance import data_facts, provenance
from dpo.run_folder.evaluations import write_evaluation
from dpo.run_folder.files import FINAL, read_metrics
from dpo.step.evaluation import Evaluation
from dpo.step.nonfinite import weights_are_finite
from dpo.terminal.console import warn
from dpo.train.setup import Run


@contextmanager
def open_outputs(run: Run) -> Iterator[MetricsWriter | None]:
    """Prepares the run folder for the next step; yields the writer of metrics, None except on rank 0.

    At the end of the context the trackers are waited for, so that the model must be exported before. Every rank must
    get here, or the rest hang.
    """
    hosts, layout = all_gather(socket.gethostname()), layout_here(run.config, run.world)
    facts = {"first_step": run.start.step + 1, "layout": layout, "data": data_facts(run.inputs.data.report)}
    origin = provenance(hosts, run.inputs.last_step) | facts
    on_main(run.world, lambda: _open_folder(run, origin))
    if run.answers:
        on_main(run.world, partial(open_answers, run.answers, run.start.step))
    with _open_writer(run) if run.world.is_main else nullcontext() as writer:
        yield writer


def _open_folder(run: Run, origin: Mapping[str, Any]) -> None:
    run.hooks.check_lock()  # the reference pass before may have taken hours
    open_run_folder(run.config, run.start, origin)


def _open_writer(run: Run) -> MetricsWriter:
    sinks = open_sinks(run.config, run.start.step + 1, read_metrics(run.dir))
    return MetricsWriter(run.dir, sinks, run.hooks.check_lock)


def open_checkpoints(run: Run) -> AbstractContextManager[Saver]:
    """Returns the saver of the run's checkpoints as a context, at whose end the last one is committed.

    Every rank must get here, and to the end of the context, or the rest hang.
    """
    keep, seconds = run.config.checkpoint.keep, run.config.parallel.timeout_seconds
    shelf = open_shelf(run.dir, keep, run.world, seconds, run.start.checkpoint, run.hooks.check_lock)
    shelf = replace(shelf, began_finite=weights_are_finite(run.policy))
    return open_saver(shelf, run.policy.model, run.optimizer, seconds)


def export_run(run: Run) -> None:
    """Exports the trained model to `final/` in the run folder. Warns of files that it gets and that have changed since
    the start. Every rank must get here, or the rest hang.
    """
    base, step = run.inputs.model.folder, max(run.start.step, run.inputs.last_step)
    on_main(run.world, lambda: tell_changes(run.inputs.model_files, run.config, base))
    finish = Finish(partial(model_card, run.config, step, base), run.hooks.check_lock)
    export(run.policy, base, run.dir / FINAL, run.config, run.world, finish)


def keep_pairs(run: Run, step: int, result: Evaluation) -> None:
    """Writes the values of single pairs after `step` steps, see `dpo.run_folder.evaluations`; warns where it cannot:
    only the report reads them. For rank 0 alone. Raises FolderLost.
    """
    run.hooks.check_lock()
    pairs, sources = run.inputs.data.eval, run.inputs.data.eval_sources
    lengths = dict(zip(("tokens_chosen", "tokens_rejected"), pairs.lengths().T[1:], strict=True))
    if "logps_rejected" not in result.pairs:
        del lengths["tokens_rejected"]
    number = pairs.source_of_pair([source.rows for source in sources])
    names = np.array([f"{source.key} {source.path}" for source in sources])
    try:
        write_evaluation(run.dir, step, {**result.pairs, **lengths, "source": number, "sources": names})
    except OSError as failure:
        warn(f"step {step}: the values of single pairs are not kept for the report: {line_of(failure)}")
