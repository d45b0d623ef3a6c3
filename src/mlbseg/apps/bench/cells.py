"""The cells of a bench: a row (a method, or a variant of one) at a budget of labels and a seed."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Annotated

from pydantic import Field

from mlbseg.config import parse_override
from mlbseg.errors import UserError
from mlbseg.methods import METHODS, find_method

SUPERVISED = "supervised"
TEACHER = "mean-teacher"
STAGE1 = "stage-1"
"""The folder of the stage 1 that the semi-supervised cells of a budget and a seed share."""
FIXED = ("method", "seed")
"""Settings that the table's own axes set."""


@dataclass(frozen=True)
class Row:
    """A way of training, as a row of the table.

    Attributes:
        label: As it is shown.
        method: A name in `mlbseg.methods.METHODS`.
        overrides: ``key=value`` settings of its own, on top of those of the whole bench.
    """

    label: str
    method: str
    overrides: tuple[str, ...] = ()

    @property
    def slug(self) -> str:
        """Its folder's name."""
        return slug(self.label)


@dataclass(frozen=True)
class Cell:
    """One training of the bench.

    Attributes:
        row: The slug of its row, or `STAGE1`.
        budget: Labels that it may see; None for all that are not of test cases.
        seed: Of initial weights and of all draws.
        label_seed: Of which scans are labelled: 0 for the first ones of the split's order.
    """

    row: str
    budget: Annotated[int, Field(ge=1, lt=2**31)] | None
    seed: Annotated[int, Field(ge=0, lt=2**31)]
    label_seed: Annotated[int, Field(ge=0, lt=2**31)] = 0

    @property
    def key(self) -> str:
        """Its folder under ``runs``."""
        labels = "all" if self.budget is None else str(self.budget)
        drawn = f"labels-{self.label_seed}/" if self.label_seed else ""
        return f"{labels}-labelled/{drawn}seed-{self.seed}/{self.row}"

    @property
    def title(self) -> str:
        """As it is shown."""
        labels = "all" if self.budget is None else str(self.budget)
        drawn = f" (set {self.label_seed})" if self.label_seed else ""
        return f"{self.row}, {labels} labels{drawn}, seed {self.seed}"

    @property
    def stage1(self) -> Cell:
        """The stage 1 that semi-supervised cells of these labels and this seed begin with."""
        return replace(self, row=STAGE1)


LONGEST = 200
"""Bytes of a row's folder name; locks and logs are named after it too, and file systems take names of 255."""


def slug(label: str) -> str:
    """Return a label as a folder's name: small letters, digits, dots and hyphens."""
    return re.sub(r"[^\w.]+", "-", label.lower()).strip("-.")


def parse_rows(methods: Sequence[str], variants: Sequence[str] = ()) -> list[Row]:
    """Return the rows that are asked for.

    Args:
        methods: Names of methods.
        variants: ``LABEL=METHOD key=value key=value ...``, values with spaces in quotes.

    Raises:
        UserError: for a method that does not exist, a variant of another form, a setting that all cells must share,
            or two rows of one folder.
    """
    for name in methods:
        find_method(name)
    rows = [Row(name, name) for name in methods]
    for text in variants:
        label, _, rest = (part.strip() for part in text.partition("="))
        try:
            method, *overrides = shlex.split(rest)
        except ValueError:
            method = ""
        if not label or not method:
            raise UserError(
                f"--variant {text!r}: expected LABEL=METHOD key=value ..., such as "
                "'mlb, nothing pasted=mlb mlb.mix=0'"
            )
        find_method(method)
        if slug(label) in METHODS:
            raise UserError(
                f"--variant {label!r}: is a method's own name, expected another (such as '{label}, changed')"
            )
        for item in overrides:
            key, _ = parse_override(item)
            if key in FIXED or key.startswith("plan."):
                raise UserError(
                    f"--variant {label!r}: sets {key}, which all cells share (leave it out"
                    f"{'' if key in FIXED else f', or set it for all with -o {item}'})"
                )
        rows.append(Row(label, method, tuple(overrides)))
    by_slug: dict[str, Row] = {}
    for row in rows:
        if not row.slug or row.slug == STAGE1:
            raise UserError(f"--variant {row.label!r}: gives no folder name to use (choose another label)")
        if (length := len(row.slug.encode())) > LONGEST:
            raise UserError(
                f"--variant {row.label!r}: found a label of {length} bytes, expected at most {LONGEST}, as folders are "
                "named after it (choose a shorter one)"
            )
        if row.slug in by_slug:
            raise UserError(
                f"found {by_slug[row.slug].label!r} and {row.label!r}, which would share the folder {row.slug}, "
                "expected each once (leave one out, or give it another label)"
            )
        by_slug[row.slug] = row
    if not rows:
        raise UserError("a bench needs --methods, such as --methods supervised,mlb")
    return rows


def cells_of(
    rows: Sequence[Row],
    budgets: Sequence[int],
    seeds: Sequence[int],
    *,
    upper: bool,
    share: Sequence[str],
    label_seeds: Sequence[int] = (0,),
) -> set[Cell]:
    """Return the cells that are asked for.

    Args:
        rows: The rows.
        budgets: Numbers of labels.
        seeds: The seeds.
        upper: Also train with all labels.
        share: Slugs of the rows that begin with the shared stage 1.
        label_seeds: Of which scans are labelled.
    """
    slugs = [row.slug for row in rows]
    if any(slug in share for slug in slugs):
        slugs.append(STAGE1)
    cells = {
        Cell(slug, budget, seed, drawn)
        for slug in slugs
        for budget in budgets
        for seed in seeds
        for drawn in label_seeds
    }
    return cells | ({Cell(SUPERVISED, None, seed) for seed in seeds} if upper else set())


def in_order(cells: Iterable[Cell], rows: Sequence[str]) -> list[Cell]:
    """Return cells in the order to run them: by label set, then by seed, so that whatever is finished early compares.

    Args:
        cells: The cells.
        rows: Slugs of all rows, in their order.
    """
    order = [STAGE1, *rows]

    def place(cell: Cell) -> tuple[int, int, float, int]:
        if cell.budget is None:
            return cell.label_seed, cell.seed, float("inf"), 0
        return cell.label_seed, cell.seed, cell.budget, order.index(cell.row)

    return sorted(cells, key=place)
