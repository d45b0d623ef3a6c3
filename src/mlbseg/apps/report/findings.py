"""What a reader should know before trusting a run, in plain words; each by a rule that is stated with it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup

from mlbseg.apps.report.curves import SOURCES, Log
from mlbseg.apps.report.page import render
from mlbseg.apps.report.scores import ranked
from mlbseg.apps.report.scoring import Scored
from mlbseg.runs import Run

GAP = 0.1  # of Dice between training cases and others
FALL = 0.02  # of validation Dice below its best
KEPT = 0.02  # of pixels, below which a source of labels says nothing
BIAS = 0.2  # of the volume
BEHIND = 0.15  # of Dice below the median
FEW = 10  # cases, below which a mean says little


@dataclass(frozen=True)
class Finding:
    """One thing to know.

    Attributes:
        title: In a few words.
        text: What was found, and what can be done.
        warning: Whether it is a warning; else it only helps to read the page.
    """

    title: str
    text: str
    warning: bool = True


def findings(run: Run, log: Log, scored: Scored | None, trained_dice: float | None) -> list[Finding]:
    """Return what stands out, warnings first.

    Args:
        run: The run.
        log: Its log.csv.
        scored: Its scored cases; None if there are none.
        trained_dice: Mean Dice of cases that it was trained on; None if it was not measured.
    """
    found = [Finding("Training", f"{text[0].upper()}{text[1:]}") for text in run.result.warnings]
    found += _of_log(log)
    if scored is not None:
        found += [
            *_of_group(scored),
            *_of_fit(scored, trained_dice),
            *_of_classes(run, scored),
            *_of_cases(scored),
        ]
    else:
        found.append(
            Finding(
                "Nothing could be scored",
                "No case with a label was found: nothing here says how good the run is.",
            )
        )
    return sorted(found, key=lambda finding: not finding.warning)


def shown(found: list[Finding]) -> Markup:
    """Return the findings as a list."""
    html = render("findings.html", findings=found, warnings=sum(f.warning for f in found))
    return Markup(html)  # noqa: S704 - rendered with everything escaped


def _of_log(log: Log) -> Iterator[Finding]:
    for name, words in SOURCES.items():
        values = log.tail(f"kept_{name}")
        if values and np.mean(values) < KEPT:
            yield Finding(
                "The weights have collapsed",
                f"Over the last quarter of training only {np.mean(values):.1%} of the pixels of {words} had any "
                "weight: the unlabelled scans taught next to nothing. Try uniform weights, or compare with the method "
                "supervised, which is what this run amounts to.",
            )
        mass = log.tail(f"mass_{name}")
        if mass and len([n for n in SOURCES if log.columns.get(f"mass_{n}")]) > 1 and np.mean(mass) < KEPT:
            yield Finding(
                "One source of labels has no say",
                f"Over the last quarter of training {words} had {np.mean(mass):.1%} of all weight.",
            )
    validated = [value for _, value in log.columns.get("validation_dice", ())]
    if len(validated) > 2 and max(validated) - validated[-1] > FALL:
        yield Finding(
            "Over-fitting: validation was better before the end",
            f"Validation Dice was {max(validated):.3f} at its best and {validated[-1]:.3f} at the end. The best "
            "weights were kept; fewer steps would have done.",
        )
    if len(validated) > 2 and validated[-1] == max(validated) and validated[-1] - validated[-2] > FALL / 2:
        yield Finding(
            "Still learning when it ended",
            f"Validation Dice rose to {validated[-1]:.3f} at the last look: more steps (-o steps=N) should help.",
        )


def _of_group(scored: Scored) -> Iterator[Finding]:
    count = len(scored.cases)
    if scored.group == "clean":
        yield Finding(
            "The scores are of training cases",
            "No test, validation or noisy case has a label. The network was trained on the cases scored here: the "
            "scores say that it could learn them, not how good it is. Set cases apart with --test N.",
        )
    if scored.group == "noisy":
        yield Finding(
            "The scores are against unverified labels",
            "They say how far prediction and label agree; where they do not, either may be wrong.",
        )
    if scored.group == "validation":
        yield Finding(
            "The scored cases chose the checkpoint",
            "Scores of validation cases are a little too good, as the weights were chosen by them.",
            warning=False,
        )
    if count < FEW:
        yield Finding(
            f"{count} case{'s are' if count > 1 else ' is'} few",
            "Another choice of cases could give quite another mean.",
            warning=False,
        )
    if scored.faults:
        named = "; ".join(str(fault) for fault in scored.faults[:5])
        more = f"; and {len(scored.faults) - 5} more" if len(scored.faults) > 5 else ""
        yield Finding("Not all is scored", f"{named}{more}.")


def _of_fit(scored: Scored, trained_dice: float | None) -> Iterator[Finding]:
    if trained_dice is None or scored.group not in ("test", "validation"):
        return
    here = scored.evaluation.mean_dice
    if trained_dice - here > GAP:
        yield Finding(
            "Over-fitting: much better on the cases it was trained on",
            f"Dice is {trained_dice:.3f} on labelled training cases and {here:.3f} on the {scored.group} cases. "
            "More labels help most; so may stronger augmentation (augment.*), fewer steps, or a method that uses the "
            "unlabelled scans.",
        )
    else:
        yield Finding(
            f"{trained_dice - here:.3f} of Dice behind the training cases"
            if trained_dice > here
            else "No worse than on training cases",
            f"Dice is {trained_dice:.3f} on labelled training cases and {here:.3f} on the {scored.group} cases "
            f"(a gap above {GAP:g} would be called over-fitting).",
            warning=False,
        )


def _of_classes(run: Run, scored: Scored) -> Iterator[Finding]:
    for value, name in run.plan.structures.items():
        counts = scored.voxels[value].values()
        labelled = [(found, expected) for found, expected in counts if expected]
        missed = sum(found == 0 for found, _ in labelled)
        invented = sum(found > 0 and not expected for found, expected in counts)
        if not labelled:
            yield Finding(
                f"Nothing to score {name} by", f"No scored case has {name} in its label.", warning=False
            )
        elif missed == len(labelled):
            yield Finding(
                f"{name} is never predicted",
                f"{len(labelled)} labels hold it, no prediction does. Has it enough labelled voxels in training, and "
                "is it large enough to be seen at the plan's spacing?",
            )
        elif missed:
            yield Finding(
                f"{name} is missed", f"{missed} of {len(labelled)} cases that have it get none of it."
            )
        if invented:
            yield Finding(
                f"{name} is invented", f"{invented} case(s) without it in their label get some of it."
            )
        ratios = [found / expected for found, expected in labelled if found]
        if len(ratios) > 2 and abs(float(np.median(ratios)) - 1) > BIAS:
            much = float(np.median(ratios))
            yield Finding(
                f"{name} is {'too large' if much > 1 else 'too small'} throughout",
                f"Its predicted volume is {much:.0%} of the labelled one in the median case.",
            )


def _of_cases(scored: Scored) -> Iterator[Finding]:
    cases = ranked(scored.evaluation)
    middle = float(np.median([dice for _, dice in cases]))
    behind = [f"{name} ({dice:.3f})" for name, dice in cases if middle - dice > BEHIND]
    if behind and len(cases) > 2:
        more = f" and {len(behind) - 5} more" if len(behind) > 5 else ""
        yield Finding(
            f"{len(behind)} case{'s fall' if len(behind) > 1 else ' falls'} far behind the others",
            f"{', '.join(behind[:5])}{more}; the median is {middle:.3f}. Look at these first: scan, label or network "
            "may be to blame.",
        )
