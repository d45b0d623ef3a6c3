"""From a run and scans to masks in the scans' own geometry."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from pydantic import TypeAdapter
from rich.console import Console

from mlbseg import processes
from mlbseg.data.cases import find_scans
from mlbseg.data.plan import Plan
from mlbseg.data.readers import mask_suffix, write_image, write_label
from mlbseg.device import device_name
from mlbseg.errors import Fault, UserError, nearest, one_case
from mlbseg.files import make_folder, require_free, working_folder
from mlbseg.inference.model import Model, PredictOptions, Segmented, load
from mlbseg.launch import launch, speaks
from mlbseg.progress import StepProgress
from mlbseg.runs import Run
from mlbseg.temporaries import sweep
from mlbseg.types import Case

__all__ = ["Model", "PredictOptions", "Predictions", "Progress", "load", "predict", "predict_scans"]

PARTS = ("clean", "noisy", "unlabelled", "validation", "test")
"""The parts of a run's split that `only` may name."""

PROBABILITIES = "probabilities"
"""The folder of probabilities among the masks."""

PATIENCE = 24 * 60.0
"""Minutes to wait for the slowest of several processes; one that dies is noticed at once."""

Progress = Callable[[int, int, str], None]
"""Is told how many cases are done, how many there are, and the id of the one at hand."""

T = TypeVar("T")

_OPTIONS = TypeAdapter(PredictOptions)


@dataclass
class Predictions:
    """What `predict` did.

    Attributes:
        masks: The file written for each case id.
        faults: Scans that could not be segmented or whose names cannot be used. The others were segmented.
        notes: Files that were ignored, and what reading a scan left out or changed.
    """

    masks: dict[str, Path] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)
    notes: list[Fault] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """Return everything as lists and strings, for JSON."""
        return {
            "masks": {case: str(path) for case, path in self.masks.items()},
            "faults": [fault.as_dict() for fault in self.faults],
            "notes": [note.as_dict() for note in self.notes],
        }


def predict(
    run: str | Path,
    scans: str | Path | Sequence[str | Path],
    out: str | Path,
    *,
    network: str | None = None,
    only: str | Sequence[str] | None = None,
    flips: bool = False,
    largest: bool | None = None,
    probabilities: bool = False,
    overlap: float = 0.5,
    overwrite: bool = False,
    part: tuple[int, int] | None = None,
    device: str = "auto",
    devices: int = 1,
    accelerator: str | None = None,
    precision: str | None = None,
    progress: Progress | None = None,
) -> Predictions:
    """Segment scans with a trained run and write a mask for each.

    Processes that were started together, by `devices` or by torchrun, segment a part of the scans each. For arrays, see
    `mlbseg.load`.

    Args:
        run: The run folder.
        scans: A folder in any layout that training reads (labels are not looked at), a scan file, a DICOM
            folder, or several of these.
        out: The folder for the masks, named after the cases. NIfTI, NRRD, MHA and PNG stay what they are;
            DICOM and HDF5 scans get NIfTI.
        network: ``student`` or ``teacher``; the method's choice when None.
        only: Case ids, or the name of a part of the run's split (``test``, ``validation``, ``unlabelled``, ...).
        flips: Average over flips of the axes that the plan allows to be flipped. Refused if it allows none: the network
            was trained without flipped scans, and its masks of them would spoil the mean.
        largest: Keep the largest connected component of every class (True) or all components (False); when None, of
            the classes of which every clean label showed one, as the plan says.
        probabilities: Also write the probability of every class, background too, as
            ``probabilities/ID_CLASS`` in `out` (a folder of masks holds nothing but masks).
        overlap: Overlap of neighbouring windows, as a fraction of the window side.
        overwrite: Replace existing masks; without it they are a fault.
        part: (k, n) for part k (from 1) of n parts of the scans. The parts are disjoint, and together all scans.
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:1`` ...
        devices: Number of devices of this machine to use together, one process each.
        accelerator: Kind of device, instead of `device`: ``auto``, ``cpu`` or ``gpu``.
        precision: ``auto``, ``32`` or ``bf16``; as in training when None.
        progress: Called with (done, all, case id), of this process's part. With several `devices` the part of
            the first is shown on stderr instead.

    Returns:
        The masks, and the scans that failed, of all processes together.

    Raises:
        UserError: if nothing can be predicted at all.
        OtherRank: if another process failed.
    """
    options = PredictOptions(
        network, flips, largest, overlap, precision,
        only if only is None or isinstance(only, str) else tuple(only), probabilities, overwrite, part,
    )  # fmt: skip
    paths = [Path(path) for path in ([scans] if isinstance(scans, str | Path) else scans)]
    name = device_name(device, accelerator, devices)
    return predict_scans(Path(run), paths, Path(out), options, name, devices, progress)


