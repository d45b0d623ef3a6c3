"""Frames to a volume, by where they lie. Anything that would put one in a wrong place is a fault."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from mlbseg.data.formats.dicom_frames import Frame, Vector
from mlbseg.data.formats.opened import fail
from mlbseg.types import Geometry

_GAP_TOLERANCE = (
    0.05  # share of the slice distance; scanners round positions, a missing slice doubles the distance
)


def stack(where: Path, frames: list[Frame]) -> tuple[list[Frame], Geometry]:
    """Order frames along their normal.

    Args:
        where: What is read, for messages: a folder, or a file of many frames.
        frames: In any order, at least one.

    Returns:
        The frames in order, and the geometry of the volume.

    Raises:
        ReadError: For frames of different size or orientation, one twice, a missing one, or a sideways shift
            (gantry tilt).
    """
    first = frames[0]
    for other in frames[1:]:
        if other.size != first.size or not np.allclose(other.spacing, first.spacing, rtol=1e-3):
            fail(
                other.path,
                f"{_kind(other)} of {_shown(other)}",
                f"{_shown(first)} as in {first.name}",
                kind="dicom",
            )
        if not np.allclose(other.axes, first.axes, atol=1e-3):
            found = (
                "another orientation"
                if other.count == 1
                else f"frame {other.index + 1} has another orientation"
            )
            remedy = "one series a folder" if other.count == 1 else "export the stacks one by one"
            fail(other.path, found, f"that of {first.name}", remedy, "dicom")
    normal = first.axes[:, 2]
    frames = sorted(frames, key=lambda frame: float(frame.position @ normal))
    gap = first.thickness if len(frames) == 1 else _distance(where, frames, normal)
    low = frames[0]
    geometry = Geometry(
        (*low.size, len(frames)),
        (*low.spacing, gap),
        tuple(low.position.tolist()),
        tuple(low.axes.ravel().tolist()),
    )
    return frames, geometry


def _distance(where: Path, frames: list[Frame], normal: Vector) -> float:
    """Return the distance of neighbouring slices in mm; raise unless the slices form a regular grid."""
    offsets = np.array([frame.position - frames[0].position for frame in frames])
    along = offsets @ normal
    gaps = np.diff(along)
    gap = float(np.median(gaps))
    for index in np.flatnonzero(gaps < 1e-3):
        pair = f"{frames[index].name} and {frames[index + 1].name}"
        remedy = (
            "keep one time point" if frames[index].count == 1 else "export one time point, contrast or stack"
        )
        fail(where, f"{pair} lie at the same position", "one slice a position", remedy, "dicom")
    for index in np.flatnonzero(np.abs(gaps - gap) > max(_GAP_TOLERANCE * gap, 0.01)):
        pair = f"between {frames[index].name} and {frames[index + 1].name}"
        found = f"{gaps[index]:.4g} mm {pair}"
        fail(where, found, f"{gap:.4g} mm", "a slice is missing: export it again", "dicom")
    sideways = np.linalg.norm(offsets - along[:, None] * normal, axis=1)
    worst = float(sideways.max())
    if worst > min(frames[0].spacing) / 2:  # less than half a pixel moves no voxel
        angle = np.degrees(np.arctan2(sideways[-1], along[-1]))
        found = f"slices shift sideways by {worst:.3g} mm (gantry tilt of {angle:.2g}°)"
        remedy = "correct the tilt with a DICOM converter"
        fail(where, found, "slices straight above each other", remedy, "dicom")
    return float(along[-1] / (len(frames) - 1))


def _kind(frame: Frame) -> str:
    return "slice" if frame.count == 1 else f"frame {frame.index + 1}"


def _shown(frame: Frame) -> str:
    return f"{frame.size[0]}×{frame.size[1]} pixels of {frame.spacing[0]:.4g}×{frame.spacing[1]:.4g} mm"
