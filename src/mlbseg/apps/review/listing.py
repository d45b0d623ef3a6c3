"""Which cases a review shows, in which order, and why each is worth a look."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from mlbseg.apps.suggest import suggest
from mlbseg.data.cases import Dataset, find_cases
from mlbseg.errors import FaultsError, UserError
from mlbseg.inference import Progress
from mlbseg.runs import CONFIG, Run
from mlbseg.types import Case, Role

ORDERS = ("audit", "suggest", "names")


@dataclass(frozen=True)
class Item:
    """A case of the list.

    Attributes:
        case: The case.
        reason: Why it is where it is in the list; may be empty.
    """

    case: Case
    reason: str = ""


@dataclass(frozen=True)
class Listing:
    """What is reviewed.

    Attributes:
        dataset: The scans and labels.
        run: The run that judges and predicts; None where a folder of scans was named.
        items: The cases, the most telling first.
        note: What to know about the order; may be empty.
    """

    dataset: Dataset
    run: Run | None
    items: tuple[Item, ...]
    note: str = ""


def list_cases(
    target: Path, order: str | Path = "audit", *, device: str = "auto", progress: Progress | None = None
) -> Listing:
    """Return the cases of a run, or of a folder of scans, in an order.

    Cases that are set apart for testing in a run are not listed: their labels are to judge it.

    Args:
        target: A run folder, or a folder or list of scans.
        order: A name in `ORDERS`, or a CSV file with a column ``case``, and ``reason`` if it has one, as
            `mlbseg suggest --out` writes it.
        device: Where ``suggest`` looks at the scans.
        progress: Called with (done, all, case id) by ``suggest``.

    Raises:
        UserError: if there is nothing to review, or the order cannot be had.
    """
    run = Run.open(target) if (target / CONFIG).is_file() else None
    dataset = run.find_cases() if run else find_cases(target)
    cases = {case.id: case for case in dataset.cases if case.role is not Role.TEST or run is None}
    if run:
        cases = {name: case for name, case in cases.items() if name not in run.split.test}
    if not cases:
        raise FaultsError(dataset.faults, str(target), "no case can be reviewed")
    note = ""
    if isinstance(order, Path) or order not in ORDERS:
        ranked: Iterable[Item] = _of_table(Path(order), cases)
    elif order == "suggest":
        if run is None:
            raise UserError("--order suggest: asks a trained run, expected a run folder to review")
        found = suggest(target, n=len(cases), device=device, progress=progress)
        ranked = [Item(cases[one.case], one.reason) for one in found.suggested if one.case in cases]
    elif order == "audit" and run and (run.root / "audit" / "cases.csv").is_file():
        ranked = _of_table(run.root / "audit" / "cases.csv", cases)
    else:
        ranked = []
        if order == "audit":
            note = "In the order of the names: there is no audit (mlbseg audit RUN makes one)." if run else ""
    items = list(ranked)
    told = {item.case.id for item in items}
    items += [Item(case) for name, case in sorted(cases.items()) if name not in told]
    return Listing(dataset, run, tuple(_named(item) for item in items), note)


def _named(item: Item) -> Item:
    if item.reason:
        return item
    return replace(item, reason="has no label" if item.case.label is None else f"label: {item.case.role}")


def _of_table(path: Path, cases: Mapping[str, Case]) -> list[Item]:
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        names = [row["case"].removeprefix("'") for row in rows]
    except (OSError, ValueError, KeyError, AttributeError, csv.Error) as error:
        raise UserError(
            f"{path}: cannot be used as an order ({error}); expected a CSV file with a column case"
        ) from None
    items: list[Item] = []
    for name, row in zip(names, rows, strict=True):
        if name in cases and name not in {item.case.id for item in items}:
            reason = row.get("reason") or ""
            if row.get("trust"):
                reason = f"trust {row['trust']}, {row.get('regions') or 0} suspected region(s)"
            items.append(Item(cases[name], reason))
    return items
