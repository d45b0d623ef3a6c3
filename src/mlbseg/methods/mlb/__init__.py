"""MLB-Seg: bootstrap from few labels with per-pixel meta-weights (Wei et al., MICCAI 2023, arXiv 2307.11604)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from mlbseg.core.directional import directional_derivative
from mlbseg.errors import UserError
from mlbseg.methods.base import Context
from mlbseg.methods.mlb.joint import Joint
from mlbseg.methods.mlb.paper import Paper
from mlbseg.methods.mlb.settings import MLBSettings
from mlbseg.methods.mlb.sight import CLEAN_VIEWS, META_VIEWS, SIGHT, VIEWS
from mlbseg.methods.mlb.weighing import Weighing
from mlbseg.settings import Section
from mlbseg.types import Batch, Losses


class MLB(Joint, Paper):
    """Stage 2 of MLB-Seg; the student comes trained from stage 1.

    ``joint`` mode takes the clean gradient v where the model stands and uses it twice, as the direction of the weights
    and as the clean part of one update. ``paper`` mode takes it after a virtual step on the consistency terms and
    follows the weighted step by a step on the clean batch. Where the batch has images set apart for it, v is their
    gradient.

    Raises:
        UserError: for a flip view where no axis may be flipped, for a weighting that disputes are too few for, and for
            pseudo labels that are asked for and not learnt.
    """

    uses_unlabelled = True
    needs_initial_labels = True
    predicts = "student"  # as in the paper's code; docs/benchmarks.md has how the two compare

    def __init__(
        self, student: nn.Module, settings: Section | None = None, context: Context | None = None
    ) -> None:
        super().__init__(student, settings, context)
        chosen, sources, axes = self.settings, self.weighing.sources, self.context.flip_axes
        if chosen.decides == "disputes" and chosen.weighting in ("softmax", "sigmoid") and len(sources) > 1:
            raise UserError(
                f"mlb.weighting: found {chosen.weighting}, which compares all pixels, but disputes leave few to it "
                "(add -o mlb.decides=everywhere, or use sign)"
            )
        if chosen.padding == "background" and chosen.mix and chosen.mode == "joint":
            raise UserError(
                f"mlb.mix: found {chosen.mix:.3g}, but with mlb.padding=background nothing is pasted (add -o mlb.mix=0)"
            )
        if chosen.relabel and "pseudo" not in sources:
            raise UserError(
                f"mlb.relabel: found {chosen.relabel}, but pseudo labels are not learnt "
                "(leave it out, or add pseudo to mlb.sources)"
            )
        if "flip" in chosen.views and axes is not None and not axes:
            raise UserError(
                "mlb.views: found flip, but the plan says that no flip keeps the anatomy valid "
                "(name the axes that may be flipped, such as plan.flip_axes=[2], or leave the flip view out)"
            )

    @classmethod
    def passes(cls, settings: Any) -> int:
        """Return how many views a step sees of each unlabelled patch, the patch itself among them."""
        return 1 + len(settings.views)

    @classmethod
    def freezes_labels(cls, settings: Any) -> bool:
        """Return whether what stage 1 predicts of unlabelled cases is learnt from: only if it is asked for."""
        return settings.sources is not None and "initial" in settings.sources

    @classmethod
    def require_useful(cls, settings: Any, *, noisy: bool, meta_cases: int) -> None:
        """Refuse settings of weights where no weight is decided.

        Raises:
            UserError: naming the setting, and why it changes nothing.
        """
        weighing = settings.weighing(noisy=noisy)
        idle = _idle(settings, weighing, meta_cases)
        if idle is None:
            return
        if weighing.may_differ:
            why, remedy = "mlb.weighting=confidence follows no direction", "choose another weighting"
        else:
            why = "with these settings no weight is left to decide"
            remedy = "add -o mlb.decides=everywhere or -o mlb.sources=initial,pseudo"
        raise UserError(f"{idle}: changes nothing, as {why} (leave it out, or {remedy})")

    @classmethod
    def why_no_weights(cls, settings: Any, *, noisy: bool) -> str:
        """Return why a run has no weight maps, in a sentence."""
        if not settings.weighing(noisy=noisy).may_differ:
            return "With these settings no weight is decided (mlb.decides, mlb.sources): every pixel counts alike."
        return "The run has no weight maps in its folder weights/."

    def losses(self, batch: Batch, step: int) -> Iterator[Losses]:
        """Yield one loss in joint mode, two (the weighted step, then the clean step) in paper mode."""
        if batch.image is None or batch.initial_label is None:
            raise ValueError("MLB needs unlabelled images and their initial labels in every batch")
        weigh = step % self.settings.every == 0
        yield from (self._joint if self.settings.mode == "joint" else self._paper)(
            batch, batch.image, weigh, step
        )

    def weight_maps(self, batch: Batch) -> dict[str, tuple[Tensor, Tensor]]:
        """Return labels and weights of the first view, with v where the model stands and nothing pasted."""
        if not self.weighing.may_differ or batch.image is None or batch.initial_label is None:
            return {}
        monitors, buffers = dict(self.monitors), {name: b.clone() for name, b in self.named_buffers()}
        meta = batch.meta_image is not None and batch.meta_label is not None
        clean = (batch.meta_image, batch.meta_label) if meta else (batch.clean_image, batch.clean_label)
        with self.same_dropout(batch):
            _, v = self._clean_gradient(*clean, batch.seed, META_VIEWS if meta else CLEAN_VIEWS)  # type: ignore[arg-type]
            views = self._draw(batch.image, batch.seed, VIEWS)
            x, taught, _ = self._see(views, batch.image, batch, SIGHT, weak=batch.weak)
            if self.weighing.asks_direction:
                direction = self._towards(self.ranks.sum_all(v), x, batch.seed)
                logits, tangent = directional_derivative(
                    self.student, direction, x, chunk=self.settings.chunk
                )
            else:
                logits, tangent = self._asked(x), None
        labels, weights = self._weigh(logits, tangent, taught, views, batch)
        self.monitors = monitors
        for name, buffer in self.named_buffers():
            buffer.copy_(buffers[name])
        count = len(batch.image)
        return {name: (labels[name][:count], weights[name][:count]) for name in labels}


def _idle(settings: MLBSettings, weighing: Weighing, meta_cases: int) -> str | None:
    """Return a setting of weights that was asked for although no weight is decided, if there is one."""
    if weighing.asks_direction:
        return None
    if meta_cases:
        return "train.meta_cases"
    if settings.weighting == "uniform":
        return None
    asked = settings.model_dump(exclude_defaults=True)
    idle = ["direction", "scope"]
    if not weighing.may_differ:
        idle += ["weighting", "per_source"]
    return next((f"mlb.{name}" for name in idle if name in asked), None)
