"""A folder of scans read once, with everything that is wrong in it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from mlbseg.data.check import CheckResult
from mlbseg.data.check import check as check_dataset
from mlbseg.data.source import DataSource

__all__ = ["CheckResult", "check"]


def check(
    data: str | Path,
    *,
    labels: Sequence[int] | None = None,
    patient: str | None = None,
    allow_empty: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> CheckResult:
    """Read every scan and label once and report all faults together. Nothing is written.

    Args:
        data: The folder (or datalist); see `mlbseg.data.cases.find_cases` for the layouts.
        labels: All label values that may occur; those that the data declares, else those that its labels agree on,
            when None.
        patient: A regular expression whose first group, found in each case id, is the patient; recognised when None.
        allow_empty: Careful labels without any structure are accepted: these scans have nothing to find.
        progress: Called with (cases done, cases in all).

    Returns:
        Faults, warnings and a summary. A fault is reported, not raised.

    Raises:
        UserError: if there are no cases at all.
    """
    source = DataSource(Path(data), labels, patient, allow_empty)
    return check_dataset(source.find(), labels=source.labels, progress=progress)
