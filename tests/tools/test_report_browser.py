"""The report's page in a real browser, as wide as a desk's and as a phone's."""

import shutil

import pytest

from apoptosis.decide.log import EventLog
from apoptosis.tools.report import write_report
from tools.test_report import event, whole_run

WIDTHS = {"desk": (1280, 900), "phone": (390, 844)}
#: What of the page's own elements reaches beyond the window, unless it scrolls in a frame of its own.
BEYOND = """
return [...document.querySelectorAll('body *')].filter(e => !e.closest('.scroll, pre, svg'))
    .filter(e => e.getBoundingClientRect().right > window.innerWidth + 0.5 || e.getBoundingClientRect().left < -0.5)
    .map(e => e.tagName + '.' + e.className)
"""
#: Of every figure: its legend's lines and its panels as boxes, and the size of the smallest text in them.
FIGURES = """
const box = e => { const b = e.getBoundingClientRect(); return [b.left, b.top, b.right, b.bottom] }
return [...document.querySelectorAll('figure')].map(f => ({
    keys: [...f.querySelectorAll('.legend li')].map(box),
    labels: [...f.querySelectorAll('.legend li')].map(e => e.innerText),
    swatches: [...f.querySelectorAll('.legend svg')].map(box), panels: [...f.querySelectorAll('.panels svg')].map(box),
    texts: [...f.querySelectorAll('.panels text')].map(e => e.getBoundingClientRect().height)}))
"""


@pytest.fixture(scope="module")
def browser():
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    found = {name: shutil.which(name) for name in ("chromium", "chromedriver")}
    if None in found.values():
        pytest.skip(f"no {', no '.join(name for name, path in found.items() if path is None)} on this machine")
    options = webdriver.ChromeOptions()
    options.binary_location = found["chromium"]
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(found["chromedriver"]))
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    folder = whole_run(tmp_path_factory.mktemp("browser") / "run")
    with EventLog(folder / "events.jsonl") as log:
        names = [f"encoder.layers.{i}.mlp.{part}.dense_of_a_long_name" for i in range(6) for part in ("up", "down")]
        event(log, 260, 64, 48, groups={name: (64 - i, 48 - i) for i, name in enumerate(names)})
    return write_report(folder).as_uri()


def resize(browser, width, height):
    """A window as narrow as a phone's, which no real window of chromium can be."""
    metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)


@pytest.mark.parametrize("name", WIDTHS)
def test_nothing_has_to_be_scrolled_sideways_and_every_legend_is_beside_its_plot(browser, address, name):
    width, height = WIDTHS[name]
    resize(browser, width, height)
    browser.get(address)
    assert browser.execute_script("return window.innerWidth") == width
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    assert browser.execute_script(BEYOND) == []
    figures = browser.execute_script(FIGURES)
    assert len(figures) == 5
    for figure in figures:
        assert figure["labels"]
        assert all(figure["labels"])
        boxes = figure["keys"] + figure["panels"]
        assert all(0 <= left < right <= width and top < bottom for left, top, right, bottom in boxes)
        assert all(right - left == 30 for left, _, right, _ in figure["swatches"])
        tops, bottoms = [box[1] for box in boxes], [box[3] for box in figure["keys"] + figure["panels"][:1]]
        assert max(bottoms) - min(tops) <= height  # the legend and the first panel are seen at once
        assert min(figure["texts"]) >= 9  # pixels, ascent and descent
    columns = [len({box[0] for box in figure["panels"]}) for figure in figures]
    assert columns == ([1, 2, 2, 3, 1] if name == "desk" else [1] * 5)
    assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []


def test_dark_is_dark_and_the_plots_go_with_it(browser, address):
    resize(browser, *WIDTHS["desk"])
    seen = []
    for scheme in ("light", "dark"):
        feature = {"name": "prefers-color-scheme", "value": scheme}
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
        browser.get(address)
        paper = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
        ink = browser.execute_script("return getComputedStyle(document.querySelector('.panels text')).fill")
        seen.append([sum(map(int, colour[4:-1].split(","))) for colour in (paper, ink)])
    (light_paper, light_ink), (dark_paper, dark_ink) = seen
    assert light_paper > 700 > 200 > light_ink
    assert dark_paper < 200 < 500 < dark_ink
