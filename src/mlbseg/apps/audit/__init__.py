"""Which labels are to be doubted: trust maps, suspected regions, cases in the order in which to look at them."""

from __future__ import annotations

import csv
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

from mlbseg.apps.audit.auditor import Auditor, Judged
from mlbseg.apps.audit.findings import REGION_COLUMNS, Audit, Audited
from mlbseg.apps.audit.page import gallery, subject_of, write_page
from mlbseg.apps.audit.regions import Region
from mlbseg.apps.audit.trust import WAYS
from mlbseg.data.cases import find_scans, still_there
from mlbseg.data.layouts import declared_unknown
from mlbseg.data.readers import mask_suffix, stem, write_image, write_label
from mlbseg.data.unread import passed_over
from mlbseg.device import pick_device
from mlbseg.errors import Fault, FaultsError, UserError, nearest, one_case
from mlbseg.evaluation import mask_files
from mlbseg.files import make_folder, write_table
from mlbseg.inference import Progress
from mlbseg.runs import Run
from mlbseg.staging import require_new, staged
from mlbseg.types import Case, Known, Role

__all__ = ["Audit", "Audited", "Region", "audit"]

CASES, REGIONS, PAGE = "cases.csv", "regions.csv", "audit.html"


def audit(
    run: str | Path,
    labels: str | Path | None = None,
    out: str | Path | None = None,
    *,
    scans: str | Path | None = None,
    way: str = "regional",
    threshold: float = 0.5,
    smallest: float | None = None,
    propose: bool = False,
    overwrite: bool = False,
    device: str = "auto",
    progress: Progress | None = None,
) -> Audit:
    """Say of every label how far a trained run believes it.

    Writes to `out`: ``trust/ID.nii.gz`` (a trust for each voxel, 0 to 1, on the scan's own lattice; in the scan's
    format where that holds fractions), ``cases.csv`` (the least trusted first), ``regions.csv`` and ``audit.html``.

    Args:
        run: The run folder.
        labels: A folder of labels by case name; the run's own clean and noisy labels when None.
        out: The folder to write to; ``audit`` in the run folder when None.
        scans: Where the scans of `labels` are; where the run was trained when None.
        way: A name in `mlbseg.apps.audit.trust.WAYS`.
        threshold: Voxels below it are not trusted.
        smallest: Volume of a region that is worth a look, mm³ (mm² in 2D); 27 voxels of the prepared grid (9 in 2D)
            when None.
        propose: Also write each label as it would be with its suspected regions drawn by the networks, as
            ``proposed/ID``: to begin a correction with, not to end it.
        overwrite: Replace an audit that is there already, but for proposals: somebody may have corrected them.
        device: ``auto``, ``cpu``, ``cuda`` ...
        progress: Called with (done, all, case id).

    Returns:
        The cases with their trust, and the faults of those that could not be judged.

    Raises:
        UserError: if there is nothing to judge, or `out` holds something.
        FaultsError: if not one case could be judged.
    """
    if way not in WAYS:
        raise UserError(f"unknown audit method {way!r}: {nearest(way, WAYS)}")
    if not 0 < threshold < 1:
        raise UserError(f"--threshold: found {threshold}, expected a number between 0 and 1")
    opened = Run.open(Path(run))
    folder = Path(out) if out is not None else opened.root / "audit"
    _require_free(folder, overwrite=overwrite, propose=propose)
    cases, faults, notes = _cases(opened, labels, scans)
    own = {case.id for case in cases} | _audited(folder)
    _require_own(folder / "trust", own)
    target = pick_device(device)
    auditor = Auditor(
        opened,
        target,
        way,
        cases,
        given=labels is not None,
        propose=propose,
        threshold=threshold,
        smallest=smallest,
    )
    steps = len(cases) * (1 + WAYS[way].relative)
    said = 0

    def say(case: Case) -> None:
        nonlocal said
        if progress is not None:
            progress(said, steps, case.id)
        said += 1

    auditor.look_first(say)
    names = opened.plan.structures
    found: list[Audited] = []
    with staged(folder, overwrite=overwrite, last=CASES) as stage:
        looked = gallery(names)
        for case in cases:
            say(case)
            with one_case(case.id, faults, "audit"):
                judged = auditor.judge(case)
                _write_maps(stage, case, judged)
                found.append(judged.audited)
                looked.add(subject_of(judged.audited, judged.sight, names), judged.audited.trust)
        if not found:
            raise FaultsError(faults, f"{opened.root}: no label could be judged")
        found.sort(key=lambda one: (one.trust, -one.suspected, one.case))
        unit = "mm²" if opened.plan.scan_ndim == 2 else "mm³"
        result = Audit(folder, way, threshold, names, unit, tuple(found), tuple(faults), notes)
        cases_found = result.case_rows()
        write_table(stage / CASES, cases_found, list(cases_found[0]), digits=12)
        write_table(stage / REGIONS, result.region_rows(), REGION_COLUMNS, digits=12)
        write_page(stage / PAGE, result, looked, title=f"Audit of {opened.root.name}")
        _drop_old(folder, {one.case for one in found})
    if progress is not None:
        progress(steps, steps, "")
    return result


