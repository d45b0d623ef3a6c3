"""Where scans are, and how they are to be understood."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mlbseg.data.cases import AS_DRAWN, Dataset, LabelOptions, find_cases, with_patients


@dataclass(frozen=True)
class DataSource:
    """A data set as a command names it.

    Attributes:
        data: The folder (or datalist); see `mlbseg.data.cases.find_cases` for the layouts.
        labels: All label values that may occur; None: those that the data declares, else those of its labels.
        patient: A regular expression whose first group, found in each case id, is the patient; None: recognised.
        options: What is said of all labels.
    """

    data: Path
    labels: Sequence[int] | None = None
    patient: str | None = None
    options: LabelOptions = AS_DRAWN

    def find(self) -> Dataset:
        """Return its cases, with their patients where these are known. No scan is read.

        Raises:
            UserError: if there are none, or the patients cannot be told.
        """
        return with_patients(find_cases(self.data, self.options), self.patient)
