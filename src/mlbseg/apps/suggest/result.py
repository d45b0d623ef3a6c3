"""What `suggest` returns, and how it is shown and written."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from mlbseg.errors import Fault
from mlbseg.files import write_table
from mlbseg.tables import data_frame
from mlbseg.terminal import plain

if TYPE_CHECKING:
    import pandas as pd

COLUMNS = (
    "rank",
    "case",
    "score",
    "uncertainty",
    "distance_to_labelled",
    "nearest_labelled",
    "nearest_picked",
    "reason",
)
"""Of the CSV file, which are the fields of a `Suggestion`."""


@dataclass(frozen=True)
class Suggestion:
    """A scan to label.

    Attributes:
        rank: From 1, in the order of the picks: the first k are the choice for k labels.
        case: Its id.
        score: What it gains by the rule, as a share of the doubt about all candidates; see `choose.py`.
        uncertainty: 1 minus the Dice that the network expects of its own mask.
        distance_to_labelled: To the nearest labelled scan; 1 is the median distance between two candidates.
        nearest_labelled: Id of that scan.
        nearest_picked: Id of the nearest scan of a lower rank; empty for the first.
        reason: All this in words.
    """

    rank: int
    case: str
    score: float
    uncertainty: float
    distance_to_labelled: float
    nearest_labelled: str
    nearest_picked: str
    reason: str


@dataclass(frozen=True)
class Suggestions:
    """What `suggest` found.

    Attributes:
        suggested: The scans to label, best first.
        candidates: Number of scans that were looked at to choose from.
        labelled: Number of labelled scans that they were compared with.
        left_out: Ids of scans that are labelled or set apart for testing already, and were passed over.
        faults: Scans that could not be looked at.
        notes: Files that were passed over.
    """

    suggested: tuple[Suggestion, ...]
    candidates: int
    labelled: int
    left_out: tuple[str, ...] = ()
    faults: tuple[Fault, ...] = ()
    notes: tuple[Fault, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """Return everything as lists, strings and finite numbers, for JSON."""
        return {
            "suggested": [asdict(row) for row in self.suggested],
            "candidates": self.candidates,
            "labelled": self.labelled,
            "left_out": list(self.left_out),
            "faults": [fault.as_dict() for fault in self.faults],
            "notes": [note.as_dict() for note in self.notes],
        }

    def table(self) -> Table:
        """Return rank, case, score and reason of each."""
        title = f"label next, of {self.candidates} scans ({self.labelled} labelled)"
        table = Table("", "case", "score", "reason", title=title)
        table.columns[0].justify = table.columns[2].justify = "right"
        for row in self.suggested:
            table.add_row(str(row.rank), plain(row.case), f"{row.score:.3f}", plain(row.reason))
        return table

    def write_csv(self, path: Path) -> None:
        """Write one line per suggestion, whole or not at all.

        Raises:
            UserError: if `path` cannot be written.
        """
        write_table(path, map(asdict, self.suggested), COLUMNS)

    def to_pandas(self) -> pd.DataFrame:
        """Return one row per suggestion, with `COLUMNS`.

        Raises:
            UserError: if pandas is not installed.
        """
        return data_frame(map(asdict, self.suggested), COLUMNS)
