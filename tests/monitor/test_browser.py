"""What a person sees. Truth: Chromium's own rendering, asked for with ``--browser``."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from boards import serving, train
from pages import charts

IMAGES = Path(__file__).parents[2] / "docs" / "img"
TEXTS = """
const found = [];
function walk(node) {
  if (node.shadowRoot) walk(node.shadowRoot);
  if (node.nodeType === Node.TEXT_NODE) found.push(node.textContent);
  node.childNodes.forEach(walk);
}
walk(document.body);
for (const frame of document.querySelectorAll("iframe"))
  if (frame.contentDocument) walk(frame.contentDocument.body);
return found.join("\\n");
"""


def shown(driver: Any, *texts: str, patience: float = 30) -> str:
    """What the page says, once it says all of these."""
    until = time.monotonic() + patience
    while True:
        found: str = driver.execute_script(TEXTS)
        missing = [t for t in texts if t not in found]
        if not missing:
            return found
        assert time.monotonic() < until, f"{missing} not on the page:\n{found[:2000]}"
        time.sleep(0.5)


def quiet(driver: Any) -> None:
    """No script of the page failed."""
    severe = [e for e in driver.get_log("browser") if e["level"] == "SEVERE"]
    ours = [e for e in severe if "favicon" not in e["message"]]
    assert not [e for e in ours if "TypeError" in e["message"] or "ReferenceError" in e["message"]]


def test_scalars(browser: Any, server: str) -> None:
    browser.get(f"{server}/?runFilter=plain#timeseries")
    page = shown(browser, "Loss", "hyper", "hypergrad", "margin", "plain run")
    assert "verdict" not in page, "codes are no curves"
    quiet(browser)


def test_custom_scalars(browser: Any, server: str) -> None:
    browser.get(f"{server}/#custom_scalars")
    shown(browser, "Loss", "loss of validation batches", "Regularization", "Health")
    quiet(browser)


@pytest.mark.parametrize("count", [1, 5])
@pytest.mark.parametrize("steps", [60, 300, 2000])
@pytest.mark.parametrize("face", ["tuner", "optimizer"])
def test_every_chart_draws(browser: Any, face: str, steps: int, count: int, tmp_path: Path) -> None:
    """Law: no red box ("The steps for value, lower, and upper tags do not match"), none empty."""
    for seed in range(count):
        train(face, steps, tmp_path / "runs" / str(seed), seed)
    red, empty = 0, 0
    with serving(tmp_path / "runs", tmp_path / "told.txt", count) as address:
        for page, least in (("custom_scalars", 10), ("scalars", 15)):
            found = charts(browser, f"{address}/#{page}")
            assert len(found) >= least, (page, found)
            red += sum(bool(chart.error) for chart in found)
            empty += sum(not chart.drawn for chart in found)
            text = shown(browser)
            assert "No data" not in text
            assert "do not match" not in text
            quiet(browser)
    print(f"{face}, {steps} steps, {count} runs: {red} red boxes, {empty} empty charts")
    assert (red, empty) == (0, 0)


def test_a_chart_of_other_steps_is_a_red_box(browser: Any, tmp_path: Path) -> None:
    """The check itself, on a log whose margins have other steps than their value."""
    from selftune.monitor import Row, TensorBoard

    log = TensorBoard(tmp_path / "runs" / "a")
    log.begin({"lr": 0.1}, ["lr"])
    log.scalars([Row("log10/lr", 0.1, s) for s in (1, 2, 3)])
    log.scalars([Row(f"margin/lr/{end}", 0.1, s) for end in ("low", "high") for s in (2, 3)])
    log.end("finished")
    with serving(tmp_path / "runs", tmp_path / "told.txt", 1) as address:
        found = charts(browser, f"{address}/#custom_scalars", patience=10)
    assert ["do not match" in chart.error for chart in found] == [True]


def test_hparams(browser: Any, server: str) -> None:
    browser.get(f"{server}/#hparams")
    shown(browser, "start/lr", "start/l1", "plain run", "with l1", "Loss/final")
    quiet(browser)


def test_the_report(browser: Any, runs: Path) -> None:
    browser.get((runs / "plain run" / "report.html").as_uri())
    shown(browser, "weight_decay", "verdict")
    images = browser.execute_script("return [...document.images].map(i => i.naturalWidth)")
    assert len(images) == 4
    assert min(images) > 300
    quiet(browser)


# the pictures of docs/inspect.md


@pytest.fixture(scope="module")
def tour(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a server over the runs of examples/inspect_runs.py."""
    given = request.config.getoption("--screenshots")
    if not given:
        pytest.skip("pass --screenshots RUNS to take the pictures of the guide")
    IMAGES.mkdir(exist_ok=True)
    with serving(Path(given), tmp_path_factory.mktemp("told") / "told.txt", 4) as address:
        yield address


SEEN = "Loss/(final|test|gap)|(log10/lr|hyper/hidden)|lr/snr"
"""Tags that the tour looks at."""


def picture(driver: Any, name: str, size: tuple[int, int] = (1200, 900)) -> None:
    driver.set_window_size(*size)
    time.sleep(4)  # charts are drawn after their data have come
    assert driver.save_screenshot(str(IMAGES / f"{name}.png"))


@pytest.mark.parametrize("name", ["good", "dead", "overfitted", "noise"])
def test_the_tour(browser: Any, tour: str, name: str) -> None:
    browser.set_window_size(1200, 1500)  # cards out of sight are not drawn
    browser.get("about:blank")
    browser.get(f"{tour}/?smoothing=0&runFilter=%5E{name}%24&tagFilter={SEEN}#timeseries")
    shown(browser, "6 cards", name)
    close = "[...document.querySelectorAll('[aria-label=\"Close side pane\"]')].map(b => b.click())"
    browser.execute_script(close)
    picture(browser, f"tour-{name}", (1200, 1500))


@pytest.mark.parametrize(
    ("page", "text", "size"),
    [
        ("timeseries", "hypergrad", (1400, 1150)),
        ("scalars", "Loss/final", (1200, 1000)),
        ("custom_scalars", "Rates and momenta", (1200, 1700)),
        ("images", "what-if", (1200, 1000)),
        ("text", "why", (1200, 1000)),
        ("hparams", "Loss/final", (1700, 800)),
    ],
)
def test_the_pages(browser: Any, tour: str, page: str, text: str, size: tuple[int, int]) -> None:
    browser.set_window_size(*size)
    browser.get("about:blank")
    browser.get(f"{tour}/#{page}{'&tagFilter=why' if page == 'text' else ''}")
    shown(browser, text)
    picture(browser, page, size)


def test_the_page_of_a_run(browser: Any, tour: str, request: pytest.FixtureRequest) -> None:
    runs = Path(request.config.getoption("--screenshots")).resolve()
    browser.get((runs / "good" / "report.html").as_uri())
    shown(browser, "weight_decay")
    picture(browser, "report")
