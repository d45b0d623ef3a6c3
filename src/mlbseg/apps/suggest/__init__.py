"""Which unlabelled scans to label next: those of which a trained network knows least, each with its reason.

`look.py` asks the network, `choose.py` picks, `result.py` is what comes out. `docs/suggest.md` says what the score
means and what it was worth.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mlbseg.apps.suggest.choose import Pick, Rule, choose, find_rule
from mlbseg.apps.suggest.look import Look, Looker
from mlbseg.apps.suggest.result import COLUMNS, Suggestion, Suggestions
from mlbseg.data.cases import find_scans, still_there
from mlbseg.device import autocast, pick_device
from mlbseg.errors import Fault, FaultsError, UserError, one_case
from mlbseg.files import make_folder, require_free
from mlbseg.inference import Progress
from mlbseg.runs import Run
from mlbseg.types import Case

__all__ = ["COLUMNS", "Suggestion", "Suggestions", "suggest"]

COPY = 0.05
"""Distance below which two scans count as near-copies; 1 is that of two scans of the set."""

FAR = 1.25
"""Distance to the nearest labelled scan above which a scan is unlike any; 1 is that of two scans of the set."""


def suggest(
    run: str | Path,
    *,
    n: int = 10,
    scans: str | Path | None = None,
    out: str | Path | None = None,
    overwrite: bool = False,
    rule: str = "spread",
    device: str = "auto",
    precision: str | None = None,
    progress: Progress | None = None,
) -> Suggestions:
    """Rank unlabelled scans by what labelling them is worth to a trained run. Nothing is trained.

    Args:
        run: The run folder; the scans that it was trained on must still be there.
        n: Number of scans to suggest; all if there are fewer.
        scans: A folder in any layout, a scan or a datalist to choose from, labels not looked at; the run's own
            unlabelled cases when None. Scans that are labelled or set apart for testing in the run are passed over.
        out: CSV file to write, with `COLUMNS`.
        overwrite: Replace `out` if it is there.
        rule: A name in `mlbseg.apps.suggest.choose.RULES`.
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:1`` ...
        precision: ``auto``, ``32`` or ``bf16``; as in training when None.
        progress: Called with (done, all, case id).

    Returns:
        The suggestions; scans that failed are faults and stop no other.

    Raises:
        FaultsError: if no scan to choose from, or no labelled scan, could be looked at.
        UserError: if the run is not finished, its scans are not there, or `out` must not be written.
    """
    if n < 1:
        raise UserError(f"--n: found {n}, expected a whole number from 1")
    gain = find_rule(rule)
    opened = Run.open(Path(run))
    root = opened.scans
    target = None if out is None else Path(out)
    if target is not None:
        _require_room(target, {root, *([] if scans is None else [Path(scans)])}, overwrite=overwrite)
    place = pick_device(device)
    network = opened.network().to(place)
    labelled, candidates, left_out, faults, notes = _find(
        opened, root, None if scans is None else Path(scans)
    )
    with autocast(precision or opened.config.train.precision, place):
        looks, unreadable = _look(Looker(network, opened.plan, place), [*labelled, *candidates], progress)
    faults += unreadable
    labelled, candidates = ([c for c in part if _key(c) in looks] for part in (labelled, candidates))
    if not labelled or not candidates:
        what = "labelled scans" if not labelled else "scans to choose from"
        raise FaultsError(faults, f"the {what}", "none of them could be looked at")
    result = Suggestions(
        _ranked(candidates, labelled, looks, n, gain),
        len(candidates),
        len(labelled),
        left_out,
        tuple(faults),
        notes,
    )
    if target is not None:
        result.write_csv(target)
    return result


def _look(
    looker: Looker, cases: Sequence[Case], progress: Progress | None
) -> tuple[dict[Path, Look], list[Fault]]:
    """Look at each scan; one that fails is a fault and stops no other."""
    looks: dict[Path, Look] = {}
    faults: list[Fault] = []
    for number, case in enumerate(cases):
        if progress is not None:
            progress(number, len(cases), case.id)
        with one_case(case.id, faults, "suggest"):
            looks[_key(case)] = looker.look(case)
    if progress is not None:
        progress(len(cases), len(cases), "")
    return looks, faults


def _key(case: Case) -> Path:
    """Return what tells a scan from one of the same id in another folder."""
    return case.images[0].resolve()


def _find(
    run: Run, root: Path, scans: Path | None
) -> tuple[list[Case], list[Case], tuple[str, ...], list[Fault], tuple[Fault, ...]]:
    """Return the run's labelled scans, the candidates, the ids that were passed over, faults, and notes on files."""
    try:
        own = find_scans(root, run.plan.channels)
    except FaultsError:
        raise
    except UserError as error:
        raise UserError(
            f"{error} (the run's labelled scans are needed to tell what is like them: {run.moved_scans})"
        ) from None

    def named(*ids: str) -> tuple[list[Case], list[Fault]]:
        return still_there(own.cases, ids, root, kind="suggest", faults=own.faults)

    split = run.split
    labelled, faults = named(*split.clean, *split.validation)
    if not labelled:
        raise FaultsError(faults, str(root), "none of the run's labelled scans is there")
    if scans is None:
        if not split.unlabelled:
            raise UserError(f"{run.root}: all of the run's scans are labelled (name others with --scans)")
        candidates, gone = named(*split.unlabelled)
        run.warn_of_changes([*labelled, *candidates])
        others = (f for f in own.faults if f.case_id is None)
        return labelled, candidates, (), [*faults, *gone, *others], own.notes
    run.warn_of_changes(labelled)
    found = find_scans(scans, run.plan.channels)
    known = {_key(case) for case in [*labelled, *named(*split.test)[0]]}
    candidates = [case for case in found.cases if _key(case) not in known]
    if not candidates:
        raise UserError(
            f"{scans}: all of its scans are labelled or set apart for testing in the run (name others)"
        )
    left_out = tuple(case.id for case in found.cases if _key(case) in known)
    return labelled, candidates, left_out, [*faults, *found.faults], found.notes


