"""What the training scans of a run look like, and in what a new scan is unlike them. No label is looked at.

A scan is unlike the training scans where one of these numbers lies outside their range, widened by a margin:

| Number | Margin |
|---|---|
| spacing, along each axis (mm; 3D scans turned to LPS) | a factor of `FACTOR` |
| field of view, along each axis (mm) | a factor of `FACTOR` |
| tilt: the largest angle between an axis of the scan and the patient's nearest axis (degrees) | `TILT` |
| intensities of each channel above its background: 0.5th percentile, median, 99.5th percentile; as they are under the normalisation ``ct``, else in standard deviations from their mean, as the network sees them | `DEVIATIONS` standard deviations, and half the range |

A network may still do well on such a scan, and fail on one that passes: these numbers know nothing of anatomy.
"""  # noqa: E501 - a table has long rows

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import numpy.typing as npt
from pydantic import Field, TypeAdapter

from mlbseg.data.facts import SAMPLE, Intensity
from mlbseg.data.fingerprint import Fingerprint, tilt_of
from mlbseg.data.lattice import array_shape, reorient
from mlbseg.data.records import read_as, write_record
from mlbseg.types import Scan

FINGERPRINT = "fingerprint.json"
"""In the run folder."""
FACTOR = 1.5
TILT = 15.0
DEVIATIONS = 0.5

_AXES = {2: ("down", "across"), 3: ("head to foot", "front to back", "left to right")}
_PERCENTILES = {"low": "the darkest values", "median": "the median value", "high": "the brightest values"}

Finite = Annotated[float, Field(allow_inf_nan=False)]
Range = tuple[Finite, Finite]


@dataclass(frozen=True)
class ChannelRange:
    """Ranges over the training scans of one channel's intensities above its background.

    Attributes:
        low: Of the 0.5th percentile.
        median: Of the median.
        high: Of the 99.5th percentile.
        deviation: Median of the standard deviation, in the unit of the ranges.
        absolute: The ranges are of values as they are; else of standard deviations from each scan's mean.
    """

    low: Range
    median: Range
    high: Range
    deviation: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    absolute: bool


@dataclass(frozen=True)
class Usual:
    """What the training scans of a run look like, as ranges. Axes in array order, 3D scans turned to LPS.

    Attributes:
        scans: How many they are.
        spacing: Of each axis, mm.
        view: Field of view along each axis, mm.
        tilt: The largest, degrees.
        channels: Of each channel; None where every training scan is constant.
    """

    scans: int
    spacing: tuple[Range, ...]
    view: tuple[Range, ...]
    tilt: Finite
    channels: tuple[ChannelRange | None, ...]

    def __post_init__(self) -> None:
        if len(self.view) != len(self.spacing):
            raise ValueError("view and spacing: expected a range for each axis in both")

    @classmethod
    def of(cls, facts: Fingerprint, normalisation: Sequence[str]) -> Usual:
        """Return the ranges over the cases of a fingerprint.

        Args:
            facts: Of the training scans.
            normalisation: ``zscore`` or ``ct``, per channel.
        """
        contents = zip(*(case.content for case in facts.cases), strict=True)
        return cls(
            len(facts.cases),
            _ranges(facts.spacings),
            _ranges(facts.spacings * facts.sizes),
            max(case.tilt for case in facts.cases),
            tuple(
                _channel([one for one in content if one is not None], absolute=kind == "ct")
                for content, kind in zip(contents, normalisation, strict=True)
            ),
        )

    @classmethod
    def read(cls, path: Path) -> Usual:
        """Read the record of a run.

        Raises:
            UserError: if it is missing or damaged.
        """
        return read_as(_USUAL, path, "the ranges of a run's training scans")

    def write(self, path: Path) -> None:
        """Write the record.

        Raises:
            UserError: if it cannot be written.
        """
        write_record(path, asdict(self))

    def unlike(self, scan: Scan) -> list[str]:
        """Say in what a scan is unlike the training scans, in a line for each number; [] if in nothing."""
        turned = reorient(scan.geometry, "LPS")
        spacing = tuple(reversed(turned.spacing))
        view = tuple(step * size for step, size in zip(spacing, array_shape(turned), strict=True))
        if len(spacing) != len(self.spacing) or len(scan.array) != len(self.channels):
            return []  # another kind of scan, which preparing it refuses
        lines = []
        for name, found, usual in (("spacing", spacing, self.spacing), ("field of view", view, self.view)):
            for axis, value, (low, high) in zip(_AXES[len(spacing)], found, usual, strict=True):
                if not low / FACTOR <= value <= high * FACTOR:
                    lines.append(f"{name} {axis} {value:.3g} mm, training {_shown(low, high)}")
        tilt = tilt_of(scan.geometry)
        if tilt > self.tilt + TILT:
            lines.append(f"tilted by {tilt:.0f} degrees, training up to {self.tilt:.0f}")
        for index, (channel, range_) in enumerate(zip(scan.array, self.channels, strict=True)):
            if range_ is None or (content := _content(channel)) is None:
                continue
            where = f" of channel {index}" if len(self.channels) > 1 else ""
            lines += [f"{line[0]}{where} {line[1]}" for line in _odd(content, range_)]
        return lines


_USUAL = TypeAdapter(Usual)


def _ranges(values: npt.NDArray[np.float64]) -> tuple[Range, ...]:
    """Return the range of each column of (cases, axes)."""
    return tuple((float(low), float(high)) for low, high in zip(values.min(0), values.max(0), strict=True))


def _channel(contents: Sequence[Intensity], *, absolute: bool) -> ChannelRange | None:
    if not contents:
        return None
    numbers = np.array([_numbers(one, absolute=absolute) for one in contents])
    deviation = float(np.median([one.std for one in contents])) if absolute else 1.0
    low, median, high = _ranges(numbers)
    return ChannelRange(low, median, high, deviation, absolute)


def _numbers(content: Intensity, *, absolute: bool) -> list[float]:
    """Return the three percentiles, as they are or in standard deviations from the mean."""
    values = [content.low, content.median, content.high]
    if absolute:
        return values
    return [(value - content.mean) / (content.std or 1.0) for value in values]


def _odd(content: Intensity, usual: ChannelRange) -> list[tuple[str, str]]:
    """Return the name of each number that is out of its range, and its figures in words."""
    lines = []
    unit = "" if usual.absolute else " standard deviations from the mean"
    found = _numbers(content, absolute=usual.absolute)
    for value, (name, words) in zip(found, _PERCENTILES.items(), strict=True):
        low, high = getattr(usual, name)
        margin = DEVIATIONS * usual.deviation + (high - low) / 2
        if not low - margin <= value <= high + margin:
            lines.append((words, f"{value:.3g}{unit}, training {_shown(low, high)}"))
    return lines


def _content(channel: npt.NDArray[np.float32]) -> Intensity | None:
    """Describe the voxels above the smallest value, from a sample of them; None if there are none, or odd values."""
    lowest = channel.min()
    sample = channel.reshape(-1)[:: max(1, channel.size // (4 * SAMPLE))]
    return Intensity.of(sample[sample > lowest]) if math.isfinite(lowest + channel.max()) else None


def _shown(low: float, high: float) -> str:
    one, other = f"{low:.3g}", f"{high:.3g}"
    return one if one == other else f"{one} to {other}"
