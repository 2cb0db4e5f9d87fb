"""Tests the report in a real browser, opened from disk and offline: what mouse, touch and keyboard do there.

Needs Chromium, and `pip install -e ".[browser]"`.
"""

import re
import shutil
from pathlib import Path

import pytest

from smallbatch_jax.study import report
from smallbatch_jax.study.answer import answer
from smallbatch_jax.study.study import load

pytestmark = pytest.mark.browser
STORED = Path(__file__).parents[2] / "notebooks/results/cifar10_subset"
WIDTHS = (1280, 390)


@pytest.fixture(scope="module")
def studies():
    return [load(STORED / name) for name in ("fig02", "fig07", "fig13_cifar10")]


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture(params=WIDTHS)
def page(browser, studies, tmp_path, request):
    """Yields all studies on one page; fails if the page writes to the console or makes a network request."""
    report.write(studies, tmp_path / "report.html")
    narrow = request.param < 500
    screen = {"width": request.param, "height": 900}
    context = browser.new_context(viewport=screen, offline=True, has_touch=narrow, is_mobile=narrow)
    opened, said, asked = context.new_page(), [], []
    opened.on("console", lambda message: said.append(message.text))
    opened.on("pageerror", lambda error: said.append(str(error)))
    opened.on("request", lambda made: asked.append(made.url))
    opened.goto(f"file://{tmp_path}/report.html")
    opened.locator('[data-chart="study2-accuracy"] .scatterlayer .trace').first.wait_for()  # the last chart of the page
    yield opened
    assert said == []
    assert set(asked) == {f"file://{tmp_path}/report.html"}
    context.close()


def middle_of_cell(page, study, x, y, columns, rows):
    """Returns the screen position of a heat map's cell (x, y), counted from the lower left."""
    plot = page.locator(f'[data-chart="{study}-map"] .nsewdrag').first
    plot.scroll_into_view_if_needed()
    box = plot.bounding_box()
    return box["x"] + box["width"] * (x + 0.5) / columns, box["y"] + box["height"] * (1 - (y + 0.5) / rows)


def chosen(page, study="study0"):
    return page.locator(f"#{study} .chosen").text_content()


def test_it_fits_the_screen_and_shows_the_answer(page, studies):
    assert page.evaluate("document.documentElement.scrollWidth") <= page.viewport_size["width"]
    for line, found in zip(page.locator("p.answer").all(), studies, strict=True):
        assert answer(found).sentence in line.text_content()
    charts = page.locator(".chart").all()
    assert len(charts) >= 1 + 4 * len(studies)  # charts of cost and theory need timings or three batch sizes
    assert all(chart.locator(".main-svg").count() for chart in charts)


def test_a_cell_tells_of_its_runs_and_shows_its_curves(page):
    x, y = middle_of_cell(page, "study0", 3, 2, 13, 9)
    if page.viewport_size["width"] > 500:
        page.mouse.move(x, y)
        label = page.locator('[data-chart="study0-map"] .hoverlayer')
        label.get_by_text("seed 0").wait_for()
        assert re.search(r"m = 8, η̃ = 2\^-9.*test accuracy 37.6 %.*seed 0: finished, 5 epochs", label.text_content())
    page.mouse.click(x, y) if page.viewport_size["width"] > 500 else page.touchscreen.tap(x, y)
    page.wait_for_function("document.querySelector('#study0 .chosen').textContent == 'm = 8, η̃ = 2^-9'")
    assert page.locator("#study0 select[name=batch_size]").input_value() == "8"
    assert page.evaluate("document.querySelector('[data-chart=\"study0-accuracy\"]').data[0].y.length") == 5
    page.reload()
    page.wait_for_function("document.querySelector('#study0 .chosen').textContent == 'm = 8, η̃ = 2^-9'")


def test_the_keyboard_alone_is_enough(page):
    page.locator("#study0 select[name=batch_size]").focus()
    before = chosen(page)
    page.keyboard.press("ArrowDown")
    page.wait_for_function(f"document.querySelector('#study0 .chosen').textContent != {before!r}")
    assert chosen(page) == before.replace("m = 2,", "m = 4,")
    heading = page.locator("#study0 table.cells th button", has_text="accuracy %")
    heading.focus()
    page.keyboard.press("Enter")
    page.keyboard.press("Enter")
    shown = page.locator("#study0 table.cells tbody td:nth-child(4)").all_text_contents()
    column = [float(cell) for cell in shown if cell != "–"]
    assert column == sorted(column, reverse=True)
    assert page.locator("#study0 table.cells th[aria-sort=descending]").text_content() == "accuracy %"
    page.locator("#study0 table.cells button.show").first.focus()
    page.keyboard.press("Enter")
    page.wait_for_function("document.querySelector('#study0 .chosen').textContent == 'm = 2, η̃ = 2^-6'")


def test_pairs_of_batch_sizes_have_their_map(page):
    page.locator("#study2 select[name=bn_batch_size]").select_option("2")
    page.wait_for_function("document.querySelector('#study2 .chosen').textContent.includes('BN batch size 2')")
