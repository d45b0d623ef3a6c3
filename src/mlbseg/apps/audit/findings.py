"""What an audit found, and its tables."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mlbseg.apps.audit.regions import Region
from mlbseg.errors import Fault
from mlbseg.tables import data_frame

if TYPE_CHECKING:
    import pandas as pd

USUAL = 0.7
"""Median trust of the cases below which the networks are to be doubted first; sound ones leave about 0.9."""
GIVEN = "given"  # what tables call the role of labels that the user named


@dataclass(frozen=True)
class Audited:
    """A case and how far its label is to be believed.

    Attributes:
        case: Its id.
        role: ``clean`` or ``noisy``, as in training, or ``given``.
        trust: Share of the voxels of any structure, by the label or by the prediction, that are trusted.
        by_class: The same of each class value but background; None where neither has it.
        suspected: Volume of the suspected regions, mm³ (mm² in 2D).
        regions: The largest of them.
        count: How many there are.
        undrawn: Volume of unknown voxels that are surely a structure, mm³ (mm² in 2D): there is something to draw.
    """

    case: str
    role: str
    trust: float
    by_class: dict[int, float | None]
    suspected: float
    regions: tuple[Region, ...]
    count: int
    undrawn: float = 0.0


@dataclass(frozen=True)
class Audit:
    """What `audit` found.

    Attributes:
        out: Where it was written.
        way: A name in `mlbseg.apps.audit.trust.WAYS`.
        threshold: Voxels below it were not trusted.
        class_names: Of each class value but background.
        unit: Of volumes: ``mm³``, or ``mm²`` in 2D.
        cases: The least trusted first.
        faults: Cases that could not be judged.
        notes: Files that were ignored.
    """

    out: Path
    way: str
    threshold: float
    class_names: dict[int, str]
    unit: str
    cases: tuple[Audited, ...]
    faults: tuple[Fault, ...]
    notes: tuple[Fault, ...] = ()

    @property
    def caution(self) -> str:
        """Why the networks may be worse than the labels; empty if nothing says so."""
        median = statistics.median(found.trust for found in self.cases)
        if median >= USUAL:
            return ""
        return (
            f"half of the labels have a trust below {median:.2f}: either most of them are wrong, or the networks are "
            "not good enough to judge them (look at a few; then train longer, or with more careful labels)"
        )

    def as_dict(self) -> dict[str, object]:
        """Return the findings, for `--json`."""
        return {
            "out": str(self.out),
            "method": self.way,
            "threshold": self.threshold,
            "note": self.caution,
            "cases": self.case_rows(),
            "regions": self.region_rows(),
            "faults": [fault.as_dict() for fault in self.faults],
            "notes": [note.as_dict() for note in self.notes],
        }

    def case_rows(self) -> list[dict[str, object]]:
        """Return the lines of `cases.csv`."""
        return [case_row(rank, found, self.class_names) for rank, found in enumerate(self.cases, 1)]

    def region_rows(self) -> list[dict[str, object]]:
        """Return the lines of `regions.csv`."""
        return [row for found in self.cases for row in region_rows(found)]

    def to_pandas(self) -> pd.DataFrame:
        """Return one row per case, the least trusted first.

        Raises:
            UserError: if pandas is not installed.
        """
        return data_frame(self.case_rows())

    def regions_to_pandas(self) -> pd.DataFrame:
        """Return one row per suspected region, with `REGION_COLUMNS`.

        Raises:
            UserError: if pandas is not installed.
        """
        return data_frame(self.region_rows(), REGION_COLUMNS)


REGION_COLUMNS = (
    "case", "number", "label", "suggested", "voxels", "volume", "trust",
    "x_index", "y_index", "z_index", "x_mm", "y_mm", "z_mm",
)  # fmt: skip


def case_row(rank: int, found: Audited, names: dict[int, str]) -> dict[str, object]:
    """Return a case's line of `cases.csv`."""
    by_class = {
        f"trust_{names.get(value, value)}": None if trust is None else round(trust, 4)
        for value, trust in found.by_class.items()
    }
    return {
        "rank": rank,
        "case": found.case,
        "role": found.role,
        "trust": round(found.trust, 4),
        "suspected_volume": round(found.suspected, 2),
        "regions": found.count,
        "undrawn_volume": round(found.undrawn, 2),
        **by_class,
    }


def region_rows(found: Audited) -> list[dict[str, object]]:
    """Return a case's lines of `regions.csv`."""
    rows: list[dict[str, object]] = []
    for number, region in enumerate(found.regions, 1):
        index, position = ([*values, ""][:3] for values in (region.index, region.position))
        rows.append(
            {
                "case": found.case,
                "number": number,
                "label": region.label,
                "suggested": region.suggested,
                "voxels": region.voxels,
                "volume": round(region.volume, 2),
                "trust": round(region.trust, 4),
                **dict(zip(("x_index", "y_index", "z_index"), index, strict=True)),
                **{
                    name: value if value == "" else round(float(value), 2)
                    for name, value in zip(("x_mm", "y_mm", "z_mm"), position, strict=True)
                },
            }
        )
    return rows
