"""What MONAI runs before and after the network: the package's own preparation as MONAI transforms.

This file goes into every exported bundle, with the files that it imports (`bundle.VENDORED`), so that a bundle
prepares scans with the very code that training did and needs no mlbseg. Hence it imports nothing else of the package.

A prepared scan is a `MetaTensor` (C, [Z,] Y, X) whose affine says where its grid lies, and whose metadata still say
where the scan itself lies. So the way back needs no more than that.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from monai.data.meta_tensor import MetaTensor
from monai.inferers.inferer import SliceInferer, SlidingWindowInferer
from monai.transforms.transform import MapTransform
from torch import Tensor, nn

from mlbseg.data.preprocess import Frame, prepare_scan, restore_label
from mlbseg.errors import UserError
from mlbseg.types import Geometry, Scan

_RAS = (-1.0, -1.0, 1.0)
"""MONAI's affines lead to the patient's right, anterior, superior; `Geometry` counts to the left and posterior."""

_MM = {1: 1000.0, 3: 0.001}
"""Millimetres in a NIfTI header's metre and micrometre, which MONAI leaves as they are."""

_CHANNEL = re.compile(r"(.+)_(\d{4})(\.nii(?:\.gz)?)")


class Prepared(MapTransform):
    """Orient, crop, resample and normalise scans as training did.

    Args:
        keys: Of `MetaTensor`s (C, X, Y[, Z]), as `LoadImaged` and `EnsureChannelFirstd` leave them.
        plan: The fields of the run's plan that `prepare_scan` uses.
    """

    def __init__(self, keys: Any, plan: Mapping[str, Any]) -> None:
        super().__init__(keys)
        self.plan: Any = SimpleNamespace(**plan)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Return the data with each scan as `MetaTensor` (C, [Z,] Y, X) on its grid."""
        result = dict(data)
        for key in self.key_iterator(result):
            image = result[key]
            native = native_geometry(image.meta)
            array = np.ascontiguousarray(
                np.asarray(image, np.float32).transpose(0, *range(image.ndim - 1, 0, -1))
            )
            prepared, frame = prepare_scan(Scan(array, native), self.plan)
            result[key] = _with_affine(prepared, to_affine(frame.grid), image.meta)
        return result


class Restored(MapTransform):
    """Bring class probabilities back to the scan's own lattice, and take the likeliest class as the plan says.

    Args:
        keys: Of class probabilities (K, [Z,] Y, X) on the grid of the scan.
        image: Key of the scan, as `Prepared` left it.
        plan: As for `Prepared`.
    """

    def __init__(self, keys: Any, image: str, plan: Mapping[str, Any]) -> None:
        super().__init__(keys)
        self.image = image
        self.plan: Any = SimpleNamespace(**plan)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Return the data with each entry a `MetaTensor` (1, X, Y[, Z]) of label values as in the label files."""
        result = dict(data)
        image = result[self.image]
        for key in self.key_iterator(result):
            probability = np.ascontiguousarray(np.asarray(result[key].cpu(), np.float32))
            frame = Frame(native_geometry(image.meta), grid_geometry(image.affine, probability.shape[1:]))
            label = restore_label(probability, frame, self.plan)
            meta = dict(image.meta)
            meta["filename_or_obj"] = _name(meta.get("filename_or_obj", ""), self.plan.channels)
            affine = torch.as_tensor(np.array(image.meta["original_affine"], np.float64))
            result[key] = _with_affine(label.T[None], affine, meta)
        return result


