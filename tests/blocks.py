"""Scans that a small network learns in seconds: a bright and a brighter block in noise, in any format and pose."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import SimpleITK as sitk  # noqa: N813 - as its documentation does

SIZE = (16, 18, 20)  # z, y, x
UNCHANGED = dict.fromkeys(
    ("affine", "elastic", "intensity", "gamma", "invert", "blur", "low_resolution", "noise"), 0.0
)
"""Settings of the augmentation that change nothing."""
TINY = ("network=unet", "network_channels=4,8,8", "patch_size=16", "checkpoint_every=4", "stage1_share=0.5")
"""Settings with which a training step takes some milliseconds."""


def blocks(seed: int, size: Sequence[int] = SIZE) -> tuple[np.ndarray, np.ndarray]:
    """Return image and label (1 and 2), both (*size); the blocks lie on one side and move with the seed."""
    rng = np.random.default_rng(seed)
    label = np.zeros(size, np.uint8)
    shift = rng.integers(0, 3, len(size))
    label[tuple(slice(2 + d, 2 + d + n // 2) for d, n in zip(shift, size, strict=True))] = 1
    label[tuple(slice(2 + d, 2 + d + n // 4) for d, n in zip(shift, size, strict=True))] = 2
    return (rng.normal(100, 10, size) + 100.0 * label).astype(np.float32), label


def save(path: Path, array: np.ndarray, *, vector: bool = False, **geometry: Sequence[float]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = sitk.GetImageFromArray(array, isVector=vector)
    for name, value in geometry.items():
        getattr(image, f"Set{name.capitalize()}")(value)
    sitk.WriteImage(image, str(path))
    return path


def write_case(
    root: Path,
    name: str,
    seed: int,
    *,
    labelled: bool,
    values: Sequence[int] = (0, 1, 2),
    size: Sequence[int] = SIZE,
    axes: Sequence[int] = (),
    **geometry: Sequence[float],
) -> None:
    """Write images/NAME and, if labelled, labels/NAME, stored backwards along the array axes `axes`."""
    image, label = blocks(seed, size)
    image, label = np.flip(image, axes), np.flip(np.array(values, np.uint8)[label], axes)
    image = image.clip(0, 255).astype(np.uint8) if name.endswith(".png") else image
    save(root / "images" / name, image, **geometry)
    if labelled:
        save(root / "labels" / name, label, **geometry)


def write_blocks(
    root: Path, *, count: int = 8, labelled: int = 4, suffix: str = ".nii.gz", **options: object
) -> Path:
    """Write cases case_0 ..., of which the first `labelled` are labelled."""
    for i in range(count):
        write_case(root, f"case_{i}{suffix}", i, labelled=i < labelled, **options)  # type: ignore[arg-type]
    return root
