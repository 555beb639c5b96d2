"""Reports as a reader sees them, in Chromium: nothing fails, nothing is fetched, nothing is missing or cut off.

Pictures of the pages are left in build/report/.
"""

import math
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browser import Browser
from report_runs import ensemble, long, recorded

import tnt_func as tnt
from tnt_func.observers import History, Row
from tnt_func.reports import plot, report
from tnt_func.reports.reading import read

ROOT = Path(__file__).parent.parent
PICTURES = ROOT / "build" / "report"
WIDTHS = (1280, 400)
PAGES = ("run", "three", "ensemble", "long")

OUTSIDE = """[...document.querySelectorAll("main, main *")].filter(element => {
  const { left, right } = element.getBoundingClientRect();
  return (right > innerWidth + 0.5 || left < -0.5) && !element.closest(".scroll table, .plot svg svg");
}).map(element => element.outerHTML.slice(0, 80))"""
"""What reaches out of the window, but for boxes that scroll by themselves."""
SMALL = """[...document.querySelectorAll("main *")].filter(element => {
  const told = [...element.childNodes].some(node => node.nodeType === 3 && node.data.trim());
  return told && parseFloat(getComputedStyle(element).fontSize) < 11;
}).map(element => element.outerHTML.slice(0, 80))"""
"""Text that is too small to read."""
DRAWN = """charts.map(chart => [...chart.svg.querySelectorAll("path.line")].map(
  path => (path.getAttribute("d").match(/[ML]/g) ?? []).length))"""
"""Of every chart, how many points each line has."""
HELD = """data.charts.flatMap(chart => chart.series.map(series => [
  series.run, series.phase, series.kind, series.name, series.x, series.y.map(y => Number.isFinite(y) ? y : shown(y))
]))"""
"""Every value in the page; what is not finite by its name."""


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    opened = Browser(tmp_path_factory.mktemp("chromium"))
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    folder, asked = tmp_path_factory.mktemp("runs"), iter(range(1000))
    recorded(folder / "base", pause_when=lambda: next(asked) == 47)
    for name, lr, seed in (("base", 0.1, 0), ("higher lr", 0.3, 0), ("other seed", 0.1, 1)):
        recorded(folder / name, lr=lr, seed=seed)
    three = [folder / "base", folder / "higher lr", folder / "other seed"]
    return {"run": three[:1], "three": three, "ensemble": [ensemble()], "long": [long(30_000)]}


