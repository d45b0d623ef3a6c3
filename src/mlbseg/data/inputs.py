"""What the files of cases hold, by content hash: while a run is made of them, none may change."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path

from pydantic import TypeAdapter

from mlbseg.data.hashes import content_hash
from mlbseg.data.reading import HERE, Reading
from mlbseg.data.records import read_record, validate, write_record
from mlbseg.data.remembered import Remembered
from mlbseg.errors import Fault, FaultsError, UserError
from mlbseg.types import Case, Role

INPUTS = "inputs.json"
"""Name of the record in the folder of a run."""

_RECORD = TypeAdapter(dict[str, dict[str, tuple[str, ...]]])


class Inputs:
    """Content hashes of the files of cases: what is known of a file is what it must hold ever after.

    The label of a case counts where it is clean or noisy; that of another role is never opened.

    Attributes:
        known: Case id -> ``images`` and ``label`` -> the hash of each file.
        since: When they held this.
        remembered: Where the hashes of unchanged files are kept.
    """

    def __init__(
        self,
        known: Mapping[str, Mapping[str, tuple[str, ...]]] | None = None,
        *,
        since: str = "it was first read",
        remembered: Remembered = HERE.remembered,
    ) -> None:
        self.known = {name: dict(parts) for name, parts in (known or {}).items()}
        self.since = since
        self.remembered = remembered

    @classmethod
    def read(
        cls, path: Path, *, since: str = "the run began", remembered: Remembered = HERE.remembered
    ) -> Inputs:
        """Read a record.

        Raises:
            UserError: It is missing or damaged.
        """
        known = validate(_RECORD, read_record(path, "the content hashes of scans"), str(path))
        return cls(known, since=since, remembered=remembered)

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
        return self.without_look(chosen)

    def without_look(self, cases: Iterable[Case]) -> Inputs:
        """Return what is known of some cases."""
        known = {case.id: self.known.get(case.id, {}) for case in cases}
        return Inputs(known, since=self.since, remembered=self.remembered)

    def joined(self, later: Inputs) -> Inputs:
        """Return what is known, and what is known later of other files."""
        names = [*self.known, *later.known]
        return Inputs(
            {name: {**later.known.get(name, {}), **self.known.get(name, {})} for name in names},
            since=self.since,
            remembered=self.remembered,
        )

    def note(self, case: Case) -> None:
        """Remember what the files of a case hold, but those that cannot be read: whoever needs them will say so."""
        self._note(case, _held(case, self.remembered))

    def note_all(
        self,
        cases: Sequence[Case],
        *,
        reading: Reading = HERE,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        """Remember what the files of cases hold, as `note`.

        Args:
            cases: The cases.
            reading: In how many processes files are read.
            progress: Called with (cases done, cases in all).
        """
        held = reading.each(partial(_held, remembered=self.remembered), cases, progress=progress)
        with closing(held):
            for case, parts in zip(cases, held, strict=True):
                self._note(case, parts)

    def _note(self, case: Case, held: Mapping[str, tuple[str, ...]]) -> None:
        for part, hashes in held.items():
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
            now = tuple(content_hash(path, self.remembered) for path in files)
            yield from self._differences(case, files, known, now)

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
        now = tuple(content_hash(path, self.remembered) for path in files)
        if self.known.setdefault(case.id, {}).setdefault(part, now) == now:
            return now
        faults = list(self._differences(case, files, self.known[case.id][part], now))
        raise UserError("\n".join(map(str, faults)), faults=faults)


def _parts(case: Case) -> Iterator[tuple[str, tuple[Path, ...]]]:
    yield "images", case.images
    if case.label is not None and case.role in (Role.CLEAN, Role.NOISY):
        yield "label", (case.label,)


def _held(case: Case, remembered: Remembered) -> dict[str, tuple[str, ...]]:
    """Return the hashes of the parts of a case whose files can all be read."""
    held = {}
    for part, files in _parts(case):
        try:
            held[part] = tuple(content_hash(path, remembered) for path in files)
        except UserError:
            continue
    return held
