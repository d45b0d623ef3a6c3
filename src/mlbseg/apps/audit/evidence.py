"""What a run's networks say of a labelled scan: each voxel's probabilities, and whether its label agrees with v."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from mlbseg.apps.audit.trust import Classes
from mlbseg.core.directional import Direction, directional_derivative, loss_and_gradient
from mlbseg.core.losses import cross_entropy_map, supervised_loss, widened
from mlbseg.core.metaweights import alignment
from mlbseg.core.views import draw_views
from mlbseg.data.batches import StepDataset
from mlbseg.data.plan import Plan
from mlbseg.device import autocast
from mlbseg.errors import UserError
from mlbseg.runs import Run, checkpoints, make_student
from mlbseg.types import IGNORE
from mlbseg.windows import slide_windows

VIEWS = ("zoom-in", "zoom-out")
"""Besides the scan as it is; and a flip, where the plan has an axis for it."""


@dataclass(frozen=True)
class Judge:
    """A network of the run.

    Attributes:
        network: In evaluation mode.
        direction: v, the gradient of the loss on careful labels, of length 1; None where nobody asks for alignments.
    """

    network: nn.Module
    direction: Direction | None = None


@dataclass(frozen=True)
class Evidence:
    """What the judges say of one scan, on the prepared grid, averaged over views and judges.

    Attributes:
        probability: (K, *S) float32.
        alignment: (*S) float32: g, the derivative of the voxel's cost along v; positive where following the label
            would lower the loss on the careful labels. 0 without directions.
    """

    probability: npt.NDArray[np.float32]
    alignment: npt.NDArray[np.float32]


def networks(run: Run, device: torch.device, *, ensemble: bool) -> Iterator[nn.Module]:
    """Yield the networks that judge: the predicting one and, for an `ensemble`, the student of each checkpoint kept.

    That of stage 1 has seen careful labels only, so it cannot have learned the errors of the others by heart.

    Raises:
        UserError: if training has not finished or a checkpoint is damaged.
    """
    yield run.network().to(device)
    for checkpoint in checkpoints.find(run.root / "checkpoints") if ensemble else ():
        state = checkpoint.load(device).get("method", {})
        network = make_student(run.plan, run.config)
        prefix = "student."
        try:
            network.load_state_dict(
                {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
            )
        except RuntimeError:
            raise UserError(f"{checkpoint.path}: does not fit plan.json's network (delete it)") from None
        yield network.to(device).eval()


def clean_direction(
    network: nn.Module, dataset: StepDataset, device: torch.device, precision: str
) -> Direction:
    """Return the mean gradient of the supervised loss on the batches of careful labels, scaled to length 1.

    Source: v of MLB-Seg (arXiv 2307.11604), of many batches instead of one.
    """
    total: dict[str, Tensor] = {}
    for step in range(len(dataset)):
        batch = dataset[step].to(device)
        label = batch.clean_label
        with autocast(precision, device):
            _, grads = loss_and_gradient(
                network,
                batch.clean_image,
                lambda z, y=label: supervised_loss(widened(z), y),  # type: ignore[misc]
            )
        total = {name: total[name] + g if total else g for name, g in grads.items()}
    length = torch.stack([g.double().square().sum() for g in total.values()]).sum().sqrt()
    return {name: (g / length.clamp(min=1e-30)).to(g.dtype) for name, g in total.items()}


def gather(
    image: npt.NDArray[np.float32],
    label: Classes,
    judges: Sequence[Judge],
    plan: Plan,
    device: torch.device,
    precision: str,
    *,
    in_views: bool,
) -> Evidence:
    """Slide the judges over a scan.

    Args:
        image: (C, *S) prepared.
        label: (*S) class indices.
        judges: At least one.
        plan: Of the run.
        device: Where windows are computed.
        precision: ``auto``, ``32`` or ``bf16``, as in training.
        in_views: Average over `VIEWS` too, instead of looking at the scan as it is alone.
    """
    array = np.concatenate([image, label[None].astype(np.float32)])
    kinds = (*VIEWS, *(("flip",) if plan.flip_axes else ())) if in_views else ()

    def look(judge: Judge, window: Tensor) -> Tensor:
        x, y = window[:, :-1], window[:, -1].round().long()
        # The same maps in every window, or a seam would show where windows meet.
        views = draw_views([0] * len(x), x.ndim - 2, kinds, device=x.device, flip_axes=plan.flip_axes or None)
        target = views.expand_label(y)
        with autocast(precision, device):
            if judge.direction is None:
                logits = widened(judge.network(views.expand(x)))
                g = torch.zeros_like(logits[:, 0])
            else:
                logits, tangent = map(
                    widened, directional_derivative(judge.network, judge.direction, views.expand(x))
                )
                g = alignment(lambda z: cross_entropy_map(z, target), logits, tangent)
        aligned, seen = views.align(torch.cat([torch.softmax(logits, 1), g.unsqueeze(1)], 1))
        # A view that looked past the window's edge has no label there.
        known, _ = views.align((target != IGNORE).to(logits.dtype).unsqueeze(1))
        seen = seen * (known > 0.999)
        return (aligned * seen).sum(0) / seen.sum(0)

    with torch.no_grad():
        found = [
            slide_windows(partial(look, judge), array, patch_size=plan.patch_size, device=device)
            for judge in judges
        ]
    mean = np.mean(found, 0)
    return Evidence(mean[:-1], mean[-1])
