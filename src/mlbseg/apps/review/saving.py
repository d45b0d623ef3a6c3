"""Writing a corrected label: never over another's work, never half, and never without keeping the old one.

A label file is replaced by a rename. Before that the old one is copied to ``labels_history`` beside the labels' folder;
after it a line goes to ``labels_history/log.jsonl``. A kill at any moment leaves the old label or the new one.
"""

from __future__ import annotations

import getpass
import hashlib
import json
import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from filelock import FileLock, Timeout

from mlbseg.data.formats.slicer import ENDING
from mlbseg.data.places import is_file
from mlbseg.data.readers import is_hdf5, mask_suffix, pixel_file, suffix, write_label
from mlbseg.errors import ReadError, UserError
from mlbseg.files import make_folder, write_atomic
from mlbseg.types import Case, Geometry

HISTORY = "labels_history"
LOG = "log.jsonl"
WRITABLE = (".nii.gz", ".nii", ".nrrd", ".mha", ".png", ".tif", ".tiff")
WAIT = 20.0
"""Seconds that a save waits for another one."""

NONE = "none"
"""The version of a label that is not there."""


class ReadOnly(UserError):
    """A label that cannot be written here, and why."""


class Conflict(UserError):
    """The label was changed since it was opened."""


class Shelf:
    """The labels of a folder of scans.

    Args:
        root: The folder; nothing outside it is read or written.
        layout: As `mlbseg.data.cases.find_cases` names it.
    """

    def __init__(self, root: Path, layout: str) -> None:
        self.root, self.layout = root.resolve(), layout
        self._threads = threading.Lock()

    def inside(self, path: Path) -> bool:
        """Say whether a path, its links followed, lies in the folder."""
        try:
            return path.resolve().is_relative_to(self.root)
        except (OSError, RuntimeError):
            return False

    def require_inside(self, case: Case) -> None:
        """Refuse a case of which a file, or a slice of its folder, lies outside.

        Raises:
            UserError: with the file.
        """
        for path in (*case.images, *(() if case.label is None else (case.label,))):
            below = path.iterdir() if path.is_dir() else ()
            for each in (path, *below):
                if not self.inside(each):
                    raise UserError(
                        f"{each.name}: a link that leads out of {self.root.name}, which a review does not follow "
                        "(put the file itself there)"
                    )

    def label_path(self, case: Case) -> Path:
        """Return the file that a case's label is written to.

        Raises:
            ReadOnly: if it cannot be written here.
        """
        path = case.label
        if path is None:
            path = self._new(case)
        elif is_hdf5(path):
            raise ReadOnly(f"{path.name}: scan and label are in one file, which is not written here")
        elif path.name.lower().endswith(ENDING):
            raise ReadOnly(f"{path.name}: names of segments would be lost (correct it in 3D Slicer)")
        elif suffix(path) not in WRITABLE or not is_file(path):
            raise ReadOnly(f"{path.name}: is not written here, expected one of {' '.join(WRITABLE)}")
        else:
            try:
                detached = pixel_file(path) != path
            except ReadError as error:
                raise ReadOnly(str(error)) from None
            if detached:
                raise ReadOnly(f"{path.name}: its pixels are in a second file (save it as .mha or .nrrd)")
        if path.is_symlink() or not self.inside(path) or not self.inside(path.parent):
            raise ReadOnly(f"{path.name}: a link, or outside {self.root.name}, so it is not written here")
        return path

    def _new(self, case: Case) -> Path:
        ending = mask_suffix(case.images)
        folders = {
            "images/ + labels/": "labels",
            "imagesTr/ + labelsTr/": "labelsTr",
            "nnU-Net v2": "labelsTr",
        }
        if self.layout in folders:
            return self.root / folders[self.layout] / f"{case.id}{ending}"
        if self.layout == "PROMISE12":
            return self.root / f"{case.id}_segmentation{ending}"
        raise ReadOnly(
            f"{case.id}: has no label, and of {self.layout} it is not known where a new one belongs (put a first label "
            "there with another program; the review then corrects it)"
        )

    def version(self, case: Case) -> str:
        """Return what tells the label as it is now from any other; `NONE` without one."""
        path = case.label if case.label is not None else self._expected(case)
        if path is None or not path.is_file():
            return NONE
        return hashlib.sha256(path.read_bytes()).hexdigest()

    def _expected(self, case: Case) -> Path | None:
        try:
            return self._new(case)
        except ReadOnly:
            return None

    def save(
        self,
        case: Case,
        label: npt.NDArray[np.integer],
        geometry: Geometry,
        base: str,
        *,
        who: str,
        changed: int,
    ) -> str:
        """Write a label (*S) on its scan's lattice, keep the old one, and write it down.

        Args:
            case: The case.
            label: Class values.
            geometry: The scan's.
            base: The version that was opened.
            who: Name of the person.
            changed: Voxels that differ from the old label, for the log.

        Returns:
            The new version.

        Raises:
            Conflict: if the label is no longer the one that was opened.
            ReadOnly: if it cannot be written here.
            UserError: if the disk is full or the like; the old label is intact.
        """
        with self._alone():
            path = self.label_path(case)
            now = self.version(case)
            if now != base:
                raise Conflict(
                    f"{case.id}: the label has been changed since it was opened here; {self.last(case.id, now)}"
                )
            kept = self._keep(case, path) if path.is_file() else None
            make_folder(path.parent)
            write_label(path, label, geometry)
            new = hashlib.sha256(path.read_bytes()).hexdigest()
            self._write_down(
                what="save", who=who, case=case.id, file=str(path.resolve().relative_to(self.root)), changed=changed,
                base=base, version=new, kept=kept,
            )  # fmt: skip
        return new

    def mark(self, case: Case, what: str, *, who: str) -> None:
        """Write down that a case was accepted, rejected or skipped.

        Raises:
            UserError: if the log cannot be written.
        """
        with self._alone():
            self._write_down(what=what, who=who, case=case.id, version=self.version(case))

    def entries(self) -> list[dict[str, Any]]:
        """Return the lines of the log, the oldest first; a line that was cut off by a kill is left out."""
        path = self.root / HISTORY / LOG
        if path.is_symlink() or not path.is_file():
            return []
        found = []
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                entry = json.loads(line)
            except ValueError:
                continue
            if isinstance(entry, dict) and isinstance(entry.get("case"), str):
                found.append(entry)
        return found

    def last(self, case: str, version: str) -> str:
        """Say who made this version of a label, as far as the log knows."""
        for entry in reversed(self.entries()):
            if (entry["case"], entry.get("what"), entry.get("version")) == (case, "save", version):
                return f"{entry.get('who')} saved it at {entry.get('when')}"
        return "another program did it"

    def _keep(self, case: Case, path: Path) -> str:
        moment = datetime.now(UTC).strftime("%Y%m%dT%H%M%S.%fZ")
        name = f"{case.id}.{moment}{suffix(path)}"
        write_atomic(self.root / HISTORY / name, path.read_bytes())
        return name

    def _write_down(self, **entry: Any) -> None:
        entry = {
            "when": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "host": socket.gethostname(),
            **entry,
        }
        path = self.root / HISTORY / LOG
        line = json.dumps(entry, ensure_ascii=False).encode(errors="backslashreplace") + b"\n"
        try:
            descriptor = os.open(
                path, os.O_RDWR | os.O_APPEND | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o644
            )
            with os.fdopen(descriptor, "rb+") as file:
                size = file.seek(0, os.SEEK_END)
                if size and (file.seek(-1, os.SEEK_END), file.read(1))[1] != b"\n":
                    line = b"\n" + line  # a kill has cut the last line off
                file.write(line)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise UserError(f"{path}: cannot be written: {error.strerror or error}") from None

    @contextmanager
    def _alone(self) -> Iterator[None]:
        folder = self.root / HISTORY
        make_folder(folder)
        if folder.is_symlink():
            raise ReadOnly(f"{HISTORY}: a link, which is not followed (make it a folder)")
        with self._threads:
            try:
                with FileLock(folder / ".lock", timeout=WAIT):
                    yield
            except Timeout:
                raise UserError(
                    f"{folder}: another save has not ended for {WAIT:.0f} s (try again)"
                ) from None
            except OSError as error:
                raise UserError(f"{folder}: cannot be written: {error.strerror or error}") from None


def user() -> str:
    """Return the name of whoever runs this program."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return "unknown"
