"""Prints an inspection on a terminal, at most 100 columns wide; as plain text where the output is piped."""

from collections.abc import Iterator, Sequence

from rich import box
from rich.console import Console, RenderableType
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from dpo.inspect.findings import findings
from dpo.inspect.inspection import Inspection
from dpo.inspect.lengths import LengthBias, Lengths, SetLengths
from dpo.inspect.shown_pairs import Part, ShownPair, Token
from dpo.inspect.step_tokens import StepTokens
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
from dpo.terminal.console import in_one_line

COLUMNS = 100
BAR_ROWS = 4  # lines per histogram
EIGHTHS = " ▁▂▃▄▅▆▇█"
BAR = 30  # characters of the longest bar of a table
PROMPT_ENDS, COMPLETION_ENDS = (16, 64), (96, 24)  # tokens that are shown of the beginning and of the end
STYLES = {"prompt": "cyan", "chosen": "green", "rejected": "red", "total": "none"}


def make_console() -> Console:
    """Returns a console on standard output, at most COLUMNS wide, and exactly COLUMNS wide where it is no terminal."""
    console = Console(highlight=False, markup=False)
    console.width = min(COLUMNS, console.width) if console.is_terminal else COLUMNS
    return console


def print_inspection(inspection: Inspection, console: Console) -> None:
    """Prints every section under its heading."""
    for heading, parts in _sections(inspection):
        console.print(Rule(_line(heading, "bold"), align="left"))
        for part in parts:
            console.print(part)
        console.print()


def _sections(inspection: Inspection) -> Iterator[tuple[str, Sequence[RenderableType]]]:
    sets = sets_of(inspection)
    yield "sources", [_line(line) for line in inspection.report.lines()]
    yield "findings", [_line(f"- {line}") for line in findings(inspection) or ["nothing unusual"]]
    for name, statistics in sets.items():
        heading = f"{name}: tokens of {statistics.pairs:,} pairs, after truncation"
        yield heading, [_lengths_table(statistics.lengths), _histograms(statistics.lengths)]
    yield (
        "ends of texts, and repeats",
        [*map(_line, tokenizer_lines(inspection.tokenizer)), _counts(inspection)],
    )
    for name, statistics in sets.items():
        if bias := statistics.bias:
            yield f"{name}: does the longer completion win?", [_line(bias_line(bias)), _bias_table(bias)]
    yield "tokens per step", [_line(steps_line(inspection)), _steps_table(inspection.steps)]
    for number, pair in enumerate(inspection.examples, start=1):
        yield f"pair {number} of step 1: {pair.place}", [*_pair_texts(pair)]


def _line(text: str, style: str = "") -> Text:
    """Returns a line for the terminal, which nothing of the data in it can break or steer."""
    return Text(in_one_line(text), style=style)


# --- tables ----------------------------------------------------------------------------------------------------------


def _lengths_table(lengths: SetLengths) -> Table:
    table = _table("", *length_headings())
    for name, values in parts_of(lengths).items():
        table.add_row(Text(NAMES[name], style=STYLES[name]), *length_cells(values))
    return table


def _counts(inspection: Inspection) -> Table:
    table = _table("", *(word for name in sets_of(inspection) for word in (name, "")))
    for name, cells in count_rows(inspection):
        table.add_row(*map(_line, (name, *cells)))
    return table


def _bias_table(bias: LengthBias) -> Table:
    table = _table("difference, tokens", "pairs", "longer completion wins")
    table.add_column("", justify="left")
    for group in bias.groups:
        bar = Text(f"{'█' * round(BAR * group.longer_wins):·<{BAR}}", style="blue")
        table.add_row(span(group), f"{group.pairs:,}", f"{group.longer_wins:.1%}", bar)
    return table


def _steps_table(steps: StepTokens) -> Table:
    table = _table("mean of the counted steps", "tokens", "saved here")
    for name, tokens in step_rows(steps):
        table.add_row(name, f"{tokens:,.0f}", f"{steps.saved(tokens):.1%}" if tokens != steps.shared else "")
    return table


def _table(*columns: str) -> Table:
    """Returns a table with names to the left and numbers to the right."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for number, name in enumerate(columns):
        table.add_column(name, justify="right" if number else "left")
    return table


# --- histograms ------------------------------------------------------------------------------------------------------


def _histograms(lengths: SetLengths) -> Table:
    """Returns all histograms side by side, with equal horizontal axes."""
    grid = Table.grid(padding=(0, 1, 0, 0))
    parts = parts_of(lengths)
    grid.add_row(*(_histogram(NAMES[name], part, lengths.bin_width, STYLES[name]) for name, part in parts.items()))
    return grid


def _histogram(name: str, lengths: Lengths, width: int, style: str) -> Text:
    text = Text(f"{name}\n")
    for line in bars(lengths.counts, BAR_ROWS):
        text.append(f"{line}\n", style=style)
    end = f"{width * len(lengths.counts):,}"
    text.append(f"0{end:>{max(len(lengths.counts) - 1, len(end) + 1)}}")
    text.append(f"\na bar is {width:,} tokens" + (f"\n{lengths.over:,} beyond" if lengths.over else ""), style="dim")
    return text


def bars(counts: Sequence[int], rows: int) -> list[str]:
    """Returns a histogram as lines from the top: block characters, at most `rows` lines high. A count above 0 is always
    visible.
    """
    highest = max([*counts, 1])
    heights = [max(round(8 * rows * count / highest), int(count > 0)) for count in counts]
    return ["".join(EIGHTHS[min(max(height - 8 * row, 0), 8)] for height in heights) for row in reversed(range(rows))]


# --- examples --------------------------------------------------------------------------------------------------------


def _pair_texts(pair: ShownPair) -> Iterator[Text]:
    parts = (("prompt", pair.prompt, PROMPT_ENDS), ("chosen", pair.chosen, COMPLETION_ENDS),
             ("rejected", pair.rejected, COMPLETION_ENDS))  # fmt: skip
    for name, part, ends in ((name, part, ends) for name, part, ends in parts if part):
        yield Text(f"{name}: {len(part.tokens):,} tokens{cut_words(name, part)}", style=f"bold {STYLES[name]}")
        yield _part_text(part, ends, STYLES[name])


def _part_text(part: Part, ends: tuple[int, int], style: str) -> Text:
    """Returns the first and last tokens of a part, with a bar after each; the middle of a long part is left out."""
    first, last = ends
    left_out = len(part.tokens) - first - last
    if left_out <= 0:
        return _tokens_text(part.tokens, style)
    middle = Text(f" … {left_out:,} tokens … ", style="dim")
    return Text.assemble(_tokens_text(part.tokens[:first], style), middle, _tokens_text(part.tokens[-last:], style))


def _tokens_text(tokens: Sequence[Token], style: str) -> Text:
    text = Text()
    for token in tokens:
        text.append(token.text, style="bold magenta" if token.is_special else style)
        text.append("│", style="dim")
    return text
