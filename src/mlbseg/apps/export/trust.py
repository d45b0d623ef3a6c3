"""How far each voxel of a pseudo label is trusted: the network's own confidence, or maps that someone else made."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from mlbseg.data.geometry import onto
from mlbseg.data.places import entries
from mlbseg.data.readers import is_scan_file, read_scan, stem
from mlbseg.errors import Fault, ReadError, UserError
from mlbseg.types import Case, Geometry


class Trust(Protocol):
    """Where trust in pseudo labels comes from."""

    def __call__(
        self, case: Case, confidence: npt.NDArray[np.float32], native: Geometry
    ) -> npt.NDArray[np.float32]:
        """Return the trust in each voxel of a case, (*S) in 0 to 1, on its scan's own lattice.

        Args:
            case: The case.
            confidence: (*S), the probability of the class that is predicted.
            native: The lattice.
        """


def confidence_as_trust(
    case: Case, confidence: npt.NDArray[np.float32], native: Geometry
) -> npt.NDArray[np.float32]:
    """Trust the network as far as it trusts itself."""
    return confidence


@dataclass(frozen=True)
class TrustMaps:
    """A folder of maps, ID.nii.gz or in another format that masks have, such as `mlbseg audit` writes."""

    folder: Path

    def __post_init__(self) -> None:
        if not self.folder.is_dir():
            raise UserError(f"{self.folder}: not a folder, expected one of trust maps such as case_01.nii.gz")

    def __call__(
        self, case: Case, confidence: npt.NDArray[np.float32], native: Geometry
    ) -> npt.NDArray[np.float32]:
        """Return the case's map.

        Raises:
            UserError: if there is none, it lies elsewhere than the scan, or holds other values than 0 to 1.
        """
        path = next((p for p in entries(self.folder) if is_scan_file(p) and stem(p) == case.id), None)
        if path is None:
            raise UserError(
                f"{self.folder}: no trust map called {case.id}.nii.gz (make it, or leave the folder out)"
            )
        scan = read_scan([path])
        trust = onto(
            scan.array[0],
            scan.geometry,
            native,
            where=path.name,
            whose="in the scan",
            remedy="make the map on this scan",
            case_id=case.id,
        )
        if not (np.isfinite(trust).all() and trust.min() >= 0 and trust.max() <= 1):
            found = f"values from {trust.min():g} to {trust.max():g}"
            raise ReadError(Fault(path.name, found, "trust from 0 to 1", "scale the map", case.id, "trust"))
        return trust
