"""A trained run as a model: from a scan, in memory or on disk, to its mask."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from mlbseg.data.preprocess import Frame, restore_label, restore_probability
from mlbseg.data.readers import read_scan
from mlbseg.device import autocast, pick_device
from mlbseg.errors import UserError, brief
from mlbseg.runs import Run
from mlbseg.types import Case, Geometry, Scan
from mlbseg.windows import case_probability, scan_probability

OVERLAPS = (0.0, 0.9)
"""The smallest and the largest overlap of windows."""


@dataclass(frozen=True)
class PredictOptions:
    """How scans are segmented, and which masks are written; `mlbseg.predict` says more.

    Attributes:
        network: ``student`` or ``teacher``; the method's choice when None.
        flips: Average over flips of the axes that the plan allows to be flipped.
        largest: Keep the largest component of every class (True) or all components (False); as planned when None.
        overlap: Overlap of neighbouring windows, as a fraction of the window side.
        precision: ``auto``, ``32`` or ``bf16``; as in training when None.
        only: Case ids, or the name of a part of the run's split; all scans when None.
        probabilities: Also write the probability of each class.
        overwrite: Replace existing masks.
        part: (k, n) for part k (from 1) of n parts of the scans; all of them when None.

    Raises:
        UserError: for an overlap or a part that does not exist.
    """

    network: str | None = None
    flips: bool = False
    largest: bool | None = None
    overlap: float = 0.5
    precision: str | None = None
    only: str | tuple[str, ...] | None = None
    probabilities: bool = False
    overwrite: bool = False
    part: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        low, high = OVERLAPS
        if not low <= self.overlap <= high:
            raise UserError(f"--overlap: found {self.overlap}, expected a number from {low:g} to {high:g}")
        if self.part is not None and not 1 <= self.part[0] <= self.part[1]:
            raise UserError(
                f"part {self.part[0]}/{self.part[1]}: expected K/N with K from 1 to N, such as 3/16"
            )


@dataclass(frozen=True)
class Segmented:
    """What the network says of one scan.

    Attributes:
        model: The model.
        probability: Of each class, (K, *S') float32, on the prepared grid.
        frame: Where that grid lies.
    """

    model: Model
    probability: npt.NDArray[np.float32]
    frame: Frame

    def mask(self) -> npt.NDArray[np.int32]:
        """Return the label value of each voxel, (*S), on the scan's own lattice."""
        model = self.model
        return restore_label(self.probability, self.frame, model.run.plan, largest=model.options.largest)

    def probabilities(self) -> Iterator[npt.NDArray[np.float32]]:
        """Yield the probability of each class, (*S), on the scan's own lattice, the background last.

        The background has the rest: where the scan was cropped away, all is background.
        """
        rest = np.ones(self.frame.native.size[::-1], np.float32)
        for k in range(1, len(self.probability)):
            native = restore_probability(self.probability[k], self.frame)
            rest -= native
            yield native
        yield rest.clip(0, 1)


class Model:
    """A trained run that segments scans.

    Args:
        run: The run.
        device: Where windows are computed; scans stay in the host's memory.
        options: How to segment.

    Attributes:
        run: The run.
        device: The device.
        options: The options.
        network: The network, in evaluation mode.

    Raises:
        UserError: if training has not finished, there is no such network, or flips are asked of a run that allows none.
    """

    def __init__(self, run: Run, device: torch.device, options: PredictOptions | None = None) -> None:
        self.run = run
        self.device = device
        self.options = options or PredictOptions()
        if self.options.flips and not run.plan.flip_axes:
            raise UserError(
                "--flips: the run's plan allows no flips, so the network was trained without them "
                "(leave --flips out, or train with plan.flip_axes)"
            )
        self.network = run.network(self.options.network).to(device)

    @property
    def class_names(self) -> dict[int, str]:
        """Name of each label value that masks can hold, the background first."""
        return dict(zip(self.run.plan.label_values, self.run.plan.class_names, strict=True))

    def predict(
        self,
        scan: Scan | npt.NDArray[np.generic] | str | Path | Sequence[str | Path],
        *,
        spacing: Sequence[float] | None = None,
    ) -> npt.NDArray[np.int32]:
        """Return the mask of a scan: the one that `mlbseg predict` writes for the same scan.

        Args:
            scan: An array, (*S) or (C, *S) with S in the order (z, y, x), or (y, x) of 2D scans; or the path of a scan
                file or DICOM folder, or one path per channel; or a `mlbseg.types.Scan`, which says where it lies.
            spacing: mm between voxels of an array, in its order: (z, y, x). The axes of an array are taken to run along
                the patient's: x to the left, y to the back, z to the head.

        Returns:
            Label values as in the labels that the run was trained on, (*S), on the scan's own lattice.

        Raises:
            UserError: if the scan cannot be read, is not of the kind that the run was trained on, or `spacing` is
                missing of an array or given of anything else.
        """
        return self.segment(self._scan(scan, spacing)).mask()

    def probabilities(
        self,
        scan: Scan | npt.NDArray[np.generic] | str | Path | Sequence[str | Path],
        *,
        spacing: Sequence[float] | None = None,
    ) -> npt.NDArray[np.float32]:
        """Return the probability of each class, (K, *S), in the order of `class_names`. Arguments as of `predict`."""
        *structures, background = self.segment(self._scan(scan, spacing)).probabilities()
        return np.stack([background, *structures])

    def segment(self, scan: Scan) -> Segmented:
        """Show a scan to the network.

        Raises:
            UserError: if it is not of the plan's dimension and channels.
        """
        return self._segmented(scan_probability, scan)

    def segment_case(self, case: Case, notes: list[str] | None = None) -> Segmented:
        """Read the scan of a case and show it to the network; it is not held while the network computes.

        Args:
            case: Its label is not looked at.
            notes: Gets what reading the scan has left out or done to it.

        Raises:
            UserError: if the scan cannot be read, or is not of the plan's dimension and channels.
        """
        return self._segmented(partial(case_probability, notes=notes), case)

    def _segmented(
        self, look: Callable[..., tuple[npt.NDArray[np.float32], Frame]], what: Scan | Case
    ) -> Segmented:
        options = self.options
        with autocast(options.precision or self.run.config.train.precision, self.device):
            return Segmented(
                self,
                *look(
                    what,
                    self.network,
                    self.run.plan,
                    self.device,
                    flips=options.flips,
                    overlap=options.overlap,
                ),
            )

    def _scan(
        self,
        scan: Scan | npt.NDArray[np.generic] | str | Path | Sequence[str | Path],
        spacing: Sequence[float] | None,
    ) -> Scan:
        if isinstance(scan, np.ndarray):
            return self._scan_of(scan, spacing)
        if spacing is not None:
            raise UserError("spacing: only an array needs one, and this scan states its own (leave it out)")
        if isinstance(scan, Scan):
            return scan
        return read_scan([Path(path) for path in ([scan] if isinstance(scan, str | Path) else scan)])

    def _scan_of(self, array: npt.NDArray[np.generic], spacing: Sequence[float] | None) -> Scan:
        ndim = self.run.plan.scan_ndim
        order = "(z, y, x)" if ndim == 3 else "(y, x)"
        if array.ndim not in (ndim, ndim + 1):
            raise UserError(
                f"the array has {array.ndim} axes, expected {order}, or one more axis of channels before them"
            )
        if array.dtype.kind not in "biuf":
            raise UserError(f"the array holds {array.dtype}, expected real numbers")
        if spacing is None:
            raise UserError(
                f"an array says nothing of its spacing: give spacing={order} in mm, 1 where it has none"
            )
        steps = tuple(float(step) for step in spacing)
        if len(steps) != ndim or not all(0 < step < float("inf") for step in steps):
            raise UserError(f"spacing: found {brief(steps)}, expected {ndim} positive numbers: {order} in mm")
        channels = np.asarray(array, np.float32)
        channels = channels if array.ndim > ndim else channels[np.newaxis]
        if 0 in channels.shape:
            raise UserError(f"the array has no voxels: its shape is {array.shape}")
        return Scan(channels, Geometry.identity(channels.shape[:0:-1], steps[::-1]))


def load(
    run: str | Path,
    *,
    network: str | None = None,
    flips: bool = False,
    largest: bool | None = None,
    overlap: float = 0.5,
    device: str = "auto",
    precision: str | None = None,
) -> Model:
    """Open a trained run as a model that segments arrays and files.

    Args:
        run: The run folder.
        network: ``student`` or ``teacher``; the method's choice when None.
        flips: Average over flips of the axes that the plan allows to be flipped.
        largest: Keep the largest component of every class (True) or all components (False); as planned when None.
        overlap: Overlap of neighbouring windows, as a fraction of the window side.
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:1`` ...
        precision: ``auto``, ``32`` or ``bf16``; as in training when None.

    Raises:
        UserError: if it is no finished run, or the options do not fit it.
    """
    options = PredictOptions(network, flips, largest, overlap, precision)
    return Model(Run.open(Path(run)), pick_device(device), options)
