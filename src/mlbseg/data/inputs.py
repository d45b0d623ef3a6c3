"""What the files of cases hold, by content hash: while a run is made of them, none may change."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import stat
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from pydantic import TypeAdapter

from mlbseg.data.formats import dicom
from mlbseg.data.readers import pixel_file
from mlbseg.data.records import read_record, validate, write_record
from mlbseg.errors import Fault, FaultsError, ReadError, UserError
from mlbseg.types import Case, Role

INPUTS = "inputs.json"
"""Name of the record in the folder of a run."""

_RECORD = TypeAdapter(dict[str, dict[str, tuple[str, ...]]])
_GRAIN = 2 * 10**9  # ns; file systems' clocks tick more often
_hashes: dict[tuple[int, ...], str] = {}


class Inputs:
    """Content hashes of the files of cases: what is known of a file is what it must hold ever after.

    The label of a case counts where it is clean or noisy; that of another role is never opened.

    Attributes:
        known: Case id -> ``images`` and ``label`` -> the hash of each file.
        since: When they held this.
    """

    def __init__(
        self,
        known: Mapping[str, Mapping[str, tuple[str, ...]]] | None = None,
        *,
        since: str = "it was first read",
    ) -> None:
        self.known = {name: dict(parts) for name, parts in (known or {}).items()}
        self.since = since

    @classmethod
    def read(cls, path: Path, *, since: str = "the run began") -> Inputs:
        """Read a record.

        Raises:
            UserError: It is missing or damaged.
        """
        return cls(
            validate(_RECORD, read_record(path, "the content hashes of scans"), str(path)), since=since
        )

    def write(self, path: Path) -> None:
        """Write a record.

        Raises:
            UserError: It cannot be written.
        """
        write_record(path, self.known)

    def of(self, cases: Iterable[Case]) -> Inputs:
        """Return what is known of some cases, after a look at their files.

        Raises:
            UserError: As `require`.
        """
        chosen = list(cases)
        self.require(chosen)
        return Inputs({case.id: self.known.get(case.id, {}) for case in chosen}, since=self.since)

    def joined(self, later: Inputs) -> Inputs:
        """Return what is known, and what is known later of other files."""
        names = [*self.known, *later.known]
        return Inputs(
            {name: {**later.known.get(name, {}), **self.known.get(name, {})} for name in names},
            since=self.since,
        )

    def note(self, case: Case) -> None:
        """Remember what the files of a case hold, but those that cannot be read: whoever needs them will say so."""
        for part, files in _parts(case):
            try:
                hashes = tuple(content_hash(path) for path in files)
            except UserError:
                continue
            self.known.setdefault(case.id, {}).setdefault(part, hashes)

    def images(self, case: Case) -> tuple[str, ...]:
        """Return the hash of each image file of a case.

        Raises:
            UserError: One cannot be read, or has changed.
        """
        return self._same(case, "images", case.images)

    def label(self, case: Case) -> str:
        """Return the hash of the label file of a case.

        Raises:
            UserError: It cannot be read, or has changed.
        """
        assert case.label is not None  # noqa: S101 - only those in a role with a label are asked for it
        return self._same(case, "label", (case.label,))[0]

    def require(self, cases: Iterable[Case]) -> None:
        """Look at the files of cases.

        Raises:
            FaultsError: Some have changed; all are named.
            UserError: One cannot be read.
        """
        chosen = list(cases)
        for case in chosen:
            self.note(case)
        if faults := [fault for case in chosen for fault in self.changes(case)]:
            raise FaultsError(faults, "the scans")

    def changes(self, case: Case) -> Iterator[Fault]:
        """Yield a fault for each known file of a case that holds something else now.

        Raises:
            UserError: A file cannot be read.
        """
        for part, files in _parts(case):
            known = self.known.get(case.id, {}).get(part)
            if known is None:
                continue
            yield from self._differences(case, files, known, tuple(content_hash(path) for path in files))

    def _differences(
        self, case: Case, files: tuple[Path, ...], known: tuple[str, ...], now: tuple[str, ...]
    ) -> Iterator[Fault]:
        if len(now) != len(known):
            found, remedy = f"{len(now)} image file(s)", "restore them, or start a new run"
            yield Fault(case.id, found, f"{len(known)} as when {self.since}", remedy, case.id, "changed")
            return
        for path, one, other in zip(files, now, known, strict=True):
            if one != other:
                found = f"has changed since {self.since}"
                remedy = "restore it as it was then, or start a new run"
                yield Fault(str(path), found, remedy=remedy, case_id=case.id, kind="changed")

    def readable_changes(self, case: Case) -> list[Fault]:
        """Return the `changes` of a case; none if a file cannot be read, as whoever needs it will say so."""
        try:
            return list(self.changes(case))
        except UserError:
            return []

    def _same(self, case: Case, part: str, files: tuple[Path, ...]) -> tuple[str, ...]:
        now = tuple(content_hash(path) for path in files)
        if self.known.setdefault(case.id, {}).setdefault(part, now) == now:
            return now
        faults = list(self._differences(case, files, self.known[case.id][part], now))
        raise UserError("\n".join(map(str, faults)), faults=faults)


def _parts(case: Case) -> Iterator[tuple[str, tuple[Path, ...]]]:
    yield "images", case.images
    if case.label is not None and case.role in (Role.CLEAN, Role.NOISY):
        yield "label", (case.label,)


def content_hash(path: Path) -> str:
    """Return the SHA-256 of what a scan's path stands for.

    Of a DICOM series all slices count; of a header file also the data file that it names.

    Raises:
        UserError: A file cannot be read.
    """
    try:
        files = [path]
        if path.is_dir():
            files = dicom.slice_files(path) or sorted(p for p in path.iterdir() if p.is_file())
        digests = [_file_hash(file) for file in [*files, *_data_files(path)]]
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from error
    return combined_hash(digests)


def combined_hash(*parts: object) -> str:
    """Return the SHA-256 of what JSON can hold."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _file_hash(path: Path) -> str:
    """Hash a file once per process, as long as the file system says that it is the same."""
    if not stat.S_ISREG(path.stat().st_mode):  # a pipe would wait for ever
        raise OSError(errno.EINVAL, "not a file of bytes")
    with path.open("rb") as file:
        found = os.fstat(file.fileno())
        # Its time of writing can be set, as `cp -p` does; that of any change cannot.
        key = (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)
        if key in _hashes:
            return _hashes[key]
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    # Of a file that has just been changed another change could carry the same time.
    if time.time_ns() - found.st_ctime_ns > _GRAIN:
        _hashes[key] = digest
    return digest


def _data_files(path: Path) -> list[Path]:
    """Return the file beside a detached header that holds its pixels."""
    if path.is_dir():
        return []
    try:
        data = pixel_file(path)
    except ReadError:  # whoever reads the scan says why
        return []
    return [] if data == path else [data]
