"""From a run and scans to masks in the scans' own geometry."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from rich.console import Console
from torch import nn

from mlbseg import processes
from mlbseg.components import largest_components
from mlbseg.data.cases import find_scans
from mlbseg.data.plan import Plan
from mlbseg.data.preprocess import restore_label, restore_probability
from mlbseg.data.readers import mask_suffix, write_image, write_label
from mlbseg.device import autocast, device_name
from mlbseg.errors import Fault, UserError, nearest, one_case
from mlbseg.files import make_folder, require_free, working_folder
from mlbseg.launch import launch, speaks
from mlbseg.progress import StepProgress
from mlbseg.runs import Run
from mlbseg.temporaries import sweep
from mlbseg.types import Case, Geometry
from mlbseg.windows import case_probability

PARTS = ("clean", "noisy", "unlabelled", "validation", "test")
"""The parts of a run's split that `only` may name."""

PROBABILITIES = "probabilities"
"""The folder of probabilities among the masks."""

PATIENCE = 24 * 60.0
"""Minutes to wait for the slowest of several processes; one that dies is noticed at once."""

Progress = Callable[[int, int, str], None]
"""Is told how many cases are done, how many there are, and the id of the one at hand."""

T = TypeVar("T")


@dataclass
class Predictions:
    """What `predict` did.

    Attributes:
        masks: The file written for each case id.
        faults: Scans that could not be segmented or whose names cannot be used; the others were segmented.
        notes: Files that were passed over, and what reading a scan has left out or done to it.
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
    largest: bool = False,
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

    Processes that were started together, by `devices` or by torchrun, segment a share of the scans each.

    Args:
        run: The run folder.
        scans: A folder in any layout that training reads (labels are not looked at), a scan file, a DICOM
            folder, or several of these.
        out: The folder for the masks, named after the cases. NIfTI, NRRD, MHA and PNG stay what they are;
            DICOM and HDF5 scans get NIfTI.
        network: ``student`` or ``teacher``; the method's preferred one when None.
        only: Case ids, or the name of a part of the run's split (``test``, ``validation``, ``unlabelled``, ...).
        flips: Average over flips of the axes that the plan allows to be flipped. Refused if it allows none: the network
            has then never seen a scan the other way round, and what it makes of one ruins the mean.
        largest: Keep only the largest connected component of each class.
        probabilities: Also write the probability of every class, background too, as
            ``probabilities/ID_CLASS`` in `out` (a folder of masks holds nothing but masks).
        overlap: Of neighbouring windows, share of the side.
        overwrite: Replace masks that are there already; without it they are a fault.
        part: (k, n) for the k-th (from 1) of n shares of the scans; the shares are disjoint, and together all.
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:1`` ...
        devices: Number of devices of this machine to use together, a process each.
        accelerator: ``auto``, ``cpu`` or ``gpu``: the kind of the devices, in place of `device`.
        precision: ``auto``, ``32`` or ``bf16``; as in training when None.
        progress: Called with (done, all, case id), of this process's share. With several `devices` the share of
            the first is shown on stderr instead.

    Returns:
        The masks, and the scans that failed, of all processes together.

    Raises:
        UserError: if nothing can be predicted at all.
        OtherRank: if another process failed.
    """
    if part is not None and not 1 <= part[0] <= part[1]:
        raise UserError(f"part {part[0]}/{part[1]}: expected K/N with K from 1 to N, such as 3/16")
    name = device_name(device, accelerator, devices)
    paths = [Path(path) for path in ([scans] if isinstance(scans, str | Path) else scans)]
    processes.require_no_launch(devices)
    if devices > 1:
        arguments = {
            "run": str(run), "scans": [str(path) for path in paths], "out": str(out), "network": network,
            "only": only if only is None or isinstance(only, str) else list(only), "flips": flips,
            "largest": largest, "probabilities": probabilities, "overlap": overlap, "overwrite": overwrite,
            "part": part, "device": name, "precision": precision, "shown": progress is not None,
        }  # fmt: skip
        masks, *told = launch("mlbseg.inference:_launched", arguments, devices)[0]
        faults, notes = ([Fault(**fault) for fault in each] for each in told)
        return Predictions({k: Path(v) for k, v in masks.items()}, faults, notes)

    def find(opened: Run) -> tuple[list[Case], list[Fault], list[Fault]]:
        found = [find_scans(path, opened.plan.channels) for path in paths]
        selected = _select(
            [c for f in found for c in f.cases], [e for f in found for e in f.faults], only, opened
        )
        make_folder(Path(out))
        for folder in (Path(out), Path(out) / PROBABILITIES):
            sweep(folder)
        return *selected, [note for f in found for note in f.notes if only is None]

    target = processes.own_device(name)
    with processes.joined(torch.device("cpu"), PATIENCE) as ranks:
        try:
            opened = Run.open(Path(run))
            if flips and not opened.plan.flip_axes:
                raise UserError(
                    "--flips: the run's plan says that no flip keeps the anatomy valid, so the network has seen none "
                    "(leave --flips out, or train with plan.flip_axes)"
                )
            model = opened.network(network).to(target)
        except UserError as error:
            raise processes.same_on_all(ranks, error) from None
        # One looks for all: while another still looks, the folder may change.
        cases, faults, notes = processes.of_first(ranks, lambda: find(opened))
        place = {case.id: number for number, case in enumerate(cases)}
        for share in (part or (1, 1), (ranks.index + 1, ranks.count)):
            cases, faults = _share(cases, share), _share(faults, share)
        own = _predict_cases(
            cases, faults, Path(out), model, opened, target, flips=flips, largest=largest,
            probabilities=probabilities, overlap=overlap, overwrite=overwrite, precision=precision, progress=progress,
        )  # fmt: skip
        shares = processes.of_all(ranks, own)
    masks = {name: mask for share in shares for name, mask in share.masks.items()}
    faults = [fault for share in shares for fault in share.faults]
    return Predictions(
        dict(sorted(masks.items(), key=lambda item: place[item[0]])),
        sorted(faults, key=lambda fault: place.get(fault.case_id or "", -1)),
        [*notes, *(note for share in shares for note in share.notes)],
    )


