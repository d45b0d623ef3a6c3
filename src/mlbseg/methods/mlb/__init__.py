"""MLB-Seg: bootstrap from few labels with per-pixel meta-weights (Wei et al., MICCAI 2023, arXiv 2307.11604)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call

from mlbseg.core.directional import (
    Direction,
    directional_derivative,
    gradient,
    loss_and_gradient,
    with_gradient,
)
from mlbseg.core.losses import (
    cross_entropy_map,
    pairwise_consistency,
    prediction_distance,
    soft_dice_loss,
    supervised_loss,
    widened,
)
from mlbseg.core.optimisers import precondition, virtual_step
from mlbseg.core.perturb import boxes, jittered, normal
from mlbseg.core.scope import Scope, parameters_in_scope
from mlbseg.core.shared_pass import output_and_tangent
from mlbseg.core.teacher import prediction
from mlbseg.core.views import ZOOM, Views, draw_views
from mlbseg.errors import UserError
from mlbseg.methods.base import Taught, inside_scan
from mlbseg.methods.mlb.weighing import Weighing
from mlbseg.types import IGNORE, Batch, Losses

_VIEWS, _SIGHT, _CLEAN_VIEWS, _CLEAN_SIGHT, _META_VIEWS, _BOX = range(6)  # streams of random numbers
_JITTER = 100  # times these: those of the views' jitter


@dataclass(frozen=True)
class _Pasted:
    """Clean pixels that are in the views of unlabelled images.

    Attributes:
        covered: (V * B, *S) bool, True where they are.
        label: (V * B, *S) their own labels, `IGNORE` where they have none, and elsewhere.
        bare: (V * B, K, *S) the student's logits of the views without them; None where these make no pseudo label.
    """

    covered: Tensor
    label: Tensor
    bare: Tensor | None


class MLB(Taught):
    """Stage 2 of MLB-Seg; the student comes trained from stage 1.

    Args:
        student: The network, with the weights of stage 1.
        mode: ``joint`` takes the clean gradient v where the model stands and uses it twice, as the direction of
            the weights and as the clean part of one update. ``paper`` takes it after a virtual step on the
            consistency terms and follows the weighted step by a step on the clean batch. Where the batch has images
            set apart for it, v is their gradient.
        views: The kinds of the views after the identity (see `draw_views`).
        clean_views: Let joint mode see the clean batch in these views too, as paper mode always does; each view
            costs a forward and a backward pass of the clean batch.
        flip_axes: Axes that a flip view may turn; None for all. With none of them a flip view is refused.
        zoom: The range of the zoom views (see `draw_views`).
        sources: The labels that are weighed, ``initial`` and ``pseudo``. None: pseudo labels alone, to which training
            adds the labels that noisy cases came with; only if ``initial`` is named have unlabelled cases frozen
            ones of stage 1.
        weighting: How an alignment becomes a weight, before the weights are made to sum to 1. ``share``
            is the paper's: in proportion. Borders and wrong labels, whose residual 1 - p(label) is largest, then
            take most of the weight, and the gradient is many times the clean one. ``residual`` divides each
            alignment by its pixel's residual. ``sign`` lets every trusted pixel count alike. ``sigmoid`` lets a pixel
            of which the direction says little count half, and those that it speaks for or against up to twice that,
            or nothing. ``softmax``: see `normalise`. Two ask no direction: ``uniform`` lets all pixels count alike,
            ``confidence`` each by the probability that the teacher gives to its label.
        decides: Where the direction decides: ``everywhere``, as in the paper, or in ``disputes`` alone, where the
            sources' labels differ; where they agree, a pixel then counts as much as the most aligned of those, and a
            single source has nothing to decide.
        per_source: Give the initial and the pseudo labels the same total of weight.
        per_image: Give every view of every image the same total of weight.
        direction: What the weights follow, v; or, to see what v is worth, noise of its length: ``random``.
        scope: The parameters that the direction moves, ``all``, ``decoder`` or ``head``.
        every: Weigh and follow the labels at every n-th step only, n-fold; the steps between have the other terms.
        mix: Sides of the boxes by which clean images are pasted into the views, as share of the patch's: an image shows
            its views' box in one of them and all but the box in the next, and the student learns the clean pixels' own
            label there (BCP, Bai et al., CVPR 2023). 0 pastes nothing. In joint mode; paper mode pastes nothing.
        jitter: Largest relative change of contrast, and shift of brightness in units of the normalised intensity,
            of each view that the student sees; the teacher sees the view as it is.
        pseudo_from: Whose predictions make the pseudo label, ``student`` (the paper) or ``teacher``.
        relabel: How many times in stage 2 it predicts all unlabelled and noisy scans, whole, for pseudo labels that
            hold until the next time; the first are thus stage 1's. They know what lies beyond a patch's border. 0: each
            patch has a pseudo label of its own at each step, by the mean of the predictions over its views.
        teacher_decay: a_max of the mean teacher.
        teacher_noise: SD of the Gaussian noise on the teacher's input, in units of the normalised intensity.
        pseudo_weight: Factor of the weighted costs Σ w^n c^n + Σ w^p c^p.
        pseudo_dice: Add the weighted labels' soft Dice loss to their cross-entropy.
        ple_weight: Factor of L_ple, of pixels that no clean one covers in any two views: few, unless `mix` is 0.
        teacher_weight: Factor of L_mt.
        chunk: Images per pass of the network, for the least memory; None for all at once. Joint mode then holds one
            chunk's graph at a time, for one more forward pass of the clean batch; paper mode chunks the
            forward-mode pass only.

    Raises:
        UserError: for a flip view where no axis may be flipped, for a weighting that disputes are too few for, and for
            pseudo labels that are asked for and not learnt.
    """

    uses_unlabelled = True
    needs_initial_labels = True
    predicts = "student"  # as in the paper's code; docs/benchmarks.md has how the two compare

    def __init__(
        self,
        student: nn.Module,
        *,
        mode: Literal["joint", "paper"] = "joint",
        views: Sequence[str] = ("zoom-out",),
        clean_views: bool = False,
        flip_axes: Sequence[int] | None = None,
        zoom: tuple[float, float] = ZOOM,
        sources: Sequence[str] | None = None,
        weighting: Literal[
            "share", "residual", "sign", "softmax", "sigmoid", "uniform", "confidence"
        ] = "sign",
        decides: Literal["everywhere", "disputes"] = "disputes",
        per_source: bool = False,
        per_image: bool = False,
        direction: Literal["clean", "random"] = "clean",
        scope: Scope = "all",
        every: int = 1,
        mix: float = 2 / 3,
        jitter: float = 0.3,
        pseudo_from: Literal["student", "teacher"] = "teacher",
        relabel: int = 0,
        teacher_decay: float = 0.99,
        teacher_noise: float = 0.1,
        pseudo_weight: float = 1.0,
        pseudo_dice: bool = True,
        ple_weight: float = 0.0,
        teacher_weight: float = 0.0,
        chunk: int | None = None,
    ) -> None:
        sources = ("pseudo",) if sources is None else tuple(dict.fromkeys(sources))
        if decides == "disputes" and weighting in ("softmax", "sigmoid") and len(sources) > 1:
            raise UserError(
                f"mlb.weighting: found {weighting}, which compares all pixels, but disputes leave few to it "
                "(add -o mlb.decides=everywhere, or use sign)"
            )
        if "flip" in views and flip_axes is not None and not flip_axes:
            raise UserError(
                "mlb.views: found flip, but the plan says that no flip keeps the anatomy valid "
                "(name the axes that may be flipped, such as plan.flip_axes=[2], or leave the flip view out)"
            )
        if relabel and "pseudo" not in sources:
            raise UserError(
                f"mlb.relabel: found {relabel}, but pseudo labels are not learnt "
                "(leave it out, or add pseudo to mlb.sources)"
            )
        super().__init__(student, teacher_decay)
        self.mode = mode
        self.views = tuple(views)
        self.clean_views = clean_views
        self.flip_axes = flip_axes
        self.zoom = zoom
        self.weighing = Weighing(sources, weighting, decides, per_source, per_image)
        self.direction = direction
        self.scope = scope
        self.every = every
        self.mix = mix
        self.jitter = jitter
        self.pseudo_from = pseudo_from
        self.relabel = relabel
        self.teacher_noise = teacher_noise
        self.pseudo_weight = pseudo_weight
        self.pseudo_dice = pseudo_dice
        self.ple_weight = ple_weight
        self.teacher_weight = teacher_weight
        self.chunk = chunk
        self._in_scope: frozenset[str] | None = None

    def losses(self, batch: Batch, step: int) -> Iterator[Losses]:
        """Yield one loss in joint mode, two (the weighted step, then the clean step) in paper mode."""
        if batch.image is None or batch.initial_label is None:
            raise ValueError("MLB needs unlabelled images and their initial labels in every batch")
        weigh = step % self.every == 0
        yield from (self._joint if self.mode == "joint" else self._paper)(batch, batch.image, weigh)

    def weight_maps(self, batch: Batch) -> dict[str, tuple[Tensor, Tensor]]:
        """Return labels and weights of the first view, with v where the model stands and nothing pasted."""
        if not self.weighing.may_differ or batch.image is None or batch.initial_label is None:
            return {}
        monitors, buffers = dict(self.monitors), {name: b.clone() for name, b in self.named_buffers()}
        meta = batch.meta_image is not None and batch.meta_label is not None
        clean = (batch.meta_image, batch.meta_label) if meta else (batch.clean_image, batch.clean_label)
        with self.same_dropout(batch):
            _, v = self._clean_gradient(*clean, batch.seed, _META_VIEWS if meta else _CLEAN_VIEWS)  # type: ignore[arg-type]
            views = self._draw(batch.image, batch.seed, _VIEWS)
            x, taught, _ = self._see(views, batch.image, batch, _SIGHT)
            if self.weighing.asks_direction:
                direction = self._towards(self.ranks.sum_all(v), x, batch.seed)
                logits, tangent = directional_derivative(self.student, direction, x, chunk=self.chunk)
            else:
                logits, tangent = self._asked(x), None
        labels, weights = self._weigh(logits, tangent, taught, views, batch)
        self.monitors = monitors
        for name, buffer in self.named_buffers():
            buffer.copy_(buffers[name])
        count = len(batch.image)
        return {name: (labels[name][:count], weights[name][:count]) for name in labels}

    def _joint(self, batch: Batch, image: Tensor, weigh: bool) -> Iterator[Losses]:
        clean, v = self._clean_gradient(batch.clean_image, batch.clean_label, batch.seed, _CLEAN_VIEWS)
        guide = v  # the gradient that the weights are to serve
        asks = weigh and self.weighing.asks_direction
        if asks and batch.meta_image is not None and batch.meta_label is not None:
            _, guide = self._clean_gradient(batch.meta_image, batch.meta_label, batch.seed, _META_VIEWS)
        views = self._draw(image, batch.seed, _VIEWS)
        x, taught, pasted = self._see(views, image, batch, _SIGHT, mix=self.mix)
        labels: dict[str, Tensor] = {}
        weights: dict[str, Tensor] = {}
        logits: Tensor | None = None
        tangent: Tensor | None = None
        # Weights and loss must mean the same network.
        with self.same_dropout(batch):
            if asks:
                direction = self._towards(self.ranks.sum_all(guide), x, batch.seed)
                if self.chunk is None:
                    logits, tangent = output_and_tangent(self.student, direction, x)
                else:
                    logits, tangent = directional_derivative(self.student, direction, x, chunk=self.chunk)
            elif self.chunk is None:
                logits = self.student(x)
            elif weigh:  # the labels of the student, should they be asked for
                logits = self._asked(x)
            if weigh and logits is not None:
                labels, weights = self._weigh(logits.detach(), tangent, taught, views, batch, pasted)

        inside = inside_scan(batch)

        def terms(logits: Tensor) -> Losses:
            logits = widened(logits)
            found = {
                **self._weighted(logits, labels, weights),
                **self._consistency(logits, taught, views, inside, pasted),
            }
            if pasted is not None:
                found["mixed"] = supervised_loss(logits, pasted.label, ranks=self.ranks)
            return found

        if self.chunk is None and logits is not None:
            others = terms(logits)
        else:
            with self.same_dropout(batch):
                others, rest = _terms_and_gradient(self.student, x, terms, self.chunk, logits)
            v = {name: v[name] + rest[name] for name in v}
        yield {"clean": with_gradient(clean, v, self.student), **others}

    def _paper(self, batch: Batch, image: Tensor, weigh: bool) -> Iterator[Losses]:
        if self.optimiser is None:
            raise ValueError("paper mode looks one optimiser step ahead: set `optimiser` first")
        asks = weigh and self.weighing.asks_direction
        views = self._draw(image, batch.seed, _VIEWS)
        x, taught, _ = self._see(views, image, batch, _SIGHT)
        with self.same_dropout(batch):
            # In the chunks of the pass that the weights come from: so dropout draws the same masks in both.
            logits = widened(torch.cat([self.student(part) for part in x.split(self.chunk or len(x))]))
        consistency = self._consistency(logits, taught, views, inside_scan(batch))
        clean_views = self._draw(batch.clean_image, batch.seed, _CLEAN_VIEWS)
        clean_x, clean_taught, _ = self._see(clean_views, batch.clean_image, batch, _CLEAN_SIGHT)
        clean_label = clean_views.expand_label(batch.clean_label)
        labels: dict[str, Tensor] = {}
        weights: dict[str, Tensor] = {}
        if weigh:
            seen, tangent = logits.detach(), None
        if asks:
            # The virtual step at w = 0 follows the consistency terms alone; v is the clean gradient there.
            together = torch.stack([logits.sum() * 0, *consistency.values()]).sum()
            regulariser = self.ranks.sum_all(gradient(together, self.student, retain_graph=True))
            ahead = virtual_step(self.student, regulariser, self.optimiser)
            meta_x, meta_label = clean_x, clean_label
            if batch.meta_image is not None and batch.meta_label is not None:
                meta_views = self._draw(batch.meta_image, batch.seed, _META_VIEWS)
                meta_x, meta_label = (
                    meta_views.expand(batch.meta_image),
                    meta_views.expand_label(batch.meta_label),
                )
            v = self.ranks.sum_all(self._gradient_at(ahead, meta_x, meta_label))
            v = precondition(v, self.student, self.optimiser, regulariser)
            with self.same_dropout(batch):
                seen, tangent = directional_derivative(
                    self.student, self._towards(v, x, batch.seed), x, chunk=self.chunk
                )
        if weigh:
            labels, weights = self._weigh(seen, tangent, taught, views, batch)
        if terms := {**self._weighted(logits, labels, weights), **consistency}:
            yield terms

        logits = widened(self.student(clean_x))
        terms = self._consistency(logits, clean_taught, clean_views, batch.clean_label != IGNORE)
        yield {
            "clean": supervised_loss(logits, clean_label, ranks=self.ranks),
            **{f"clean_{name}": term for name, term in terms.items()},
        }

    def _draw(self, image: Tensor, seed: int, stream: int) -> Views:
        return draw_views(
            self.seeds(len(image), seed, stream),
            image.ndim - 2,
            self.views,
            device=image.device,
            flip_axes=self.flip_axes,
            zoom=self.zoom,
        )

    def _see(
        self, views: Views, image: Tensor, batch: Batch, stream: int, mix: float = 0.0
    ) -> tuple[Tensor, Tensor | None, _Pasted | None]:
        """Return what the networks see of an image's views.

        Returns:
            x: (V * B, C, *S) for the student.
            taught: (V * B, K, *S) the teacher's logits of the views as they are; None if nothing needs them.
            pasted: The clean pixels in `x`; None without any.
        """
        x = views.expand(image)
        taught: Tensor | None = None
        if self._asks_teacher(batch):
            seeds, shape = self.seeds(len(image), batch.seed, stream), (len(views), *image.shape[1:])
            noise = normal(seeds, shape, image).transpose(0, 1).flatten(0, 1)
            with torch.no_grad():
                taught = widened(self.teacher(x + self.teacher_noise * noise))
        pasted: _Pasted | None = None
        if mix:
            x, pasted = self._mix(x, image, batch)
        if self.jitter:
            streams = [_JITTER * (1 + stream) + v for v in range(len(views))]
            x = jittered([s for v in streams for s in self.seeds(len(image), batch.seed, v)], x, self.jitter)
        return x, taught, pasted

    def _asks_teacher(self, batch: Batch) -> bool:
        """Return whether anything depends on what the teacher predicts of the views."""
        labels = batch.pseudo_label is None and self.pseudo_from == "teacher"
        return labels or bool(self.teacher_weight) or self.weighing.weighting == "confidence"

    def _asked(self, x: Tensor) -> Tensor:
        """Return the student's logits, a chunk at a time and without gradient."""
        return torch.cat([prediction(self.student, part) for part in x.split(self.chunk or len(x))])

    def scan_labeller(self) -> nn.Module:
        """Return the network that makes pseudo labels."""
        return self.teacher if self.pseudo_from == "teacher" else self.student

    def _mix(self, x: Tensor, image: Tensor, batch: Batch) -> tuple[Tensor, _Pasted]:
        """Return views (V * B, C, *S) of B images with clean ones pasted in a box or around it, and what was pasted.

        Source: Bai et al., BCP (CVPR 2023, arXiv 2305.00673). The views of an image take the two ways in turn, and
        so do images: a box is covered in one view and bare in the next.
        """
        count = len(image)
        place = torch.arange(count, device=x.device)
        box = boxes(self.seeds(count, batch.seed, _BOX), image, self.mix ** (x.ndim - 2))
        turn = torch.arange(len(x) // count, device=x.device)[:, None] + place + self.ranks.index * count
        inside = turn.reshape(-1, *(1,) * (x.ndim - 1)) % 2 == 0
        covered = box.repeat(len(turn), *(1,) * (x.ndim - 1)) == inside
        partner = (place * len(batch.clean_image) // count).repeat(len(turn))
        mixed = torch.where(covered, batch.clean_image[partner], x)
        covered = covered.squeeze(1)
        own = batch.pseudo_label is None and self.pseudo_from == "student"
        bare = self._asked(x) if own else None
        return mixed, _Pasted(covered, torch.where(covered, batch.clean_label[partner], IGNORE), bare)

    def _towards(self, v: Direction, x: Tensor, seed: int) -> Direction:
        """Return the direction of the weights: the part of v, or of noise in its place, that the scope moves."""
        if self.direction == "random":
            noise = {name: normal([seed + i], t.shape, t)[0] for i, (name, t) in enumerate(v.items())}
            v = {name: z * (v[name].norm() / z.norm().clamp(min=1e-12)) for name, z in noise.items()}
        if self.scope == "all":
            return v
        if self._in_scope is None:
            self._in_scope = parameters_in_scope(self.student, x, self.scope)
        return {name: t for name, t in v.items() if name in self._in_scope}

    @torch.no_grad()
    def _weigh(
        self,
        logits: Tensor,
        tangent: Tensor | None,
        taught: Tensor | None,
        views: Views,
        batch: Batch,
        pasted: _Pasted | None = None,
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return labels and weights of the sources, each (V * B, *S), by name.

        Args:
            logits: (V * B, K, *S).
            tangent: Their derivative along the direction; None for weights that ask none.
            taught: The teacher's logits, where they are needed.
            views: The views.
            batch: With initial labels, `UNLABELLED` where there is none, and perhaps pseudo labels of whole scans.
            pasted: Clean pixels in the views, which these labels are not about.
        """
        logits = widened(logits)
        initial, pseudo = batch.initial_label, batch.pseudo_label
        assert initial is not None  # noqa: S101 - `losses` has looked
        if pseudo is None:
            own = logits if pasted is None else pasted.bare
            seen = taught if self.pseudo_from == "teacher" else own
            assert seen is not None  # noqa: S101 - `_asks_teacher`
            pseudo = views.pseudo_label(torch.softmax(seen, 1))
        # What is padding in the scan has no pseudo label either.
        pseudo = torch.where(initial == IGNORE, IGNORE, pseudo)
        both = {"initial": initial, "pseudo": pseudo}
        labels = {name: views.expand_label(both[name]) for name in self.weighing.sources}
        if pasted is not None:
            labels = {name: torch.where(pasted.covered, IGNORE, label) for name, label in labels.items()}
        weights = self.weighing.weigh(labels, logits, tangent, taught, self.ranks)
        for name, label in labels.items():
            mask = label >= 0
            kept, all_known, mass = self.ranks.sum_each(
                (weights[name] > 0).sum(), mask.sum(), weights[name].sum()
            )
            self.monitors[f"kept_{name}"] = kept / all_known.clamp(min=1)
            self.monitors[f"mass_{name}"] = mass
        return labels, weights

    def _weighted(self, logits: Tensor, labels: dict[str, Tensor], weights: dict[str, Tensor]) -> Losses:
        """Return Σ w c for each label source; the weights of both sources sum to 1 over all ranks.

        With `pseudo_dice` each source's soft Dice loss is added, of pixels that count by their weight, as much as the
        source has of all weight.
        """
        factor = self.pseudo_weight * self.every
        terms = {}
        for name, label in labels.items():
            weight = weights[name]
            term = self.ranks.sum((weight * cross_entropy_map(logits, label)).sum())
            if self.pseudo_dice:
                mass, known = self.ranks.sum_each(weight.sum(), (label >= 0).sum())
                term = term + mass * soft_dice_loss(logits, label, weight=weight * known, ranks=self.ranks)
            terms[name] = factor * term
        return terms

    def _consistency(
        self,
        logits: Tensor,
        taught: Tensor | None,
        views: Views,
        inside: Tensor,
        pasted: _Pasted | None = None,
    ) -> Losses:
        """Return L_ple and L_mt, where they have a weight, of pixels that `pasted` clean ones do not cover.

        `inside` (B, *S) is True where the images show their scans.
        """
        uncovered = None if pasted is None else (~pasted.covered).unsqueeze(1).to(logits.dtype)
        terms = {}
        if self.teacher_weight and taught is not None:
            valid = (views.expand_label(inside.long()) > 0).unsqueeze(1).to(logits.dtype)
            valid = valid if uncovered is None else valid * uncovered
            distance = prediction_distance(logits, taught, valid, ranks=self.ranks)
            terms["teacher"] = self.teacher_weight * distance
        if self.views and self.ple_weight:
            aligned, seen = views.align(torch.softmax(logits, 1))
            seen = seen * inside.unsqueeze(1)
            if uncovered is not None:
                seen = seen * (views.align(uncovered)[0] > 0.999)  # interpolated: no part of it covered
            terms["views"] = self.ple_weight * pairwise_consistency(aligned, seen, ranks=self.ranks)
        return terms

    def _clean_gradient(
        self, image: Tensor, label: Tensor, seed: int, stream: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the supervised loss, over all ranks, and this rank's part of its gradient."""
        if self.clean_views:
            views = self._draw(image, seed, stream)
            image, label = views.expand(image), views.expand_label(label)
        return loss_and_gradient(
            self.student,
            image,
            lambda z: supervised_loss(widened(z), label, ranks=self.ranks),
            chunk=self.chunk,
        )

    def _gradient_at(self, ahead: dict[str, Tensor], x: Tensor, label: Tensor) -> dict[str, Tensor]:
        """Return the supervised loss's gradient at the parameters `ahead`, leaving the student as it is."""
        ahead = {name: p.detach().requires_grad_() for name, p in ahead.items()}
        buffers = {name: b.detach().clone() for name, b in self.student.named_buffers()}
        logits = widened(functional_call(self.student, {**ahead, **buffers}, (x,)))
        loss = supervised_loss(logits, label, ranks=self.ranks)
        grads = torch.autograd.grad(loss, list(ahead.values()), materialize_grads=True)
        return dict(zip(ahead, grads, strict=True))


def _terms_and_gradient(
    model: nn.Module, x: Tensor, terms: Callable[[Tensor], Losses], chunk: int | None, output: Tensor | None
) -> tuple[Losses, dict[str, Tensor]]:
    """Return loss terms, detached, and the gradient of their sum, a chunk at a time (see `loss_and_gradient`)."""
    found: Losses = {}

    def total(logits: Tensor) -> Tensor:
        found.update(terms(logits))
        return torch.stack([logits.sum() * 0, *found.values()]).sum()  # a step may have no terms

    _, grads = loss_and_gradient(model, x, total, chunk=chunk, output=output)
    return {name: term.detach() for name, term in found.items()}, grads
