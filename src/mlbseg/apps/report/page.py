"""One HTML page that needs nothing but itself: sections, tables, colours for light, dark and paper."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from mlbseg.files import make_folder, require_free, write_atomic
from mlbseg.temporaries import sweep

PALETTE = {
    "page": ("#f4f6f8", "#10161d"),
    "card": ("#ffffff", "#18212b"),
    "sunken": ("#eaeff3", "#212d39"),
    "line": ("#d3dbe3", "#32404d"),
    "control": ("#6b7a89", "#7d8e9f"),
    "ink": ("#17222c", "#e7edf2"),
    "quiet": ("#4b5a68", "#a9b7c4"),
    "accent": ("#0b5f80", "#74c6e6"),
    "warning": ("#7a4a00", "#ffcf7a"),
    "warning-back": ("#fff4dc", "#332814"),
    "series-1": ("#0b6aa0", "#6cbcf0"),
    "series-2": ("#b34700", "#ff9d5c"),
    "series-3": ("#00795a", "#4fd1a5"),
    "series-4": ("#9b3c84", "#ef9bd6"),
    "series-5": ("#7a5c00", "#e0c04a"),
    "series-6": ("#5b5bc4", "#a9a9ff"),
}
"""CSS variable to its colour on a light and on a dark page; `TEXT` and `SHAPES` say what lies on what."""

TEXT = (
    *((ink, back) for ink in ("ink", "quiet", "accent") for back in ("page", "card", "sunken")),
    ("warning", "warning-back"),
    ("ink", "warning-back"),
)
"""Text and what it lies on: a contrast of 4.5 at least (WCAG 2.2, 1.4.3, level AA)."""

SHAPES = (
    *((f"series-{number}", "card") for number in range(1, 7)),
    ("control", "card"),
    ("accent", "card"),
    ("accent", "page"),
)
"""Lines of charts, edges of controls and the focus, and what they lie on: 3 at least (1.4.11)."""


@dataclass(frozen=True)
class Section:
    """A part of a page.

    Attributes:
        title: Its heading, also in the list of sections.
        body: What it shows; see `mlbseg.apps.report.viewer.Gallery`, `table` and `paragraphs`.
        note: A line of small print below the heading.
        scripts: Files that the body needs, such as `mlbseg.apps.report.viewer.SCRIPTS`; of another room as
            ``package:file``.
    """

    title: str
    body: Markup
    note: str = ""
    scripts: tuple[str, ...] = ()


@dataclass(frozen=True)
class Cell:
    """A cell of a table.

    Attributes:
        text: What it shows.
        order: What its column is sorted by; the text when None. Numbers are set to the right.
    """

    text: str | Markup
    order: float | str | None = None


def render_page(
    title: str,
    sections: Sequence[Section],
    *,
    subtitle: str = "",
    facts: Sequence[tuple[str, str]] = (),
    connect: bool = False,
) -> str:
    """Return a whole HTML page. Nothing on it is fetched: it opens from a disk without a network.

    Args:
        title: The heading.
        sections: What follows, in order.
        subtitle: A line below the heading.
        facts: What is to be seen first: a few words and a figure each, as (words, figure).
        connect: Let the page's scripts ask the server that it came from.
    """
    names = dict.fromkeys([*(name for section in sections for name in section.scripts), "templates/page.js"])
    scripts = [_text(name) for name in names]
    return render(
        "page.html", title=title, sections=sections, subtitle=subtitle, facts=facts, palette=PALETTE,
        style=Markup(_text("templates/page.css")),  # noqa: S704 - a file of this package
        scripts=[Markup(script) for script in scripts],  # noqa: S704 - the same
        policy=_policy(scripts, connect=connect),
    )  # fmt: skip


def _policy(scripts: Sequence[str], *, connect: bool) -> Markup:
    """Return a policy that lets these scripts run and no other, whatever a name in the page holds."""
    hashes = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts]
    allowed = " ".join(f"'sha256-{each}'" for each in hashes)
    asks = "connect-src 'self'; " if connect else ""
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src {allowed}; {asks}"
    return Markup(policy + "base-uri 'none'; form-action 'none'")  # noqa: S704 - made of hashes alone


def table(
    headings: Sequence[str],
    rows: Sequence[Sequence[Cell | str | Markup]],
    *,
    caption: str,
    sortable: bool = True,
) -> Markup:
    """Return a table; where `sortable`, its headings are buttons that sort it.

    Args:
        headings: Of the columns.
        rows: Cells of each row; the first names the row.
        caption: What the table holds, in words.
        sortable: Whether readers may sort it.
    """
    cells = [[cell if isinstance(cell, Cell) else Cell(cell) for cell in row] for row in rows]
    right = [any(isinstance(row[i].order, int | float) for row in cells) for i in range(len(headings))]
    html = render(
        "table.html", headings=headings, rows=cells, right=right, caption=caption, sortable=sortable and len(rows) > 1
    )  # fmt: skip
    return Markup(html)  # noqa: S704 - rendered with everything escaped


def number(value: float | None, digits: int = 3, *, missing: str = "–") -> Cell:
    """Return a number's cell; one that is missing is sorted before all others."""
    if value is None:
        return Cell(missing, float("-inf"))
    return Cell(f"{value:.{digits}f}", value)


def paragraphs(*texts: str) -> Markup:
    """Return paragraphs of plain text."""
    return Markup("").join(Markup("<p>{}</p>").format(text) for text in texts)


def terms(pairs: Mapping[str, object]) -> Markup:
    """Return a list of words and what stands for each."""
    return Markup(render("terms.html", pairs=pairs))  # noqa: S704 - rendered with everything escaped


def require_free_page(path: Path, *, overwrite: bool) -> None:
    """Refuse to write over a file without being told to, and over what is no page in any case.

    What killed processes left beside it is removed, masks of an earlier report for instance.

    Raises:
        UserError: if it is there, or its name does not end in .html.
    """
    sweep(path.parent)
    require_free(path, overwrite=overwrite, suffixes=(".html", ".htm"))


def write_page(path: Path, content: str) -> None:
    """Write a page, whole or not at all, and the folder for it.

    Raises:
        UserError: if it cannot be written.
    """
    make_folder(path.parent)
    # What a name holds that is no text is written as its escape, which every reader sees.
    write_atomic(path, content.encode(errors="backslashreplace"))


def render(name: str, *, room: str = "mlbseg.apps.report", **values: Any) -> str:
    """Return a template of a room, filled; every value is escaped unless it is `Markup`."""
    return _environment(room).get_template(name).render(**values)


@cache
def _environment(room: str) -> Environment:
    return Environment(
        loader=PackageLoader(room),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _text(name: str) -> str:
    """Return a file of this room; of another one where the name is ``package:file``."""
    room, colon, file = name.partition(":")
    return (files(room if colon else "mlbseg.apps.report") / (file or name)).read_text(encoding="utf-8")
