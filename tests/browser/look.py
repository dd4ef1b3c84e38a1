"""Opens each tab of TensorBoard in a real browser, tells what it shows, and takes a picture of it.

    python -m tests.browser.look LOGDIR OUT

LOGDIR is a run folder, or one of many; the pictures lie in OUT afterwards, one a tab.
"""

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.request import urlopen

from tests.browser.webdriver import Browser, chromium, serving, settled

TEXT = "node.innerText.trim()"


def time_series(page: Browser) -> dict[str, Any]:
    """Groups in their order, and of each card in the window the colors of its lines by run."""
    rows = """[...node.querySelectorAll('tb-data-table-content-row')].map((row) => [
        row.querySelectorAll('tb-data-table-content-cell')[1].innerText.trim(),
        row.querySelector('.row-circle span').style.backgroundColor])"""
    cards = page.each("scalar-card-component", f"[node.querySelector('.tag').title, {rows}]")
    lines = {title: dict(runs) for title, runs in cards if runs}  # a card gets its table when it is in the window
    return {"groups": page.each(".group-title", TEXT), "lines": lines} if lines else {}


def line_charts(page: Browser) -> dict[str, Any]:
    """Groups in their order, and of each chart that is open the colors in which lines are drawn."""
    titles = page.each("tf-card-heading", "node.tag || node.displayName")
    colors = """[...new Set([...node.shadowRoot.querySelectorAll('path.line')]
        .filter((path) => path.getAttribute('d').includes('L')).map((path) => getComputedStyle(path).stroke))].sort()"""
    charts = page.each("vz-line-chart2", colors)
    lines = by_title(titles, charts)
    return {"groups": groups(page), "lines": lines} if lines else {}


def groups(page: Browser) -> list[str]:
    """The headings of groups, from top to bottom; the results of a search that nobody made have none."""
    return [name for name in page.each("tf-category-paginated-view", "node.category.name") if name]


def histograms(page: Browser) -> dict[str, int]:
    """Tag and run of a card -> the number of distributions that are drawn."""
    return areas(page, "vz-histogram-timeseries", "path.outline")


def distributions(page: Browser) -> dict[str, int]:
    """Tag and run of a card -> the number of areas that are drawn."""
    return areas(page, "vz-distribution-chart", "path.area")


def areas(page: Browser, chart: str, mark: str) -> dict[str, int]:
    """Tag and run of a card -> how many marks its chart has."""
    titles = page.each("tf-card-heading", "`${node.tag} ${node.run}`")
    counts = page.each(chart, f"node.shadowRoot.querySelectorAll('{mark}').length")
    return by_title(titles, counts)


def by_title(titles: Sequence[str], shown: Sequence[Any]) -> dict[str, Any]:
    """Title of a card -> what it shows; nothing while a card shows nothing, or came after the titles were read."""
    return dict(zip(titles, shown, strict=True)) if shown and all(shown) and len(titles) == len(shown) else {}


def text(page: Browser) -> dict[str, Any]:
    """The pages, the cells of their tables, and their blocks of code."""
    pages = page.each("tf-card-heading", "node.tag")
    cells, code = page.each("td", TEXT), page.each("pre code", TEXT)
    is_whole = pages and cells  # the answers come after their heading
    return {"pages": pages, "cells": cells, "code": code} if is_whole else {}


def hparams(page: Browser) -> dict[str, Any]:
    """Trial -> heading of a column -> what stands there."""
    cells = "[...row.querySelectorAll('slot')].map((slot) => slot.assignedNodes()[0]?.innerText.trim() || '')"
    tables = page.each("vaadin-grid", f"[...node.shadowRoot.querySelectorAll('tr')].map((row) => {cells})")
    head, *rows = [row for row in (tables or [[[]]])[0] if any(row)] or [[]]
    return {row[0]: dict(zip(head[2:], row[2:], strict=False)) for row in rows}  # the second column is for ticking


TABS: Mapping[str, Callable[[Browser], dict[str, Any]]] = {
    "timeseries": time_series,
    "scalars": line_charts,
    "custom_scalars": line_charts,
    "distributions": distributions,
    "histograms": histograms,
    "text": text,
    "hparams": hparams,
}


def look(logdir: Path, out: Path, tabs: Sequence[str] = tuple(TABS)) -> dict[str, dict[str, Any]]:
    """Tab -> what it shows. Raises TimeoutError where a tab shows nothing, AssertionError where a page complains."""
    out.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "tensorboard.main", f"--logdir={logdir}", "--host=127.0.0.1", "--port=0"]
    with serving(command, r"(http://127\.0\.0\.1:\d+)") as url, chromium(1600, 2000) as page:
        settled(lambda: _fetch(f"{url}/data/plugin/timeseries/tags"), "the points")
        return {tab: _look(page, url, tab, out) for tab in tabs}


def _look(page: Browser, url: str, tab: str, out: Path) -> dict[str, Any]:
    page.open(f"{url}/?{tab}#{tab}")  # the query makes it a new page, not a step within the old one
    try:
        seen = settled(lambda: TABS[tab](page), tab)
    finally:
        page.screenshot(out / f"{tab}.png")
    errors = page.errors()
    assert not errors, f"{tab}: {errors}"
    return seen


def _fetch(url: str) -> Any:
    with urlopen(url, timeout=30) as response:
        return json.load(response)


if __name__ == "__main__":
    print(json.dumps(look(Path(sys.argv[1]), Path(sys.argv[2])), indent=1))
