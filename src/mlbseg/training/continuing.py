"""A run that starts from another on the same scans: what it takes over of its split, its plan and its cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from mlbseg.config import Config
from mlbseg.data.fingerprint import Fingerprint
from mlbseg.data.plan import ARCHITECTURE, Plan
from mlbseg.data.records import read_record
from mlbseg.data.splits import Split
from mlbseg.errors import printable
from mlbseg.runs import ENVIRONMENT, Run
from mlbseg.runs.starting import Start, StartRecord
from mlbseg.training.request import TrainRequest

PREPARED = ("spacing", "orientation", "crop", "normalisation", "intensity")
"""Plan fields that shape prepared scans: where they stay, the cache holds them already."""
LEARNT_ON = ("patch_size", "batch_size")
"""Plan fields that depend on the machine and the network."""


@dataclass
class Continued:
    """What a run takes over of the one that its weights are of.

    Attributes:
        start: The weights; None if they are drawn.
        run: The run that they are of, if it is one on the same scans.
        request: What is asked for.
        config: The settings.
        same_device: Whether that run was trained on a device of this kind.
        cache: Folder for preprocessed scans.
        said: What was taken over, and what was not and why.
    """

    start: Start | None
    run: Run | None
    request: TrainRequest
    config: Config
    same_device: bool
    cache: Path | None
    said: list[str] = field(default_factory=list)

    @classmethod
    def of(
        cls, start: Start | None, request: TrainRequest, config: Config, device: torch.device
    ) -> Continued:
        """Look at what there is to take over.

        Raises:
            UserError: the run that the weights are of is damaged.
        """
        run = None if start is None or request.data is None or not start.of(request.data) else start.run
        cache, same = request.cache, False
        if run is not None:
            record = read_record(run.root / ENVIRONMENT, "the environment of a run")
            same = str(record.get("device")).partition(":")[0] == device.type
            if cache is None and Path(run.data.cache).is_dir():
                cache = Path(run.data.cache)
        return cls(start, run, request, config, same, cache)

    def split(self, found: Sequence[str]) -> tuple[int | Sequence[str] | None, int | Sequence[str], int]:
        """Return which cases are set apart for testing and for validation, and the seed of the shuffle.

        Args:
            found: Ids of all cases.
        """
        test, validation, seed = self.request.test, self.request.validation, self.config.seed
        if self.run is None:
            return test, validation, seed
        theirs = self.run.split
        if self.request.seed is None:
            seed = theirs.seed
        if test is not None:
            self.said.append("test cases: as asked for, not those of that run")
        else:
            test = [name for name in theirs.test if name in set(found)] or None
            self.said.append(f"test cases: the {len(test or ())} of that run" + _gone(theirs.test, found))
        count = self.request.labelled
        wide = not isinstance(count, int) or count >= len(theirs.clean) + len(theirs.validation)
        if not validation and theirs.validation and wide:
            validation = [name for name in theirs.validation if name in set(found)]
            self.said.append(
                f"validation cases: the {len(validation)} of that run" + _gone(theirs.validation, found)
            )
        elif theirs.validation:
            self.said.append("validation cases: as asked for, not those of that run")
        return test, validation, seed

    def plan(self, facts: Fingerprint) -> dict[str, Any]:
        """Return the plan fields to take over, unless the user sets them.

        Args:
            facts: Of the training scans.
        """
        if self.start is None:
            return {}
        proposed = self.start.proposal.of(facts.scan_ndim, facts.channels)
        if self.run is None:
            return proposed
        theirs = self.run.plan
        if (theirs.scan_ndim, theirs.channels) != (facts.scan_ndim, facts.channels):
            self.said.append(
                f"the plan: not reused, as the scans have {facts.scan_ndim} dimensions and {facts.channels} channels "
                f"now, {theirs.scan_ndim} and {theirs.channels} then"
            )
            return proposed
        names = [*PREPARED]
        own_network = any(getattr(self.config.plan, name) is not None for name in ARCHITECTURE)
        if own_network:
            self.said.append("patch and batch: decided anew, as the network is set")
        elif not self.same_device:
            self.said.append(
                "patch and batch: decided anew, as that run was trained on another kind of device"
            )
        else:
            names += LEARNT_ON
        taken = {name: getattr(theirs, name) for name in names}
        return proposed | {name: value for name, value in taken.items() if name != "intensity" or value}

    def notes(self, split: Split, plan: Plan) -> tuple[str, ...]:
        """Return what was taken over and what was not, once all is decided."""
        if self.start is None or self.start.run is None:
            return ()
        if self.run is None:
            lines = [
                "split, spacing and normalisation are decided anew, as that run was trained on scans in another place"
            ]
            theirs = self.start.run
            if known := sorted({*split.clean, *split.noisy, *split.unlabelled} & set(theirs.split.test)):
                lines.append(
                    f"WARNING: {len(known)} cases are named as test cases of that run, such as {known[0]}: if they "
                    "are the same scans, set them apart again (--test)"
                )
            return tuple(lines)
        theirs = self.run
        every = (*PREPARED, *LEARNT_ON, *ARCHITECTURE)
        same = [name for name in every if getattr(plan, name) == getattr(theirs.plan, name)]
        lines = [*self.said, f"reused of the plan: {', '.join(same)}"]
        other = [name for name in every if name not in same]
        if other:
            lines.append(f"other than in that run: {', '.join(other)}")
        if plan.label_values != theirs.plan.label_values:
            lines.append(
                f"label values: {list(plan.label_values)} now, {list(theirs.plan.label_values)} then"
            )
        kept = all(getattr(plan, name) == getattr(theirs.plan, name) for name in PREPARED)
        if kept and self.cache is not None and str(self.cache) == theirs.data.cache:
            lines.append("prepared scans: those of that run")
        added = [name for name in split.clean if name not in {*theirs.split.clean, *theirs.split.validation}]
        lines.append(f"careful labels: {len(split.clean)}, of which {len(added)} are new")
        learned = {
            *theirs.split.clean,
            *theirs.split.noisy,
            *theirs.split.unlabelled,
            *theirs.split.validation,
        }
        if known := sorted(learned.intersection(split.test)):
            lines.append(
                f"WARNING: the starting weights have learned from {len(known)} of the test cases, such as {known[0]}: "
                "scores on these say nothing"
            )
        return tuple(lines)


def _gone(names: Sequence[str], found: Sequence[str]) -> str:
    gone = [name for name in names if name not in set(found)]
    return f" ({len(gone)} of them are gone)" if gone else ""


def show_start(record: StartRecord, console: Console | None) -> None:
    """Print what became of the weights to start from: a table, and the notes."""
    if console is None:
        return
    title = f"starting weights: {record.kind} {record.source} ({record.file}, sha256 {record.sha256[:12]})"
    table = Table("weights", "tensors", "which", title=escape(printable(title)), title_justify="left")
    for word, count, which in record.fitted.rows():
        table.add_row(word, str(count), escape(printable(which)))
    console.print(table)
    for note in record.notes:
        console.print(f"  {printable(note)}", markup=False, highlight=False, soft_wrap=True)