class Windows(SlidingWindowInferer):
    """Sliding windows over class probabilities, not logits: what is averaged where windows overlap."""

    def __call__(self, inputs: Tensor, network: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Any:
        """Return class probabilities (B, K, *S) of images (B, C, *S)."""
        return super().__call__(inputs, _probability(network), *args, **kwargs)


class Slices(SliceInferer):
    """The same with a 2D network, slice by slice along the first axis of 3D scans."""

    def __call__(self, inputs: Tensor, network: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Any:
        """Return class probabilities (B, K, Z, Y, X) of images (B, C, Z, Y, X)."""
        return super().__call__(inputs, _probability(network), *args, **kwargs)


def find_scans(folder: str, channels: int) -> list[dict[str, Any]]:
    """List the NIfTI files in a folder for MONAI's data set; with several channels NAME_0000, NAME_0001 ... are one.

    Raises:
        UserError: if there is none, or a scan lacks a channel.
    """
    files = sorted(p for p in Path(folder).glob("*.nii*") if p.is_file() and not p.name.startswith("."))
    if not files:
        raise UserError(f"{folder}: no NIfTI files, expected scans such as case_01.nii.gz")
    matches = [_CHANNEL.fullmatch(path.name) for path in files]
    if channels == 1 or not all(matches):
        return [{"image": str(path)} for path in files]
    groups: dict[str, list[str]] = {}
    for path, match in zip(files, matches, strict=True):
        groups.setdefault(match[1] if match else path.name, []).append(str(path))
    for name, images in groups.items():
        if len(images) != channels:
            raise UserError(
                f"{folder}: {name} has {len(images)} channel file(s), expected {channels} as in training"
            )
    return [{"image": images} for images in groups.values()]


def native_geometry(meta: Mapping[str, Any]) -> Geometry:
    """Return where a scan that MONAI has read lies."""
    size = [int(n) for n in meta["spatial_shape"]]
    affine = np.asarray(torch.as_tensor(meta["original_affine"]).cpu(), np.float64).copy()
    affine[:-1] *= _MM.get(int(meta.get("xyzt_units", 0)) & 7, 1.0)
    n = len(size)
    spacing = np.linalg.norm(affine[:-1, :n], axis=0)
    if n == 2:  # a 2D image's files know no patient: only its pixels' size counts
        return Geometry.identity(tuple(size), tuple(float(v) for v in spacing))
    flips = np.array(_RAS)[:, None]
    return Geometry(
        tuple(size),
        tuple(float(v) for v in spacing),
        tuple(float(v) for v in affine[:3, 3] * _RAS),
        tuple(float(v) for v in (flips * affine[:3, :3] / spacing).ravel()),
    )


def to_affine(grid: Geometry) -> Tensor:
    """Return the affine, float64, from the indices of an array ([z,] y, x) on a grid to MONAI's coordinates."""
    n = grid.ndim
    flips = np.array(_RAS if n == 3 else (1.0, 1.0))
    affine = np.eye(n + 1)
    affine[:n, :n] = (flips[:, None] * np.reshape(grid.direction, (n, n)) * grid.spacing)[:, ::-1]
    affine[:n, n] = flips * grid.origin
    return torch.from_numpy(affine)


def grid_geometry(affine: Tensor, shape: Sequence[int]) -> Geometry:
    """Return the grid of an array of `shape` ([z,] y, x) with an affine of `to_affine`."""
    n = len(shape)
    matrix = np.asarray(torch.as_tensor(affine).cpu(), np.float64)
    flips = np.array(_RAS if n == 3 else (1.0, 1.0))
    steps = (flips[:, None] * matrix[:n, :n])[:, ::-1]
    spacing = np.linalg.norm(steps, axis=0)
    return Geometry(
        tuple(int(size) for size in reversed(shape)),
        tuple(float(v) for v in spacing),
        tuple(float(v) for v in flips * matrix[:n, n]),
        tuple(float(v) for v in (steps / spacing).ravel()),
    )


def _with_affine(array: npt.NDArray[Any], affine: Tensor, meta: Mapping[str, Any]) -> MetaTensor:
    """Return an array with these metadata, but lying where another affine says."""
    others = {name: value for name, value in meta.items() if name != "affine"}
    return MetaTensor(torch.from_numpy(np.ascontiguousarray(array)), affine=affine, meta=others)


def _probability(network: Callable[..., Tensor]) -> Callable[..., Tensor]:
    if isinstance(network, nn.Module):
        network.eval()

    def probability(window: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return torch.softmax(network(window, *args, **kwargs).float(), 1)

    return probability


def _name(found: Any, channels: int) -> str:
    """Return the name to call a mask by: the scan's file's, without the number of its first channel."""
    name = str(found[0] if isinstance(found, list | tuple) else found)
    match = _CHANNEL.fullmatch(Path(name).name)
    return str(Path(name).parent / f"{match[1]}{match[3]}") if match and channels > 1 else name