def _launched(
    shown: bool, part: list[int] | None, **arguments: Any
) -> tuple[dict[str, str], list[Any], list[Any]]:
    """Be one of the processes that `predict` starts."""
    console = Console(stderr=True) if shown and speaks() else None
    with StepProgress(console, "predicting (the first device's share)", 0) as progress:
        result = predict(
            part=None if part is None else (part[0], part[1]),
            progress=lambda done, total, case: progress.update(done, {"case": case}, total=total),
            **arguments,
        )
    faults, notes = ([one.as_dict() for one in each] for each in (result.faults, result.notes))
    return {k: str(v) for k, v in result.masks.items()}, faults, notes


def _share(items: list[T], share: tuple[int, int]) -> list[T]:
    """Return the k-th (from 1) of n shares: neighbours, which are often alike in size, go to different ones."""
    return items[share[0] - 1 :: share[1]]


def _predict_cases(
    cases: list[Case],
    faults: list[Fault],
    out: Path,
    model: nn.Module,
    opened: Run,
    target: torch.device,
    *,
    flips: bool,
    largest: bool,
    probabilities: bool,
    overlap: float,
    overwrite: bool,
    precision: str | None,
    progress: Progress | None,
) -> Predictions:
    result = Predictions(faults=faults)
    for number, case in enumerate(cases):
        if progress is not None:
            progress(number, len(cases), case.id)
        # One bad scan does not stop the others; it is named at the end.
        with one_case(case.id, result.faults, "predict"):
            mask = out / f"{case.id}{mask_suffix(case.images)}"
            _require_room(case, mask, opened.plan, probabilities=probabilities, overwrite=overwrite)
            with autocast(precision or opened.config.train.precision, target):
                told = _predict_case(
                    case, mask, model, opened.plan, target, flips, largest, probabilities, overlap
                )
            result.masks[case.id] = mask
            result.notes += [Fault(case.id, note, case_id=case.id, kind="note") for note in told]
    if progress is not None:
        progress(len(cases), len(cases), "")
    return result


def _require_room(case: Case, mask: Path, plan: Plan, *, probabilities: bool, overwrite: bool) -> None:
    """Refuse to write over a scan in any case, and over what is there without `overwrite`."""
    wanted = [mask, *(_probability_files(case, mask, plan) if probabilities else ())]
    scans = {path.resolve() for path in case.images}
    for path in wanted:
        if path.resolve() in scans:
            raise UserError(f"{path} is the scan itself (choose another --out)")
        require_free(path, overwrite=overwrite)


def _predict_case(
    case: Case,
    mask: Path,
    network: nn.Module,
    plan: Plan,
    device: torch.device,
    flips: bool,
    largest: bool,
    probabilities: bool,
    overlap: float,
) -> list[str]:
    """Write a case's mask; return what reading the scan has left out or done to it."""
    notes: list[str] = []
    probability, frame = case_probability(
        case, network, plan, device, flips=flips, overlap=overlap, notes=notes
    )
    label = restore_label(probability, frame, plan)
    if largest:
        label = largest_components(label)
    if not probabilities:
        write_label(mask, label, frame.native)
        return notes
    # A case is there with its mask: its probabilities come with it, or not at all.
    with working_folder(mask.parent) as work:
        write_label(work / mask.name, label, frame.native)
        _write_probabilities(
            case, work / mask.name, probability, frame.native, plan, lambda p: restore_probability(p, frame)
        )
        make_folder(mask.parent / PROBABILITIES)
        for path in _probability_files(case, mask, plan):
            (work / PROBABILITIES / path.name).replace(path)
        (work / mask.name).replace(mask)
    return notes


def _write_probabilities(
    case: Case,
    mask: Path,
    probability: npt.NDArray[np.float32],
    geometry: Geometry,
    plan: Plan,
    restore: Callable[[npt.NDArray[np.float32]], npt.NDArray[np.float32]],
) -> None:
    background, *files = _probability_files(case, mask, plan)
    make_folder(background.parent)
    # The rest, not the network's own: where the scan was cropped away, it is all background.
    rest = np.ones(geometry.size[::-1], np.float32)
    for k, path in enumerate(files, start=1):
        native = restore(probability[k])
        rest -= native
        write_image(path, native, geometry)
    write_image(background, rest.clip(0, 1), geometry)


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
