"""Pages in a real browser: they load without errors, and viewer, tables and keys work."""

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
ARGUMENTS = (
    "--no-sandbox",
    "--disable-dev-shm-usage",
    "--use-angle=swiftshader",
    "--enable-unsafe-swiftshader",
)

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
    context = chromium.new_context(offline=True, viewport={"width": 900, "height": 600})

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


def pixels(page: Any) -> np.ndarray:
    """Return what the viewer shows, (Y, X, 3)."""
    uri = page.evaluate(
        """() => {
            const { viewer } = document.querySelector(".viewer");
            viewer.nv.drawScene();
            return viewer.canvas.toDataURL();
        }"""
    )
    content = base64.b64decode(uri.partition("base64,")[2])
    return np.asarray(Image.open(io.BytesIO(content)).convert("RGB")).astype(int)


def coloured(seen: np.ndarray) -> np.ndarray:
    return np.asarray(np.ptp(seen, axis=2) > 40)


def test_planes_slices_and_window(show: Open) -> None:
    page = show(page_of(subject()))
    place, canvas = page.locator(".place"), page.locator("canvas")
    assert "label: organ" in place.inner_text()
    start = pixels(page)
    slider = page.get_by_role("slider", name="Axial")
    assert slider.get_attribute("aria-valuetext") == "slice 5 of 6"
    slider.focus()
    page.keyboard.press("ArrowLeft")
    assert slider.get_attribute("aria-valuetext") == "slice 4 of 6"
    before = place.inner_text()
    assert " mm · value " in before
    canvas.focus()
    page.keyboard.press("PageUp")
    page.keyboard.press("ArrowLeft")
    assert slider.get_attribute("aria-valuetext") == "slice 5 of 6"
    assert place.inner_text() != before
    assert (pixels(page) != start).any()
    for name in ("Axial", "Coronal", "Sagittal", "3D", "Planes and 3D"):
        page.get_by_role("button", name=name, exact=True).click()
        assert page.get_by_role("button", name=name, exact=True).get_attribute("aria-pressed") == "true"
        seen = pixels(page)
        assert seen.max() > 60, name
        assert coloured(seen).any(), name
    page.get_by_role("button", name="Axial", exact=True).click()
    usual = pixels(page).mean()
    page.get_by_label("Window").select_option("whole range")
    assert abs(pixels(page).mean() - usual) > 1
    box = canvas.bounding_box()
    page.mouse.move(box["x"] + 200, box["y"] + 200)
    page.mouse.down(button="right")
    page.mouse.move(box["x"] + 240, box["y"] + 180, steps=3)
    page.mouse.up(button="right")
    assert page.get_by_label("Window").input_value() == "own"
    canvas.click(position={"x": 300, "y": 150})
    clicked = slider.get_attribute("aria-valuetext")
    page.mouse.wheel(0, 100)
    page.wait_for_timeout(100)
    assert slider.get_attribute("aria-valuetext") != clicked
    zoomed = "document.querySelector('.viewer').viewer.nv.scene.pan2Dxyzmm[3]"
    page.keyboard.down("Control")
    page.mouse.wheel(0, -200)
    page.keyboard.up("Control")
    page.wait_for_timeout(100)
    assert page.evaluate(zoomed) != 1
    page.get_by_role("button", name="Reset view").click()
    assert page.evaluate(zoomed) == 1


def test_layers_and_classes_are_switched_coloured_and_faded(show: Open) -> None:
    page = show(page_of(subject()))
    page.get_by_role("button", name="Axial", exact=True).click()
    both = pixels(page)
    page.get_by_label("prediction", exact=True).uncheck()
    filled = pixels(page)
    assert (filled != both).any()
    page.get_by_label("organ").uncheck()
    page.get_by_label("vessel").uncheck()
    assert not page.get_by_label("organ").is_checked()
    none = pixels(page)
    page.get_by_label("label", exact=True).uncheck()
    assert np.array_equal(none, pixels(page))
    page.get_by_label("label", exact=True).check()
    page.get_by_label("vessel").check()
    one = pixels(page)
    assert (one != none).any()
    assert coloured(one).sum() < coloured(filled).sum()
    page.get_by_label("Colour of label").select_option("red")
    assert (pixels(page) != one).any()
    page.get_by_label("trust", exact=True).check()
    strong = np.abs(pixels(page) - one).sum()
    page.get_by_label("Opacity of trust, per cent").fill("10")
    assert 0 < np.abs(pixels(page) - one).sum() < strong
    assert "trust" in page.locator(".place").inner_text()
    # A digit switches the layer of that number, from anywhere in the figure.
    page.locator("canvas").focus()
    page.keyboard.press("1")
    assert not page.get_by_label("label", exact=True).is_checked()


