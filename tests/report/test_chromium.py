"""Pages in a real browser: they load without errors, and slider, layers, tables and keys work."""

from __future__ import annotations

import base64
import io
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from report.pages import EVIL, contrast, page_of, subject, write

CHROMIUM = next(
    (p for n in ("chromium", "chromium-browser", "google-chrome") if (p := shutil.which(n))), None
)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium on the path (apt-get install chromium)"),
]
ARGUMENTS = ("--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage")

Open = Callable[..., Any]


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=list(ARGUMENTS))
        yield browser
        browser.close()


@pytest.fixture
def show(chromium: Any, tmp_path: Path) -> Iterator[Open]:
    """Open a page from the disk, without a network; what it complains about or asks for fails the test."""
    complaints: list[str] = []
    context = chromium.new_context(offline=True, viewport={"width": 640, "height": 600})

    def opened(html: str, **media: Any) -> Any:
        page = context.new_page()
        page.emulate_media(**media)
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on(
            "request", lambda r: None if r.url.startswith(("file:", "data:")) else complaints.append(r.url)
        )
        page.goto(write(tmp_path / "page.html", html))
        page.wait_for_selector("html[data-ready]")
        return page

    yield opened
    context.close()
    assert complaints == []


def pixels(page: Any, number: int = 0) -> np.ndarray:
    """Return what a canvas shows, (Y, X, 4)."""
    uri = (
        page.locator("canvas")
        .nth(number)
        .evaluate(
            """canvas => {
            const copy = document.createElement("canvas");
            [copy.width, copy.height] = [canvas.width, canvas.height];
            copy.getContext("2d", { willReadFrequently: true }).drawImage(canvas, 0, 0);
            return copy.toDataURL();
        }"""
        )
    )
    content = base64.b64decode(uri.partition("base64,")[2])
    return np.asarray(Image.open(io.BytesIO(content)).convert("RGBA"))


def test_slider_and_keys_change_the_slice(show: Open) -> None:
    page = show(page_of(subject()))
    slider, place = page.get_by_role("slider", name="Slice"), page.locator(".place")
    assert place.inner_text() == "5 of 6"
    before = pixels(page)
    slider.focus()
    page.keyboard.press("ArrowLeft")
    assert place.inner_text() == "4 of 6"
    assert slider.get_attribute("aria-valuetext") == "slice 4 of 6"
    assert "slice 4 of 6" in str(page.locator("canvas").get_attribute("aria-label"))
    assert (pixels(page) != before).any()
    page.keyboard.press("Home")
    assert place.inner_text() == "1 of 6"
    slider.fill("5")
    assert place.inner_text() == "6 of 6"


def test_layers_are_switched_and_faded(show: Open) -> None:
    page = show(page_of(subject()))
    both = pixels(page)
    page.get_by_label("label", exact=True).uncheck()
    page.get_by_label("prediction", exact=True).uncheck()
    alone = pixels(page)
    assert (alone[..., 0] == alone[..., 2]).mean() > 0.99  # grey
    assert (both[..., 0] != both[..., 2]).mean() > 0.05
    page.get_by_label("trust", exact=True).check()
    strong = pixels(page).astype(int) - alone
    page.get_by_label("Opacity of trust, per cent").fill("10")
    faint = pixels(page).astype(int) - alone
    assert 0 < np.abs(faint).sum() < 0.5 * np.abs(strong).sum()
    assert page.get_by_text("trust: 0").is_visible()
    page.get_by_label("Opacity of trust, per cent").fill("0")
    assert np.array_equal(pixels(page), alone)
    # A digit switches the layer of that number, from anywhere in the figure.
    page.get_by_role("slider", name="Slice").focus()
    page.keyboard.press("1")
    assert page.get_by_label("label", exact=True).is_checked()
    assert (pixels(page) != alone).any()


def test_layers_lie_where_they_belong(show: Open) -> None:
    mask = np.zeros((20, 30), int)
    mask[5:10, 20:25] = 1
    page = show(page_of(_black(mask)))
    seen = pixels(page)[..., :3].sum(axis=2) > 0
    rows, columns = np.nonzero(seen)
    height, width = seen.shape
    found = [
        rows.min() / height,
        (rows.max() + 1) / height,
        columns.min() / width,
        (columns.max() + 1) / width,
    ]
    assert np.allclose(found, [5 / 20, 10 / 20, 20 / 30, 25 / 30], atol=0.01)


