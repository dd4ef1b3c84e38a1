"""Lines, points and bars in SVG, in the colors of the page's style sheet; all text is escaped.

A drawing is WIDTH by HEIGHT units, its plot from LEFT and TOP to RIGHT and BOTTOM; axes have ticks at round numbers:

    y label
    1.0 |      _.--
    0.5 |  _.-'
    0.0 |-'________
        0   50  100   x label
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from markupsafe import Markup

from dpo.report.numbers import Histogram
from dpo.report.scales import Scale, shown, tick_labels, ticks, widened

WIDTH, HEIGHT = 540, 250
LEFT, RIGHT, TOP, BOTTOM = 62, 526, 24, 210
"""The place of the plot in the drawing."""
DASHES = ("", "7 4", "2 3")
"""Patterns of lines, so that more lines than colors can be told apart."""

Point = tuple[float, float]


@dataclass(frozen=True)
class Series:
    """A line of a chart, with its entry in the legend."""

    label: str
    """Empty: not in the legend, as for a thin line below a bold one of the same color."""
    hue: str
    """The name of a color of the style sheet: "chosen" for --chosen."""
    points: Sequence[Point]
    is_bold: bool = True
    has_dots: bool = False
    """A dot at each point, with its value where the mouse points."""
    dash: int = 0
    """An index of DASHES."""


@dataclass(frozen=True)
class Chart:
    """A drawing with its heading."""

    title: str
    svg: Markup
    legend: tuple[Series, ...] = ()


@dataclass(frozen=True)
class Frame:
    """Both axes of a plot."""

    x: Scale
    y: Scale
    svg: Markup


def frame(xs: tuple[float, float], ys: tuple[float, float], x_label: str, y_label: str) -> Frame:
    """Returns the axes of a plot, with ticks, their labels and grid lines.

    Args:
        xs: the lowest and the highest x.
        ys: the lowest and the highest y.
        x_label: the quantity and unit of the x axis.
        y_label: those of the y axis.
    """
    x, y = Scale(*xs, LEFT, RIGHT), Scale(*ys, BOTTOM, TOP)
    parts = [Markup('<rect class="plot" x="{}" y="{}" width="{}" height="{}"/>').format(
        LEFT, TOP, RIGHT - LEFT, BOTTOM - TOP
    )]  # fmt: skip
    for value, label in _labelled(*xs):
        parts.append(_line("grid", x(value), TOP, x(value), BOTTOM))
        parts.append(_text(x(value), BOTTOM + 15, label, "middle"))
    for value, label in _labelled(*ys):
        parts.append(_line("grid", LEFT, y(value), RIGHT, y(value)))
        parts.append(_text(LEFT - 6, y(value) + 4, label, "end"))
    for scale, (x1, y1, x2, y2) in ((y, (LEFT, y(0), RIGHT, y(0))), (x, (x(0), TOP, x(0), BOTTOM))):
        if scale.low < 0 < scale.high:
            parts.append(_line("zero", x1, y1, x2, y2))
    parts.append(_text((LEFT + RIGHT) / 2, BOTTOM + 33, x_label, "middle"))
    parts.append(_text(LEFT - 6, 12, y_label, "start"))
    return Frame(x, y, Markup("").join(parts))


def _labelled(low: float, high: float) -> list[tuple[float, str]]:
    values = ticks(low, high)
    return list(zip(values, tick_labels(values), strict=True))


def drawing(label: str, *parts: Markup) -> Markup:
    """Returns the parts as one SVG element, with a label for readers that do not see it."""
    head = Markup('<svg viewBox="0 0 {} {}" role="img" aria-label="{}">').format(WIDTH, HEIGHT, label)
    return Markup("").join((head, *parts, Markup("</svg>")))


# --- charts -----------------------------------------------------------------------------------------------------------


def line_chart(title: str, y_label: str, series: Sequence[Series]) -> Chart:
    """Returns a chart of lines over steps.

    Args:
        title: the heading.
        y_label: the quantity and unit of the y axis.
        series: the lines; those without points are left out, and some line has points.
    """
    present = [line for line in series if line.points]
    points = [point for line in present for point in line.points]
    axis_x, axis_y = ([point[i] for point in points] for i in (0, 1))
    low, high = _range(axis_x, 0.0)
    axes = frame((0.0 if low < high / 2 else low, high), _range(axis_y, 0.04), "step", y_label)
    lines = [_polyline(line, axes) for line in present]
    legend = tuple(replace(line, points=()) for line in present if line.label)
    return Chart(title, drawing(title, axes.svg, *lines), legend)


def _range(values: Sequence[float], part: float) -> tuple[float, float]:
    return widened(min(values), max(values), part)


def _polyline(line: Series, axes: Frame) -> Markup:
    places = [(axes.x(x), axes.y(y)) for x, y in line.points]
    path = " ".join(f"{'L' if i else 'M'}{x:.1f} {y:.1f}" for i, (x, y) in enumerate(places))
    drawn = Markup('<path class="{}" style="--hue: var(--{})" stroke-dasharray="{}" d="{}"/>').format(
        "line" if line.is_bold else "line thin", line.hue, DASHES[line.dash], path
    )
    if not line.has_dots and len(places) > 1:
        return drawn
    dot = Markup('<circle class="dot" style="--hue: var(--{})" cx="{}" cy="{}" r="3"><title>{}</title></circle>')
    dots = [
        dot.format(line.hue, f"{x:.1f}", f"{y:.1f}", f"{line.label} at {shown(at)}: {shown(value)}")
        for (x, y), (at, value) in zip(places, line.points, strict=True)
    ]
    return Markup("").join((drawn, *dots))


def histogram_chart(title: str, x_label: str, sides: Sequence[tuple[str, Histogram]], highest: int) -> Chart:
    """Returns overlaid histograms with the same edges, each with a mark at its mean.

    Args:
        title: the heading.
        x_label: the quantity and unit of the values.
        sides: (hue, histogram) of each; the hue is its label too.
        highest: the highest count of the y axis, at least 1.
    """
    edges = sides[0][1].edges
    axes = frame((float(edges[0]), float(edges[-1])), (0.0, 1.05 * highest), x_label, "pairs")
    parts = [_bars(hue, found, axes) for hue, found in sides]
    for hue, found in sides:
        if edges[0] <= found.mean <= edges[-1]:
            mark = Markup('<line class="mean" style="--hue: var(--{})" x1="{}" x2="{}" y1="{}" y2="{}"/>')
            place = f"{axes.x(found.mean):.1f}"
            parts.append(mark.format(hue, place, place, TOP, BOTTOM))
    legend = tuple(Series(f"{hue}, mean {shown(found.mean)}", hue, ()) for hue, found in sides)
    return Chart(title, drawing(title, axes.svg, *parts), legend)


def _bars(hue: str, found: Histogram, axes: Frame) -> Markup:
    bar = Markup(
        '<rect class="bar" style="--hue: var(--{})" x="{}" y="{}" width="{}" height="{}"><title>{}</title></rect>'
    )
    bars = []
    for low, high, count in zip(found.edges, found.edges[1:], found.counts, strict=False):
        if count:
            x, y = axes.x(float(low)), axes.y(float(count))
            tip = f"{hue}, {shown(float(low))} to {shown(float(high))}: {count:,} pairs"
            width = axes.x(float(high)) - x
            bars.append(bar.format(hue, f"{x:.1f}", f"{y:.1f}", f"{width:.1f}", f"{BOTTOM - y:.1f}", tip))
    return Markup("").join(bars)


def scatter_chart(title: str, labels: tuple[str, str], points: Sequence[Point], means: Series) -> Chart:
    """Returns a chart of points, one per pair, with a line of means over them.

    Args:
        title: the heading.
        labels: the quantity and unit of the x axis and of the y axis.
        points: the points, at least one.
        means: the line.
    """
    xs, ys = ([point[i] for point in points] for i in (0, 1))
    axes = frame(_range(xs, 0.03), _range(ys, 0.04), *labels)
    path = "".join(f"M{axes.x(x):.1f} {axes.y(y):.1f}h0" for x, y in points)
    cloud = Markup('<path class="cloud" d="{}"/>').format(path)
    return Chart(title, drawing(title, axes.svg, cloud, _polyline(means, axes)), (replace(means, points=()),))


def diagonal_chart(title: str, labels: tuple[str, str], points: Sequence[tuple[float, float, float]]) -> Chart:
    """Returns observed against predicted shares, with the diagonal and a bar of one standard error to both sides.

    Args:
        title: the heading.
        labels: the quantity of the x axis and of the y axis.
        points: (predicted, observed, standard error of the observed were it as predicted).
    """
    low = min(0.5, *(observed - error for _, observed, error in points)) - 0.02
    axes = frame((0.48, 1.02), (low, 1.02), *labels)
    parts = [_line("diagonal", axes.x(0.5), axes.y(0.5), axes.x(1), axes.y(1))]
    for x, y, error in points:
        parts.append(_line("error", axes.x(x), axes.y(max(y - error, low)), axes.x(x), axes.y(min(y + error, 1.02))))
    line = Series("observed, ± one standard error", "prompt", [(x, y) for x, y, _ in points], has_dots=True)
    parts.append(_polyline(line, axes))
    legend = (replace(line, points=()), Series("calibrated", "total", (), dash=1))
    return Chart(title, drawing(title, axes.svg, *parts), legend)


# --- elements ---------------------------------------------------------------------------------------------------------


def _line(kind: str, x1: float, y1: float, x2: float, y2: float) -> Markup:
    x1, y1, x2, y2 = (round(value, 1) for value in (x1, y1, x2, y2))
    return Markup('<line class="{}" x1="{}" y1="{}" x2="{}" y2="{}"/>').format(kind, x1, y1, x2, y2)


def _text(x: float, y: float, text: str, anchor: str) -> Markup:
    return Markup('<text x="{}" y="{}" text-anchor="{}">{}</text>').format(round(x, 1), round(y, 1), anchor, text)
