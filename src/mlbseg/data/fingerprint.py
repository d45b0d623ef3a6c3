"""The facts about a data set that a plan rests on. No test case is opened for them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from itertools import combinations

import numpy as np
import numpy.typing as npt

from mlbseg.data.facts import ImageFacts, Intensity, facts_of, image_facts, recalled
from mlbseg.data.known import label_on, leaves_classes
from mlbseg.data.lattice import array_shape, reorient
from mlbseg.data.readers import LABEL_BYTES, SCAN_BYTES, announced, read_scan
from mlbseg.data.reading import HERE, Reading
from mlbseg.data.remembered import Remembered
from mlbseg.data.structures import Structure, structures
from mlbseg.errors import Fault, ReadError, UserError
from mlbseg.types import NOT_KNOWN, Case, Geometry, Role, Scan

MEASURED = 16
"""Clean cases, evenly spread, whose structures are measured: enough for a median, and quick for any number."""
POSED = 2.0
"""Standard deviations over cases by which structures lie to one side where scans share a pose."""
ONE_PIECE = 0.95
"""Share of a structure's voxels in its largest component from which it counts as one piece: a hand has slipped."""


@dataclass(frozen=True)
class LabelledFacts:
    """What an image and its label show together.

    Attributes:
        voxels: Voxels of each label value, on the image's lattice.
        foreground: Intensities of each channel under the label; empty unless the case is clean.
        structures: What the label shows; empty unless it was asked for, and of a label whose structures cannot be
            seen as wholes: one that was drawn on some slices, or in less than half of the scan.
        unknown: Voxels that do not tell their class.
    """

    voxels: dict[int, int]
    foreground: tuple[Intensity | None, ...]
    structures: tuple[Structure, ...]
    unknown: int = 0


@dataclass(frozen=True)
class CaseFacts:
    """Facts about one case. Array order, 3D scans turned to LPS: z (to S), y (to P), x (to L).

    Attributes:
        id: The case.
        role: Its role.
        size: Voxels along each axis.
        spacing: mm along each axis.
        box_size: Size of the box of non-background voxels (with a margin).
        channels: Number of channels.
        minimum: Smallest value of each channel: its background.
        integers: Whether each channel holds whole numbers only.
        content: Intensities of each channel's voxels above its minimum; None for a constant channel.
        foreground: Intensities of each channel under the label; empty unless the case is clean.
        label_voxels: Voxels of each label value; empty unless the case is clean or noisy.
        structures: What the label shows; empty unless the case is one of the `MEASURED` clean ones.
        unknown: Voxels whose class the label does not tell.
        classes: The label values that were drawn; None: all.
        tilt: See `tilt_of`.
    """

    id: str
    role: Role
    size: tuple[int, ...]
    spacing: tuple[float, ...]
    box_size: tuple[int, ...]
    channels: int
    minimum: tuple[float, ...]
    integers: tuple[bool, ...]
    content: tuple[Intensity | None, ...]
    foreground: tuple[Intensity | None, ...]
    label_voxels: dict[int, int]
    structures: tuple[Structure, ...] = ()
    unknown: int = 0
    classes: tuple[int, ...] | None = None
    tilt: float = 0.0