@pytest.fixture(scope="module")
def pages(sources: dict[str, list[Any]], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    return {name: report(*runs, path=folder / f"{name}.html") for name, runs in sources.items()}


def middle(browser: Browser, chart: int, step: int) -> tuple[float, float]:
    """Where a step is on the screen, in a chart that is scrolled to."""
    found = browser.run(f"""(() => {{
      const chart = charts[{chart}];
      chart.plot.scrollIntoView({{ block: "center" }});
      const box = chart.svg.getBoundingClientRect();
      return [box.left + chart.across({step}), box.top + box.height / 2];
    }})()""")
    return found[0], found[1]


def move_slider(browser: Browser, to: int) -> None:
    browser.run(f'smoothing.value = {to}; smoothing.dispatchEvent(new Event("input")); 0')


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", PAGES)
def test_a_page_is_whole_at_both_widths(browser: Browser, pages: dict[str, Path], name: str, width: int):
    browser.open(pages[name], width)
    browser.screenshot(PICTURES / f"{name}-{width}.png")
    assert browser.complaints == []
    assert browser.requests == [pages[name].resolve().as_uri()]
    assert browser.run("innerWidth") == width == browser.run("document.documentElement.scrollWidth")
    assert browser.run(OUTSIDE) == []
    assert browser.run(SMALL) == []
    assert browser.run("charts.length") == browser.run("document.querySelectorAll('figure svg[role=img]').length") > 0


@pytest.mark.parametrize("name", PAGES)
def test_every_series_is_drawn_with_all_its_points(browser: Browser, pages: dict[str, Path], name: str):
    browser.open(pages[name])
    move_slider(browser, 0)
    wanted = browser.run("""data.charts.map(
      chart => [...chart.bands.map(band => band.mean), ...chart.series.map(one => one.y)].map(
        column => column.filter(Number.isFinite).length))""")
    assert [sorted(chart) for chart in browser.run(DRAWN)] == [sorted(chart) for chart in wanted]
    odd = browser.run(
        "data.charts.flatMap(chart => chart.series.map(one => one.y.filter(y => !Number.isFinite(y)).length))"
    )
    assert browser.run('document.querySelectorAll("path.odd").length') == sum(odd)
    move_slider(browser, 50)
    noisy = browser.run("""data.charts.map(chart => chart.noisy ?
      chart.series.filter(one => one.member === null && one.x.length > MANY).length : 0)""")
    assert [len(chart) for chart in browser.run(DRAWN)] == [len(a) + b for a, b in zip(wanted, noisy, strict=True)]
    assert browser.complaints == []


@pytest.mark.parametrize("name", ["run", "three", "ensemble"])
def test_values_read_back_from_the_page_are_those_of_the_record(
    browser: Browser, pages: dict[str, Path], sources: dict[str, list[Any]], name: str
):
    browser.open(pages[name])
    held = {tuple(found[:4]): found[4:] for found in browser.run(HELD)}
    wanted = {
        (run, *one.key): [one.steps, [value if math.isfinite(value) else repr(value) for value in one.values]]
        for run, source in enumerate(sources[name])
        for one in read(source, "run").series
    }
    assert held == wanted


def test_pointing_at_a_step_shows_its_values(browser: Browser, pages: dict[str, Path], sources: dict[str, list[Any]]):
    browser.open(pages["three"])
    chart = browser.run('charts.findIndex(chart => chart.chart.name === "loss")')
    for step in (1, 50, 100):
        browser.mouse("Moved", *middle(browser, chart, step))
        rows = browser.run("""[...document.querySelectorAll(".tip:not([hidden]) tr")].map(
          row => [...row.cells].slice(1).map(cell => cell.textContent))""")
        shown = {label: value for label, value, then in rows if not then}
        for source in sources["three"]:
            for one in read(source, "run").series:
                if one.name == "loss" and step in one.steps:
                    said = "train, whole epochs" if (one.phase, one.kind) == ("train", "epoch") else one.phase
                    value = one.values[one.steps.index(step)]
                    assert shown[f"{Path(source).name}, {said}"] == f"{value:.6g}"
    assert browser.run(
        '[...document.querySelectorAll(".cross")].every(line => line.getAttribute("visibility") === "visible")'
    )
    assert browser.run(OUTSIDE) == []


def test_pointing_in_a_narrow_window_stays_inside(browser: Browser, pages: dict[str, Path]):
    for name in ("three", "ensemble"):
        browser.open(pages[name], 400)
        for step in (2, 75, 100):
            browser.mouse("Moved", *middle(browser, 0, step))
            assert browser.run('document.querySelectorAll(".tip:not([hidden])").length') == 1
            assert browser.run(OUTSIDE) == []
    browser.screenshot(PICTURES / "pointed-400.png")


def test_controls_zoom_hide_and_change_the_axis(browser: Browser, pages: dict[str, Path]):
    browser.open(pages["three"])
    count = "document.querySelectorAll('path.line').length"
    before, whole = browser.run(count), browser.run("charts[0].x")
    browser.run('document.querySelectorAll("button[data-run]")[1].click()')
    assert browser.run(count) == before * 2 // 3
    browser.run('document.querySelectorAll("button[data-run]")[1].click()')
    assert browser.run(count) == before
    x, y = middle(browser, 0, 20)
    browser.mouse("Pressed", x, y, button="left", clickCount=1)
    browser.mouse("Moved", middle(browser, 0, 40)[0], y, button="left")
    browser.mouse("Released", middle(browser, 0, 40)[0], y, button="left", clickCount=1)
    assert browser.run("charts.map(chart => chart.x).every(([low, high]) => low === 20 && high === 40)")
    browser.run("reset.click()")
    assert browser.run("charts[0].x") == whole
    browser.run("charts[0].svg.focus()")
    step = browser.run("view.step")
    for _ in range(3):
        browser("Input.dispatchKeyEvent", type="keyDown", key="ArrowRight")
    assert browser.run("view.step") == step + 3
    low = browser.run("charts[0].up(-1) !== null")
    browser.run("log.click()")
    assert low and browser.run("charts[0].up(-1) === null && charts[0].up(1) !== null")
    browser.run("log.click()")
    spiked = browser.run('charts.findIndex(chart => chart.chart.name === "spike")')
    assert browser.run(f"charts[{spiked}].up(1e6)") > 0
    browser.run("clip.click()")
    assert browser.run(f"charts[{spiked}].up(1e6)") < 0
    assert browser.complaints == []


def test_a_dark_page_is_dark(browser: Browser, pages: dict[str, Path]):
    browser.open(pages["three"], scheme="dark")
    browser.screenshot(PICTURES / "three-dark.png")
    assert browser.run("getComputedStyle(document.body).backgroundColor") == "rgb(17, 20, 24)"


def test_a_hundred_thousand_steps_are_a_small_page_soon_drawn(browser: Browser, tmp_path: Path):
    history, begun = long(100_000), time.process_time()
    path = report(history, path=tmp_path / "report.html")
    assert time.process_time() - begun < 5 and path.stat().st_size < 2_500_000
    browser("Performance.enable", timeDomain="threadTicks")
    browser.open(path)
    spent = {metric["name"]: metric["value"] for metric in browser("Performance.getMetrics")["metrics"]}
    assert 0 < spent["TaskDuration"] < 5
    held = {found[3]: dict(zip(found[4], found[5], strict=True)) for found in browser.run(HELD)}
    assert (held["loss"][50_000], held["accuracy"][50_001], held["norm"][33_333]) == (99, -9, "nan")


def test_what_a_stranger_wrote_does_not_run(browser: Browser, tmp_path: Path):
    evil = "</script><script>alert(1)</script><img src=x onerror=alert(2)><svg onload=alert(3)>"
    rows = [Row(step, 0, "train", "step", {evil: 1.0, f"{evil}.0": math.nan, f"{evil}.1": 2.0}) for step in (1, 2)]
    path = report(History(rows), History(rows), path=tmp_path / "evil.html", names=[evil, evil + "'"], title=evil)
    browser.open(path, 400)
    assert (browser.complaints, browser.requests) == ([], [path.resolve().as_uri()])
    browser.mouse("Moved", *middle(browser, 0, 1))
    assert browser.run("document.querySelector('.tip').textContent").count(evil) > 0
    assert (browser.complaints, browser.run(OUTSIDE)) == ([], [])


def test_what_is_put_into_a_page_is_neither_run_nor_fetched(browser: Browser, pages: dict[str, Path], tmp_path: Path):
    more = (
        "<script>document.title = 'changed'</script><img src='http://127.0.0.1:9/x.png' onerror='document.title = 1'>"
    )
    path = tmp_path / "changed.html"
    path.write_text(pages["ensemble"].read_text().replace("<footer>", f"{more}<footer>"))
    browser.open(path)
    assert sum("Content Security Policy" in said for said in browser.complaints) >= 2
    assert (browser.run("document.title"), browser.run("charts.length")) == ("run", 1)


def test_a_page_that_fails_fetches_or_overflows_is_seen(browser: Browser, tmp_path: Path):
    path = tmp_path / "bad.html"
    path.write_text("<main><p style='width: 2000px'>wide</p><img src='x.png'></main><script>missing()</script>")
    browser.open(path, 400)
    assert any("missing is not defined" in said for said in browser.complaints)
    assert len(browser.requests) == 2
    assert len(browser.run(OUTSIDE)) > 0


def test_a_plot_is_drawn_without_scripts(browser: Browser, sources: dict[str, list[Any]], tmp_path: Path):
    path = tmp_path / "plot.html"
    drawn = [plot(sources["run"][0])._repr_html_(), plot(sources["ensemble"][0])._repr_html_()]
    path.write_text(f"<meta charset=utf-8><main>{''.join(drawn)}</main>")
    browser.open(path, 400)
    browser.screenshot(PICTURES / "plot-400.png")
    assert (browser.complaints, browser.requests, browser.run(OUTSIDE)) == ([], [path.as_uri()], [])
    boxes = "[...document.querySelectorAll('path')].map(path => path.getBBox()).map(box => [box.width, box.height])"
    assert all(0 < width <= 300 and 0 <= height <= 110 for width, height in browser.run(boxes))


def contrast(a: str, b: str) -> float:
    """Of two colours, #rgb or #rrggbb, as the Web Content Accessibility Guidelines define it."""

    def luminance(colour: str) -> float:
        digits = colour[1:] if len(colour) == 7 else "".join(2 * digit for digit in colour[1:])
        parts = [int(digits[at : at + 2], 16) / 255 for at in (0, 2, 4)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return sum(part * weight for part, weight in zip(linear, (0.2126, 0.7152, 0.0722), strict=True))

    high, low = sorted((luminance(a), luminance(b)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_colours_stand_out(scheme: int):
    style = (Path(tnt.__file__).parent / "reports" / "page.css").read_text()
    colours = dict(re.findall(r"--(\w+): (#\w+)", style.split(":root {")[1 + scheme].partition("}")[0]))
    for ground in ("card", "ground"):
        assert all(contrast(colours[text], colours[ground]) >= 4.5 for text in ("ink", "quiet", "warn"))
        assert all(contrast(colours[f"h{hue}"], colours[ground]) >= 3 for hue in range(8))