def predict_scans(
    run: Path,
    scans: Sequence[Path],
    out: Path,
    options: PredictOptions,
    device: str = "auto",
    devices: int = 1,
    progress: Progress | None = None,
) -> Predictions:
    """Segment scans as the options say. See `predict`.

    Raises:
        UserError: if nothing can be predicted at all.
        OtherRank: if another process failed.
    """
    processes.require_no_launch(devices)
    if devices > 1:
        arguments = {
            "run": str(run), "scans": [str(path) for path in scans], "out": str(out),
            "options": _OPTIONS.dump_python(options, mode="json"), "device": device, "shown": progress is not None,
        }  # fmt: skip
        masks, *told = launch("mlbseg.inference:_launched", arguments, devices)[0]
        faults, notes = ([Fault(**fault) for fault in each] for each in told)
        return Predictions({k: Path(v) for k, v in masks.items()}, faults, notes)
    target = processes.own_device(device)
    with processes.joined(torch.device("cpu"), PATIENCE) as ranks:
        try:
            model = Model(Run.open(run), target, options)
        except UserError as error:
            raise processes.same_on_all(ranks, error) from None
        # One looks for all: while another still looks, the folder may change.
        cases, faults, notes = processes.of_first(ranks, lambda: _find(scans, out, model))
        place = {case.id: number for number, case in enumerate(cases)}
        for part in (options.part or (1, 1), (ranks.index + 1, ranks.count)):
            cases, faults = _part(cases, part), _part(faults, part)
        parts = processes.of_all(ranks, _predict_cases(cases, faults, out, model, progress))
    masks = {name: mask for part in parts for name, mask in part.masks.items()}
    faults = [fault for part in parts for fault in part.faults]
    return Predictions(
        dict(sorted(masks.items(), key=lambda item: place[item[0]])),
        sorted(faults, key=lambda fault: place.get(fault.case_id or "", -1)),
        [*notes, *(note for part in parts for note in part.notes)],
    )


def _launched(
    run: str, scans: list[str], out: str, options: dict[str, Any], device: str, shown: bool
) -> tuple[dict[str, str], list[Any], list[Any]]:
    """Be one of the processes that `predict_scans` starts."""
    console = Console(stderr=True) if shown and speaks() else None
    with StepProgress(console, "predicting (the first device's part)", 0) as progress:
        result = predict_scans(
            Path(run), [Path(path) for path in scans], Path(out), _OPTIONS.validate_python(options), device,
            progress=lambda done, total, case: progress.update(done, {"case": case}, total=total),
        )  # fmt: skip
    told = result.as_dict()
    return told["masks"], told["faults"], told["notes"]


def _find(scans: Sequence[Path], out: Path, model: Model) -> tuple[list[Case], list[Fault], list[Fault]]:
    """Return the cases that are wanted, faults and notes; make the folder for the masks."""
    only, found = model.options.only, [find_scans(path, model.run.plan.channels) for path in scans]
    cases, faults = _select(
        [c for f in found for c in f.cases], [e for f in found for e in f.faults], only, model.run
    )
    make_folder(out)
    for folder in (out, out / PROBABILITIES):
        sweep(folder)
    return cases, faults, [note for f in found for note in f.notes if only is None]


