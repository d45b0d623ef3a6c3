"""A raw dataset for nnU-Net v2: careful labels, and pseudo labels in which voxels not trusted are ignored."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import SimpleITK as sitk  # noqa: N813 - as its documentation does

from mlbseg.apps.export.labels import class_indices
from mlbseg.apps.export.output import write_json
from mlbseg.apps.export.trust import Trust, TrustMaps, confidence_as_trust
from mlbseg.data.cases import still_there
from mlbseg.data.geometry import straight
from mlbseg.data.known import hidden, label_on
from mlbseg.data.plan import Plan
from mlbseg.data.preprocess import Frame, restore_probability
from mlbseg.data.readers import SUFFIXES, read_scan, suffix, write_image, write_label
from mlbseg.data.records import write_record
from mlbseg.device import pick_device
from mlbseg.errors import Fault, FaultsError, UserError, nearest, one_case
from mlbseg.files import make_folder
from mlbseg.inference import Model, PredictOptions
from mlbseg.runs import Run
from mlbseg.staging import require_new, staged
from mlbseg.types import NOT_KNOWN, Case, Geometry

ENDING = ".nii.gz"
TRUST = 0.8
ALSO = ("noisy", "validation", "test")
"""Parts of the run's split that are left out unless asked for."""
FOLDS = 5

NOTES = "mlbseg.json"
SPLITS = "splits_final.json"


@dataclass
class Dataset:
    """What `export_nnunet` did.

    Attributes:
        root: The dataset's folder.
        labels: Case id -> how many of its voxels carry a label (1 for careful labels), share.
        faults: Cases that were left out.
    """

    root: Path
    labels: dict[str, float] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)


def export_nnunet(
    run: Run,
    out: Path,
    *,
    dataset: str | None = None,
    data: Path | None = None,
    trust: float = TRUST,
    trust_maps: Path | None = None,
    also: Sequence[str] = (),
    network: str | None = None,
    device: str = "auto",
    overwrite: bool = False,
    progress: Callable[[int, int, str], None] | None = None,
) -> Dataset:
    """Write a raw dataset of nnU-Net v2.

    Args:
        run: The run.
        out: The folder that nnU-Net calls nnUNet_raw.
        dataset: The dataset's name, Dataset001_NAME; made from the run folder's name when None.
        data: Where the scans are; where training found them when None.
        trust: Voxels of a pseudo label with less are ignored.
        trust_maps: A folder of maps in place of the predicted class's probability.
        also: Of `ALSO`: noisy cases with pseudo labels in place of their own; validation cases with their
            careful labels; test cases, as images without labels.
        network: ``student`` or ``teacher``; the method's preferred one when None.
        device: ``auto``, ``cpu``, ``cuda`` ...
        overwrite: Replace files that are there already.
        progress: Called with (done, all, case id).

    Raises:
        UserError: if nothing can be exported at all.
    """
    for part in also:
        if part not in ALSO:
            raise UserError(f"--also {part}: {nearest(part, ALSO)}")
    if not 0 <= trust <= 1:
        raise UserError(f"--trust {trust:g}: expected a number from 0 to 1")
    root = out / _dataset_name(dataset, run)
    require_new(root, overwrite=overwrite)
    source: Trust = confidence_as_trust if trust_maps is None else TrustMaps(trust_maps)
    cases, faults = _cases(run, data, also)
    # The label is a mean over flips where the plan allows any.
    model = Model([run], pick_device(device), PredictOptions(network, flips=bool(run.plan.flip_axes)))
    result = Dataset(root, faults=faults)
    _require_no_others(root, {case.id for case, _ in cases})
    make_folder(out)
    with staged(root, overwrite=overwrite) as folder:
        for name in ("imagesTr", "labelsTr", *(["imagesTs"] if "test" in also else [])):
            (folder / name).mkdir()
        for number, (case, part) in enumerate(cases):
            if progress is not None:
                progress(number, len(cases), case.id)
            failed = len(result.faults)
            with one_case(case.id, result.faults, "export", "case"):
                if part == "test":
                    _write_images(case, folder / "imagesTs", run.plan)
                    continue
                if part in ("clean", "validation"):
                    label, geometry = _careful(case, run.plan)
                else:
                    label, geometry = _pseudo(case, model, source, trust)
                _write_images(case, folder / "imagesTr", run.plan)
                write_label(folder / "labelsTr" / f"{case.id}{ENDING}", label, straight(geometry))
                result.labels[case.id] = float((label < run.plan.num_classes).mean())
            if len(result.faults) > failed:
                _forget(case, folder)
        if not result.labels:
            raise FaultsError(result.faults, str(root), "no case is left")
        careful = [case.id for case, part in cases if part == "clean" and case.id in result.labels]
        write_record(folder / "dataset.json", _description(run.plan, result))
        idle = {part: list(run.split.as_dict()[part]) for part in ALSO if part not in also}
        parts = {case.id: part for case, part in cases}
        _write_notes(folder, run, result, parts, idle, trust, trust_maps, careful)
        stale = _stale(root, parts.keys() - result.labels.keys(), folder)
    for path in stale:  # what an earlier export has left of cases that failed now
        path.unlink(missing_ok=True)
    if progress is not None:
        progress(len(cases), len(cases), "")
    return result


