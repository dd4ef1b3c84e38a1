"""Renders the page of one run or of several. The templates, `one_run.html` and `sweep.html`, escape all text."""

from collections.abc import Sequence

from dpo.base.pages import render_page
from dpo.report.heat_maps import heat_maps
from dpo.report.listings import answers_over_time, config_rows, origin_rows
from dpo.report.metrics import cost
from dpo.report.numbers import by_source
from dpo.report.one_run import calibration_chart, curve_charts, key_numbers, length_chart, reward_charts, why
from dpo.report.record import Record
from dpo.report.scales import shown, shown_error, value_text
from dpo.report.sweep import HEADINGS, differing, run_curves, run_rows

ONE, SEVERAL = "one_run.html", "sweep.html"


def page_of_run(record: Record) -> str:
    """Returns the page of one run. It has no script and loads nothing."""
    last, spent = max(record.pairs, default=None), cost(record)
    return render_page(
        "dpo.report",
        ONE,
        name=record.folder.resolve().name,
        folder=str(record.folder),
        config=record.config,
        faults=record.faults,
        key_numbers=key_numbers(record, spent),
        why=why(record),
        curves=curve_charts(record),
        rewards=reward_charts(record),
        length=length_chart(record),
        calibration=calibration_chart(record),
        last=last,
        sources=by_source(record.pairs[last]) if last is not None else [],
        answers=answers_over_time(record),
        config_rows=config_rows(record),
        config_text=record.config_text,
        origin=origin_rows(record, spent.devices),
        shown=shown,
        value_text=value_text,
    )


def page_of_runs(records: Sequence[Record], metric: str | None = None) -> str:
    """Returns the page of several runs side by side.

    Args:
        records: the runs, at least two.
        metric: the metric of the heat map; None: those of `heat_maps.METRICS`.
    """
    keys = differing(records)
    return render_page(
        "dpo.report",
        SEVERAL,
        faults=[f"{record.folder}: {fault}" for record in records for fault in record.faults],
        keys=keys,
        headings=HEADINGS,
        rows=run_rows(records, keys),
        heat_maps=heat_maps(records, keys, metric),
        curves=run_curves(records),
        shown=shown,
        shown_error=shown_error,
        zip=zip,
    )
