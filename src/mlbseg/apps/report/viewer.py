"""Cases to look at on a page: one viewer, NiiVue in `niivue/`, that opens any of those that the page holds."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import matplotlib as mpl
import numpy as np
from markupsafe import Markup
from matplotlib.colors import to_hex

from mlbseg.apps.report.packing import Subject, pack
from mlbseg.apps.report.page import render

MOST_BYTES = 30_000_000
"""That a page holds of all its cases; what is beyond it is not on the page."""

SCRIPTS = ("niivue/niivue.js", "templates/viewer.js")
"""What a section with a viewer needs; see `mlbseg.apps.report.page.Section`."""

MAP_COLOURS = tuple(to_hex(mpl.colormaps["viridis"](x)) for x in np.linspace(0, 1, 9))
"""Of a map's values 0 ... 1; what lies between is interpolated."""


@dataclass(frozen=True)
class _Kept:
    rank: float
    number: int
    name: str
    content: str


class Gallery:
    """The cases of a page.

    Args:
        class_names: Name of each class value.
        most: Bytes that the page may hold of them.
    """

    def __init__(self, class_names: Mapping[int, str], most: int = MOST_BYTES) -> None:
        self.class_names, self.most = class_names, most
        self.kept: list[_Kept] = []
        self.beyond = 0

    def add(self, subject: Subject, rank: float = 0.0) -> bool:
        """Take a case. Beyond the bound those of the highest rank, then the latest, are dropped.

        Args:
            subject: The case.
            rank: The lower, the more worth showing.

        Returns:
            Whether the page still holds this case.
        """
        content = base64.b64encode(pack(subject, self.class_names)).decode()
        new = _Kept(rank, len(self.kept) + self.beyond, subject.name, content)
        self.kept = sorted([*self.kept, new], key=lambda one: (one.rank, one.number))
        while len(self.kept) > 1 and sum(len(one.content) for one in self.kept) > self.most:
            self.kept.pop()
            self.beyond += 1
        return new in self.kept

    def fill(self, subjects: Iterable[Subject], count: int) -> None:
        """Take cases, the most telling first, until the page is full; the rest is not even read.

        Args:
            subjects: The cases.
            count: How many there are.
        """
        for subject in subjects:
            if not self.add(subject, len(self.kept)):
                break
        self.beyond = count - len(self.kept)

    @property
    def note(self) -> str:
        """What the page does not hold, in words."""
        if not self.beyond:
            return "Click a case to open it in the viewer."
        size = f"{self.most / 1e6:.0f} MB"
        return (
            f"The first {len(self.kept)} cases can be opened here; the page holds {size} of scans, and "
            f"{self.beyond} more are beyond it."
        )

    @property
    def names(self) -> list[str]:
        """The cases that can be opened, in order."""
        return [one.name for one in self.kept]

    def html(self) -> Markup:
        """Return the viewer; nothing where there is no case. Its section needs `SCRIPTS`."""
        if not self.kept:
            return Markup("")
        return viewer([(one.name, one.content) for one in self.kept])


def viewer(cases: list[tuple[str, str]], *, editor: Markup | None = None) -> Markup:
    """Return a viewer of cases.

    Args:
        cases: Name, and what `pack` returned, in base 64.
        editor: Controls to put beside the picture.
    """
    return Markup(render("viewer.html", cases=cases, editor=editor or "", stops=MAP_COLOURS))  # noqa: S704 - all escaped


def opener(name: str, text: str | None = None, *, place: tuple[float, ...] = ()) -> Markup:
    """Return a button that opens a case in the page's viewer.

    Args:
        name: Of the case.
        text: What the button says; the name when None.
        place: Where to put the crosshair, mm in LPS; where it opens by itself when empty.
    """
    x, y, z = (*place, 0.0, 0.0, 0.0)[:3]
    mm = f"{-x:.3f} {-y:.3f} {z:.3f}" if len(place) == 3 else ""
    return Markup('<button type="button" class="open" data-case="{}" data-mm="{}">{}</button>').format(
        name, mm, name if text is None else text
    )
