"""From runs and scans to masks in the scans' own geometry."""

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
from mlbseg.data.readers import write_image, write_label
from mlbseg.device import device_name
from mlbseg.errors import Fault, UserError, nearest, one_case
from mlbseg.files import make_folder, working_folder
from mlbseg.inference.model import Model, PredictOptions, Segmented, load
from mlbseg.inference.targets import PROBABILITIES, UNCERTAINTY, Targets, is_file_name, targets
from mlbseg.launch import launch, speaks
from mlbseg.progress import StepProgress
from mlbseg.runs import Run
from mlbseg.temporaries import sweep
from mlbseg.types import Case

__all__ = ["Model", "PredictOptions", "Predictions", "Progress", "load", "predict", "predict_scans"]

PARTS = ("clean", "noisy", "unlabelled", "validation", "test")
"""The parts of a run's split that `only` may name."""

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
        unlike: Of each scan that is unlike the training scans, in what; see `mlbseg.data.unlike`.
        skipped: Scans whose masks were there already.
    """

    masks: dict[str, Path] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)
    notes: list[Fault] = field(default_factory=list)
    unlike: dict[str, tuple[str, ...]] = field(default_factory=dict)
    skipped: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """Return everything as lists and strings, for JSON."""
        return {
            "masks": {case: str(path) for case, path in self.masks.items()},
            "faults": [fault.as_dict() for fault in self.faults],
            "notes": [note.as_dict() for note in self.notes],
            "unlike": {case: list(lines) for case, lines in self.unlike.items()},
            "skipped": list(self.skipped),
        }

    @classmethod
    def from_dict(cls, told: dict[str, Any]) -> Predictions:
        """Return what `as_dict` was of."""
        return cls(
            {case: Path(path) for case, path in told["masks"].items()},
            [Fault(**fault) for fault in told["faults"]],
            [Fault(**note) for note in told["notes"]],
            {case: tuple(lines) for case, lines in told["unlike"].items()},
            told["skipped"],
        )


def predict(
    run: str | Path | Sequence[str | Path],
    scans: str | Path | Sequence[str | Path],
    out: str | Path,
    *,
    network: str | None = None,
    only: str | Sequence[str] | None = None,
    flips: bool = False,
    largest: bool | None = None,
    probabilities: bool = False,
    uncertainty: bool = False,
    overlap: float = 0.5,
    overwrite: bool = False,
    skip_existing: bool = False,
    part: tuple[int, int] | None = None,
    device: str = "auto",
    devices: int = 1,
    accelerator: str | None = None,
    precision: str | None = None,
    progress: Progress | None = None,
) -> Predictions:
    """Segment scans with a trained run, or with several together, and write a mask for each.

    Processes that were started together, by `devices` or by torchrun, segment a part of the scans each. For arrays, see
    `mlbseg.load`.

    Args:
        run: The run folder; or several, whose probabilities are averaged on each scan's own lattice. They may prepare
            scans in different ways, but are of the same classes and channels.
        scans: A folder in any layout that training reads (labels are not looked at), a scan file, a DICOM
            folder, or several of these.
        out: The folder for the masks, named after the cases. NIfTI, NRRD, MHA and PNG stay what they are;
            DICOM and HDF5 scans get NIfTI. Or, of a single scan, the name of its mask, such as ``x_seg.nii.gz``.
        network: ``student`` or ``teacher``; the method's choice when None.
        only: Case ids, or the name of a part of the run's split (``test``, ``validation``, ``unlabelled``, ...); of
            several runs, the cases that are in this part of all their splits.
        flips: Average over flips of the axes that the plan allows to be flipped. Refused if it allows none: the network
            was trained without flipped scans, and its masks of them would spoil the mean.
        largest: Keep the largest connected component of every class (True) or all components (False); when None, of
            the classes of which every clean label showed one, as the plan says; of several runs, as all plans say.
        probabilities: Also write the probability of every class, background too, as
            ``probabilities/ID_CLASS`` in `out` (a folder of masks holds nothing but masks).
        uncertainty: Also write ``uncertainty/ID_entropy`` in `out` and, of several runs,
            ``uncertainty/ID_disagreement``, both from 0 to 1; see `Segmented.uncertainty`.
        overlap: Overlap of neighbouring windows, as a fraction of the window side.
        overwrite: Replace existing masks; without it they are a fault.
        skip_existing: Leave scans out of which all files that are wanted are there already, whatever made them.
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
        only if only is None or isinstance(only, str) else tuple(only), probabilities, uncertainty, overwrite,
        skip_existing, part,
    )  # fmt: skip
    runs = [Path(each) for each in ([run] if isinstance(run, str | Path) else run)]
    paths = [Path(path) for path in ([scans] if isinstance(scans, str | Path) else scans)]
    name = device_name(device, accelerator, devices)
    return predict_scans(runs, paths, Path(out), options, name, devices, progress)


