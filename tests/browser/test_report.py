"""The pages of `dpo.report` in a real browser: nothing complains, and nothing is wider than the window."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from dpo.report.page import page_of_run, page_of_runs
from dpo.report.record import read_record
from tests.browser.webdriver import PROGRAMS, Browser, chromium
from tests.report.folders import eval_line, pairs_of, save_run, train_line

MISSING = [name for name in PROGRAMS if not shutil.which(name)]
pytestmark = [
    pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}"),
    pytest.mark.xdist_group("browser"),
]


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The page of a run, and that of twelve."""
    root = tmp_path_factory.mktemp("pages")
    runs = []
    for i in range(12):
        steps = range(1, 61)
        lines = [train_line(step, chosen=step / 60, rejected=-step * (i + 1) / 60) for step in steps]
        lines += [eval_line(step, step / 60, -step * (i + 1) / 60) for step in range(0, 61, 10)]
        changes = {"loss__beta": 0.1 * (1 + i % 4), "optim__lr": 1e-6 * (1 + i // 4)}
        runs.append(
            save_run(root / f"beta{i % 4}-lr{i // 4}", lines, {60: pairs_of([-1, 2, 3], [0, -4, 1])}, **changes)
        )
    texts = {"one": page_of_run(read_record(runs[0])), "twelve": page_of_runs([read_record(run) for run in runs])}
    for name, text in texts.items():
        (root / f"{name}.html").write_text(text)
    return {name: root / f"{name}.html" for name in texts}


@pytest.fixture(scope="module", params=[500, 1250])
def browser(request: pytest.FixtureRequest) -> Iterator[Browser]:
    with chromium(request.param, 900) as page:
        yield page


@pytest.mark.parametrize(("name", "num_charts"), [("one", 1 + 8 + 1 + 2), ("twelve", 8)])
def test_a_page_is_drawn_without_complaints(
    pages: dict[str, Path], browser: Browser, name: str, num_charts: int
) -> None:
    """Every chart has a size: one of the split, eight curves, one histogram, length and calibration. The page does not
    scroll sideways: wide tables do so by themselves.
    """
    browser.open(pages[name].as_uri())
    assert browser.errors() == []
    (widths,) = browser.each("main", "[document.documentElement.scrollWidth, window.innerWidth]")
    assert widths[0] <= widths[1]
    sizes = browser.each('svg[role="img"]', "[node.getBoundingClientRect().width, node.getBoundingClientRect().height]")
    assert len(sizes) == num_charts and all(width > 200 and height > 90 for width, height in sizes)


def test_the_lines_of_twelve_runs_look_different(pages: dict[str, Path], browser: Browser) -> None:
    """By the strokes that are drawn in the first chart: color and dashes."""
    browser.open(pages["twelve"].as_uri())
    looks = browser.each("path.line", "getComputedStyle(node).stroke + node.getAttribute('stroke-dasharray')")
    assert len(set(looks[:12])) == 12
