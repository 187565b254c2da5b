"""The pages of `shoal report` in a real browser: drawn, still, quiet and readable, on a screen, a phone and paper."""

from __future__ import annotations

import base64
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from browser import CHROMIUM, MISSING, Tab, browser_tab
from recorded_runs import START, config, lines, summary, write_run
from shoal.deploy.cli import main

pytestmark = [pytest.mark.skipif(CHROMIUM is None, reason=MISSING), pytest.mark.timeout(1200)]
LONG = "a_name_without_a_single_place_to_break_it_" * 5


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A page of one run and one of several, both with long and evil names."""
    root = tmp_path_factory.mktemp("pages")
    written = lines()
    for entry in written:
        # A line of another plot is called so, too.
        entry |= {
            f"dropped_env_steps/{LONG}": 5,
            "dropped_env_steps/trained": 3,
            "dropped_env_steps/<img src=x onerror=alert(1)>": 7,
        }
    log = [f"2026-11-22 13:00:00,123 WARNING actors.seats: {LONG}<script>alert(1)</script>"]
    evaluations = [{"time": START, "env_steps": 1e6, "mean_return": 20.0, "return_ci95": 1.0, "episodes": 64}]
    one = write_run(root / LONG[:80], written, ended=summary(written[-1]), log=log, evaluations=evaluations)
    several = [
        write_run(
            root / f"{rate}-{seed}", settings=config(seed=seed, learner__learning_rate=rate, env__kwargs={LONG: LONG})
        )
        for rate in (0.001, LONG)
        for seed in (0, 1)
    ]
    found = {"one": root / "one.html", "several": root / "several.html"}
    assert main(["report", str(one), "--out", str(found["one"])]) == 0
    assert main(["report", *map(str, several), "--out", str(found["several"])]) == 0
    return found


@pytest.fixture(scope="module")
def tab() -> Iterator[Tab]:
    """One browser for all tests."""
    with browser_tab() as tab:
        yield tab


@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("kind", ["one", "several"])
def test_a_page_is_drawn(kind: str, width: int, pages: dict[str, Path], tab: Tab) -> None:
    """Catches a plot that is not drawn, an error in the console, something fetched, a page wider than its screen, text
    that cannot be read against what is behind it."""
    tab.events.clear()
    tab.look(width=width)
    tab.open(pages[kind])
    assert tab.complaints() == []
    assert [url for url in tab.requested() if not url.startswith(("file:", "data:"))] == []
    plots = tab.evaluate("document.querySelectorAll('.plot').length")
    drawn = tab.evaluate(
        "[...document.querySelectorAll('.plot')].filter(p => p.querySelector('svg.main-svg .scatterlayer path')).length"
    )
    assert drawn == plots >= 8
    assert tab.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth") == 0
    wider = tab.evaluate(
        """[...document.querySelectorAll("main *")].filter(e => !e.closest(".wide, svg"))
        .filter(e => e.getBoundingClientRect().right > innerWidth + 1).map(e => e.outerHTML.slice(0, 200))"""
    )
    assert wider == []
    for dark in (False, True):  # a page that is open follows its reader
        tab.look(width=width, dark=dark)
        assert tab.evaluate("matchMedia('(prefers-color-scheme: dark)').matches") == dark
        assert tab.evaluate(f"({CONTRASTS})()") == []


CONTRASTS = """() => {
  const rgb = (text) => text.match(/[\\d.]+/g).map(Number);
  const luminance = ([r, g, b]) => [r, g, b].map((v) => v / 255)
    .map((v) => (v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4))
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = (e) => {
    for (; e; e = e.parentElement) {
      const color = rgb(getComputedStyle(e).backgroundColor);
      if (color.length < 4 || color[3] > 0) return color;
    }
    return [255, 255, 255];
  };
  const low = [];
  for (const e of document.querySelectorAll("h1, h2, h3, p, dt, strong, span, td, th, figcaption, a, button, text")) {
    if (!e.textContent.trim()) continue;
    const style = getComputedStyle(e);
    const [a, b] = [rgb(e.tagName === "text" ? style.fill : style.color), behind(e)].map(luminance);
    const contrast = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (contrast < 4.5) low.push(`${contrast.toFixed(1)}: ${e.outerHTML.slice(0, 160)}`);
  }
  return low;
}"""
"""Return texts with less contrast than WCAG (AA) requires."""


def test_what_came_in_through_files_does_not_run(pages: dict[str, Path], tab: Tab) -> None:
    """Catches a text that becomes an element, and a script that the page's policy would let run."""
    tab.look(width=1280)
    tab.events.clear()
    tab.open(pages["one"])
    assert tab.evaluate("document.querySelectorAll('img, iframe, object').length") == 0
    assert tab.evaluate("document.scripts.length") == 3
    inject = "document.body.append(Object.assign(document.createElement('script'), {textContent: 'window.ran = 1'}))"
    tab.evaluate(f"{inject}, 0")
    assert tab.evaluate("window.ran") is None
    assert any("Content Security Policy" in complaint for complaint in tab.complaints())


