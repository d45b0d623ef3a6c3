"""Pages: colours that can be read, text that stays text, nothing from outside."""

from __future__ import annotations

import base64
import hashlib
import re
from pathlib import Path

import pytest

from mlbseg.apps.report.page import (
    PALETTE,
    SHAPES,
    TEXT,
    Cell,
    Section,
    number,
    paragraphs,
    render_page,
    require_free_page,
    table,
    terms,
    write_page,
)
from mlbseg.apps.report.viewer import MAP_COLOURS, SCRIPTS
from mlbseg.errors import UserError
from report.pages import EVIL, contrast, page_of, subject


def test_contrast_is_that_of_the_standard() -> None:
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    assert contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=0.01)


@pytest.mark.parametrize("place", [0, 1], ids=["light", "dark"])
def test_the_palette_has_contrast(place: int) -> None:
    low = [(a, b) for a, b in TEXT if contrast(PALETTE[a][place], PALETTE[b][place]) < 4.5]
    faint = [(a, b) for a, b in SHAPES if contrast(PALETTE[a][place], PALETTE[b][place]) < 3]
    assert (low, faint) == ([], [])


def test_style_uses_the_palette_alone() -> None:
    style = re.findall(r"<style>(.*?)</style>", page_of(subject()), re.S)[0]
    used = set(re.findall(r"var\(--([\w-]+)\)", style))
    assert used - set(PALETTE) == set()
    own = style.split("* { box-sizing")[1]
    # Black below scans, white below figures, and the colours of maps, which are the same on either page.
    allowed = {"#000", "#ffffff", *MAP_COLOURS}
    assert set(re.findall(r"#[0-9a-f]{3,6}\b", own)) <= allowed


def test_everything_is_escaped() -> None:
    body = (
        table(["case", EVIL], [[EVIL, Cell(EVIL, EVIL)], ["b", "c"]], caption=EVIL)
        + paragraphs(EVIL)
        + terms({EVIL: EVIL})
    )
    html = render_page(EVIL, [Section(EVIL, body, EVIL)], subtitle=EVIL, facts=[(EVIL, EVIL)])
    assert "<b>x" not in html
    assert html.count("<script") == 1


def test_the_policy_allows_the_own_scripts_alone() -> None:
    html = page_of(subject())
    policy = re.search(r'Content-Security-Policy" content="([^"]+)"', html)
    scripts = re.findall(r"<script>(.*?)</script>", html, re.S)
    assert policy is not None
    assert len(scripts) == 1 + len(SCRIPTS)
    hashes = [base64.b64encode(hashlib.sha256(s.encode()).digest()).decode() for s in scripts]
    assert "script-src " + " ".join(f"'sha256-{h}'" for h in hashes) + ";" in policy[1]
    assert "default-src 'none'" in policy[1]
    assert "connect-src" not in policy[1]


def test_nothing_is_fetched() -> None:
    html = re.sub(r"<script>.*?</script>", "", page_of(subject()), flags=re.S)
    targets = re.findall(r'(?:src|href)="([^"]*)"', html)
    assert targets
    assert [t for t in targets if not t.startswith(("#", "data:"))] == []
    assert "url(" not in html


def test_numbers_sort_and_missing_ones_come_first() -> None:
    assert number(0.12345) == Cell("0.123", 0.12345)
    assert number(None).order == float("-inf")
    html = table(["a", "b"], [["x", number(1.0)], ["y", number(None)]], caption="c")
    assert 'class="right"' in html
    assert 'data-order="-inf"' in html
    assert "<button" in html
    assert "<button" not in table(["a"], [["x"]], caption="c")


def test_pages_are_written_whole_and_not_over_others(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.html"
    write_page(path, "text \udcff")
    assert path.read_text() == "text \\udcff"
    with pytest.raises(UserError, match="exists already"):
        require_free_page(path, overwrite=False)
    require_free_page(path, overwrite=True)
    with pytest.raises(UserError, match=r"ends in \.html"):
        require_free_page(tmp_path / "scan.nii.gz", overwrite=True)
    with pytest.raises(UserError, match="cannot be made a folder"):
        write_page(path / "b.html", "")
