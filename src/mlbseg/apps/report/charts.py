"""Line charts as SVG in the page's own colours, so that they are legible on a light and on a dark page."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup
from matplotlib.ticker import LogLocator, MaxNLocator

from mlbseg.apps.report.page import render

Points = Sequence[tuple[float, float]]
"""Of a line: (x, y)."""

WIDTH, HEIGHT = 560, 250
LEFT, RIGHT, TOP, BOTTOM = 52, 12, 12, 38
"""Margins for the axes, in the picture's own units."""

STROKES = ("", "7 4", "2 4", "9 3 2 3", "14 4", "4 2")
"""Of the lines in turn: they can be told apart without colours."""

SMOOTH_ABOVE = 40
"""Points: a longer line is drawn pale, with its running mean upon it."""

LOG_ABOVE = 30
"""Times the smallest value that the largest must be for a logarithmic axis, where that is allowed."""


@dataclass(frozen=True)
class _Line:
    name: str
    number: int
    stroke: str
    path: str
    pale: str
    last: str


def line_chart(
    title: str,
    lines: Mapping[str, Points],
    *,
    note: str = "",
    x_label: str = "step",
    bounds: tuple[float, float] | None = None,
    may_be_log: bool = False,
    mark: tuple[float, str] | None = None,
    smooth: bool = True,
) -> Markup:
    """Return a chart.

    Args:
        title: What is drawn.
        lines: The points of each, by name; one without points is left out.
        note: A sentence on how to read it.
        x_label: What x counts.
        bounds: Of y; those of the values when None.
        may_be_log: Draw y on a logarithmic axis if the values are of very different sizes, all above 0.
        mark: An x and what began after it; lines are interrupted there.
        smooth: Draw the running mean of a long line upon it.
    """
    drawn = {name: points for name, points in lines.items() if points}
    every = [y for points in drawn.values() for _, y in points]
    if not every:
        return Markup("")
    logarithmic = may_be_log and min(every) > 0 and max(every) > LOG_ABOVE * min(every)
    low, high = bounds or _bounds(min(every), max(every), logarithmic)
    first = min(x for points in drawn.values() for x, _ in points)
    last = max(x for points in drawn.values() for x, _ in points)

    def place(x: float, y: float) -> tuple[float, float]:
        low_, high_, y_ = (math.log(v) for v in (low, high, y)) if logarithmic else (low, high, y)
        across = (x - first) / ((last - first) or 1)
        up = (y_ - low_) / ((high_ - low_) or 1)
        return LEFT + across * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM)

    def path(parts: Sequence[Points]) -> str:
        return "".join(
            "M" + "L".join("{:.1f} {:.1f}".format(*place(x, y)) for x, y in part) for part in parts
        )

    made = []
    for number, (name, points) in enumerate(drawn.items()):
        parts = _parts(points, None if mark is None else mark[0])
        noisy = smooth and len(points) > SMOOTH_ABOVE
        upper = [_smoothed(part) for part in parts] if noisy else parts
        made.append(
            _Line(
                name,
                1 + number % 6,
                STROKES[number % len(STROKES)],
                path(upper),
                path(parts) if noisy else "",
                f"{points[-1][1]:.3g}",
            )
        )
    y_ticks = LogLocator().tick_values(low, high) if logarithmic else MaxNLocator(5).tick_values(low, high)
    x_ticks = MaxNLocator(6, integer=True).tick_values(first, last)
    return Markup(  # noqa: S704 - rendered with everything escaped
        render(
            "chart.html",
            title=title,
            note=" ".join([note, "The axis is logarithmic."] if logarithmic else [note]).strip(),
            x_label=x_label,
            size=(WIDTH, HEIGHT),
            frame=(LEFT, TOP, WIDTH - RIGHT, HEIGHT - BOTTOM),
            lines=made,
            y_ticks=[(f"{y:.4g}", place(first, y)[1]) for y in y_ticks if low <= y <= high],
            x_ticks=[(f"{x:,.0f}", place(x, low)[0]) for x in x_ticks if first <= x <= last],
            mark=None if mark is None else (place(mark[0], low)[0], mark[1]),
        )
    )


def _bounds(low: float, high: float, logarithmic: bool) -> tuple[float, float]:
    """Return what an axis shows of values from `low` to `high`."""
    if logarithmic:
        return low / 1.2, high * 1.2
    margin = 0.05 * ((high - low) or abs(high) or 1)
    return (0.0 if 0 <= low < 0.5 * high else low - margin), high + margin


def _parts(points: Points, cut: float | None) -> list[Points]:
    """Return the points up to a cut and those after it, as far as there are any."""
    if cut is None:
        return [points]
    sides = [p for p in points if p[0] <= cut], [p for p in points if p[0] > cut]
    return [side for side in sides if side]


def _smoothed(points: Points) -> Points:
    """Return the running mean, over a twentieth of the points, shortened towards the ends."""
    values = np.array([y for _, y in points])
    reach = max(1, len(points) // 40)
    total = np.concatenate([[0.0], values.cumsum()])
    start = np.maximum(np.arange(len(values)) - reach, 0)
    stop = np.minimum(np.arange(len(values)) + reach + 1, len(values))
    means = (total[stop] - total[start]) / (stop - start)
    return [(x, float(y)) for (x, _), y in zip(points, means, strict=True)]
