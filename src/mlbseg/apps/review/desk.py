"""The cases of a review in memory: opened, packed for the browser part by part, corrected, judged, predicted."""

from __future__ import annotations

import itertools
import math
import threading
import zlib
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from mlbseg.apps.report.packing import MOST_CLASSES, Subject, from_ras, pack, towards_ras, values_of
from mlbseg.apps.report.scoring import mask_on, predict_cases, trust_map
from mlbseg.apps.review.listing import Listing
from mlbseg.apps.review.saving import NONE, ReadOnly, Shelf
from mlbseg.data.readers import mask_suffix, read_label, read_scan
from mlbseg.device import pick_device
from mlbseg.errors import UserError
from mlbseg.files import make_folder
from mlbseg.inference import Model
from mlbseg.types import Case, Geometry, Role

MOST_PART = 8_000_000
"""Voxels that a browser is given at once, at full resolution; a larger scan comes in parts, slab by slab."""

OPEN = 2
"""Cases that are kept in memory."""

SUSPECTED = 0.5
"""Trust below which a voxel is suspected, as `mlbseg audit` has it by default."""

MASKS = "masks"


@dataclass
class Opened:
    """A case in memory; arrays (*S) lie on the scan's own lattice.

    Attributes:
        case: The case, with its label as it is now.
        geometry: The lattice.
        image: First channel.
        label: Class values; zeros where there is no label.
        version: Of the label file.
        predicted: Class values; None as long as there is no prediction.
        trust: 0 to 1; None without an audit.
    """

    case: Case
    geometry: Geometry
    image: npt.NDArray[np.float32]
    label: npt.NDArray[np.int32]
    version: str
    predicted: npt.NDArray[np.int32] | None = None
    trust: npt.NDArray[np.float32] | None = None
    audited: str = ""


