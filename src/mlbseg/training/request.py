"""What a training is asked for: one object, from the command line or Python to the run folder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path

from mlbseg.config import Config, load_config
from mlbseg.data.cases import AS_DRAWN, LabelOptions
from mlbseg.data.source import DataSource
from mlbseg.errors import UserError


@dataclass(frozen=True)
class TrainRequest:
    """All that may be asked of a new run; `mlbseg.train` says more.

    Attributes:
        data: Folder of scans, or a datalist.
        out: The run folder to create.
        method: Name of the method.
        labelled: Labels to keep in an experiment: the first K, or those of the named cases.
        test: Cases that training never sees: the last N, or the named ones.
        validation: Clean cases to select the checkpoint by: the last N, or the named ones.
        labels: All label values that may occur.
        patient: Regular expression that finds the patient in a case id.
        seed: Random seed.
        preset: Name of a preset.
        config: YAML file of settings.
        overrides: Settings as ``key=value``.
        label_options: What is said of all labels.
        skip_bad: Faulty cases are left out.
        cache: Folder for preprocessed scans.
        init: Weights to start from; see `mlbseg.runs.starting.read_start`.
        steps: Optimiser steps of all stages.
        minutes: How long training may take, in place of steps.
    """

    data: Path | None = None
    out: Path | None = None
    method: str | None = None
    labelled: int | Sequence[str] | None = None
    test: int | Sequence[str] | None = None
    validation: int | Sequence[str] = 0
    labels: Sequence[int] | None = None
    patient: str | None = None
    seed: int | None = None
    preset: str | None = None
    config: Path | None = None
    overrides: Sequence[str] = ()
    label_options: LabelOptions = AS_DRAWN
    skip_bad: bool = False
    cache: Path | None = None
    init: str | None = None
    steps: int | None = None
    minutes: float | None = None

    @property
    def source(self) -> DataSource:
        """The data set.

        Raises:
            UserError: if none is named.
        """
        if self.data is None:
            raise UserError("no data: name a folder of scans, or a CSV/JSON list of them")
        return DataSource(self.data, self.labels, self.patient, self.label_options)

    @cached_property
    def settings(self) -> Config:
        """The settings of the run.

        Raises:
            UserError: for settings that do not exist, or values that they cannot have.
        """
        if self.minutes is not None and (self.steps is not None or not 0 < self.minutes < 1e7):
            found = (
                f"{self.minutes:g} and --steps {self.steps}"
                if self.steps is not None
                else f"{self.minutes:g}"
            )
            raise UserError(f"--minutes: found {found}, expected a positive number, and no --steps beside it")
        return load_config(
            self.config, preset=self.preset, overrides=self.overrides, method=self.method, seed=self.seed,
            train=None if self.init is None else {"init": self.init},
            plan=None if self.steps is None else {"steps": self.steps},
        )  # fmt: skip

    def given(self) -> list[str]:
        """Return the names of what is asked for beyond the defaults."""
        own = [field.name for field in fields(self) if getattr(self, field.name) != field.default]
        return [name for name in own if name != "label_options"] + self.label_options.given()
