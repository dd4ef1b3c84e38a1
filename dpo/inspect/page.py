"""Renders an inspection as one HTML page without other files. The template, `page.html`, escapes all data."""

from dpo.base.pages import render_page
from dpo.inspect.findings import findings
from dpo.inspect.inspection import Inspection
from dpo.inspect.lengths import PERCENTS
from dpo.inspect.words import (
    NAMES,
    bias_line,
    count_rows,
    cut_words,
    length_cells,
    length_headings,
    parts_of,
    sets_of,
    span,
    step_rows,
    steps_line,
    tokenizer_lines,
)

TEMPLATE = "page.html"


def html_page(inspection: Inspection) -> str:
    """Returns the page. It has no script and loads nothing from elsewhere."""
    return render_page(
        "dpo.inspect",
        TEMPLATE,
        config=inspection.config,
        key_numbers=_key_numbers(inspection),
        findings=findings(inspection),
        report=inspection.report,
        sets=sets_of(inspection),
        names=NAMES,
        percents=PERCENTS,
        parts_of=parts_of,
        length_headings=length_headings(),
        length_cells=length_cells,
        tokenizer_lines=tokenizer_lines(inspection.tokenizer),
        count_rows=count_rows(inspection),
        bias_line=bias_line,
        span=span,
        cut_words=cut_words,
        steps=inspection.steps,
        steps_line=steps_line(inspection),
        step_rows=step_rows(inspection.steps),
        examples=inspection.examples,
    )


def _key_numbers(inspection: Inspection) -> list[tuple[str, str]]:
    """Returns (number, meaning) of the numbers at the top of the page."""
    report, ends, steps, bias = inspection.report, inspection.train.ends, inspection.steps, inspection.train.bias
    dropped = sum(sum(source.dropped.values()) for source in report.sources)
    return [
        (f"{report.train_pairs:,}", "pairs to train on"),
        (f"{report.eval_pairs:,}", "pairs to evaluate"),
        (f"{dropped:,}", "pairs dropped"),
        (f"{ends.prompts_cut / ends.rows:.1%}", "of prompts cut"),
        (f"{ends.completions_cut / ends.completions:.1%}", "of completions cut"),
        *([(f"{bias.longer_share:.1%}", "of longer completions win")] if bias else []),
        (f"{steps.shared:,.0f}", "tokens per step"),
        (f"{steps.saved(steps.unpadded):.1%}", "of tokens saved by sharing"),
    ]