def test_a_picture_is_flat_and_upright_and_layers_lie_where_they_belong(show: Open) -> None:
    mask = np.zeros((20, 30), int)
    mask[2:8, 20:25] = 1
    shown = subject(shape=(20, 30), image=np.zeros((20, 30)), masks={"label": mask}, maps={})
    page = show(page_of(shown))
    assert not page.locator(".slices").is_visible()
    assert not page.get_by_role("button", name="Coronal").is_visible()
    rows, columns = np.nonzero(coloured(pixels(page)) & (pixels(page)[..., 0] > pixels(page)[..., 2]))
    height, width = pixels(page).shape[:2]
    side = min(height / 20, width / 30)
    found = [
        (rows.min() - height / 2) / side + 10, (rows.max() + 1 - height / 2) / side + 10,
        (columns.min() - width / 2) / side + 15, (columns.max() + 1 - width / 2) / side + 15,
    ]  # fmt: skip
    assert np.allclose(found, [2, 8, 20, 25], atol=0.3)
    assert "x " in page.locator(".place").inner_text()


def test_any_case_is_opened_by_name_and_place(show: Open) -> None:
    from mlbseg.apps.report.page import Section, render_page, table
    from mlbseg.apps.report.viewer import SCRIPTS, Gallery, opener

    looked = Gallery({1: "organ"})
    looked.fill((subject(name) for name in ("a", "b")), 2)
    rows = [[opener("a")], [opener("b")], [opener("a", "there", place=(7.0, 3.0, 6.0))]]
    body = looked.html() + table(["case"], rows, caption="c")
    page = show(render_page("t", [Section("s", body, "", SCRIPTS)]))
    page.get_by_role("button", name="b", exact=True).click()
    page.wait_for_selector('.viewer[data-ready="b"]')
    assert page.get_by_label("Case").input_value() == "1"
    page.get_by_role("button", name="there").click()
    page.wait_for_selector('.viewer[data-ready="a"]')
    page.wait_for_function("() => document.activeElement.tagName === 'CANVAS'")
    assert page.locator(".place").inner_text().startswith("L 7.0, P 3.0, S 6.0 mm")


def test_a_browser_without_webgl_is_told(chromium: Any, tmp_path: Path) -> None:
    page = chromium.new_page()
    page.add_init_script("HTMLCanvasElement.prototype.getContext = () => null")
    page.goto(write(tmp_path / "page.html", page_of(subject())))
    page.wait_for_selector("html[data-ready]")
    assert page.get_by_text("This browser cannot show the scans").count() == 1
    page.close()


def test_names_stay_text_and_run_nothing(show: Open) -> None:
    page = show(page_of(subject(EVIL), title=EVIL))
    assert page.title() == EVIL
    assert page.locator("figcaption strong").inner_text() == EVIL
    assert EVIL in str(page.locator("canvas").get_attribute("aria-label"))
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
            """() => { const e = document.activeElement; const { view } = e.dataset;
               return [e.tagName, view ? "view " + view : e.className || e.id || e.textContent || e.localName,
               getComputedStyle(e).outlineStyle, parseFloat(getComputedStyle(e).outlineWidth)]; }"""
        )
        if found[0] == "BODY":
            break
        order.append(found[1])
        outlines.append((found[2], found[3]))
    views, slices = [f"view {v}" for v in ("all", "axial", "coronal", "sagittal", "render")], ["position"] * 3
    window = ["preset", "low", "high", "reset"]
    masks, others = ["shown", "colour", "opacity"], ["shown", "opacity"]
    expected = [
        "skip", "theme", "Cases", "More", "case", *views, "canvas", *slices, *window, *masks, *masks, *others, *others,
        "class", "class",
    ]  # fmt: skip
    assert order == expected
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
               return [...document.querySelectorAll("h1, h2, p, a:not(.skip), span, label, li, strong, button, legend")]
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
    assert not page.locator(".layers").is_visible()
    assert not page.locator("nav").is_visible()
    assert page.locator("canvas").is_visible()
    assert page.get_by_text("label: organ").is_visible()
    colour = page.evaluate("getComputedStyle(document.body).color")
    assert contrast(_hex(colour), "#ffffff") > 7


def test_a_narrow_window_needs_no_sideways_scrolling(show: Open) -> None:
    page = show(page_of(subject("x" * 200)))
    page.set_viewport_size({"width": 360, "height": 700})
    assert page.evaluate("document.documentElement.scrollWidth") <= 360


def _hex(colour: str) -> str:
    """Return a computed colour, ``rgb(1, 2, 3)``, as ``#010203``."""
    return "#" + "".join(f"{int(v):02x}" for v in colour[colour.index("(") + 1 : -1].split(",")[:3])