def _require_free(folder: Path, *, overwrite: bool, propose: bool) -> None:
    require_new(folder, overwrite=overwrite)
    if propose and (folder / "proposed").exists():
        raise UserError(
            f"{folder / 'proposed'}: holds proposals, which somebody may have corrected, so they are never replaced "
            "(move the folder away, or choose another --out)"
        )


def _cases(
    run: Run, labels: str | Path | None, scans: str | Path | None
) -> tuple[list[Case], list[Fault], tuple[Fault, ...]]:
    """Return the cases to judge, each with its label, the faults of others, and notes on what was passed over."""
    root = run.scans
    if labels is None:
        if scans is not None:
            raise UserError("--scans names the scans of --labels (give both, or neither)")
        return *_own_cases(run, root), ()
    given, faults = mask_files(Path(labels), "labels")
    found = find_scans(Path(scans) if scans is not None else root, run.plan.channels)
    unknown = declared_unknown(Path(labels), Path(labels).resolve().parent)
    chosen = [
        replace(case, label=given[case.id], known=Known(ignore=unknown))
        for case in found.cases
        if case.id in given
    ]
    known = {case.id for case in found.cases}
    for name in sorted(given.keys() - known):
        faults.append(
            Fault(
                given[name].name, f"no scan named {name}", "", "name their folder with --scans", name, "audit"
            )
        )
    if not chosen:
        raise FaultsError(faults, f"{labels}: no label belongs to a scan")
    return chosen, faults, (*passed_over(Path(labels)), *found.notes)


def _own_cases(run: Run, root: Path) -> tuple[list[Case], list[Fault]]:
    """Return the run's clean, validation and noisy cases, and a fault for each that is not there any more."""
    try:
        dataset = run.find_cases()
    except UserError as error:
        raise UserError(f"{error} ({run.moved_scans})") from None
    split = run.split
    roles = {
        **dict.fromkeys([*split.clean, *split.validation], Role.CLEAN),
        **dict.fromkeys(split.noisy, Role.NOISY),
    }
    found, faults = still_there(
        dataset.cases, sorted(roles), root, kind="audit", labelled=True, faults=dataset.faults
    )
    if not found:
        raise FaultsError(faults, str(root), "no label of the run is there")
    cases = [case.with_role(roles[case.id]) for case in found]
    run.warn_of_changes(cases)
    return cases, faults


def _audited(folder: Path) -> set[str]:
    """Return the cases that the table of an earlier audit names."""
    try:
        if not (folder / CASES).is_file():
            return set()
        with (folder / CASES).open(newline="", encoding="utf-8") as file:
            return {(row["case"] or "").removeprefix("'") for row in csv.DictReader(file)}
    except (OSError, KeyError, ValueError, csv.Error):
        return set()


def _require_own(folder: Path, cases: Collection[str]) -> None:
    """Refuse a folder of trust maps that holds what no audit has written there: those maps may go, it must not."""
    found = sorted(folder.iterdir()) if folder.is_dir() else []
    # Hidden is what a killed audit left of a map that it was writing.
    others = [path.name for path in found if not path.name.startswith(".") and stem(path) not in cases]
    if others:
        raise UserError(
            f"{folder}: holds {others[0]!r}, which is no map of this audit or of the one before it (move it away, or "
            "choose another --out)"
        )


def _drop_old(folder: Path, cases: Collection[str]) -> None:
    """Remove what an earlier audit has left that this one does not replace, or would for a moment contradict.

    The table of cases stays until it is replaced: it says which maps are an audit's.
    """
    for name in (REGIONS, PAGE):
        (folder / name).unlink(missing_ok=True)
    maps = folder / "trust"
    for path in maps.iterdir() if maps.is_dir() else ():
        # Maps of other cases: nobody could tell them from this audit's.
        if path.is_file() and stem(path) not in cases and not path.name.startswith("."):
            path.unlink()


def _write_maps(folder: Path, case: Case, judged: Judged) -> None:
    suffix = mask_suffix(case.images)
    path = folder / "trust" / f"{case.id}{'.tiff' if suffix == '.png' else suffix}"
    make_folder(path.parent)
    write_image(path, judged.trust, judged.geometry)
    if judged.proposal is not None:
        make_folder(folder / "proposed")
        write_label(folder / "proposed" / f"{case.id}{suffix}", judged.proposal, judged.geometry)
