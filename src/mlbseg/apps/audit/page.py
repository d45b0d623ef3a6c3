"""The page of an audit: which cases to look at, where in them, and what the networks would have drawn there."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from markupsafe import Markup

from mlbseg.apps.audit.findings import Audit, Audited
from mlbseg.apps.audit.trust import WAYS
from mlbseg.apps.report.packing import Subject
from mlbseg.apps.report.page import Cell, Section, number, paragraphs, render_page, table
from mlbseg.apps.report.viewer import SCRIPTS, Gallery, opener
from mlbseg.files import write_atomic
from mlbseg.types import Geometry


@dataclass(frozen=True)
class Sight:
    """What there is to see of a case, on its prepared grid.

    Attributes:
        image: (*S) intensities of the first channel.
        label: (*S) class values.
        predicted: (*S) class values.
        trust: (*S) in 0 ... 1.
        suspected: (*S) whether a voxel lies in a suspected region.
        geometry: Of that grid.
    """

    image: npt.NDArray[np.float32]
    label: npt.NDArray[np.integer]
    predicted: npt.NDArray[np.integer]
    trust: npt.NDArray[np.float32]
    suspected: npt.NDArray[np.bool_]
    geometry: Geometry


def subject_of(found: Audited, sight: Sight, names: dict[int, str]) -> Subject:
    """Return a case as the page's viewer shows it, opened at its largest suspected region."""
    region = max(names) + 1  # a value of its own, that no class has
    return Subject(
        name=found.case,
        caption=f"trust {found.trust:.3f}, {found.count} suspected region(s), role {found.role}",
        image=sight.image,
        geometry=sight.geometry,
        masks={
            "label": sight.label,
            "prediction": sight.predicted,
            "suspected": np.where(sight.suspected, region, 0),
        },
        maps={"doubt": np.where(sight.trust < 1 - 1e-3, 1 - sight.trust, np.nan)},
        focus=sight.suspected if sight.suspected.any() else None,
    )


def gallery(names: dict[int, str]) -> Gallery:
    """Return the viewer that takes such cases."""
    return Gallery({**names, max(names) + 1: "suspected region"})


def write_page(path: Path, result: Audit, looked: Gallery, *, title: str) -> None:
    """Write the audit as one HTML file that needs nothing but itself.

    Args:
        path: The file.
        result: All cases.
        looked: Those that can be opened.
        title: The heading.

    Raises:
        UserError: if the file cannot be written.
    """
    body = looked.html() + _cases(result, looked.names)
    sections = [Section("Cases", body, f"The least trusted first. {looked.note}", SCRIPTS)]
    if any(found.regions for found in result.cases):
        sections.append(Section("Suspected regions", _regions(result, looked.names)))
    sections.append(Section("How this was judged", _method(result)))
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


def _cases(result: Audit, shown: Collection[str]) -> Markup:
    headings = ["case", "role", "trust", *(f"trust, {name}" for name in result.class_names.values())]
    rows: list[list[Cell | str]] = [
        [Cell(opener(found.case) if found.case in shown else found.case), found.role, number(found.trust),
         *(number(found.by_class[v]) for v in result.class_names),
         number(found.suspected, 0), Cell(str(found.count), found.count)]
        for found in result.cases
    ]  # fmt: skip
    return table([*headings, f"suspected, {result.unit}", "regions"], rows, caption="Trust of every label")


def _regions(result: Audit, shown: Collection[str]) -> Markup:
    names = result.class_names
    rows: list[list[Cell | str]] = []
    for found in result.cases:
        for n, r in enumerate(found.regions, 1):
            name = f"{found.case}, {n}"
            link = opener(found.case, name, place=r.position) if found.case in shown else name
            rows.append(
                [Cell(link), _named(r.label, names), _named(r.suggested, names), number(r.volume, 0),
                 number(r.trust, 2), ", ".join(str(i) for i in r.index),
                 ", ".join(f"{x:.1f}" for x in r.position)]
            )  # fmt: skip
    headings = [
        "region",
        "label",
        "the networks say",
        result.unit,
        "trust",
        "voxel (x, y, z)",
        "position, mm, LPS",
    ]
    return table(
        headings, rows, caption="Suspected regions: those of the least trusted case first, the largest first"
    )


def _method(result: Audit) -> Markup:
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
        "The folder trust has the maps of all cases, in the scans' own geometry.",
    )


def _named(value: int, names: dict[int, str]) -> str:
    return names.get(value, "background" if value == 0 else str(value))
