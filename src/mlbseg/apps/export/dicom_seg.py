"""Masks of DICOM series as DICOM segmentations that refer to their series, by highdicom."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import numpy.typing as npt
from pydantic import Field, TypeAdapter

from mlbseg.apps.export.labels import class_indices, colour
from mlbseg.apps.export.output import require_extra
from mlbseg.data.cases import find_scans
from mlbseg.data.formats import dicom
from mlbseg.data.geometry import onto
from mlbseg.data.plan import Plan
from mlbseg.data.readers import read_label
from mlbseg.data.records import read_record, validate
from mlbseg.device import pick_device
from mlbseg.errors import Fault, ReadError, UserError, nearest, one_case
from mlbseg.files import make_folder, write_atomic
from mlbseg.inference import Model, PredictOptions
from mlbseg.runs import Run
from mlbseg.runs.weights import WEIGHTS
from mlbseg.types import Case

if TYPE_CHECKING:
    from highdicom.seg import SegmentDescription
    from pydicom import Dataset

SERIES_NUMBER = 100
"""Of the segmentation's own series in its study."""

_Text = Annotated[str, Field(min_length=1, max_length=64)]
_Short = Annotated[str, Field(min_length=1, max_length=16)]
Codes = dict[str, tuple[_Short, _Short, _Text]]
"""Class name -> code value, coding scheme, meaning."""

STRUCTURE = ("123037004", "SCT", "Anatomical Structure")
"""What every segment is, in SNOMED CT: the category."""
ORGAN = ("113343008", "SCT", "Organ")
"""The type of a segment for which no code was given."""

_REQUIRED = ("StudyInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID", "SOPInstanceUID", "SOPClassUID")
"""Of each slice: without them nothing can refer to it."""
_MAY_BE_EMPTY = ("PatientID", "PatientName", "PatientBirthDate", "PatientSex", "StudyDate", "StudyTime", "StudyID",
                 "AccessionNumber", "ReferringPhysicianName")  # fmt: skip
"""What the standard wants of each slice, if empty."""


@dataclass
class Segmentations:
    """What `export_dicom_seg` did.

    Attributes:
        files: The segmentation of each case.
        faults: Series that could not be exported; the others were.
    """

    files: dict[str, Path] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)


def export_dicom_seg(
    run: Run,
    out: Path,
    *,
    scans: Path,
    masks: Path | None = None,
    codes: Path | None = None,
    fractional: bool = False,
    network: str | None = None,
    device: str = "auto",
    overwrite: bool = False,
    progress: Callable[[int, int, str], None] | None = None,
) -> Segmentations:
    """Write a DICOM segmentation, ID.dcm, for each DICOM series.

    Args:
        run: The run; its plan names the classes.
        out: The folder for the segmentations.
        scans: A folder of one DICOM series, or of such folders.
        masks: A folder of masks that `mlbseg predict` wrote for these series; they are predicted now when None.
        codes: A JSON file: class name -> [code value, coding scheme, meaning], the segments' types.
        fractional: Write each class's probability, in 255ths, in place of the likeliest class.
        network: ``student`` or ``teacher``; the method's preferred one when None.
        device: ``auto``, ``cpu``, ``cuda`` ...
        overwrite: Replace segmentations that are there already; without it they are a fault.
        progress: Called with (done, all, case id).

    Raises:
        UserError: if nothing can be exported at all.
    """
    require_extra("the format dicom-seg", "highdicom")
    if run.plan.scan_ndim != 3:
        raise UserError(
            f"{run.root}: a model of 2D images, and a DICOM segmentation is made for a series of slices "
            "(train on 3D scans; plan.ndim=2 segments them slice by slice)"
        )
    if masks is not None and fractional:
        raise UserError(
            "--fractional writes probabilities, which --masks does not hold (leave one of them out)"
        )
    known = read_codes(codes, run.plan)
    found = find_scans(scans, run.plan.channels)
    model = Model([run], pick_device(device), PredictOptions(network)) if masks is None else None
    make_folder(out)
    result = Segmentations(faults=list(found.faults))
    for number, case in enumerate(found.cases):
        if progress is not None:
            progress(number, len(found.cases), case.id)
        place = out / f"{case.id}.dcm"
        with one_case(case.id, result.faults, "export", "series"):
            if place.exists() and not overwrite:
                raise UserError(f"{place} exists already (pass --overwrite, or another OUT)")
            _require_series(case)
            segments = (
                _from_mask(case, masks, run.plan)
                if masks is not None
                else _predicted(case, model, fractional=fractional)
            )
            write_atomic(place, segmentation(case, segments, run, known))
            result.files[case.id] = place
    if progress is not None:
        progress(len(found.cases), len(found.cases), "")
    return result