@dataclass(frozen=True)
class Fingerprint:
    """What the training cases of a data set have in common."""

    cases: tuple[CaseFacts, ...]

    @property
    def scan_ndim(self) -> int:
        """2 or 3."""
        return len(self.cases[0].size)

    @property
    def channels(self) -> int:
        """Channels of every scan."""
        return self.cases[0].channels

    @property
    def spacings(self) -> npt.NDArray[np.float64]:
        """(cases, axes), mm, array order."""
        return np.array([case.spacing for case in self.cases])

    @property
    def sizes(self) -> npt.NDArray[np.float64]:
        """(cases, axes), voxels, array order."""
        return np.array([case.size for case in self.cases], float)

    @property
    def box_sizes(self) -> npt.NDArray[np.float64]:
        """(cases, axes), voxels of the non-background box, array order."""
        return np.array([case.box_size for case in self.cases], float)

    @property
    def median_spacing(self) -> tuple[float, ...]:
        """Median over cases, mm, array order."""
        return tuple(float(v) for v in np.median(self.spacings, axis=0))

    @property
    def median_size(self) -> tuple[float, ...]:
        """Median over cases, voxels, array order."""
        return tuple(float(v) for v in np.median(self.sizes, axis=0))

    def count(self, *roles: Role) -> int:
        """Return the number of cases in any of `roles`."""
        return sum(case.role in roles for case in self.cases)

    @property
    def partly_known(self) -> int:
        """The number of clean cases whose label leaves voxels or classes open."""
        values = set(self.label_values()) - {0}
        return sum(
            case.role is Role.CLEAN and (case.unknown > 0 or leaves_classes(case.classes, values))
            for case in self.cases
        )

    def extent(self) -> npt.NDArray[np.float64] | None:
        """Return mm along each axis (array order) that hold the largest component of any structure.

        Of each structure the median over cases counts, so that one odd label decides nothing. None if no clean
        label holds anything.
        """
        sizes = [np.median([s.extent for s in found], axis=0) for found in self._by_value().values()]
        return np.max(sizes, axis=0) if sizes else None

    def kept(self, spacing: float) -> float:
        """Return the mean Dice that the clean labels keep at a spacing (mm), of the structure that loses most."""
        means = [np.mean([s.kept(spacing) for s in found]) for found in self._by_value().values()]
        return float(min(means, default=0.0))

    def in_one_piece(self) -> tuple[int, ...]:
        """Return the values whose largest component holds `ONE_PIECE` or more in every clean label, of 3 or more."""
        return tuple(
            value
            for value, found in sorted(self._by_value().items())
            if len(found) >= 3 and all(structure.largest >= ONE_PIECE for structure in found)
        )

    def posed_axes(self) -> tuple[int, ...]:
        """Return the array axes along which the structures of the clean labels lie alike in all scans.

        They do where a structure is off the middle of the scans, or behind another one, by more than `POSED` times
        the standard deviation over cases. Fewer than three labels show no pose.
        """
        # 0 is the middle of the scan.
        places = [
            {0: np.full(self.scan_ndim, 0.5)} | {s.value: np.array(s.centre) for s in case.structures}
            for case in self.cases
            if case.structures
        ]
        posed = np.zeros(self.scan_ndim, bool)
        for first, second in combinations(sorted({value for case in places for value in case}), 2):
            apart = np.array([case[second] - case[first] for case in places if {first, second} <= set(case)])
            if len(apart) >= 3:
                posed |= np.abs(apart.mean(axis=0)) > POSED * apart.std(axis=0, ddof=1)
        return tuple(int(axis) for axis in np.flatnonzero(posed))

    def _by_value(self) -> dict[int, list[Structure]]:
        found: dict[int, list[Structure]] = {}
        for case in self.cases:
            for structure in case.structures:
                found.setdefault(structure.value, []).append(structure)
        return found

    def label_values(self) -> tuple[int, ...]:
        """Return the values in the clean labels (in the noisy ones if no label is clean), sorted."""
        for role in (Role.CLEAN, Role.NOISY):
            values = {v for case in self.cases if case.role == role for v in case.label_voxels}
            if values:
                return tuple(sorted(values))
        return ()


