"""Trained runs as a model: from a scan, in memory or on disk, to its mask."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import log
from pathlib import Path
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from mlbseg.data.preprocess import Frame, prepare_scan, restore_mean, restore_probability
from mlbseg.data.readers import read_scan
from mlbseg.device import autocast, pick_device
from mlbseg.errors import UserError, brief, printable
from mlbseg.runs import Run
from mlbseg.types import Case, Geometry, Scan
from mlbseg.windows import prepared_probability

Map: TypeAlias = npt.NDArray[np.float32]

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
        uncertainty: Also write maps of `Segmented.uncertainty`.
        overwrite: Replace existing masks.
        skip_existing: Leave scans out whose masks, and all else that is wanted of them, are there already.
        part: (k, n) for part k (from 1) of n parts of the scans; all of them when None.

    Raises:
        UserError: for an overlap or a part that does not exist, or options that exclude each other.
    """

    network: str | None = None
    flips: bool = False
    largest: bool | None = None
    overlap: float = 0.5
    precision: str | None = None
    only: str | tuple[str, ...] | None = None
    probabilities: bool = False
    uncertainty: bool = False
    overwrite: bool = False
    skip_existing: bool = False
    part: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        low, high = OVERLAPS
        if not low <= self.overlap <= high:
            raise UserError(f"--overlap: found {self.overlap}, expected a number from {low:g} to {high:g}")
        if self.part is not None and not 1 <= self.part[0] <= self.part[1]:
            raise UserError(
                f"part {self.part[0]}/{self.part[1]}: expected K/N with K from 1 to N, such as 3/16"
            )
        if self.overwrite and self.skip_existing:
            raise UserError(
                "--overwrite replaces existing masks and --skip-existing keeps them: pass one of them"
            )


@dataclass(frozen=True)
class Segmented:
    """What the networks say of one scan.

    Attributes:
        model: The model.
        maps: Of each run: the probability of each class, (K, *S') float32, on its prepared grid, and where that lies.
        notes: What reading the scan has left out or done to it.
        unlike: In what the scan is unlike the training scans; see `mlbseg.data.unlike`.
    """

    model: Model
    maps: tuple[tuple[Map, Frame], ...]
    notes: tuple[str, ...] = ()
    unlike: tuple[str, ...] = ()

    @property
    def native(self) -> Geometry:
        """The scan's own lattice."""
        return self.maps[0][1].native

    def mask(self) -> npt.NDArray[np.int32]:
        """Return the label value of each voxel, (*S), on the scan's own lattice: the class likeliest on average."""
        model = self.model
        return restore_mean(self.maps, model.label_values, model.in_one_piece, largest=model.options.largest)

    def probabilities(self) -> Iterator[Map]:
        """Yield the probability of each class, (*S), averaged over the runs on the scan's own lattice, background last.

        The background has the rest: where the scan was cropped away, all is background.
        """
        rest = np.ones(self.native.size[::-1], np.float32)
        for k in range(1, len(self.model.label_values)):
            native = _mean(restore_probability(probability[k], frame) for probability, frame in self.maps)
            rest -= native
            yield native
        yield rest.clip(0, 1)

    def uncertainty(self) -> dict[str, Map]:
        """Return maps (*S) of how unsure the runs are, on the scan's own lattice.

        Returns:
            ``entropy``: that of the averaged probabilities, from 0 (one class is sure) to 1 (all classes are equally
            likely): -sum p log p / log K of K classes. Of several runs also ``disagreement``: the mutual information
            of class and run on the same scale, which is that entropy less the mean of the runs' own (Lakshminarayanan
            et al. 2017; Depeweg et al. 2018). It is 0 where all runs say the same, however unsure.
        """
        shape = self.native.size[::-1]
        entropy, own = np.zeros(shape, np.float32), np.zeros(shape, np.float32)
        for k in range(len(self.model.label_values)):
            # Class by class, so that the probabilities of all classes are never held on the scan's lattice.
            total = np.zeros(shape, np.float32)
            for probability, frame in self.maps:
                native = restore_probability(probability[k], frame, outside=float(k == 0))
                total += native
                own += _information(native)
            total /= np.float32(len(self.maps))
            entropy += _information(total)
        scale = np.float32(1 / log(len(self.model.label_values)))
        maps = {"entropy": (entropy * scale).clip(0, 1)}
        if len(self.maps) > 1:
            maps["disagreement"] = ((entropy - own / len(self.maps)) * scale).clip(0, 1)
        return maps