def read_codes(path: Path | None, plan: Plan) -> Codes:
    """Return the code of each class, of the file or `ORGAN`.

    Raises:
        UserError: if the file holds something else, or names a class that the plan does not have.
    """
    known: Codes = dict.fromkeys(plan.class_names[1:], ORGAN)
    if path is None:
        return known
    record = read_record(path, "class name -> [value, scheme, meaning]")
    for name, code in record.items():
        if name not in known:
            raise UserError(f"{path}: no class is called {name!r}: {nearest(name, known)}")
        if not (isinstance(code, list) and len(code) == 3 and all(isinstance(part, str) for part in code)):
            raise UserError(
                f"{path}: {name!r} has {code!r}, expected three texts [value, scheme, meaning], such as {list(ORGAN)}"
            )
    return {**known, **validate(TypeAdapter(Codes), record, str(path))}


def segmentation(case: Case, segments: npt.NDArray[Any], run: Run, codes: Mapping[str, Any]) -> bytes:
    """Return a DICOM file that holds segments and refers to the slices that they were drawn on.

    Args:
        case: Its one image is the folder of the series.
        segments: (Z, Y, X) uint8 class indices, or (Z, Y, X, K - 1) float32 probabilities of all but background.
        run: Names the algorithm and the classes.
        codes: From `read_codes`.

    Raises:
        ReadError: if no segmentation can refer to the series as it is.
    """
    from highdicom import UID
    from highdicom.seg import Segmentation

    sources, order = _sources(case)
    segments = segments[order]
    described = _descriptions(run, codes)
    weights = run.root / WEIGHTS
    mark = hashlib.sha256(weights.read_bytes()).hexdigest()[:16] if weights.is_file() else "0"
    content = io.BytesIO()
    try:
        dataset = Segmentation(
            source_images=sources,
            pixel_array=segments,
            segmentation_type="BINARY" if segments.ndim == 3 else "FRACTIONAL",
            fractional_type="PROBABILITY",
            segment_descriptions=described,
            series_instance_uid=UID(),
            series_number=SERIES_NUMBER,
            sop_instance_uid=UID(),
            instance_number=1,
            manufacturer="mlbseg",
            manufacturer_model_name=f"{run.config.method} {run.plan.network}",
            software_versions=version("mlbseg"),
            device_serial_number=mark,  # which weights: there is no device
            content_label="MLBSEG",
            content_description="Segmented by a network, not by a person",
            series_description="mlbseg segmentation",
        )
        dataset.save_as(content)
    except (AttributeError, ValueError, OSError) as error:  # highdicom cannot take the headers
        raise _unfit(case, str(error)) from error
    return content.getvalue()


def _descriptions(run: Run, codes: Mapping[str, Any]) -> list[SegmentDescription]:
    from highdicom import AlgorithmIdentificationSequence
    from highdicom.color import CIELabColor
    from highdicom.seg import SegmentDescription
    from highdicom.sr import CodedConcept
    from pydicom.sr.codedict import codes as dictionary

    algorithm = AlgorithmIdentificationSequence(
        name=f"mlbseg {run.config.method}",
        version=version("mlbseg"),
        family=dictionary.cid7162.ArtificialIntelligence,
    )

    def concept(code: tuple[str, str, str]) -> CodedConcept:
        return CodedConcept(value=code[0], scheme_designator=code[1], meaning=code[2])

    return [
        SegmentDescription(
            segment_number=index,
            segment_label=name[:64],
            segmented_property_category=concept(STRUCTURE),
            segmented_property_type=concept(codes[name]),
            algorithm_type="AUTOMATIC",
            algorithm_identification=algorithm,
            tracking_uid=None,
            display_color=CIELabColor.from_rgb(*colour(index)),
        )
        for index, name in enumerate(run.plan.class_names[1:], start=1)
    ]