def test_outlines_run_around_classes(show: Open) -> None:
    empty, mask = np.zeros((20, 30), int), np.zeros((20, 30), int)
    mask[5:15, 10:20] = 1
    page = show(page_of(_black(empty, mask)))
    seen = pixels(page)[..., :3].sum(axis=2) > 0
    height, width = seen.shape
    assert not seen[height // 2, width // 2]  # inside
    assert seen[height // 2, width // 3 - 3 : width // 3 + 3].any()  # the left edge
    assert not seen[: height // 5].any()


def test_an_old_browser_is_told(chromium: Any, tmp_path: Path) -> None:
    page = chromium.new_page()
    page.add_init_script("delete window.DecompressionStream")
    page.goto(write(tmp_path / "page.html", page_of(subject(), subject("case_2"))))
    page.wait_for_selector("html[data-ready]")
    assert page.get_by_text("This browser cannot show the slices").count() == 2
    page.close()


def test_names_stay_text_and_run_nothing(show: Open) -> None:
    page = show(page_of(subject(EVIL), title=EVIL))
    assert page.title() == EVIL
    assert page.locator("figcaption strong").inner_text() == EVIL
    assert page.locator("b").count() == 0


def test_tables_are_sorted_by_click_and_by_key(show: Open) -> None:
    from mlbseg.apps.report.page import Section, number, render_page, table

    rows = [["b10", number(0.7)], ["b9", number(None)], ["a", number(0.05)]]
    page = show(render_page("t", [Section("s", table(["case", "Dice"], rows, caption="c"))]))

    def names() -> list[str]:
        return [str(text) for text in page.locator("tbody th").all_inner_texts()]

    page.get_by_role("button", name="Dice").click()
    assert names() == ["b9", "a", "b10"]
    assert page.locator("th[aria-sort]").get_attribute("aria-sort") == "ascending"
    page.keyboard.press("Enter")
    assert names() == ["b10", "a", "b9"]
    page.get_by_role("button", name="case").focus()
    page.keyboard.press("Space")
    assert names() == ["a", "b9", "b10"]


def test_every_control_is_reached_by_tab_and_shows_it(show: Open) -> None:
    page = show(page_of(subject(), subject("case_2")))
    order, outlines = [], []
    for _ in range(40):
        page.keyboard.press("Tab")
        found = page.evaluate(
            """() => { const e = document.activeElement; return [e.tagName, e.className || e.id || e.textContent,
               getComputedStyle(e).outlineStyle, parseFloat(getComputedStyle(e).outlineWidth)]; }"""
        )
        if found[0] == "BODY":
            break
        order.append(found[1])
        outlines.append((found[2], found[3]))
    one = ["position", *["shown", "opacity"] * 4]
    assert order == ["skip", "theme", "Cases", "More", *one, *one]
    assert all(style == "solid" and width >= 2 for style, width in outlines)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_has_contrast_on_either_page(scheme: str, show: Open) -> None:
    page = show(page_of(subject()), color_scheme=scheme)
    for press in (False, True):
        if press:
            page.locator("#theme").click()
        pairs = page.evaluate(
            """() => { const solid = e => {
                 for (; e; e = e.parentElement) {
                   const c = getComputedStyle(e).backgroundColor;
                   if (c !== "rgba(0, 0, 0, 0)") return c;
                 }
                 return "rgb(255, 255, 255)";
               };
               return [...document.querySelectorAll("h1, h2, p, a:not(.skip), span, label, li, strong, button")]
                 .filter(e => e.innerText?.trim() && e.checkVisibility())
                 .map(e => [e.innerText, getComputedStyle(e).color, solid(e)]); }"""
        )
        low = [(text, a, b) for text, a, b in pairs if contrast(_hex(a), _hex(b)) < 4.5]
        assert len(pairs) > 15
        assert low == []
        dark = contrast(_hex(pairs[0][2]), "#000000") < 2
        assert dark == ((scheme == "dark") != press)


def test_paper_is_light_and_without_controls(show: Open) -> None:
    page = show(page_of(subject()), color_scheme="dark", media="print")
    assert not page.locator(".layer").first.is_visible()
    assert not page.locator("nav").is_visible()
    assert page.locator("canvas").is_visible()
    assert page.get_by_text("prediction: outlined").is_visible()
    assert page.get_by_text("5 of 6").is_visible()
    colour = page.evaluate("getComputedStyle(document.body).color")
    assert contrast(_hex(colour), "#ffffff") > 7


def test_a_narrow_window_needs_no_sideways_scrolling(show: Open) -> None:
    page = show(page_of(subject("x" * 200)))
    page.set_viewport_size({"width": 360, "height": 700})
    assert page.evaluate("document.documentElement.scrollWidth") <= 360


def _black(*masks: np.ndarray) -> Any:
    from mlbseg.apps.report.slices import Subject

    names = ("label", "prediction")
    return Subject("a", "", np.zeros(masks[0].shape), (1.0, 1.0), dict(zip(names, masks, strict=False)))


def _hex(colour: str) -> str:
    """Return a computed colour, ``rgb(1, 2, 3)``, as ``#010203``."""
    return "#" + "".join(f"{int(v):02x}" for v in colour[colour.index("(") + 1 : -1].split(",")[:3])
