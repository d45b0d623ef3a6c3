"""MLB-Seg: bootstrap from few labels with per-pixel meta-weights (Wei et al., MICCAI 2023, arXiv 2307.11604)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call

from mlbseg.core.losses import (
    cross_entropy_map,
    pairwise_consistency,
    prediction_distance,
    residual_map,
    supervised_loss,
)
from mlbseg.core.metaweights import (
    Direction,
    alignment,
    directional_derivative,
    gradient,
    normalise,
    virtual_step,
)
from mlbseg.core.teacher import make_teacher, update_teacher
from mlbseg.core.views import ZOOM, Views, draw_views
from mlbseg.errors import UserError
from mlbseg.methods.base import Method
from mlbseg.types import Batch, Losses


class MLB(Method):
    """Stage 2 of MLB-Seg; the student comes trained from stage 1.

    Args:
        student: The network, with the weights of stage 1.
        mode: ``joint`` takes the clean gradient v where the model stands and uses it twice, as the direction of
            the weights and as the clean part of one update. ``paper`` takes it after a virtual step on the
            consistency terms and follows the weighted step by a step on the clean batch.
        views: The kinds of the views after the identity (see `draw_views`).
        flip_axes: Axes that a flip view may turn; None for all. With none of them a flip view is refused.
        zoom: The range of the zoom views (see `draw_views`).
        weighting: How a positive alignment becomes a weight, before the weights are made to sum to 1. ``share``
            is the paper's: in proportion. Borders and wrong labels, whose residual 1 - p(label) is largest, then
            take most of the weight, and the gradient is many times the clean one. ``residual`` divides each
            alignment by its pixel's residual. ``sign`` lets every trusted pixel count alike.
        jitter: Largest relative change of contrast, and shift of brightness in units of the normalised intensity,
            of each view that the student sees; the teacher sees the view as it is.
        pseudo_from: Whose predictions over the views make the pseudo label, ``student`` (the paper) or ``teacher``.
        teacher_decay: a_max of the mean teacher.
        teacher_noise: SD of the Gaussian noise on the teacher's input, in units of the normalised intensity.
        pseudo_weight: Factor of the weighted costs Σ w^n c^n + Σ w^p c^p.
        consistency_weight: Factor of L_ple + L_mt.
        chunk: Images per forward-mode pass; None for all at once. With dropout, chunks draw other masks than the
            loss's one pass.

    Raises:
        UserError: for a flip view where no axis may be flipped.
    """

    uses_unlabelled = True
    needs_initial_labels = True

    def __init__(
        self,
        student: nn.Module,
        *,
        mode: Literal["joint", "paper"] = "joint",
        views: Sequence[str] = ("zoom-out",),
        flip_axes: Sequence[int] | None = None,
        zoom: tuple[float, float] = ZOOM,
        weighting: Literal["share", "residual", "sign"] = "sign",
        jitter: float = 0.6,
        pseudo_from: Literal["student", "teacher"] = "teacher",
        teacher_decay: float = 0.99,
        teacher_noise: float = 0.1,
        pseudo_weight: float = 3.0,
        consistency_weight: float = 10.0,
        chunk: int | None = None,
    ) -> None:
        if "flip" in views and flip_axes is not None and not flip_axes:
            raise UserError(
                "mlb.views: found flip, but the plan says that no flip keeps the anatomy valid "
                "(name the axes that may be flipped, such as plan.flip_axes=[2], or leave the flip view out)"
            )
        super().__init__(student)
        self.teacher = make_teacher(student)
        self.mode = mode
        self.views = tuple(views)
        self.flip_axes = flip_axes
        self.zoom = zoom
        self.weighting = weighting
        self.jitter = jitter
        self.pseudo_from = pseudo_from
        self.teacher_decay = teacher_decay
        self.teacher_noise = teacher_noise
        self.pseudo_weight = pseudo_weight
        self.consistency_weight = consistency_weight
        self.chunk = chunk

    def losses(self, batch: Batch, step: int) -> Iterator[Losses]:
        """Yield one loss in joint mode, two (the weighted step, then the clean step) in paper mode."""
        if batch.image is None or batch.initial_label is None:
            raise ValueError("MLB needs unlabelled images and their initial labels in every batch")
        generator = torch.Generator().manual_seed(batch.seed)
        yield from (self._joint if self.mode == "joint" else self._paper)(
            batch, batch.image, batch.initial_label, generator
        )

    def after_step(self, step: int) -> None:
        """Move the teacher, by the global step."""
        update_teacher(self.teacher, self.student, step, self.teacher_decay)

    def networks(self) -> dict[str, nn.Module]:
        """Return teacher and student; the teacher predicts unless told otherwise."""
        return {"teacher": self.teacher, "student": self.student}

    def _joint(
        self, batch: Batch, image: Tensor, initial: Tensor, generator: torch.Generator
    ) -> Iterator[Losses]:
        clean = supervised_loss(self.student(batch.clean_image).float(), batch.clean_label)
        v = gradient(clean, self.student)

        views = self._draw(image, generator)
        x, taught = self._see(views.expand(image), generator)
        with _same_dropout(batch):
            labels, weights = self._weigh(x, taught, views, initial, v)
        with _same_dropout(batch):
            logits = self.student(x).float()
        yield {
            "clean": _linearised(clean, v, self.student),
            **self._weighted(logits, labels, weights),
            **self._consistency(logits, taught, views),
        }

    def _paper(
        self, batch: Batch, image: Tensor, initial: Tensor, generator: torch.Generator
    ) -> Iterator[Losses]:
        if self.optimiser is None:
            raise ValueError("paper mode looks one optimiser step ahead: set `optimiser` first")
        views = self._draw(image, generator)
        x, taught = self._see(views.expand(image), generator)
        with _same_dropout(batch):
            logits = self.student(x).float()
        consistency = self._consistency(logits, taught, views)

        # The virtual step at w = 0 follows the consistency terms alone; v is the clean gradient there.
        ahead = virtual_step(
            self.student,
            gradient(torch.stack([*consistency.values()]).sum(), self.student, retain_graph=True),
            self.optimiser,
        )
        clean_views = self._draw(batch.clean_image, generator)
        clean_x, clean_taught = self._see(clean_views.expand(batch.clean_image), generator)
        clean_label = clean_views.expand_label(batch.clean_label)
        v = _gradient_at(ahead, self.student, clean_x, clean_label)
        with _same_dropout(batch):
            labels, weights = self._weigh(x, taught, views, initial, v)
        yield {**self._weighted(logits, labels, weights), **consistency}

        logits = self.student(clean_x).float()
        terms = self._consistency(logits, clean_taught, clean_views)
        yield {
            "clean": supervised_loss(logits, clean_label),
            **{f"clean_{name}": term for name, term in terms.items()},
        }

    def _draw(self, image: Tensor, generator: torch.Generator) -> Views:
        return draw_views(
            len(image),
            image.ndim - 2,
            self.views,
            generator=generator,
            device=image.device,
            flip_axes=self.flip_axes,
            zoom=self.zoom,
        )

    def _see(self, x: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return what the student sees of the views, (V * B, C, *S), and the teacher's logits, (V * B, K, *S)."""
        noise = torch.randn(x.shape, generator=generator).to(x) * self.teacher_noise
        with torch.no_grad():
            taught = self.teacher(x + noise).float()
        if self.jitter:
            shape = (*x.shape[:2], *(1,) * (x.ndim - 2))
            contrast, shift = ((2 * torch.rand(2, *shape, generator=generator) - 1) * self.jitter).to(x)
            x = x * (1 + contrast) + shift
        return x, taught

    def _weigh(
        self, x: Tensor, taught: Tensor, views: Views, initial: Tensor, v: Direction
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return labels and weights of both sources, each (V * B, *S), by source name."""
        logits, tangent = directional_derivative(self.student, v, x, chunk=self.chunk)
        logits, tangent = logits.float(), tangent.float()
        pseudo = views.pseudo_label(torch.softmax(taught if self.pseudo_from == "teacher" else logits, 1))
        # What is padding in the scan has no pseudo label either.
        pseudo = torch.where(initial < 0, initial, pseudo)
        labels = {"initial": views.expand_label(initial), "pseudo": views.expand_label(pseudo)}
        alignments = []
        for label in labels.values():
            g = alignment(lambda z, y=label: cross_entropy_map(z, y), logits, tangent)  # type: ignore[misc]
            if self.weighting == "residual":
                g = g / residual_map(logits, label).clamp(min=1e-3)
            elif self.weighting == "sign":
                g = g.sign()
            alignments.append(g)
        weights = dict(zip(labels, normalise(alignments), strict=True))
        for name, label in labels.items():
            known = (label >= 0).sum().clamp(min=1)
            self.monitors[f"kept_{name}"] = (weights[name] > 0).sum() / known
            self.monitors[f"mass_{name}"] = weights[name].sum()
        return labels, weights

    def _weighted(self, logits: Tensor, labels: dict[str, Tensor], weights: dict[str, Tensor]) -> Losses:
        """Return Σ w c for each label source; the weights of both sources sum to 1."""
        return {
            name: self.pseudo_weight * (weights[name] * cross_entropy_map(logits, label)).sum()
            for name, label in labels.items()
        }

    def _consistency(self, logits: Tensor, taught: Tensor, views: Views) -> Losses:
        """Return L_ple and L_mt."""
        terms = {"teacher": prediction_distance(logits, taught, views.valid(logits.shape[2:]))}
        if self.views:
            terms["views"] = pairwise_consistency(*views.align(torch.softmax(logits, 1)))
        return {name: self.consistency_weight * term for name, term in terms.items()}


@contextlib.contextmanager
def _same_dropout(batch: Batch) -> Iterator[None]:
    """Let two passes over the same images draw the same masks: weights and loss must mean the same network."""
    device = batch.clean_image.device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(batch.seed)
        yield


def _linearised(loss: Tensor, v: Direction, model: nn.Module) -> Tensor:
    """Return a scalar with the value of `loss` and the gradient v, whose backward pass costs nothing more."""
    parameters = dict(model.named_parameters())
    return (
        loss.detach()
        + torch.stack(
            [(p * v[n]).sum() - (p.detach() * v[n]).sum() for n, p in parameters.items() if n in v]
        ).sum()
    )


def _gradient_at(ahead: dict[str, Tensor], model: nn.Module, x: Tensor, label: Tensor) -> dict[str, Tensor]:
    """Return the supervised loss's gradient at the parameters `ahead`, leaving the model as it is."""
    ahead = {name: p.detach().requires_grad_() for name, p in ahead.items()}
    buffers = {name: b.detach().clone() for name, b in model.named_buffers()}
    loss = supervised_loss(functional_call(model, {**ahead, **buffers}, (x,)).float(), label)
    grads = torch.autograd.grad(loss, list(ahead.values()), materialize_grads=True)
    return dict(zip(ahead, grads, strict=True))