def _sources(case: Case) -> tuple[list[Dataset], list[int]]:
    """Return the headers of a series in the order of its slices, and which slice each of its planes is.

    A file of many frames is one source, with planes in the order in which its frames are stored. Filled
    in are those that archives leave out: empty where the standard allows it, and sizes from the volume.

    Raises:
        ReadError: if a file cannot be read, or names no study, series, frame of reference or instance.
    """
    from pydicom import dcmread
    from pydicom.errors import InvalidDicomError
    from pydicom.valuerep import DSfloat

    series = dicom.series(case.images[0])
    frames = series.frames
    files = list(dict.fromkeys(frame.path for frame in frames))
    if len(files) > 1 and any(frame.count > 1 for frame in frames):
        raise _unfit(case, f"frames in {len(files)} files")
    order = sorted(
        range(len(frames)), key=lambda k: frames[k].index
    )  # of single slices, all of index 0, none moves
    x, y, z = (DSfloat(value, auto_format=True) for value in series.geometry.spacing)
    sources = []
    for file in files:
        try:
            dataset = dcmread(file, stop_before_pixels=True, force=True)  # older files have no preamble
            absent = [keyword for keyword in _REQUIRED if not dataset.get(keyword)]
            sizes = [keyword for keyword in ("PixelSpacing", "SliceThickness") if not dataset.get(keyword)]
        except (AttributeError, ValueError, InvalidDicomError, OSError) as error:
            raise _unfit(case, str(error), file) from error
        if absent:
            raise _unfit(case, f"no {', no '.join(absent)}", file)
        if len(files) == len(frames):  # of several frames, their functional groups say it
            if "PixelSpacing" in sizes:
                dataset.PixelSpacing = [y, x]  # of rows, then of columns
            if "SliceThickness" in sizes:
                dataset.SliceThickness = z
        for keyword in _MAY_BE_EMPTY:
            if keyword not in dataset:
                setattr(dataset, keyword, None)
        sources.append(dataset)
    return sources, order


def _unfit(case: Case, found: str, file: Path | None = None) -> ReadError:
    return ReadError(
        Fault(
            case.id if file is None else f"{case.id}/{file.name}",
            found,
            "the headers of a DICOM series that a segmentation can refer to",
            "get the series from the archive again with its UIDs, or use the masks of `mlbseg predict`",
            case.id,
            "dicom",
        )
    )


def _require_series(case: Case) -> None:
    if len(case.images) != 1 or not (case.images[0].is_dir() or dicom.is_dicom(case.images[0])):
        raise ReadError(
            Fault(
                case.images[0].name,
                "not a DICOM series",
                "a folder of DICOM slices, to which the segmentation can refer",
                "use the masks of `mlbseg predict` for other formats",
                case.id,
                "dicom",
            )
        )


def _from_mask(case: Case, masks: Path, plan: Plan) -> npt.NDArray[np.uint8]:
    """Return the class indices (Z, Y, X) of a case's mask."""
    path = masks / f"{case.id}.nii.gz"
    if not path.is_file():
        raise UserError(f"{path}: no such mask (make it with `mlbseg predict`, or leave --masks out)")
    label, geometry = read_label(path)
    expected = dicom.series(case.images[0]).geometry
    label = onto(
        label,
        geometry,
        expected,
        where=path.name,
        whose="in the series",
        remedy="predict on this series",
        case_id=case.id,
    )
    return class_indices(label, plan, path.name)


def _predicted(case: Case, model: Model | None, *, fractional: bool) -> npt.NDArray[Any]:
    """Return class indices (Z, Y, X), or probabilities (Z, Y, X, K - 1)."""
    if model is None:
        raise ValueError("a network is needed to predict")
    segmented = model.segment_case(case)
    if not fractional:
        return class_indices(segmented.mask(), model.runs[0].plan, case.id)
    *structures, _ = segmented.probabilities()
    return np.stack(structures, axis=-1).clip(0, 1)
