"""Whether a training went wrong in a way that can be seen without a test label.

A few whole scans are predicted by stage 1 and by the final network. Careful labels show whether a network has learned
them at all; unlabelled scans show whether stage 2 has moved away from what stage 1 made of them. Nothing is changed:
the user is told, in the terminal, in result.json and in the report.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from mlbseg.data.preprocess import UNKNOWN
from mlbseg.metrics import dice

T = TypeVar("T")
Mask = npt.NDArray[np.uint8]

LOOKED_AT = 3
"""Scans of each kind."""
FITTED = 0.7
"""Mean Dice on careful labels that were trained on, below which a network has not learned them."""
LOST = 0.05
"""Of that Dice, by which stage 2 may be below stage 1."""
SWOLLEN = 1.5
"""Times the volume of stage 1 that a structure may have after stage 2, or its reciprocal."""
SCATTERED = 3.0
"""Times the connected components of stage 1 that a structure may have after stage 2, and one more."""
APART = 0.6
"""Mean Dice between both stages on unlabelled scans, below which they have little to do with each other."""


@dataclass(frozen=True)
class Look:
    """What a network makes of whole scans, on their prepared grids.

    Attributes:
        fit: Mean Dice over the structures of each careful label that it was trained on.
        masks: Class indices (*S) of each unlabelled scan.
    """

    fit: tuple[float, ...]
    masks: tuple[Mask, ...]


def few(cases: Sequence[T]) -> Sequence[T]:
    """Return a few of the cases, evenly spread."""
    if len(cases) <= LOOKED_AT:
        return cases
    return [cases[i] for i in np.linspace(0, len(cases) - 1, LOOKED_AT).round().astype(int)]


def look(labelled: Sequence[tuple[Mask, Mask]], unlabelled: Sequence[Mask]) -> Look:
    """Return what a network makes of scans.

    Args:
        labelled: Its masks of scans, each with the label (*S); `UNKNOWN` voxels do not count.
        unlabelled: Its masks of scans without.
    """
    fit = []
    for mask, label in labelled:
        found = np.where(label == UNKNOWN, UNKNOWN, mask)
        values = [value for value in np.unique(label) if value not in (0, UNKNOWN)]
        if values:
            fit.append(float(np.mean([dice(found == value, label == value) for value in values])))
    return Look(tuple(fit), tuple(unlabelled))


def warnings_of(first: Look | None, last: Look, class_names: Sequence[str]) -> list[str]:
    """Return the warnings about a training, each in a sentence or two with what to change.

    Args:
        first: Of stage 1's network; None where there was one stage only, or its weights are gone.
        last: Of the final network.
        class_names: Of each class; the first is the background.
    """
    return [*_of_fit(first, last), *(_of_change(first, last, class_names) if first is not None else ())]


def _of_fit(first: Look | None, last: Look) -> Iterator[str]:
    if not last.fit:
        return
    before, now = (None if first is None else np.mean(first.fit)), np.mean(last.fit)
    if now < FITTED:
        stage = "" if before is None else f" (stage 1: {before:.2f})"
        yield (
            f"the network has not learned the careful labels: mean Dice {now:.2f} on labelled scans that it was "
            f"trained on{stage}. Train longer (-o steps=N), look at these labels (mlbseg audit), or set a finer "
            "plan.spacing."
        )
    elif before is not None and now < before - LOST:
        yield (
            f"stage 2 has unlearned careful labels: mean Dice {now:.2f} on labelled scans that it was trained on, "
            f"{before:.2f} after stage 1. Compare with --method supervised, or give stage 1 more steps "
            "(-o train.stage1_share=0.9)."
        )


def _of_change(first: Look, last: Look, class_names: Sequence[str]) -> Iterator[str]:
    if not first.masks:
        return
    remedy = "Compare with --method supervised; a longer stage 1 (-o steps=N) or more labels may be needed."
    agreement = []
    for value, name in list(enumerate(class_names))[1:]:
        pairs = [(a == value, b == value) for a, b in zip(first.masks, last.masks, strict=True)]
        if not any(a.any() or b.any() for a, b in pairs):
            continue
        agreement.append(np.mean([dice(a, b) for a, b in pairs]))
        before, now = (sum(int(pair[i].sum()) for pair in pairs) for i in (0, 1))
        ratio = (now + 1) / (before + 1)
        if not 1 / SWOLLEN <= ratio <= SWOLLEN:
            yield (
                f"stage 2 finds {ratio:.2g} times as much {name} in unlabelled scans as stage 1 did. {remedy}"
            )
        parts = [np.mean([_components(pair[i]) for pair in pairs]) for i in (0, 1)]
        if parts[1] > SCATTERED * parts[0] + 1:
            yield (
                f"stage 2 finds {name} in {parts[1]:.3g} parts a scan, stage 1 found {parts[0]:.3g}. {remedy}"
            )
    if agreement and np.mean(agreement) < APART:
        yield (
            f"stages 1 and 2 agree little on unlabelled scans (mean Dice {np.mean(agreement):.2f}), so one of them is "
            f"wrong there. {remedy}"
        )


def _components(mask: npt.NDArray[np.bool_]) -> int:
    """Return the number of connected components, full connectivity."""
    return int(ndimage.label(mask, structure=np.ones((3,) * mask.ndim))[1])
