"""From a run and a labelled case to the trust of its label."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from mlbseg.apps.audit.evidence import Evidence, Judge, clean_direction, gather, networks
from mlbseg.apps.audit.findings import GIVEN, Audited
from mlbseg.apps.audit.page import Sight
from mlbseg.apps.audit.regions import find_regions, stray_region
from mlbseg.apps.audit.trust import (
    WAYS,
    Classes,
    Map,
    alignment_trust,
    class_thresholds,
    confident_trust,
    disagreement_trust,
    regional_trust,
)
from mlbseg.data.batches import StepDataset
from mlbseg.data.cache import Cache
from mlbseg.data.known import hidden, label_on
from mlbseg.data.preprocess import (
    UNKNOWN,
    Frame,
    prepare_label,
    prepare_scan,
    restore_label,
    restore_probability,
)
from mlbseg.data.readers import read_scan
from mlbseg.errors import UserError, one_case
from mlbseg.runs import Run, augmentation_of
from mlbseg.types import NOT_KNOWN, Case, Geometry, Role

Mask = npt.NDArray[np.bool_]

BATCHES = 12  # of careful labels, whose mean gradient is v


@dataclass(frozen=True)
class Judged:
    """What there is to say of a case; arrays (*S) lie on the scan's own lattice.

    Attributes:
        audited: For the tables.
        sight: For the page.
        trust: Of each voxel, 0 to 1.
        proposal: Class values: the label, and in its suspected regions what the networks say; None if not wanted.
        geometry: The lattice.
    """

    audited: Audited
    sight: Sight
    trust: Map
    proposal: Classes | None
    geometry: Geometry


SURE = 0.95
"""Probability from which an unknown voxel is surely a structure."""


class Auditor:
    """The judges of a run, and what they go by.

    Args:
        run: The run.
        device: Where networks compute.
        way: A name in `mlbseg.apps.audit.trust.WAYS`.
        cases: All that are to be judged, each with its label.
        given: Whether the user named the labels: training may not have seen them.
        propose: Whether proposals are wanted.
        threshold: Voxels below it are not trusted.
        smallest: Volume of a region that is worth a look, mm³ (mm² in 2D); None for 27 voxels of the grid (9 in 2D).
    """

    def __init__(
        self,
        run: Run,
        device: torch.device,
        way: str,
        cases: Sequence[Case],
        *,
        given: bool,
        propose: bool,
        threshold: float,
        smallest: float | None,
    ) -> None:
        self.run, self.plan, self.device, self.way, self.cases = run, run.plan, device, way, cases
        self.given, self.propose, self.threshold, self.smallest = given, propose, threshold, smallest
        self.precision = run.config.train.precision
        self.judges = [Judge(network) for network in networks(run, device, ensemble=WAYS[way].ensemble)]
        if WAYS[way].aligned:
            dataset = self._careful()
            self.judges = [
                Judge(j.network, clean_direction(j.network, dataset, device, self.precision))
                for j in self.judges
            ]
        self.thresholds = np.ones(run.plan.num_classes)
        self.scale = 1.0

    def look_first(self, say: Callable[[Case], None]) -> None:
        """Measure what is usual for the labels, where the way needs it."""
        if not WAYS[self.way].relative:
            return
        squares: list[float] = []

        def pairs() -> Iterator[tuple[Map, Classes]]:
            for case in self.cases:
                say(case)
                with one_case(case.id, [], "audit"):  # `judge` meets it again, and it is named
                    image, label, known, _, _ = self._prepared(case)
                    evidence = self._evidence(image, label)
                    squares.append(float(np.mean(evidence.alignment[known].astype(np.float64) ** 2)))
                    yield evidence.probability[:, known], label[known]

        self.thresholds = class_thresholds(pairs(), self.plan.num_classes)
        self.scale = float(np.sqrt(np.mean(squares))) if squares else 1.0

    def judge(self, case: Case) -> Judged:
        """Return what there is to say of a case.

        Raises:
            UserError: if the scan or the label cannot be used.
        """
        image, label, known, frame, given = self._prepared(case)
        evidence = self._evidence(image, label)
        likeliest = evidence.probability.argmax(0).astype(np.uint8)
        # Where a class was not drawn, background does not say that it is not there.
        known &= ~((label == 0) & np.isin(likeliest, hidden(case.known, self.plan.label_values)))
        # What the label leaves open is not judged, and casts no doubt on its neighbours: there it agrees.
        trust = np.where(known, self._trust(evidence, np.where(known, label, likeliest)), np.float32(1))
        predicted = np.where(known, likeliest, 0)
        values = np.asarray(self.plan.label_values, np.min_scalar_type(max(self.plan.label_values)))
        voxel = float(np.prod(frame.grid.spacing))
        smallest = 3**label.ndim * voxel if self.smallest is None else self.smallest
        regions, suspected, count = find_regions(
            trust, values[label], values[predicted], frame, threshold=self.threshold, smallest=smallest
        )
        volume = float(suspected.sum()) * voxel
        # The networks see no more than the prepared grid: labels outside it lie where the scan is empty.
        drawn = np.where(given == NOT_KNOWN, 0, given)
        stray = (drawn != 0) & (restore_probability(np.ones_like(trust), frame) < 0.5)
        region = stray_region(drawn, stray, frame.native)
        if region is not None and region.volume >= smallest:
            regions, count, volume = [region, *regions], count + 1, volume + region.volume
        share = float(np.prod(frame.native.spacing)) / voxel
        doubted = trust < self.threshold
        audited = Audited(
            case.id,
            GIVEN if self.given else case.role.value,
            _share_trusted(doubted, (label > 0) | (predicted > 0), share * stray.sum(), empty=1.0) or 0.0,
            {
                int(v): _share_trusted(
                    doubted, (label == k) | (predicted == k), share * (stray & (given == v)).sum(), empty=None
                )
                for k, v in enumerate(values)
                if k
            },
            volume,
            tuple(regions),
            count,
            float(np.sum((evidence.probability[1:].max(0) >= SURE) & ~known)) * voxel,
        )
        sight = Sight(image[0], values[label], values[predicted], trust, suspected, frame.grid)
        proposal: Classes | None = None
        if self.propose:
            wrong = stray | (restore_probability(suspected.astype(np.float32), frame) > 0.5)
            kept = np.where(given == NOT_KNOWN, case.known.ignore or 0, given)
            proposal = np.where(wrong, restore_label(evidence.probability, frame, self.plan), kept)
        native = np.where(stray, 0, restore_probability(trust - 1, frame) + 1).clip(0, 1).astype(np.float32)
        return Judged(audited, sight, native, proposal, frame.native)

    def _prepared(self, case: Case) -> tuple[Map, Classes, Mask, Frame, Classes]:
        """Return scan, label and where that is known, on the prepared grid; where the grid lies; the label as given.

        On the grid what the label leaves open is background.
        """
        scan = read_scan(case.images)
        label = label_on(case, scan.geometry, whose="the scan")
        image, frame = prepare_scan(scan, self.plan)
        prepared = prepare_label(label, scan.geometry, frame.grid, self.plan)
        known = prepared != UNKNOWN
        return image, np.where(known, prepared, 0), known, frame, label

    def _evidence(self, image: Map, label: Classes) -> Evidence:
        return gather(
            image,
            label,
            self.judges,
            self.plan,
            self.device,
            self.precision,
            in_views=WAYS[self.way].ensemble,
        )

    def _trust(self, evidence: Evidence, label: Classes) -> Map:
        if self.way == "alignment":
            return alignment_trust(evidence.alignment, self.scale)
        if self.way == "confident":
            return confident_trust(evidence.probability, label, self.thresholds)
        if self.way == "disagreement":
            return disagreement_trust(evidence.probability, label)
        return regional_trust(evidence.probability, label)

    def _careful(self) -> StepDataset:
        """Return batches of careful labels: of scans that nothing was trained on, where the run has some."""
        run, config = self.run, self.run.config
        cases = {c.id: c.with_role(Role.CLEAN) for c in run.find_cases().cases if c.label is not None}
        apart = run.split.validation or run.split.clean[len(run.split.clean) - config.train.meta_cases :]
        careful = [cases[i] for i in apart or run.split.clean if i in cases]
        if not careful:
            raise UserError(f"{run.scans}: none of the run's careful labels is there ({run.moved_scans})")
        return StepDataset(
            Cache(Path(run.data.cache), run.plan),
            careful,
            patch_size=run.plan.patch_size,
            batch_size=run.plan.batch_size,
            unlabelled_batch_size=1,
            steps=BATCHES,
            seed=config.seed,
            stage=3,  # other draws than training's
            foreground=config.train.foreground,
            augment=augmentation_of(run),
        )


def _share_trusted(doubted: Mask, where: Mask, outside: float, *, empty: float | None) -> float | None:
    """Return the share of `where` that is not doubted, voxels outside the grid (as many) being all doubted."""
    total = where.sum() + outside
    return float(1 - (doubted[where].sum() + outside) / total) if total else empty
