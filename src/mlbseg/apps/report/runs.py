"""The page of a run: what was trained on what, how it went, and how good it is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mlbseg.apps.report.curves import Log, charts, read_log
from mlbseg.apps.report.findings import Finding, findings, shown
from mlbseg.apps.report.page import Section, paragraphs, render_page, require_free_page, write_page
from mlbseg.apps.report.scores import case_table, summary_table
from mlbseg.apps.report.scoring import (
    GROUPS,
    Scored,
    choose,
    labelled_cases,
    predict_cases,
    score_cases,
    subjects,
    training_dice,
)
from mlbseg.apps.report.sections import (
    audit_section,
    data_section,
    machine_section,
    plan_section,
    start_section,
    weights_section,
)
from mlbseg.apps.report.viewer import SCRIPTS, Gallery
from mlbseg.data.readers import is_scan_file, stem
from mlbseg.data.unread import passed_over
from mlbseg.device import pick_device
from mlbseg.errors import Fault, UserError, note_lines
from mlbseg.evaluation import Evaluation
from mlbseg.files import working_folder
from mlbseg.inference import Model, Progress
from mlbseg.runs import Run
from mlbseg.types import Case

REPORT = "report.html"
_KINDS = {"test": "test", "validation": "validation", "noisy": "noisily labelled", "clean": "training"}
COMPARED = 3
"""Training cases that are predicted too, to see how much better they are."""


@dataclass(frozen=True)
class Report:
    """What `report` wrote.

    Attributes:
        path: The page.
        scored: Number of cases that were scored.
        group: Which part of the split they are; None if there are none.
        mean_dice: Of these; None if there are none.
        findings: What stands out.
        evaluation: The scores; None if there are none.
        beyond: Further cases of this group that were not scored.
    """

    path: Path
    scored: int
    group: str | None
    mean_dice: float | None
    findings: tuple[Finding, ...]
    evaluation: Evaluation | None = None
    beyond: int = 0

    @property
    def warnings(self) -> list[Finding]:
        """The findings that are warnings."""
        return [finding for finding in self.findings if finding.warning]

    def as_dict(self) -> dict[str, Any]:
        """Return everything as lists, strings and numbers, for JSON."""
        return {
            "report": str(self.path),
            "scored": self.scored,
            "group": self.group,
            "mean_dice": self.mean_dice,
            "scores": None if self.evaluation is None else self.evaluation.as_dict()["summary"],
            "warnings": [f"{finding.title}. {finding.text}" for finding in self.warnings],
        }


def report(
    run: str | Path,
    out: str | Path | None = None,
    *,
    predictions: str | Path | None = None,
    cases: int = 40,
    compared: int = COMPARED,
    overwrite: bool = False,
    device: str = "auto",
    progress: Progress | None = None,
) -> Report:
    """Write one HTML file that shows what a run learned, how good it is, and warnings.

    It shows and chooses nothing: training is over, and no label that it looks at changes the run.

    Args:
        run: The run folder.
        out: The file; `REPORT` in the run folder when None.
        predictions: A folder of masks to score in place of the report's own predictions.
        cases: How many cases to predict and score at most: test cases, else validation cases, else those with a
            unverified label, else the training cases; the first of them.
        compared: How many of the labelled training cases to predict too where others are scored, to see whether
            the network is better on what it was trained on.
        overwrite: Replace a file that is there.
        device: ``auto``, ``cpu``, ``cuda`` ...
        progress: Called with (done, all, case id).

    Raises:
        UserError: if it is no finished run, the file is there, or nothing can be scored although cases are there.
    """
    opened = Run.open(Path(run))
    path = opened.root / REPORT if out is None else Path(out)
    require_free_page(path, overwrite=overwrite)
    if cases < 1:
        raise UserError(f"--cases: found {cases}, expected a whole number from 1")
    model = Model([opened], pick_device(device))
    log = read_log(opened.root / "log.csv")
    # Beside the page, and not among the temporary files of all users: there will be masks in it.
    with working_folder(path.parent) as work:
        groups, gone, missing = _groups(opened)
        scored = _score(model, groups, predictions, cases, work, progress)
        if scored is not None:
            # A group that is gone as a whole is why a later one was scored.
            tried = list(GROUPS)[: list(GROUPS).index(scored.group) + 1]
            scored = replace(scored, faults=(*(f for group in tried for f in gone[group]), *scored.faults))
        trained = None
        clean = groups.get("clean", [])[:compared]
        if scored is not None and scored.group in ("test", "validation") and clean and predictions is None:
            (work / "trained").mkdir()
            trained = training_dice(model, clean, work / "trained")
        # Here, as the masks to be shown are in this folder, and one after the other: each is a whole scan in memory.
        looked = Gallery(opened.plan.structures)
        if scored is not None:
            looked.fill(subjects(scored, opened, work / "certainty"), len(scored.cases))
    found = findings(opened, log, scored, trained)
    looked_at = [*([] if scored is None else scored.cases.values()), *(clean if trained is not None else ())]
    if changed := opened.changed(looked_at):
        found.insert(0, Finding("Files have changed since the run began", changed))
    if predictions is not None and (others := passed_over(Path(predictions))):
        found.append(Finding("Files beside the masks were passed over", " ".join(note_lines(others))))
    if missing:
        found.insert(0, Finding("The scans are not where they were", missing))
    weights = sum(parameter.numel() for parameter in model.networks[0].parameters())
    content = render_page(
        f"{opened.config.method} on {opened.scans.name}",
        _sections(opened, log, scored, looked, found),
        subtitle=_subtitle(opened, weights),
        facts=_facts(opened, scored),
    )
    write_page(path, content)
    return Report(
        path,
        0 if scored is None else len(scored.cases),
        None if scored is None else scored.group,
        None if scored is None else scored.evaluation.mean_dice,
        tuple(found),
        None if scored is None else scored.evaluation,
        0 if scored is None else scored.beyond,
    )


def _groups(run: Run) -> tuple[dict[str, list[Case]], dict[str, list[Fault]], str]:
    """Return the labelled cases of each group and the faults of those that are gone; or neither, and why."""
    try:
        return *labelled_cases(run), ""
    except UserError as error:
        return {}, {}, f"{error} So no case could be scored or shown; all else is from the run folder."


def _score(
    model: Model,
    groups: Mapping[str, list[Case]],
    predictions: str | Path | None,
    most: int,
    work: Path,
    progress: Progress | None,
) -> Scored | None:
    [run] = model.runs
    given = None if predictions is None else _masks(Path(predictions))
    chosen = choose(groups, given)
    if chosen is None:
        if given is not None and any(groups.values()):
            raise UserError(
                f"{predictions}: no mask is named after a labelled case of the run, expected such as "
                f"{next(c.id for cases in groups.values() for c in cases)}.nii.gz"
            )
        return None
    group, cases = chosen
    beyond, cases = len(cases) - len(cases[:most]), cases[:most]
    if given is not None:
        faults = [
            Fault(case.id, f"no mask in {Path(str(predictions)).name}", case_id=case.id, kind="predict")
            for case in groups[group]
            if case.id not in given
        ]
        return score_cases(
            group, cases, given, Path(str(predictions)), run.plan, faults=faults, beyond=beyond
        )
    for name in ("masks", "certainty"):
        (work / name).mkdir()
    masks, faults = predict_cases(model, cases, work / "masks", progress, certainty=work / "certainty")
    return score_cases(group, cases, masks, work / "masks", run.plan, faults=faults, beyond=beyond)


def _masks(folder: Path) -> dict[str, Path]:
    try:
        return {stem(path): path for path in sorted(folder.iterdir()) if is_scan_file(path)}
    except OSError as error:
        raise UserError(f"{folder}: {error.strerror}, expected a folder of predicted masks") from None


def _sections(
    run: Run, log: Log, scored: Scored | None, looked: Gallery, found: list[Finding]
) -> list[Section]:
    sections = [Section("At a glance", shown(found))]
    if scored is not None:
        note = f"Scored: {GROUPS[scored.group]}."
        if scored.beyond:
            note += f" The first {len(scored.cases)} of them; {scored.beyond} more were left out (--cases N)."
        sections.append(Section("Scores", summary_table(scored.evaluation), note))
        sections.append(
            Section(
                "Cases",
                looked.html() + case_table(scored.evaluation, looked.names),
                looked.note,
                SCRIPTS,
            )
        )
    if log.columns:
        note = (
            ""
            if log.stages != (2,)
            else "The log has stage 2 only: stage 1 was trained elsewhere and shared."
        )
        sections.append(Section("Training", charts(log), note))
    else:
        sections.append(Section("Training", paragraphs("The run has no log of its steps.")))
    extra = (weights_section(run), audit_section(run))
    sections += [section for section in extra if section is not None]
    begun = start_section(run)
    return [
        *sections,
        data_section(run),
        plan_section(run),
        *([] if begun is None else [begun]),
        machine_section(run),
    ]


def _subtitle(run: Run, weights: int) -> str:
    patch = "×".join(map(str, run.plan.patch_size))
    return (
        f"{run.plan.ndim}D {run.plan.network} of {weights / 1e6:.2f} million parameters, patches of {patch}; kept: "
        f"{run.result.selection}."
    )


def _facts(run: Run, scored: Scored | None) -> list[tuple[str, str]]:
    split = run.split
    facts = []
    if scored is not None:
        count = len(scored.cases)
        words = f"mean Dice of {count} {_KINDS[scored.group]} case{'s' if count > 1 else ''}"
        facts.append((words, f"{scored.evaluation.mean_dice:.3f}"))
        distance = scored.evaluation.summary[None]["hd95_mm"].mean
        if distance is not None:
            facts.append(("95HD, mean", f"{distance:.1f} mm"))
        if unknown := sum(scored.evaluation.unknown.values()):
            facts.append(("unknown voxels, not scored", f"{unknown:,}"))
    facts.append(("careful labels", str(len(split.clean))))
    if split.noisy:
        facts.append(("unverified labels", str(len(split.noisy))))
    facts.append(("scans without a label", str(len(split.unlabelled))))
    facts.append(("training steps", f"{run.plan.steps:,}"))
    return facts