def _require_room(out: Path, scans: set[Path], *, overwrite: bool) -> None:
    """Refuse, before minutes of work, to write over what is there, and over a list of scans in any case."""
    if out.resolve() in {path.resolve() for path in scans}:
        raise UserError(f"{out} is the list of the scans itself (choose another --out)")
    require_free(out, overwrite=overwrite, suffixes=(".csv",))
    make_folder(out.parent)


def _ranked(
    candidates: Sequence[Case], labelled: Sequence[Case], looks: dict[Path, Look], n: int, rule: Rule
) -> tuple[Suggestion, ...]:
    seen = [looks[_key(case)] for case in candidates]
    uncertainty = np.array([look.uncertainty for look in seen])
    descriptors = np.array([look.descriptor for look in seen])
    references = np.array([looks[_key(case)].descriptor for case in labelled])
    picks = choose(uncertainty, descriptors, references, n, rule)
    result = []
    for rank, pick in enumerate(picks, start=1):
        own = float(uncertainty[pick.index])
        near = labelled[pick.labelled].id
        surer = float(np.mean(uncertainty < own))
        result.append(
            Suggestion(
                rank,
                candidates[pick.index].id,
                pick.score,
                own,
                pick.distance,
                near,
                "" if pick.picked is None else candidates[pick.picked].id,
                _reason(pick, own, surer, near),
            )
        )
    return tuple(result)


def _reason(pick: Pick, uncertainty: float, surer: float, near: str) -> str:
    """Return a pick's numbers in words.

    Args:
        pick: The pick.
        uncertainty: Its own.
        surer: Share of the candidates that the network is surer of.
        near: Id of the nearest labelled scan.
    """
    words = [f"the network expects a Dice of {1 - uncertainty:.3f} here and more in {surer:.0%} of the scans"]
    distance = f"{pick.distance:.2f} times the usual distance"
    if pick.distance < COPY:
        words.append(f"nearly a copy of {near}, which is labelled")
    elif pick.distance > FAR:
        words.append(f"unlike any labelled scan ({distance} to the nearest, {near})")
    else:
        words.append(f"{distance} from the nearest labelled scan, {near}")
    if pick.closer:
        others = "1 other scan is" if pick.closer == 1 else f"{pick.closer} other scans are"
        words.append(f"{others} nearer to it than to any label so far")
    return "; ".join(words)