def predict_scans(
    runs: Sequence[Path],
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
            "runs": [str(run) for run in runs], "scans": [str(path) for path in scans], "out": str(out),
            "options": _OPTIONS.dump_python(options, mode="json"), "device": device, "shown": progress is not None,
        }  # fmt: skip
        return Predictions.from_dict(launch("mlbseg.inference:_launched", arguments, devices)[0])
    target = processes.own_device(device)
    with processes.joined(torch.device("cpu"), PATIENCE) as ranks:
        try:
            model = Model([Run.open(run) for run in runs], target, options)
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
        {name: lines for part in parts for name, lines in part.unlike.items()},
        [name for part in parts for name in part.skipped],
    )


def _launched(
    runs: list[str], scans: list[str], out: str, options: dict[str, Any], device: str, shown: bool
) -> dict[str, Any]:
    """Be one of the processes that `predict_scans` starts."""
    console = Console(stderr=True) if shown and speaks() else None
    with StepProgress(console, "predicting (the first device's part)", 0) as progress:
        result = predict_scans(
            [Path(run) for run in runs], [Path(path) for path in scans], Path(out),
            _OPTIONS.validate_python(options), device,
            progress=lambda done, total, case: progress.update(done, {"case": case}, total=total),
        )  # fmt: skip
    return result.as_dict()


def _find(scans: Sequence[Path], out: Path, model: Model) -> tuple[list[Case], list[Fault], list[Fault]]:
    """Return the cases that are wanted, faults and notes; make the folder for the masks."""
    only, found = model.options.only, [find_scans(path, model.runs[0].plan.channels) for path in scans]
    cases, faults = _select(
        [c for f in found for c in f.cases], [e for f in found for e in f.faults], only, model.runs
    )
    folder = out
    if is_file_name(out):
        folder = out.parent
        if len(cases) + len(faults) > 1:
            raise UserError(
                f"--out {out}: the name of one mask, but found {len(cases) + len(faults)} scans, expected one "
                "(give the name of a folder, without an ending)"
            )
    make_folder(folder)
    for each in (folder, folder / PROBABILITIES, folder / UNCERTAINTY):
        sweep(each)
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
            wanted = targets(case, out, model)
            if model.options.skip_existing and all(path.is_file() for path in wanted.all):
                result.skipped.append(case.id)
                continue
            wanted.require_room(case, overwrite=model.options.overwrite)
            segmented = model.segment_case(case)
            _write(wanted, segmented)
            result.masks[case.id] = wanted.mask
            result.notes += [Fault(case.id, note, case_id=case.id, kind="note") for note in segmented.notes]
            if segmented.unlike:
                result.unlike[case.id] = segmented.unlike
    if progress is not None:
        progress(len(cases), len(cases), "")
    return result


def _write(wanted: Targets, segmented: Segmented) -> None:
    """Write what is wanted of a case: all files, or none."""
    mask, lattice = wanted.mask, segmented.native
    if wanted.all == [mask]:
        write_label(mask, segmented.mask(), lattice)
        return
    with working_folder(mask.parent) as work:
        write_label(work / mask.name, segmented.mask(), lattice)
        if wanted.probabilities:
            background, *structures = wanted.probabilities
            for path, probability in zip((*structures, background), segmented.probabilities(), strict=True):
                write_image(work / path.name, probability, lattice)
        if wanted.uncertainty:
            for name, values in segmented.uncertainty().items():
                write_image(work / wanted.uncertainty[name].name, values, lattice)
        for path in reversed(wanted.all):  # the mask last
            make_folder(path.parent)
            (work / path.name).replace(path)


def _select(
    cases: list[Case], faults: list[Fault], only: str | Sequence[str] | None, runs: Sequence[Run]
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
        only = _ids_of_part(only, runs)
    missing = sorted(set(only) - seen - {fault.case_id for fault in faults})
    if missing:
        found = f"no scan found for {len(missing)} cases, such as {', '.join(missing[:3])}"
        raise UserError(f"{found} (expected case ids, or one of {', '.join(PARTS)})")
    wanted = {*only, None}
    return [c for c in cases if c.id in wanted], [f for f in faults if f.case_id in wanted]


def _ids_of_part(part: str, runs: Sequence[Run]) -> list[str]:
    """Return the cases that are in a part of the split of every run."""
    if part not in PARTS:
        raise UserError(f"the run's split has no part {part!r}: {nearest(part, PARTS)}")
    ids = [set(run.split.as_dict()[part]) for run in runs]
    for run, own in zip(runs, ids, strict=True):
        if not own:
            raise UserError(f"{run.root}: no case is in the {part} part of the run's split")
    common = sorted(set.intersection(*ids))
    if not common:
        raise UserError(
            f"no case is in the {part} part of the splits of all {len(runs)} runs (name case ids instead)"
        )
    return common