def _dataset_name(name: str | None, run: Run) -> str:
    if name is None:
        word = "".join(c for c in run.root.resolve().name.title() if c.isascii() and c.isalnum())
        return f"Dataset501_{word or 'Mlbseg'}"
    kind, _, rest = name.partition("_")
    number = kind.removeprefix("Dataset")
    plain = rest.replace("_", "").replace("-", "")
    if not (kind.startswith("Dataset") and len(number) == 3 and number.isdecimal() and plain.isalnum()):
        raise UserError(f"--dataset {name!r}: expected a name such as Dataset501_Heart")
    return name


def _require_no_others(root: Path, names: set[str]) -> None:
    """Refuse to replace files in a dataset that holds other cases too: nnU-Net counts them."""
    others = sorted(
        {path.name.removesuffix(ENDING) for path in (root / "labelsTr").glob(f"*{ENDING}")} - names
    )
    if others:
        found = f"{len(others)} case(s) that this export has not, such as {others[0]}"
        raise UserError(f"{root}: holds {found} (remove the folder, or choose another --dataset)")


def _cases(run: Run, data: Path | None, also: Sequence[str]) -> tuple[list[tuple[Case, str]], list[Fault]]:
    """Return the cases that go in, each with its part of the split, and a fault for each that is not there."""
    if data is None:
        data = run.scans
        if not data.exists():
            raise UserError(
                f"{data}: the run's scans are not there any more (say with --data where they are)"
            )
    dataset = run.find_cases(data)
    wanted: list[tuple[Case, str]] = []
    faults: list[Fault] = []
    parts = run.split.as_dict()
    for part in ("clean", "unlabelled", *also):
        labelled = part in ("clean", "validation")
        found, gone = still_there(
            dataset.cases, parts[part], data, kind="export", labelled=labelled, faults=dataset.faults
        )
        wanted += [(case, part) for case in found]
        faults += gone
    run.warn_of_changes(case for case, _ in wanted)
    return wanted, faults


def _careful(case: Case, plan: Plan) -> tuple[npt.NDArray[np.uint16], Geometry]:
    """Return a careful label as class indices (*S), the number of classes where it is not known, and where it lies."""
    if case.label is None:
        raise UserError(f"{case.id}: no label")
    native = read_scan(case.images).geometry
    label = label_on(case, native, whose="its scan", remedy="")
    open_ = label == NOT_KNOWN
    if hidden(case.known, plan.label_values):
        open_ |= label == 0  # background, or a class that was not drawn: of no single label
    indices = class_indices(np.where(open_, 0, label), plan, case.label.name).astype(np.uint16)
    indices[open_] = plan.num_classes
    return indices, native


def _pseudo(
    case: Case, model: Model, source: Trust, threshold: float
) -> tuple[npt.NDArray[np.uint16], Geometry]:
    """Return a pseudo label as class indices (*S), the number of classes where it is not trusted, and where it lies."""
    segmented, plan = model.segment_case(case), model.runs[0].plan
    [(probability, frame)] = segmented.maps
    classes = class_indices(segmented.mask(), plan, case.id)
    label = classes.astype(np.uint16)  # of 256 classes the ignored one is number 256
    trust = source(case, confidence(probability, frame), frame.native)
    label[trust < threshold] = plan.num_classes
    return label, frame.native


def confidence(probability: npt.NDArray[np.float32], frame: Frame) -> npt.NDArray[np.float32]:
    """Return the probability of the likeliest class, (*S) on the native lattice, from (K, *S') on the grid."""
    # The background is what the others leave: where the scan was cropped away, it is certain.
    background = np.ones(frame.native.size[::-1], np.float32)
    highest = np.zeros_like(background)
    for one in probability[1:]:
        native = restore_probability(one, frame)
        background -= native
        np.maximum(highest, native, out=highest)
    return np.maximum(highest, background.clip(0, 1), out=highest)