def _part(items: list[T], part: tuple[int, int]) -> list[T]:
    """Return part k (from 1) of n: neighbours, which are often alike in size, go to different ones."""
    return items[part[0] - 1 :: part[1]]


def _predict_cases(
    cases: list[Case], faults: list[Fault], out: Path, model: Model, progress: Progress | None
) -> Predictions:
    result = Predictions(faults=faults)
    for number, case in enumerate(cases):
        if progress is not None:
            progress(number, len(cases), case.id)
        # One bad scan does not stop the others; it is named at the end.
        with one_case(case.id, result.faults, "predict"):
            mask = out / f"{case.id}{mask_suffix(case.images)}"
            _require_room(case, mask, model)
            notes: list[str] = []
            _write(case, mask, model.segment_case(case, notes))
            result.masks[case.id] = mask
            result.notes += [Fault(case.id, note, case_id=case.id, kind="note") for note in notes]
    if progress is not None:
        progress(len(cases), len(cases), "")
    return result


def _require_room(case: Case, mask: Path, model: Model) -> None:
    """Refuse to write over a scan in any case, and over what is there unless it may be replaced."""
    wanted = [mask, *(_probability_files(case, mask, model.run.plan) if model.options.probabilities else ())]
    scans = {path.resolve() for path in case.images}
    for path in wanted:
        if path.resolve() in scans:
            raise UserError(f"{path} is the scan itself (choose another --out)")
        require_free(path, overwrite=model.options.overwrite)


def _write(case: Case, mask: Path, segmented: Segmented) -> None:
    """Write the mask of a case, with its probabilities where they are wanted: both, or neither."""
    if not segmented.model.options.probabilities:
        write_label(mask, segmented.mask(), segmented.frame.native)
        return
    background, *structures = _probability_files(case, mask, segmented.model.run.plan)
    with working_folder(mask.parent) as work:
        write_label(work / mask.name, segmented.mask(), segmented.frame.native)
        for path, probability in zip((*structures, background), segmented.probabilities(), strict=True):
            write_image(work / path.name, probability, segmented.frame.native)
        make_folder(background.parent)
        for path in (*structures, background):
            (work / path.name).replace(path)
        (work / mask.name).replace(mask)


def _probability_files(case: Case, mask: Path, plan: Plan) -> list[Path]:
    suffix = mask.name.removeprefix(case.id)
    suffix = ".tiff" if suffix == ".png" else suffix  # PNG holds no floating point
    folder = mask.parent / PROBABILITIES
    return [folder / f"{case.id}_{value}{suffix}" for value in plan.label_values]


def _select(
    cases: list[Case], faults: list[Fault], only: str | Sequence[str] | None, run: Run
) -> tuple[list[Case], list[Fault]]:
    """Return the cases that are wanted, and the faults of these or of none in particular."""
    seen: set[str] = set()
    for case in cases:
        if case.id in seen:
            raise UserError(f"two scans are called {case.id!r}: their masks would overwrite each other")
        seen.add(case.id)
    if only is None:
        return cases, faults
    if isinstance(only, str):
        if only not in PARTS:
            raise UserError(f"the run's split has no part {only!r}: {nearest(only, PARTS)}")
        part, only = only, run.split.as_dict()[only]
        if not only:
            raise UserError(f"{run.root}: no case is in the {part} part of the run's split")
    missing = sorted(set(only) - seen - {fault.case_id for fault in faults})
    if missing:
        found = f"no scan found for {len(missing)} cases, such as {', '.join(missing[:3])}"
        raise UserError(f"{found} (expected case ids, or one of {', '.join(PARTS)})")
    wanted = {*only, None}
    return [c for c in cases if c.id in wanted], [f for f in faults if f.case_id in wanted]
