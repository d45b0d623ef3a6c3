"""From a prepared scan to maps of it, window by window."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import combinations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from mlbseg.data.plan import Plan
from mlbseg.data.preprocess import Frame, prepare_scan
from mlbseg.data.readers import read_scan
from mlbseg.types import Case, Scan

SLICES = 8
"""That a 2D network is shown of a 3D scan at once."""


def predict_grid(
    network: nn.Module,
    image: npt.NDArray[np.float32],
    *,
    patch_size: Sequence[int],
    device: torch.device,
    flip_axes: Sequence[int] = (),
    overlap: float = 0.5,
) -> npt.NDArray[np.float32]:
    """Return class probabilities of a prepared scan by sliding windows with Gaussian weights.

    A 2D network sees a 3D scan slice by slice along its first axis. What it holds in memory, see `slide_windows`.

    Args:
        network: In evaluation mode, on `device`.
        image: (C, *S).
        patch_size: Of a window; array order.
        device: Where windows are computed; scan and result stay in the host's memory.
        flip_axes: Axes of a window; the mean is taken over all combinations of their flips.
        overlap: Overlap of neighbouring windows, as a fraction of the window side.

    Returns:
        (K, *S) float32.
    """
    subsets = [s for n in range(len(flip_axes) + 1) for s in combinations(flip_axes, n)]

    def probability(window: Tensor) -> Tensor:
        total: Tensor | None = None
        for subset in subsets:
            axes = [a + 2 for a in subset]
            flipped = window.flip(axes) if axes else window
            p = torch.softmax(network(flipped).float(), 1)
            p = p.flip(axes) if axes else p
            total = p if total is None else total + p
        assert total is not None  # noqa: S101 - the empty subset is always there
        return total / len(subsets)

    with torch.inference_mode():
        return slide_windows(probability, image, patch_size=patch_size, device=device, overlap=overlap)


def slide_windows(
    function: Callable[[Tensor], Tensor],
    array: npt.NDArray[np.float32],
    *,
    patch_size: Sequence[int],
    device: torch.device,
    overlap: float = 0.5,
) -> npt.NDArray[np.float32]:
    """Return maps of a whole scan from those of its windows, which are weighed by a Gaussian where they overlap.

    Windows of a 2D patch go through a 3D scan slice by slice along its first axis.

    Held at once, whatever the overlap and the size of the windows: the array, the maps and, in 3D, the sum of the
    windows' weights, 4 bytes each: 4 (C + M + 1) bytes a voxel of the grid, besides what the windows at hand take.

    Args:
        function: Maps windows (B, C, *patch_size) to (B, M, *patch_size).
        array: (C, *S); a scan smaller than the window is continued by its edge.
        patch_size: Of a window; array order.
        device: Where windows are computed; scan and result stay in the host's memory.
        overlap: Overlap of neighbouring windows, as a fraction of the window side.

    Returns:
        (M, *S) float32.
    """
    # Here, as every process that trains imports this module, and MONAI takes seconds.
    from monai.inferers.utils import sliding_window_inference

    x = torch.from_numpy(np.ascontiguousarray(array))
    sliced = len(patch_size) < x.ndim - 1
    # (Z, C, Y, X) for slices, (1, C, *S) otherwise
    x = x.movedim(1, 0) if sliced else x.unsqueeze(0)

    def slide(part: Tensor) -> npt.NDArray[np.float32]:
        result: Tensor = sliding_window_inference(
            part,
            roi_size=tuple(patch_size),
            sw_batch_size=1 if device.type == "cpu" else 4,
            predictor=function,
            overlap=overlap,
            mode="gaussian",
            padding_mode="replicate",
            sw_device=device,
            device=torch.device("cpu"),
        )
        return result.numpy()

    if not sliced:
        return np.ascontiguousarray(slide(x)[0])
    whole: npt.NDArray[np.float32] | None = None
    for start in range(0, len(x), SLICES):
        part = slide(x[start : start + SLICES])
        if whole is None:  # only now is the number of maps known
            whole = np.empty((part.shape[1], len(x), *part.shape[2:]), np.float32)
        whole[:, start : start + SLICES] = part.swapaxes(0, 1)
    assert whole is not None  # noqa: S101 - a scan has a slice
    return whole


def case_probability(
    case: Case,
    network: nn.Module,
    plan: Plan,
    device: torch.device,
    *,
    flips: bool = False,
    overlap: float = 0.5,
    notes: list[str] | None = None,
) -> tuple[npt.NDArray[np.float32], Frame]:
    """Return the class probabilities of a case's scan on the prepared grid, (K, *S) float32, and where that grid lies.

    Args:
        case: Its label is not looked at.
        network: In evaluation mode, on `device`.
        plan: Of the run that the network is from.
        device: Where windows are computed.
        flips: Average over flips of the axes that the plan allows to be flipped.
        overlap: Overlap of neighbouring windows, as a fraction of the window side.
        notes: Gets what reading the scan has left out or done to it.

    Raises:
        UserError: if the scan cannot be read, or is not of the plan's dimension and channels.
    """
    # Only the scan's geometry is needed to go back, so no name keeps its array.
    return scan_probability(
        _noted(read_scan(case.images), notes), network, plan, device, flips=flips, overlap=overlap
    )


def scan_probability(
    scan: Scan,
    network: nn.Module,
    plan: Plan,
    device: torch.device,
    *,
    flips: bool = False,
    overlap: float = 0.5,
) -> tuple[npt.NDArray[np.float32], Frame]:
    """Return the class probabilities of a scan in memory. See `case_probability`.

    Raises:
        UserError: if it is not of the plan's dimension and channels.
    """
    image, frame = prepare_scan(scan, plan)
    del scan  # the caller may have let go of it
    return prepared_probability(image, network, plan, device, flips=flips, overlap=overlap), frame


def prepared_probability(
    image: npt.NDArray[np.float32],
    network: nn.Module,
    plan: Plan,
    device: torch.device,
    *,
    flips: bool = False,
    overlap: float = 0.5,
) -> npt.NDArray[np.float32]:
    """Return the class probabilities (K, *S) float32 of a prepared scan (C, *S). See `case_probability`."""
    axes = plan.flip_axes if flips else ()
    return predict_grid(
        network, image, patch_size=plan.patch_size, device=device, flip_axes=axes, overlap=overlap
    )


def _noted(scan: Scan, notes: list[str] | None) -> Scan:
    if notes is not None:
        notes += scan.notes
    return scan