def fingerprint(
    cases: Sequence[Case],
    *,
    reading: Reading = HERE,
    progress: Callable[[int, int], None] | None = None,
) -> Fingerprint:
    """Read the training cases, one in a process at a time, and note what a plan needs to know.

    Args:
        cases: The data set. Test cases are not opened, and no label but those of clean and noisy cases.
        reading: In how many processes files are read, and what is remembered of them. It changes no result.
        progress: Called with (cases read, cases in all).

    Raises:
        UserError: No case is for training, or the scans differ in dimension or channels.
        ReadError: A file cannot be read.
    """
    training = [case for case in cases if case.role != Role.TEST]
    if not training:
        raise UserError("no case to train on: found only test cases, expected clean or unlabelled ones")
    clean = [case.id for case in training if case.role is Role.CLEAN]
    measured = {clean[i * len(clean) // MEASURED] for i in range(MEASURED)} if clean else set()
    read = functools.partial(_case_facts, measured=frozenset(measured), remembered=reading.remembered)
    facts: list[CaseFacts] = []
    with closing(
        reading.each(read, training, need=functools.partial(_need, reading.remembered), progress=progress)
    ) as found:
        for last in found:
            facts.append(last)
            first = facts[0]
            if (len(last.size), last.channels) != (len(first.size), first.channels):
                raise UserError(
                    f"{last.id}: {len(last.size)}D with {last.channels} channels, expected "
                    f"{len(first.size)}D with {first.channels} channels as {first.id} has (leave one kind out)"
                )
    return Fingerprint(tuple(facts))


def _need(remembered: Remembered, case: Case) -> int:
    """Return the memory that a case takes, bytes; a case without a label takes none if its scan is remembered."""
    if not _has_label(case) and recalled(ImageFacts, case.images, remembered) is not None:
        return 0
    image = sum(announced(path) for path in case.images)
    label = announced(case.label, label=True) if _has_label(case) and case.label is not None else 0
    return SCAN_BYTES * image + LABEL_BYTES * label


def _has_label(case: Case) -> bool:
    return case.label is not None and case.role in (Role.CLEAN, Role.NOISY)


def _case_facts(case: Case, measured: frozenset[str], remembered: Remembered) -> CaseFacts:
    scan = functools.cache(lambda: read_scan(case.images))  # once, and only if something is not remembered
    image = image_facts(case.images, remembered, scan)
    if image.measures is None:
        found = f"{image.odd} values are NaN or infinite"
        raise ReadError(Fault(case.id, found, "finite values", "export the scan again", case.id, "nan"))
    shown = LabelledFacts({}, (), ())
    if _has_label(case) and case.label is not None:
        measure = case.id in measured and case.role is Role.CLEAN
        shown = facts_of(
            LabelledFacts, [*case.images, case.label], lambda: _labelled_facts(case, scan(), measure=measure),
            remembered, str(case.role), asdict(case.known), measure,
        )  # fmt: skip
    turned = reorient(image.geometry, "LPS")
    return CaseFacts(
        id=case.id,
        role=case.role,
        size=array_shape(turned),
        spacing=tuple(reversed(turned.spacing)),
        box_size=image.measures.box_size,
        channels=image.channels,
        minimum=image.measures.minimum,
        integers=image.measures.integers,
        content=image.measures.content,
        foreground=shown.foreground,
        label_voxels=shown.voxels,
        structures=shown.structures,
        unknown=shown.unknown,
        classes=case.known.classes,
        tilt=tilt_of(image.geometry),
    )


def tilt_of(geometry: Geometry) -> float:
    """Return the largest angle between an axis of a scan and the patient's axis nearest to it, degrees."""
    cosines = np.abs(np.reshape(geometry.direction, (geometry.ndim, geometry.ndim))).max(axis=0)
    return float(np.degrees(np.arccos(np.clip(cosines, -1, 1))).max())


def _labelled_facts(case: Case, scan: Scan, *, measure: bool) -> LabelledFacts:
    label = label_on(case, scan.geometry)
    values, counts = np.unique(label, return_counts=True)
    voxels = {int(v): int(n) for v, n in zip(values, counts, strict=True) if v != NOT_KNOWN}
    unknown = label.size - sum(voxels.values())
    if case.role is not Role.CLEAN:
        return LabelledFacts(voxels, (), (), unknown)
    drawn = np.where(label == NOT_KNOWN, 0, label)  # what the label leaves open is no structure
    foreground = tuple(Intensity.of(channel[drawn > 0]) for channel in scan.array)
    whole = not case.known.sparse and case.known.every is None and 2 * unknown <= label.size
    return LabelledFacts(
        voxels, foreground, structures(drawn, scan.geometry) if measure and whole else (), unknown
    )