def _write_images(case: Case, folder: Path, plan: Plan) -> None:
    """Write each channel of a case's scan, copied where it is a NIfTI file of its own."""
    scan = read_scan(case.images)
    if len(scan.array) != plan.channels:
        raise UserError(f"{case.id}: {len(scan.array)} channels, expected {plan.channels} as in training")
    for index, channel in enumerate(scan.array):
        place = folder / f"{case.id}_{index:04d}{ENDING}"
        if len(case.images) == plan.channels and _plain_nifti(case.images[index], scan.geometry.ndim):
            shutil.copyfile(case.images[index], place)
        else:
            write_image(place, channel, straight(scan.geometry))


def _plain_nifti(path: Path, ndim: int) -> bool:
    """Return whether a file is compressed NIfTI without further axes, which nnU-Net reads as it is."""
    if path.is_dir() or SUFFIXES.get(suffix(path)) != "NIfTI" or not path.name.endswith(ENDING):
        return False
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    try:
        reader.ReadImageInformation()
    except RuntimeError:  # its axes are not quite at right angles, which ITK and so nnU-Net do not take
        return False
    return bool(reader.GetDimension() == ndim and reader.GetNumberOfComponents() == 1)


def _stale(root: Path, gone: Collection[str], fresh: Path) -> list[Path]:
    """Return files of an earlier export in `root` that `fresh` does not replace and that would contradict it.

    Args:
        root: The dataset's folder.
        gone: Cases that this export was to have and has no label of.
        fresh: The folder that is about to be moved there.
    """
    found = [root / "labelsTr" / f"{name}{ENDING}" for name in gone]
    found += [p for p in (root / "imagesTr").glob(f"*{ENDING}") if p.name[: -len(f"_0000{ENDING}")] in gone]
    return [*found, *([] if (fresh / SPLITS).exists() else [root / SPLITS])]


def _forget(case: Case, folder: Path) -> None:
    """Remove what a failed case has left."""
    (folder / "labelsTr" / f"{case.id}{ENDING}").unlink(missing_ok=True)
    for path in folder.glob(f"images*/*{ENDING}"):
        if path.name[: -len(f"_0000{ENDING}")] == case.id:
            path.unlink()


def _description(plan: Plan, result: Dataset) -> dict[str, Any]:
    """Return dataset.json: labels are numbered without gaps, and the highest is what is ignored."""
    names = _label_names(plan)
    return {
        "name": result.root.name,
        "description": f"Careful and pseudo labels, by mlbseg {version('mlbseg')}; see {NOTES}",
        "channel_names": {
            str(i): "CT" if kind == "ct" else "zscore" for i, kind in enumerate(plan.normalisation)
        },
        "labels": {**{name: index for index, name in enumerate(names)}, "ignore": plan.num_classes},
        "numTraining": len(result.labels),
        "file_ending": ENDING,
    }


def _label_names(plan: Plan) -> list[str]:
    """Return the classes' names, each once and none of nnU-Net's two words."""
    names = ["background"]
    for value, name in zip(plan.label_values[1:], plan.class_names[1:], strict=True):
        names.append(name if name not in (*names, "ignore") else f"{name} ({value})")
    return names


def _write_notes(
    folder: Path,
    run: Run,
    result: Dataset,
    parts: dict[str, str],
    idle: dict[str, list[str]],
    threshold: float,
    maps: Path | None,
    careful: Sequence[str],
) -> None:
    """Write where each label is from and what its values were, and folds that are validated on careful labels alone."""
    plan = run.plan
    pseudo = {name: share for name, share in result.labels.items() if parts[name] in ("unlabelled", "noisy")}
    write_record(
        folder / NOTES,
        {
            "made_by": f"mlbseg {version('mlbseg')}",
            "method": run.config.method,
            "values": [
                {"here": index, "in the run": value, "name": name}
                for index, (value, name) in enumerate(zip(plan.label_values, plan.class_names, strict=True))
            ]
            + [{"here": plan.num_classes, "in the run": None, "name": "ignore"}],
            "trust": "the probability of the predicted class" if maps is None else str(maps),
            "threshold": threshold,
            "careful labels": sorted(set(result.labels) - set(pseudo)),
            "pseudo labels: share of voxels that is trusted": pseudo,
            "left out for a fault": [str(fault) for fault in result.faults],
            "left out as not asked for with --also": {part: ids for part, ids in idle.items() if ids},
        },
    )
    folds = min(FOLDS, len(careful))
    if folds < 2:  # one careful label cannot be both learned from and validated on
        return
    splits = []
    for fold in range(folds):
        held = list(careful[fold::folds])
        splits.append({"train": [name for name in result.labels if name not in held], "val": held})
    write_json(folder / SPLITS, splits)