def test_a_legend_hides_and_shows(pages: dict[str, Path], tab: Tab) -> None:
    """Catches a legend that does nothing, hides lines of other plots, or leaves a band behind."""
    tab.look(width=1280)
    tab.open(pages["several"])
    hidden = "[...document.querySelectorAll('.plot')].map(p => p.data.filter(t => t.visible === false).length)"
    click = "document.querySelector('#curves > .legend button').click()"
    tab.evaluate(click)
    many = tab.evaluate("document.querySelectorAll('.plot').length")
    tab.wait_for(f"{hidden}.every(n => n === 3)")  # a line and both edges of its band
    assert tab.evaluate("document.querySelector('#curves > .legend button').getAttribute('aria-pressed')") == "false"
    tab.evaluate(click)
    tab.wait_for(f"{hidden}.every(n => n === 0)")
    tab.open(pages["one"])
    tab.evaluate("document.querySelector('#speed figure .legend button').click()")
    tab.wait_for(f"{hidden}.reduce((a, b) => a + b) === 1")
    assert many > 5


def choose(tab: Tab, name: str, value: str) -> None:
    tab.evaluate("delete document.documentElement.dataset.chosen, 0")
    select = f"document.getElementById('{name}')"
    tab.evaluate(f"{select}.value = '{value}', {select}.dispatchEvent(new Event('change', {{bubbles: true}}))")
    tab.wait_for("'chosen' in document.documentElement.dataset")


def test_curves_are_smoothed_and_shown_over_time(pages: dict[str, Path], tab: Tab) -> None:
    """Catches a choice that does nothing or is not taken back, a mean of other points, a band left behind."""
    tab.look(width=1280)
    for kind, key in (("one", "lag"), ("one", "gradient"), ("several", "return")):
        tab.open(pages[kind])
        plot = f"document.getElementById('plot-{key}')"
        read = f"{plot}.data.map(({{x, y}}) => [[...x], [...y]])"
        raw, modes = tab.evaluate(read), tab.evaluate(f"{plot}.data.map(line => [line.mode, line.line.shape])")
        log = tab.evaluate(f"{plot}.layout.yaxis.type") == "log"
        choose(tab, "smoothing", "0.15")
        smoothed = tab.evaluate(read)
        for (x, y), (same, mean), (mode, shape) in zip(raw, smoothed, modes, strict=True):
            assert same == x
            if mode != "lines" or shape == "hv":
                assert mean == y
            elif log:
                assert mean == pytest.approx([10**v for v in slow_mean(x, np.log10(y), 0.15)], rel=1e-6)
            else:
                assert mean == pytest.approx(slow_mean(x, y, 0.15), rel=1e-6, abs=1e-9)
        assert smoothed != raw
        choose(tab, "axis", "time")
        assert tab.evaluate(f"{plot}.layout.xaxis.title.text") == "minutes of training"
        assert max(tab.evaluate(read)[0][0]) == pytest.approx(5)
        assert 4.9 < tab.evaluate(f"{plot}.layout.xaxis.range[1]") < 6
        choose(tab, "axis", "")
        choose(tab, "smoothing", "0")
        assert tab.evaluate(read) == raw


def slow_mean(x: list[float], y: Sequence[float], share: float) -> list[float]:
    """The mean of the points within half of a stretch on either side, or as far as both sides go."""
    found = []
    for at in x:
        reach = min((x[-1] - x[0]) * share / 2, at - x[0], x[-1] - at)
        found.append(float(np.mean([v for p, v in zip(x, y, strict=True) if at - reach <= p <= at + reach])))
    return found


def test_a_finger_on_a_plot_scrolls_the_page(pages: dict[str, Path], tab: Tab) -> None:
    """Catches a phone whose page cannot be scrolled because plots take every touch."""
    tab.look(width=390)
    tab.open(pages["one"])
    assert tab.evaluate("document.querySelector('.plot').layout.dragmode") is False
    tab.look(width=1280)
    tab.open(pages["one"])
    assert tab.evaluate("document.querySelector('.plot').layout.dragmode") != False  # noqa: E712  (what is not set is null)


def test_values_appear_under_the_pointer(pages: dict[str, Path], tab: Tab) -> None:
    """Catches plots whose numbers cannot be read."""
    tab.look(width=1280, height=2000)
    tab.open(pages["one"])
    box = tab.evaluate("(({x, y, width, height}) => [x + width / 2, y + height / 2])"
                       "(document.querySelector('#plot-return .nsewdrag').getBoundingClientRect())")  # fmt: skip
    tab.call("Input.dispatchMouseEvent", type="mouseMoved", x=box[0], y=box[1])
    tab.wait_for("document.querySelector('#plot-return .hoverlayer').textContent.includes('last 256 episodes')")


def test_on_paper(pages: dict[str, Path], tab: Tab) -> None:
    """Catches plots cut off by the paper's edge, and dark paper."""
    tab.look(width=1280, dark=True)
    tab.open(pages["one"])
    pdf = base64.b64decode(tab.call("Page.printToPDF", printBackground=True)["data"])
    assert pdf.startswith(b"%PDF")
    tab.look(width=794, media="print", dark=True)
    tab.evaluate("dispatchEvent(new Event('beforeprint')), 0")
    assert tab.evaluate("document.documentElement.scrollWidth") <= 794
    outside = """[...document.querySelectorAll(".plot .main-svg")].filter(svg =>
        svg.getBoundingClientRect().right > svg.closest("figure").getBoundingClientRect().right + 1).length"""
    assert tab.evaluate(outside) == 0
    assert tab.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    tab.evaluate("dispatchEvent(new Event('afterprint')), 0")
    assert tab.evaluate("document.querySelectorAll('svg.main-svg[viewBox]').length") == 0