def _mean(maps: Iterator[Map]) -> Map:
    """Return the mean of maps, one of which is held at a time; a single one as it is."""
    total, count = next(maps), 1
    for each in maps:
        total += each
        count += 1
    return total if count == 1 else total / np.float32(count)


def _information(probability: Map) -> Map:
    """Return -p log p of each voxel, 0 of p = 0."""
    information: Map = -probability * np.log(np.maximum(probability, np.finfo(np.float32).tiny))
    return information


class Model:
    """Trained runs that segment scans: one run, or several whose probabilities are averaged.

    Several runs may prepare scans in different ways: the mean is taken on the scan's own lattice. Where `largest` is
    None, a mask keeps the largest component of the classes of which the plans of all runs say so.

    Args:
        runs: The runs.
        device: Where windows are computed; scans stay in the host's memory.
        options: How to segment.

    Attributes:
        runs: The runs.
        device: The device.
        options: The options.
        networks: The network of each run, in evaluation mode.
        label_values: The value of each class in a mask, the background first.
        in_one_piece: The values of which a mask keeps the largest component.

    Raises:
        UserError: if training has not finished, the runs are not of the same classes and kind of scans, there is no
            such network, or flips are asked of a run that allows none.
    """

    def __init__(
        self, runs: Sequence[Run], device: torch.device, options: PredictOptions | None = None
    ) -> None:
        self.runs = tuple(runs)
        self.device = device
        self.options = options or PredictOptions()
        require_alike(self.runs)
        for run in self.runs:
            if self.options.flips and not run.plan.flip_axes:
                whose = "the run's plan" if len(self.runs) == 1 else f"the plan of {run.root}"
                raise UserError(
                    f"--flips: {whose} allows no flips, so the network was trained without them "
                    "(leave --flips out, or train with plan.flip_axes)"
                )
        self.label_values = self.runs[0].plan.label_values
        pieces = (run.plan.largest_component for run in self.runs)
        self.in_one_piece = tuple(sorted(set.intersection(*map(set, pieces))))
        self._usual = [usual for run in self.runs if (usual := run.usual) is not None]
        self.networks = tuple(run.network(self.options.network).to(device) for run in self.runs)

    @property
    def class_names(self) -> dict[int, str]:
        """Name of each label value that masks can hold, the background first."""
        return class_names(self.runs)

    def predict(
        self,
        scan: Scan | npt.NDArray[np.generic] | str | Path | Sequence[str | Path],
        *,
        spacing: Sequence[float] | None = None,
    ) -> npt.NDArray[np.int32]:
        """Return the mask of a scan: the one that `mlbseg predict` writes for the same scan.

        It warns where the scan is unlike the training scans (`mlbseg.data.unlike`).

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
        return self._seen(scan, spacing).mask()

    def probabilities(
        self,
        scan: Scan | npt.NDArray[np.generic] | str | Path | Sequence[str | Path],
        *,
        spacing: Sequence[float] | None = None,
    ) -> npt.NDArray[np.float32]:
        """Return the probability of each class, (K, *S), in the order of `class_names`. Arguments as of `predict`."""
        *structures, background = self._seen(scan, spacing).probabilities()
        return np.stack([background, *structures])

    def uncertainty(
        self,
        scan: Scan | npt.NDArray[np.generic] | str | Path | Sequence[str | Path],
        *,
        spacing: Sequence[float] | None = None,
    ) -> dict[str, Map]:
        """Return the maps (*S) of `Segmented.uncertainty`: ``entropy`` and, of several runs, ``disagreement``.

        Arguments as of `predict`.
        """
        return self._seen(scan, spacing).uncertainty()

    def segment(self, scan: Scan) -> Segmented:
        """Show a scan to the networks.

        Raises:
            UserError: if it is not of the plans' dimension and channels.
        """
        notes, unlike = scan.notes, self.unlike(scan)
        prepared = [prepare_scan(scan, run.plan) for run in self.runs]
        del scan  # the caller may have let go of it, and only its geometry is needed to go back
        maps = []
        for run, network in zip(self.runs, self.networks, strict=True):
            image, frame = prepared.pop(0)
            with autocast(self.options.precision or run.config.train.precision, self.device):
                probability = prepared_probability(
                    image, network, run.plan, self.device,
                    flips=self.options.flips, overlap=self.options.overlap,
                )  # fmt: skip
            maps.append((probability, frame))
        return Segmented(self, tuple(maps), notes, unlike)

    def segment_case(self, case: Case) -> Segmented:
        """Read the scan of a case and show it to the networks; it is not held while they compute.

        Args:
            case: Its label is not looked at.

        Raises:
            UserError: if the scan cannot be read, or is not of the plans' dimension and channels.
        """
        return self.segment(read_scan(case.images))

    def unlike(self, scan: Scan) -> tuple[str, ...]:
        """Say in what a scan is unlike the training scans of any of the runs; () if in nothing, or nothing is known."""
        return tuple(dict.fromkeys(line for usual in self._usual for line in usual.unlike(scan)))

    def _seen(
        self,
        scan: Scan | npt.NDArray[np.generic] | str | Path | Sequence[str | Path],
        spacing: Sequence[float] | None,
    ) -> Segmented:
        segmented = self.segment(self._scan(scan, spacing))
        if segmented.unlike:
            warnings.warn(
                printable(f"the scan is unlike the training scans: {'; '.join(segmented.unlike)}"),
                stacklevel=3,
            )
        return segmented

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
        ndim = self.runs[0].plan.scan_ndim
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


def require_alike(runs: Sequence[Run]) -> None:
    """Refuse runs that cannot be averaged or compared: of other classes, channels or dimension of scans.

    Raises:
        UserError: if there is no run, or two of them differ.
    """
    if not runs:
        raise UserError("no run was given, expected one run folder or more")
    first = runs[0]
    for run in runs[1:]:
        one, other = first.plan, run.plan
        kinds = [f"{plan.scan_ndim}D scans of {plan.channels} channel(s)" for plan in (one, other)]
        if kinds[0] != kinds[1]:
            raise UserError(
                f"{run.root}: trained on {kinds[1]}, but {first.root} on {kinds[0]} "
                "(give runs on the same kind of scans)"
            )
        names = [dict(zip(plan.label_values, plan.class_names, strict=True)) for plan in (one, other)]
        if one.label_values != other.label_values or any(
            named and other_named and names[0][value] != names[1][value]
            for value in one.label_values[1:]
            for named, other_named in [(_is_named(value, names[0]), _is_named(value, names[1]))]
        ):
            found = [", ".join(f"{value} {name}" for value, name in each.items()) for each in names]
            raise UserError(
                f"{run.root}: its classes are {found[1]}, but those of {first.root} are {found[0]} "
                "(give runs that were trained on the same classes)"
            )


def class_names(runs: Sequence[Run]) -> dict[int, str]:
    """Return the name of each label value: that of the first run that has one, as some labels are without names."""
    names: dict[int, str] = {}
    for run in runs:
        own = dict(zip(run.plan.label_values, run.plan.class_names, strict=True))
        names |= {v: name for v, name in own.items() if v not in names or not _is_named(v, names)}
    return names


def _is_named(value: int, names: dict[int, str]) -> bool:
    """Say whether a value has a name of its own, and not the one that planning gives to those without."""
    return names[value] != f"label {value}"


def load(
    run: str | Path | Sequence[str | Path],
    *more: str | Path,
    network: str | None = None,
    flips: bool = False,
    largest: bool | None = None,
    overlap: float = 0.5,
    device: str = "auto",
    precision: str | None = None,
) -> Model:
    """Open trained runs as a model that segments arrays and files.

    Args:
        run: The run folder, or a list of several whose probabilities are averaged; see `Model`.
        more: Further run folders.
        network: ``student`` or ``teacher``; the method's choice when None.
        flips: Average over flips of the axes that the plan allows to be flipped.
        largest: Keep the largest component of every class (True) or all components (False); as planned when None.
        overlap: Overlap of neighbouring windows, as a fraction of the window side.
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:1`` ...
        precision: ``auto``, ``32`` or ``bf16``; as in training when None.

    Raises:
        UserError: if one is no finished run, the options do not fit it, or the runs do not belong together.
    """
    options = PredictOptions(network, flips, largest, overlap, precision)
    roots = [*([run] if isinstance(run, str | Path) else run), *more]
    return Model([Run.open(Path(root)) for root in roots], pick_device(device), options)
