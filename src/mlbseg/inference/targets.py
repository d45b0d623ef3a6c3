"""The files that are made of one scan, and where they go."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from mlbseg.data.readers import mask_suffix, stem, suffix
from mlbseg.errors import UserError
from mlbseg.files import require_free
from mlbseg.inference.model import Model
from mlbseg.types import Case

PROBABILITIES = "probabilities"
"""The folder of probabilities among the masks."""
UNCERTAINTY = "uncertainty"
"""The folder of maps of uncertainty among the masks."""

_VOLUMES = (".nii.gz", ".nii", ".nrrd", ".mha")
"""Endings of files that hold the mask of any scan, with its geometry."""
_PICTURES = {".png": (".png",), ".tif": (".tif", ".tiff")}
"""Further endings, by the ending that a scan's mask has."""


@dataclass(frozen=True)
class Targets:
    """The files that are made of one scan.

    Attributes:
        mask: Its mask.
        probabilities: A file for each class, the background first; none if they are not wanted.
        uncertainty: A file for each map of `Segmented.uncertainty`, by name; none if they are not wanted.
    """

    mask: Path
    probabilities: tuple[Path, ...] = ()
    uncertainty: Mapping[str, Path] = field(default_factory=dict)

    @property
    def all(self) -> list[Path]:
        """All files."""
        return [self.mask, *self.probabilities, *self.uncertainty.values()]

    def require_room(self, case: Case, *, overwrite: bool) -> None:
        """Refuse to write over a scan in any case, and over what is there unless it may be replaced.

        Raises:
            UserError: if a file is there already.
        """
        scans = {path.resolve() for path in case.images}
        for path in self.all:
            if path.resolve() in scans:
                raise UserError(f"{path} is the scan itself (choose another --out)")
            remedy = "pass --overwrite or --skip-existing, or write elsewhere"
            require_free(path, overwrite=overwrite, remedy=remedy)


def is_file_name(out: Path) -> bool:
    """Say whether a path is the name of one mask, and not of a folder of masks: it ends like a scan file."""
    return bool(suffix(out)) and not out.is_dir()


def targets(case: Case, out: Path, model: Model) -> Targets:
    """Return the files that are to be made of a case.

    Args:
        case: The case.
        out: The folder of the masks, or the name of one.
        model: Its options say what is wanted.

    Raises:
        UserError: if `out` is the name of a file that cannot hold the mask.
    """
    usual = mask_suffix(case.images)
    single = is_file_name(out)
    if single:
        endings = (*_VOLUMES, *_PICTURES.get(usual, ()))
        if suffix(out) not in endings:
            raise UserError(
                f"--out {out}: expected a name that ends in {', '.join(endings)} for a mask of this scan"
            )
    mask = out if single else out / f"{case.id}{usual}"
    name, ending = stem(mask), suffix(mask)
    ending = ".tiff" if ending == ".png" else ending  # PNG holds no floating point
    beside, options = mask.parent, model.options
    values = model.label_values if options.probabilities else ()
    kinds = ("entropy", "disagreement")[: min(len(model.runs), 2)] if options.uncertainty else ()
    return Targets(
        mask,
        tuple(beside / PROBABILITIES / f"{name}_{value}{ending}" for value in values),
        {kind: beside / UNCERTAINTY / f"{name}_{kind}{ending}" for kind in kinds},
    )
