"""The record of a bench: what all its cells share, as it is written down."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from pydantic import ConfigDict, TypeAdapter

from mlbseg.apps.bench.cells import STAGE1, SUPERVISED, Cell, Row
from mlbseg.config import Config, config_of, load_config, parse_override
from mlbseg.data.cases import AS_DRAWN, Dataset, LabelOptions, with_patients
from mlbseg.data.patients import Patients
from mlbseg.data.records import PathText, read_as, write_record
from mlbseg.data.splits import Split, make_split
from mlbseg.errors import UserError, brief
from mlbseg.methods import METHODS, find_method
from mlbseg.training import stage1_settings

RECORD = "bench.json"
SETTINGS = "settings.yaml"
INITIALISER = next(name for name, kind in METHODS.own.items() if kind.uses_unlabelled)
"""Of the runs that hold the shared stage 1: any method that begins with one."""


@dataclass(frozen=True)
class Setup:
    """The record of a bench.

    Attributes:
        data: The data set.
        cache: Where prepared scans are kept.
        split_seed: Of the shuffle by which the cases were divided.
        rule: How they were divided, in a sentence.
        clean: Cases whose label training may be given, in the order in which budgets count.
        test: Cases that are set apart.
        scored: Those of them that have a label.
        asked: The settings that were asked for, for all cells.
        plan: What was decided for all cells.
        rows: The rows by slug.
        cells: Row, budget and seed of each cell that was ever asked for, in the order to run them.
        commands: The commands that asked.
        labels: The label values that were named, none of them if none were; None if nobody wrote that down, as in
            folders of earlier versions. So too the next three.
        noisy: Cases whose label came with them and is not trusted.
        unlabelled: Cases without a label.
        patients: Which cases are of one patient.
        label_options: What was said of all labels.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    data: PathText
    cache: PathText
    split_seed: int
    rule: str
    clean: tuple[str, ...]
    test: tuple[str, ...]
    scored: tuple[str, ...]
    asked: dict[str, Any]
    plan: dict[str, Any]
    rows: dict[str, Row] = field(default_factory=dict)
    cells: tuple[Cell, ...] = ()
    commands: tuple[str, ...] = ()
    labels: tuple[int, ...] | None = None
    noisy: tuple[str, ...] | None = None
    unlabelled: tuple[str, ...] | None = None
    patients: Patients | None = None
    label_options: LabelOptions = AS_DRAWN

    @classmethod
    def read(cls, folder: Path) -> Setup:
        """Read the record of a bench's folder.

        Raises:
            UserError: if it is missing or damaged.
        """
        path = folder / RECORD
        setup = read_as(TypeAdapter(cls), path, "the record of a bench")
        for name, row in setup.rows.items():
            if name != row.slug:  # it names a folder
                raise UserError(f"{path}: row {brief(name)}, expected {row.slug!r} as its label has it")
        known = {*setup.rows, STAGE1}
        for cell in setup.cells:
            if cell.row not in known and not (cell.row == SUPERVISED and cell.budget is None):
                raise UserError(
                    f"{path}: a cell of the row {brief(cell.row)}, expected {brief(sorted(known))}"
                )
        return setup

    def write(self, folder: Path) -> None:
        """Write the record, whole or not at all."""
        write_record(folder / RECORD, asdict(self))

    def config(self, folder: Path, cell: Cell) -> Config:
        """Return the settings of a cell: those of the bench, with the plan pinned, and those of its row."""
        if cell.row == STAGE1:
            row = Row(STAGE1, INITIALISER)
        elif cell.budget is None:
            # Nothing here has weights to decide: all labels are learnt from.
            row = Row(SUPERVISED, SUPERVISED, ("train.meta_cases=0",))
        else:
            row = self.rows[cell.row]
        return load_config(folder / SETTINGS, overrides=row.overrides, method=row.method, seed=cell.seed)

    def split(self, cell: Cell, dataset: Dataset) -> Split:
        """Return the split of a cell, which is that of `mlbseg train` with the same cases named."""
        dataset = dataset if self.patients is None else with_patients(dataset, known=self.patients)
        return make_split(
            dataset.cases,
            order=dataset.order,
            labelled=self.labelled(cell, dataset),
            test=self.test,
            seed=cell.seed,
            patients=self.patients,
        )

    def labelled(self, cell: Cell, dataset: Dataset) -> tuple[str, ...]:
        """Return the cases whose label a cell is given: the first of the order, or of one of the patients' shuffled."""
        order = self.clean
        if cell.label_seed:
            patient = {case.id: case.patient for case in dataset.cases}
            patients = list(dict.fromkeys(patient[name] for name in self.clean))
            place = np.random.default_rng([cell.label_seed, self.split_seed]).permutation(len(patients))
            rank = dict(zip(patients, place.tolist(), strict=True))
            order = tuple(sorted(self.clean, key=lambda name: rank[patient[name]]))
        return order[: cell.budget]

    def shares_stage1(self, row: Row) -> bool:
        """Return whether a row begins with the stage 1 that the rows share."""
        return shares_stage1(row, config_of(self.asked))

    def needs_stage1(self, cell: Cell) -> bool:
        """Return whether a cell begins with the stage 1 of its budget and seed."""
        return cell.budget is not None and cell.row != STAGE1 and self.shares_stage1(self.rows[cell.row])


def with_row(config: Config, row: Row) -> Config:
    """Return the settings of a row from those of all rows."""
    data = config.model_dump(mode="json")
    for item in row.overrides:
        key, value = parse_override(item)
        section, _, name = key.partition(".")
        data[section][name] = value
    return load_config(**{**data, "method": row.method})


def shares_stage1(row: Row, config: Config) -> bool:
    """Return whether a row has a stage 1, and nothing of its own in it."""
    own, method = with_row(config, row), find_method(row.method)
    shared = method.uses_unlabelled and method.stage1(own.of(row.method)) is None
    return shared and stage1_settings(own) == stage1_settings(config)