class Desk:
    """All that the server of a review does, without the web.

    Args:
        listing: What is reviewed.
        who: Name of the person, for the log.
        device: Where networks compute.
    """

    def __init__(self, listing: Listing, *, who: str, device: str = "auto") -> None:
        self.listing, self.who = listing, who
        self.shelf = Shelf(listing.dataset.root, listing.dataset.layout)
        self.run, self.items = listing.run, list(listing.items)
        self.device = pick_device(device) if self.run else None
        self.classes = dict(self.run.plan.structures if self.run else listing.dataset.class_names)
        self.classes.pop(0, None)
        if not self.classes:
            self.classes = _first_classes(listing)
        self.failed: dict[int, str] = {}
        self._open: OrderedDict[int, Opened] = OrderedDict()
        self._lock = threading.RLock()  # one case is read, packed or saved at a time
        self._network_lock = threading.Lock()
        self._model: Model | None = None

    def state(self) -> list[dict[str, Any]]:
        """Return the list as it is now: of each case its name, its reason and what was done to it."""
        done = {}
        for entry in self.shelf.entries():
            done[entry["case"]] = f"{entry.get('what')} by {entry.get('who')}"
        return [
            {
                "number": number,
                "name": item.case.id,
                "reason": item.reason,
                "state": done.get(item.case.id, ""),
                "predicted": self._mask_file(item.case).is_file() if self.run else False,
                "failed": self.failed.get(number, ""),
            }
            for number, item in enumerate(self.items)
        ]

    def case(self, number: int) -> Case:
        """Return a case of the list, with the label that it has now.

        Raises:
            UserError: if there is none of that number, or a file of it lies outside the folder.
        """
        if not 0 <= number < len(self.items):
            raise UserError(f"case {number}: there is none of this number")
        case = self.items[number].case
        if case.label is None and self.shelf.version(case) != NONE:
            case = replace(case, label=self.shelf.label_path(case), role=Role.CLEAN)
        self.shelf.require_inside(case)
        return case

    def opened(self, number: int) -> Opened:
        """Return a case in memory, with the label as the file has it now.

        Raises:
            UserError: if it cannot be read.
        """
        with self._lock:
            case = self.case(number)
            version = self.shelf.version(case)
            found = self._open.get(number)
            if found is None:
                scan = read_scan(case.images)
                found = Opened(
                    case, scan.geometry, scan.array[0], np.zeros(scan.array[0].shape, np.int32), ""
                )
                if self.run:
                    found.trust = trust_map(self.run.root / "audit" / "trust", case.id, scan.geometry)[0]
            if found.version != version:
                found.label = (
                    mask_on(case.label, found.geometry) if case.label else np.zeros_like(found.label)
                )
                found.case, found.version = case, version
            if found.predicted is None and self.run and (path := self._mask_file(case)).is_file():
                found.predicted = mask_on(path, found.geometry)
            self._open[number] = found
            self._open.move_to_end(number)
            while len(self._open) > OPEN:
                self._open.popitem(last=False)
            return found

    def packed(self, number: int, part: int | None = None) -> bytes:
        """Return a part of a case for the browser; that with most to look at when None.

        Raises:
            UserError: if it cannot be read, or there is no such part.
        """
        with self._lock:
            opened = self.opened(number)
            suspected = self._suspected(opened)
            slabs = self._slabs(opened.geometry)
            if part is None:
                part = self._telling(opened, suspected, slabs)
            if not 0 <= part < len(slabs):
                raise UserError(f"{opened.case.id}: has no part {part + 1}")
            masks: dict[str, npt.NDArray[Any]] = {"label": opened.label}
            if opened.predicted is not None:
                masks["prediction"] = opened.predicted
            maps = {}
            if suspected is not None and opened.trust is not None:
                maps["suspected"] = np.where(suspected, np.float32(1), np.float32(np.nan))
                maps["doubt"] = np.where(opened.trust < 1 - 1e-3, 1 - opened.trust, np.float32(np.nan))
            values = self.values(opened)
            extra = {
                "number": number, "part": part, "parts": len(slabs), "base": opened.version,
                "readonly": self._readonly(opened.case), "unknown": opened.case.known.ignore,
                "predicting": self.run is not None and opened.predicted is None and not self.failed.get(number),
                "audited": opened.audited,
            }  # fmt: skip
            subject = self._slab(opened, masks, maps, suspected, slabs[part])
            names = {
                value: self.classes.get(value, f"label {value}")
                for value in values
                if value != opened.case.known.ignore
            }
            if opened.case.known.ignore is not None:
                names[opened.case.known.ignore] = "unknown"
            return pack(
                subject, names, most=2 * MOST_PART, unknown=opened.case.known.ignore, extra=extra, level=1
            )

    def values(self, opened: Opened) -> list[int]:
        """Return the class values that can be drawn, in order; what the browser draws is an index into it, from 1.

        Raises:
            ReadOnly: if they are more than one byte can tell apart.
        """
        found = {*values_of(opened.label), *self.classes}
        if opened.predicted is not None:
            found |= set(values_of(opened.predicted))
        if opened.case.known.ignore is not None:
            found.add(opened.case.known.ignore)
        values = sorted(value for value in found if value != 0)
        if len(values) > MOST_CLASSES or values[0] < 0:
            raise ReadOnly(f"{opened.case.id}: has negative or more than {MOST_CLASSES} class values")
        return values

    def save(
        self, number: int, part: int, base: str, values: Sequence[int], content: bytes, *, who: str = ""
    ) -> str:
        """Save what was drawn in a part of a case; the rest of the label stays.

        Args:
            number: Of the case.
            part: Of the scan.
            base: The version of the label that was opened.
            values: The class values as the browser was given them; they may be others by now, as a prediction has come.
            content: A zlib stream of a byte for each voxel of the part, in the order of `pack`: 0, or an index into
                `values`, from 1.
            who: Name of the person; that of the review when empty.

        Returns:
            The new version.

        Raises:
            Conflict: if the label has been changed since.
            UserError: if the content is not what it should be, or the label cannot be written.
        """
        with self._lock:
            opened = self.opened(number)
            slabs = self._slabs(opened.geometry)
            if not 0 <= part < len(slabs):
                raise UserError(f"{opened.case.id}: has no part {part + 1}")
            odd = sorted(set(values).difference(self.values(opened)))
            if odd and base == opened.version:  # of another version nothing is saved anyway
                raise UserError(
                    f"{opened.case.id}: {odd[0]} is no class of these labels, so nothing was saved"
                )
            turned, _ = towards_ras(opened.label, opened.geometry)
            turned = turned.copy()
            shape = turned[slabs[part]].shape
            drawn = _inflated(content, math.prod(shape)).reshape(shape)
            if drawn.max(initial=0) > len(values):
                raise UserError(f"{opened.case.id}: a class that there is not, so nothing was saved")
            turned[slabs[part]] = np.array([0, *values], np.int32)[drawn]
            label = from_ras(turned, opened.geometry)
            changed = int(np.count_nonzero(label != opened.label))
            version = self.shelf.save(
                opened.case, label, opened.geometry, base, who=who or self.who, changed=changed
            )
            opened.label, opened.version = label, version
            opened.case = self.case(number)
            return version

    def mark(self, number: int, what: str, *, who: str = "") -> None:
        """Write down that a case was accepted, rejected or skipped.

        Raises:
            UserError: if `what` is none of these, or the log cannot be written.
        """
        if what not in ("accept", "reject", "skip"):
            raise UserError(f"{what!r}: expected accept, reject or skip")
        self.shelf.mark(self.case(number), what, who=who or self.who)

    def audit(self, number: int) -> dict[str, Any]:
        """Judge a case's label as it is now by the run, in place of what the last audit said.

        Raises:
            UserError: if there is no run or no label, or the case cannot be judged.
        """
        from mlbseg.apps.audit.auditor import Auditor

        if self.run is None or self.device is None:
            raise UserError("an audit asks a trained run, expected a run folder to review")
        case = self.case(number)
        if case.label is None:
            raise UserError(f"{case.id}: has no label to judge (save one first)")
        with self._network_lock:
            auditor = Auditor(
                self.run,
                self.device,
                "regional",
                [case],
                given=True,
                propose=False,
                threshold=SUSPECTED,
                smallest=None,
            )
            judged = auditor.judge(case)
        with self._lock:
            opened = self.opened(number)
            opened.trust = judged.trust
            opened.audited = (
                f"trust now {judged.audited.trust:.3f}, {judged.audited.count} suspected region(s)"
            )
            self.items[number] = replace(self.items[number], reason=opened.audited)
        return {"audited": opened.audited}

    def predict(self, number: int) -> None:
        """Predict a case, unless that was done before; what goes wrong is kept in `failed`."""
        if self.run is None or self.device is None or number in self.failed:
            return
        with self._network_lock:
            try:
                case = self.case(number)
                path = self._mask_file(case)
                if path.is_file():
                    return
                if self._model is None:
                    self._model = Model([self.run], self.device)
                make_folder(path.parent)
                _, faults = predict_cases(self._model, [case], path.parent)
                if faults:
                    self.failed[number] = str(faults[0])
            except UserError as error:
                self.failed[number] = str(error)

    def _mask_file(self, case: Case) -> Path:
        assert self.run is not None  # noqa: S101 - asked for where there is a run
        return self.run.root / "review" / MASKS / f"{case.id}{mask_suffix(case.images)}"

    def _readonly(self, case: Case) -> str:
        try:
            self.shelf.label_path(case)
        except ReadOnly as error:
            return str(error)
        return ""

    def _suspected(self, opened: Opened) -> npt.NDArray[np.bool_] | None:
        """Return the suspected regions, by the audit's rule: somewhere thicker than two voxels."""
        if opened.trust is None:
            return None
        doubted = opened.trust < SUSPECTED
        inner = ndimage.binary_erosion(np.pad(doubted, 1, mode="edge"))[(slice(1, -1),) * doubted.ndim]
        numbered, count = ndimage.label(doubted, structure=np.ones((3,) * doubted.ndim))
        kept = np.zeros(count + 1, bool)
        kept[np.unique(numbered[inner & doubted])] = True
        kept[0] = False
        return np.asarray(kept[numbered])

    def _slabs(self, geometry: Geometry) -> list[tuple[slice, ...]]:
        """Return the parts of a scan, turned as `towards_ras` turns it: slabs of whole axial slices."""
        shape = towards_ras(np.zeros(geometry.size[::-1], np.uint8), geometry)[0].shape
        count = max(1, math.ceil(math.prod(shape) / MOST_PART))
        edges = np.linspace(0, shape[0], min(count, shape[0]) + 1).round().astype(int)
        return [(slice(int(a), int(b)),) for a, b in itertools.pairwise(edges)]

    def _telling(
        self, opened: Opened, suspected: npt.NDArray[np.bool_] | None, slabs: list[tuple[slice, ...]]
    ) -> int:
        if len(slabs) == 1:
            return 0
        looks = [suspected, opened.label != 0, None if opened.predicted is None else opened.predicted != 0]
        marked = next((mask for mask in looks if mask is not None and mask.any()), None)
        if marked is None:
            return len(slabs) // 2
        turned, _ = towards_ras(marked, opened.geometry)
        return int(np.argmax([np.count_nonzero(turned[slab]) for slab in slabs]))

    def _slab(
        self,
        opened: Opened,
        masks: dict[str, npt.NDArray[Any]],
        maps: dict[str, npt.NDArray[Any]],
        suspected: npt.NDArray[np.bool_] | None,
        slab: tuple[slice, ...],
    ) -> Subject:
        focus = suspected if suspected is not None and suspected.any() else None
        reason = next((i.reason for i in self.items if i.case.id == opened.case.id), "")
        if opened.geometry.ndim == 2:
            return Subject(opened.case.id, reason, opened.image, opened.geometry, masks, maps, focus)

        def cut(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
            return np.ascontiguousarray(towards_ras(array, opened.geometry)[0][slab])

        image, lattice = towards_ras(opened.image, opened.geometry)
        direction = np.reshape(lattice.direction, (3, 3))
        origin = np.asarray(lattice.origin) + direction[:, 2] * lattice.spacing[2] * slab[0].start
        cropped = image[slab]
        place = Geometry(cropped.shape[::-1], lattice.spacing, tuple(origin.tolist()), lattice.direction)
        focus = None if focus is None else cut(focus)
        return Subject(
            opened.case.id, reason, np.ascontiguousarray(cropped), place,
            {name: cut(mask) for name, mask in masks.items()}, {name: cut(m) for name, m in maps.items()},
            focus if focus is not None and focus.any() else None,
        )  # fmt: skip


def _first_classes(listing: Listing) -> dict[int, str]:
    """Return the class values of the first label that can be read, where nothing names them; one class without any."""
    for item in listing.items:
        if item.case.label is not None:
            try:
                found = values_of(read_label(item.case.label)[0])
            except UserError:
                continue
            if values := [value for value in found if value > 0 and value != item.case.known.ignore]:
                return {value: f"label {value}" for value in values}
    return {1: "label 1"}


def _inflated(content: bytes, count: int) -> npt.NDArray[np.uint8]:
    """Return so many bytes of a zlib stream, which must hold just these.

    Raises:
        UserError: if it is damaged, or holds more or fewer.
    """
    engine = zlib.decompressobj()
    try:
        found = engine.decompress(content, count + 1)
    except zlib.error:
        raise UserError("what was sent is damaged, so nothing was saved") from None
    if len(found) != count or not engine.eof:
        raise UserError("what was sent is not of the scan's size, so nothing was saved")
    return np.frombuffer(found, np.uint8)
