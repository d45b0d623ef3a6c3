"""The demo: phantom scans, three trainings on them, one table and one picture."""

from __future__ import annotations

import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from mlbseg.data.phantom import CLASS_NAMES, write_phantoms
from mlbseg.data.readers import read_label, read_scan
from mlbseg.data.records import write_record
from mlbseg.errors import UserError
from mlbseg.evaluation import Evaluation, evaluate
from mlbseg.files import make_folder, write_atomic
from mlbseg.inference import predict
from mlbseg.pictures import Row, overlay
from mlbseg.staging import contents
from mlbseg.training import train

SCANS, TESTED, LABELLED = 50, 12, 4
STEPS = 1000
PATCH = "40,48,48"  # voxels; the plan's own, a little larger than the scan, would take a third longer
MARKER = ".mlbseg-demo"
"""The file that tells a demo's folder from anyone else's, even if the demo was stopped early."""


@dataclass(frozen=True)
class Arm:
    """One training of the demo.

    Attributes:
        title: In the table.
        folder: Under the demo's folder.
        method: A name in `mlbseg.methods.METHODS`.
        labelled: How many labels it may see; None for all.
    """

    title: str
    folder: str
    method: str
    labelled: int | None


ARMS = (
    Arm(f"supervised, {LABELLED} labels", "supervised", "supervised", LABELLED),
    Arm(f"MLB, the same {LABELLED} labels", "mlb", "mlb", LABELLED),
    Arm(f"supervised, all {SCANS - TESTED} labels", "all-labels", "supervised", None),
)


@dataclass(frozen=True)
class DemoResult:
    """What the demo found.

    Attributes:
        scores: The evaluation of each arm, by its folder.
        picture: Masks over test scans.
    """

    scores: dict[str, Evaluation]
    picture: Path

    @property
    def gap_closed(self) -> float | None:
        """Share of the Dice gap between few labels and all labels that MLB closes; None without a gap."""
        low, mlb, high = (self.scores[arm.folder].mean_dice for arm in ARMS)
        return (mlb - low) / (high - low) if high > low else None

    def as_dict(self) -> dict[str, Any]:
        """Return the figures, for JSON."""
        return {
            "arms": [{**asdict(arm), "mean_dice": self.scores[arm.folder].mean_dice} for arm in ARMS],
            "gap_closed": self.gap_closed,
            "picture": str(self.picture),
        }

    def table(self) -> Table:
        """Return Dice of each arm on the test phantoms, per structure."""
        gap = f"gap between {LABELLED} labels and all labels"
        closed = (
            f"there is no {gap}"
            if self.gap_closed is None
            else f"MLB closes {self.gap_closed:.0%} of the {gap}"
        )
        table = Table(
            "trained with",
            "mean Dice",
            *CLASS_NAMES.values(),
            title=f"Dice on {TESTED} phantoms that no training saw (mean ± SD over scans)",
            caption=closed,
        )
        for arm in ARMS:
            result = self.scores[arm.folder]
            cells = [
                f"{s['dice'].mean:.3f} ± {s['dice'].sd:.3f}"
                for value, s in result.summary.items()
                if value is not None
            ]
            table.add_row(arm.title, f"{result.mean_dice:.3f}", *cells)
        return table


def demo(out: Path, *, seed: int = 0, steps: int | None = None, console: Console | None = None) -> DemoResult:
    """Make phantoms, train the three arms, segment the test phantoms, and write table and picture.

    Every arm gets the same number of steps, the same initial weights and the same test scans.

    Args:
        out: A folder that does not exist, is empty, or holds an earlier demo, whose runs are replaced.
        seed: Of phantoms and training.
        steps: Per arm; the demo's own number when None.
        console: Where progress is shown.

    Raises:
        UserError: if the folder holds something else, or cannot be made.
    """
    scans = out / "scans"
    _clear(out)
    write_phantoms(scans, count=SCANS, seed=seed)
    scores = {}
    for arm in ARMS:
        if console is not None:
            console.print(f"\n{arm.title}", style="bold")
        run, masks = out / "runs" / arm.folder, out / "masks" / arm.folder
        train(
            scans,
            run,
            method=arm.method,
            labelled=arm.labelled,
            test=TESTED,
            seed=seed,
            overrides=[f"plan.steps={steps or STEPS}", f"plan.patch_size={PATCH}"],
            cache=out / "cache",
            console=console,
        )
        predict(run, scans, masks, only="test")
        scores[arm.folder] = evaluate(
            masks, scans / "labels", classes=CLASS_NAMES, out=out / f"{arm.folder}.csv", overwrite=True
        )
    result = DemoResult(scores, out / "demo.png")
    _draw(out, result)
    write_record(out / "demo.json", result.as_dict())
    return result


def _clear(out: Path) -> None:
    """Make room for the demo in its own folder; touch nobody else's."""
    if (there := contents(out)) and MARKER not in there:
        raise UserError(f"{out}: holds something else than a demo (choose another --out)")
    make_folder(out)
    write_atomic(out / MARKER, b"")
    for name in ("scans", "runs", "masks"):
        shutil.rmtree(out / name, ignore_errors=True)


def _draw(out: Path, result: DemoResult) -> None:
    """Show the test scans on which MLB did best, middling and worst."""
    by_case: dict[str, list[float]] = {}
    for row in result.scores["mlb"].rows:
        by_case.setdefault(row.case, []).append(row.scores.dice)
    ranked = sorted(by_case, key=lambda case: sum(by_case[case]), reverse=True)
    rows = []
    for case in (ranked[0], ranked[len(ranked) // 2], ranked[-1]):
        name = f"{case}.nii.gz"
        masks = [read_label(out / "masks" / arm.folder / name)[0] for arm in ARMS]
        image = read_scan([out / "scans" / "images" / name]).array[0]
        rows.append(Row(case, image, read_label(out / "scans" / "labels" / name)[0], masks))
    overlay(rows, ["reference", *(arm.title for arm in ARMS)], result.picture)
