"""The page of an audit: which cases to look at, where in them, and what the networks would have drawn there."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from markupsafe import Markup

from mlbseg.apps.audit.findings import Audit, Audited
from mlbseg.apps.audit.trust import WAYS
from mlbseg.apps.report.page import Cell, Section, number, paragraphs, render_page, table
from mlbseg.apps.report.slices import Subject, browser
from mlbseg.files import write_atomic


@dataclass(frozen=True)
class Sight:
    """What there is to see of a case, on its prepared grid.

    Attributes:
        image: (*S) intensities of the first channel.
        label: (*S) class values.
        predicted: (*S) class values.
        trust: (*S) in 0 ... 1.
        suspected: (*S) whether a voxel lies in a suspected region.
        spacing: Of the array's axes, mm.
    """

    image: npt.NDArray[np.float32]
    label: npt.NDArray[np.integer]
    predicted: npt.NDArray[np.integer]
    trust: npt.NDArray[np.float32]
    suspected: npt.NDArray[np.bool_]
    spacing: tuple[float, ...]


def write_page(path: Path, result: Audit, sights: Iterable[tuple[str, Sight]], *, title: str) -> None:
    """Write the audit as one HTML file that needs nothing but itself.

    Args:
        path: The file.
        result: All cases.
        sights: Of the least trusted ones, in this order.
        title: The heading.

    Raises:
        UserError: if the file cannot be written.
    """
    names = result.class_names
    sections = [Section("Cases", _cases(result), "The least trusted first.")]
    by_case = {found.case: found for found in result.cases}
    for case, sight in sights:  # one at a time: those of large scans are large
        sections.append(Section(case, _case(by_case[case], sight, names, result.unit)))
    sections.append(Section("How this was judged", _method(result, len(sections) - 1)))
    if result.faults:
        sections.append(Section("Not judged", paragraphs(*(str(fault) for fault in result.faults))))
    doubted = sum(bool(found.count) for found in result.cases)
    facts = [
        ("labels", str(len(result.cases))),
        ("with a suspected region", str(doubted)),
        ("least trust", f"{result.cases[0].trust:.2f}"),
    ]
    page = render_page(
        title,
        sections,
        subtitle="Which labels to look at first. A low trust is a reason to look, not a verdict.",
        facts=facts,
    )
    write_atomic(path, page.encode(errors="backslashreplace"))


def _cases(result: Audit) -> Markup:
    headings = ["case", "role", "trust", *(f"trust, {name}" for name in result.class_names.values())]
    rows: list[list[Cell | str]] = [
        [found.case, found.role, number(found.trust), *(number(found.by_class[v]) for v in result.class_names),
         number(found.suspected, 0), Cell(str(found.count), found.count)]
        for found in result.cases
    ]  # fmt: skip
    return table([*headings, f"suspected, {result.unit}", "regions"], rows, caption="Trust of every label")


def _case(found: Audited, sight: Sight, names: dict[int, str], unit: str) -> Markup:
    focus = (
        int(sight.suspected.sum(axis=(1, 2)).argmax())
        if sight.label.ndim == 3 and sight.suspected.any()
        else None
    )
    region = max(names) + 1  # a value of its own, that no class has
    subject = Subject(
        name=found.case,
        caption=f"trust {found.trust:.3f}, {found.count} suspected region(s), role {found.role}",
        image=sight.image,
        spacing=sight.spacing,
        masks={
            "label": sight.label,
            "networks": sight.predicted,
            "suspected": np.where(sight.suspected, region, 0),
        },
        maps={"doubt": np.where(sight.trust < 1 - 1e-3, 1 - sight.trust, np.nan)},
        focus=focus,
    )
    body = browser(subject, {**names, region: "suspected region"})
    if found.regions:
        rows: list[list[Cell | str]] = [
            [str(n), _named(r.label, names), _named(r.suggested, names), number(r.volume, 0), number(r.trust, 2),
             ", ".join(str(i) for i in r.index), ", ".join(f"{x:.1f}" for x in r.position)]
            for n, r in enumerate(found.regions, 1)
        ]  # fmt: skip
        headings = [
            "region",
            "label",
            "the networks say",
            unit,
            "trust",
            "voxel (x, y, z)",
            "position, mm, LPS",
        ]
        body += table(headings, rows, caption=f"Suspected regions of {found.case}, the largest first")
    return body


def _method(result: Audit, shown: int) -> Markup:
    caution = [result.caution[0].upper() + result.caution[1:] + "."] if result.caution else []
    return paragraphs(
        *caution,
        f"Method {result.way}: {WAYS[result.way].about}. A voxel is doubted where its trust is below "
        f"{result.threshold:g}. A case's trust is the share of trusted voxels among those that belong to a "
        "structure by the label or by the networks. A suspected region is a connected set of doubted voxels that "
        "is somewhere thicker than two of them, as borders that two people would draw a voxel apart are no errors.",
        "Labels in role clean were learned by the networks that judge them here, and errors in them may have been "
        "learned as well: trust in these is too high rather than too low. Networks err too, most of all on anatomy "
        "that they have not seen: look before you change a label.",
        f"The {shown} least trusted cases are shown. The folder trust has the maps of all, in the scans' own geometry.",
    )


def _named(value: int, names: dict[int, str]) -> str:
    return names.get(value, "background" if value == 0 else str(value))
