"""An inspection on a terminal, at most 100 columns wide; plain where it is piped."""

from collections.abc import Iterator, Sequence

from rich import box
from rich.console import Console, RenderableType
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from dpo.inspect.inspection import Inspection
from dpo.inspect.lengths import LengthBias, Lengths, SetLengths
from dpo.inspect.shown_pairs import Part, ShownPair, Token
from dpo.inspect.step_tokens import StepTokens
from dpo.inspect.words import (
    NAMES,
    bias_line,
    count_rows,
    cut_words,
    findings,
    length_cells,
    length_headings,
    parts_of,
    sets_of,
    span,
    step_rows,
    steps_line,
    tokenizer_lines,
)

COLUMNS = 100
BAR_ROWS = 4  # lines of a histogram
EIGHTHS = " ▁▂▃▄▅▆▇█"
BAR = 30  # characters of the longest bar of a table
PROMPT_ENDS, COMPLETION_ENDS = (16, 64), (96, 24)  # tokens at the beginning and at the end that are shown
STYLES = {"prompt": "cyan", "chosen": "green", "rejected": "red", "total": "none"}


def make_console() -> Console:
    """Standard output, never wider than COLUMNS, and as wide as that where it is no terminal."""
    console = Console(highlight=False, markup=False)
    console.width = min(COLUMNS, console.width) if console.is_terminal else COLUMNS
    return console


def print_inspection(inspection: Inspection, console: Console) -> None:
    """Every section under its heading."""
    for heading, parts in _sections(inspection):
        console.print(Rule(Text(heading, style="bold"), align="left"))
        for part in parts:
            console.print(part)
        console.print()


def _sections(inspection: Inspection) -> Iterator[tuple[str, Sequence[RenderableType]]]:
    sets = sets_of(inspection)
    yield "what was read", [Text(line) for line in inspection.report.lines()]
    yield "worth a look", [Text(f"- {line}") for line in findings(inspection) or ["nothing unusual"]]
    for name, those in sets.items():
        heading = f"{name}: tokens of {those.pairs:,} pairs, after truncation"
        yield heading, [_lengths_table(those.lengths), _histograms(those.lengths)]
    yield (
        "how texts begin and end, and what repeats",
        [*map(Text, tokenizer_lines(inspection.tokenizer)), _counts(inspection)],
    )
    for name, those in sets.items():
        yield f"{name}: is the longer one better?", [Text(bias_line(those.bias)), _bias_table(those.bias)]
    yield "tokens a step", [Text(steps_line(inspection)), _steps_table(inspection.steps)]
    for number, pair in enumerate(inspection.examples, start=1):
        yield f"pair {number} of step 1: {pair.place}", [*_pair_texts(pair)]


# --- tables ----------------------------------------------------------------------------------------------------------


def _lengths_table(lengths: SetLengths) -> Table:
    table = _table("", *length_headings())
    for name, those in parts_of(lengths).items():
        table.add_row(Text(NAMES[name], style=STYLES[name]), *length_cells(those))
    return table


def _counts(inspection: Inspection) -> Table:
    table = _table("", *(word for name in sets_of(inspection) for word in (name, "")))
    for name, cells in count_rows(inspection):
        table.add_row(name, *cells)
    return table


def _bias_table(bias: LengthBias) -> Table:
    table = _table("difference, tokens", "pairs", "longer one wins")
    table.add_column("", justify="left")
    for group in bias.groups:
        bar = Text(f"{'█' * round(BAR * group.longer_wins):·<{BAR}}", style="blue")
        table.add_row(span(group), f"{group.pairs:,}", f"{group.longer_wins:.1%}", bar)
    return table


def _steps_table(steps: StepTokens) -> Table:
    table = _table("mean of the steps looked at", "tokens", "saved here")
    for name, tokens in step_rows(steps):
        table.add_row(name, f"{tokens:,.0f}", f"{steps.saved(tokens):.1%}" if tokens != steps.shared else "")
    return table


def _table(*columns: str) -> Table:
    """Names to the left, figures to the right."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for number, name in enumerate(columns):
        table.add_column(name, justify="right" if number else "left")
    return table


# --- histograms ------------------------------------------------------------------------------------------------------


def _histograms(lengths: SetLengths) -> Table:
    """All four side by side, their horizontal axes alike."""
    grid = Table.grid(padding=(0, 1, 0, 0))
    parts = parts_of(lengths)
    grid.add_row(*(_histogram(NAMES[name], those, lengths.bin_width, STYLES[name]) for name, those in parts.items()))
    return grid


def _histogram(name: str, those: Lengths, width: int, style: str) -> Text:
    text = Text(f"{name}\n")
    for line in bars(those.counts, BAR_ROWS):
        text.append(f"{line}\n", style=style)
    end = f"{width * len(those.counts):,}"
    text.append(f"0{end:>{max(len(those.counts) - 1, len(end) + 1)}}")
    text.append(f"\na bar is {width:,} tokens" + (f"\n{those.over:,} beyond" if those.over else ""), style="dim")
    return text


def bars(counts: Sequence[int], rows: int) -> list[str]:
    """Columns of block characters, the highest `rows` lines high, from the top; what is not 0 is seen."""
    highest = max([*counts, 1])
    heights = [max(round(8 * rows * count / highest), int(count > 0)) for count in counts]
    return ["".join(EIGHTHS[min(max(height - 8 * row, 0), 8)] for height in heights) for row in reversed(range(rows))]


# --- examples --------------------------------------------------------------------------------------------------------


def _pair_texts(pair: ShownPair) -> Iterator[Text]:
    parts = (("prompt", pair.prompt, PROMPT_ENDS), ("chosen", pair.chosen, COMPLETION_ENDS),
             ("rejected", pair.rejected, COMPLETION_ENDS))  # fmt: skip
    for name, part, shown in parts:
        yield Text(f"{name}: {len(part.tokens):,} tokens{cut_words(name, part)}", style=f"bold {STYLES[name]}")
        yield _part_text(part, shown, STYLES[name])


def _part_text(part: Part, shown: tuple[int, int], style: str) -> Text:
    """A part's first and last tokens, a bar after each; the middle of a long one is left out."""
    first, last = shown
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
