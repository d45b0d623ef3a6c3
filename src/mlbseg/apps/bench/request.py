"""What a bench is asked for: one object, from the command line or Python to the record of the bench."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from mlbseg.apps.bench.cells import FIXED, Row, parse_rows
from mlbseg.config import Config, load_config, parse_override
from mlbseg.data.cases import AS_DRAWN, LabelOptions
from mlbseg.data.reading import Reading
from mlbseg.errors import UserError


@dataclass(frozen=True)
class BenchRequest:
    """All that may be asked of a bench; `mlbseg.bench` says more.

    Attributes:
        data: Folder of scans, or a datalist.
        methods: Names of methods, one row each.
        variants: Further rows, ``LABEL=METHOD key=value ...``.
        budgets: Numbers of labels.
        seeds: Random seeds.
        label_seeds: Seeds of which scans are labelled; 0 for the first ones.
        test: Cases set apart for testing.
        split_seed: Random seed of the order of cases.
        upper: Also train supervised with all labels.
        labels: All label values that may occur.
        patient: Regular expression that finds the patient in a case id.
        label_options: What is said of all labels.
        preset: Name of a preset.
        config: YAML file of settings.
        overrides: Settings as ``key=value``.
        cache: Folder for preprocessed scans.
        processes: Number of processes that read scans; one per core when None.
        command: As typed, for the record.

    Raises:
        UserError: for rows, numbers or test cases that no bench can have.
    """

    data: Path
    methods: Sequence[str] = ()
    variants: Sequence[str] = ()
    budgets: Sequence[int] = ()
    seeds: Sequence[int] = (0,)
    label_seeds: Sequence[int] = (0,)
    test: int | Sequence[str] | None = None
    split_seed: int = 0
    upper: bool = True
    labels: Sequence[int] | None = None
    patient: str | None = None
    label_options: LabelOptions = AS_DRAWN
    preset: str | None = None
    config: Path | None = None
    overrides: Sequence[str] = ()
    cache: Path | None = None
    processes: int | None = None
    command: str = ""

    def __post_init__(self) -> None:
        _ = self.rows  # refuses rows that there cannot be
        _require_numbers("--labelled", self.budgets, least=1)
        _require_numbers("--seeds", self.seeds, least=0)
        _require_numbers("--label-seeds", self.label_seeds, least=0)
        if self.test is None:
            raise UserError("a bench needs test cases: --test N, or a file or a list of case ids")

    @cached_property
    def rows(self) -> list[Row]:
        """The rows of the table."""
        return parse_rows(self.methods, self.variants)

    @cached_property
    def reading(self) -> Reading:
        """In how many processes scans are read, and what is remembered of them."""
        return Reading.of(self.processes, self.cache)

    @cached_property
    def settings(self) -> Config:
        """The settings of all cells. A file may be a run's config.yaml: its method and seed do not count.

        Raises:
            UserError: for what `load_config` refuses, and for overrides of what the table's axes set.
        """
        for item in self.overrides:
            key, _ = parse_override(item)
            if key in FIXED:
                raise UserError(f"-o {item}: each cell has its own (use --{key}s)")
        config = load_config(self.config, preset=self.preset, overrides=self.overrides)
        return config.model_copy(update={name: Config.model_fields[name].default for name in FIXED})


def _require_numbers(name: str, values: Sequence[int], least: int) -> None:
    """Refuse no numbers, numbers below the least, and a number twice."""
    if not values:
        raise UserError(f"a bench needs {name}, such as {name} {least},{least + 1}")
    if low := [value for value in values if value < least]:
        raise UserError(f"{name}: found {low[0]}, expected whole numbers from {least}")
    if twice := [value for value in values if values.count(value) > 1]:
        raise UserError(f"{name}: found {twice[0]} twice, expected each once")
