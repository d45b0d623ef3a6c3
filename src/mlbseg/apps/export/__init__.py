"""Hand-over: what a run has learned, in the formats of other programs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlbseg.apps.export.bundle import export_bundle
from mlbseg.apps.export.dicom_seg import export_dicom_seg
from mlbseg.apps.export.labels import export_labels
from mlbseg.apps.export.nnunet import export_nnunet
from mlbseg.apps.export.onnx import export_onnx
from mlbseg.errors import Fault, UserError, nearest
from mlbseg.inference import Progress
from mlbseg.runs import Run


@dataclass
class Exported:
    """What `export` did.

    Attributes:
        files: What was written; of a data set its folder.
        faults: Cases that were left out.
        next: What to do with it, in a line.
    """

    files: list[Path] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    next: str = ""

    def as_dict(self) -> dict[str, Any]:
        """Return everything as lists and strings, for JSON."""
        return {
            "files": [str(path) for path in self.files],
            "next": self.next,
            "faults": [fault.as_dict() for fault in self.faults],
        }


@dataclass(frozen=True)
class Format:
    """A format that runs are exported in.

    Attributes:
        write: Called with the run, the folder, and the options that were given, those below and `overwrite`.
        summary: What it is.
        options: Names of its own options.
        needs: Those of them that must be given.
        works_on_scans: It goes through scans, on a device, and shows progress.
    """

    write: Callable[..., Exported]
    summary: str
    options: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    works_on_scans: bool = False


def _bundle(run: Run, out: Path, **options: Any) -> Exported:
    files = export_bundle(run, out, **options)
    return Exported(
        files, next="python -m monai.bundle run --config_file configs/inference.json, in its folder"
    )


def _onnx(run: Run, out: Path, **options: Any) -> Exported:
    return Exported(export_onnx(run, out, **options), next="model.json says how to prepare scans for it")


def _labels(run: Run, out: Path, **options: Any) -> Exported:
    return Exported(
        export_labels(run, out, **options), next="in ITK-SNAP: Segmentation > Import Label Descriptions"
    )


def _nnunet(run: Run, out: Path, **options: Any) -> Exported:
    result = export_nnunet(run, out, **options)
    number = result.root.name[len("Dataset") :].partition("_")[0]
    then = f"nnUNetv2_plan_and_preprocess -d {int(number)} --verify_dataset_integrity"
    return Exported([result.root], result.faults, then)


def _dicom_seg(run: Run, out: Path, **options: Any) -> Exported:
    result = export_dicom_seg(run, out, **options)
    return Exported(list(result.files.values()), result.faults)


FORMATS: dict[str, Format] = {
    "bundle": Format(_bundle, "a MONAI bundle: runs with MONAI and MONAI Label", ("network",)),
    "onnx": Format(_onnx, "the network as ONNX, and how to prepare scans for it", ("network",)),
    "nnunet": Format(
        _nnunet,
        "a raw dataset for nnU-Net v2 of careful and pseudo labels",
        ("network", "data", "dataset", "trust", "trust_maps", "also"),
        works_on_scans=True,
    ),
    "itksnap": Format(_labels, "class names and colours for ITK-SNAP and 3D Slicer"),
    "dicom-seg": Format(
        _dicom_seg,
        "DICOM segmentations that refer to their series",
        ("network", "scans", "masks", "codes", "fractional"),
        needs=("scans",),
        works_on_scans=True,
    ),
}


def export(
    run: str | Path,
    out: str | Path,
    format: str,
    *,
    overwrite: bool = False,
    device: str = "auto",
    progress: Progress | None = None,
    **options: Any,
) -> Exported:
    """Hand a run over to another program.

    Args:
        run: The run folder.
        out: The folder to write into.
        format: A key of `FORMATS`.
        overwrite: Replace files that are there already.
        device: ``auto``, ``cpu``, ``cuda`` ... for formats that go through scans.
        progress: Called with (done, all, case id) by these.
        options: Of the format, as its function in this package has them; those that are None were not given.

    Raises:
        UserError: if the format is unknown, an option is another's or missing, or nothing can be exported at all.
    """
    if format not in FORMATS:
        raise UserError(f"unknown format {format!r}: {nearest(format, FORMATS)}")
    chosen = FORMATS[format]
    given = {name: value for name, value in options.items() if value is not None}
    _require_own(format, given)
    if chosen.works_on_scans:
        given |= {"device": device, "progress": progress}
    return chosen.write(Run.open(Path(run)), Path(out), overwrite=overwrite, **given)


def _require_own(name: str, given: Mapping[str, Any]) -> None:
    """Refuse options of other formats, and the lack of one that is needed."""
    for option in given:
        if option not in FORMATS[name].options:
            others = [other for other, kind in FORMATS.items() if option in kind.options]
            if not others:
                raise TypeError(f"export() got an unexpected option {option!r}")
            raise UserError(
                f"--{_dashed(option)}: an option of {', '.join(others)}, not of {name} (leave it out)"
            )
    for option in FORMATS[name].needs:
        if option not in given:
            raise UserError(f"the format {name} needs --{_dashed(option)} (see mlbseg export --help)")


def _dashed(option: str) -> str:
    return option.replace("_", "-")
