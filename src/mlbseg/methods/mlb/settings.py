"""What a user can set of MLB."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from mlbseg.methods.base import Taught
from mlbseg.methods.mlb.weighing import Weighing
from mlbseg.settings import FEW, SINGLE, Below1, Noise, Patches, Steps, Weight

View = Literal["zoom-in", "zoom-out", "flip"]
Source = Literal["initial", "pseudo"]


class MLBSettings(Taught.Settings):
    """What a user can set of MLB, the bootstrap stage."""

    mode: Literal["joint", "paper"] = Field(
        "joint",
        description="joint takes the clean gradient where the model stands, for the weights and for the one "
        "update; paper looks one virtual step ahead, and follows the weighted step by a step on the"
        " clean batch",
    )
    views: Annotated[Annotated[list[View], FEW], SINGLE] = Field(
        ["zoom-out"], description="views of each unlabelled patch beside the patch itself"
    )
    padding: Literal["unknown", "background"] = Field(
        "unknown",
        description="what a view shows beyond the image. unknown: nothing is learnt there, and pseudo labels "
        "are the mean of the views that saw a pixel. background: as in the public code, which also "
        "averages over all views, zooms by its own ranges, and compares views in the frame of one",
    )
    ple_detached: bool = Field(
        False,
        description="with padding=background, let the consistency of views move one view of each pair alone, "
        "as in the public code",
    )
    clean_views: bool = Field(
        False,
        description="let joint mode see the clean batch in these views too, as paper mode always does; each "
        "view costs a forward and a backward pass",
    )
    sources: Annotated[list[Source] | None, Field(min_length=1, max_length=16), SINGLE] = Field(
        None,
        description="the labels that are weighed. Empty: pseudo labels, and the labels that noisy cases came "
        "with. Only if initial is named are stage 1's predictions of unlabelled cases kept and "
        "weighed",
    )
    weighting: Literal["share", "residual", "sign", "softmax", "sigmoid", "uniform", "confidence"] = Field(
        "sign",
        description="how a pixel's alignment with the clean gradient becomes its weight. share, the paper's: in"
        " proportion; borders and wrong labels then take most of the weight. residual: in "
        "proportion to the alignment divided by the pixel's residual 1 - p(label). sign: every "
        "trusted pixel counts alike. sigmoid: half, where the gradient says little of a pixel, up "
        "to twice that or nothing. softmax: over all pixels. uniform: all alike. confidence: by the"
        " teacher's probability of the label",
    )
    decides: Literal["everywhere", "disputes"] = Field(
        "disputes",
        description="where the gradient decides: everywhere, as in the paper, or only where the sources' labels"
        " differ; where they agree, a pixel counts as much as the most aligned one",
    )
    per_source: bool = Field(False, description="give initial and pseudo labels the same total weight")
    per_image: bool = Field(False, description="give every view of every image the same total weight")
    direction: Literal["clean", "random"] = Field(
        "clean",
        description="what the weights follow: the clean gradient, or noise of its length, as a control",
    )
    scope: Literal["all", "decoder", "head"] = Field(
        "all", description="the parameters whose gradient decides the weights"
    )
    every: Steps = Field(
        1,
        description="weigh and follow the labels only at every n-th step, n-fold; other steps have the other "
        "terms",
    )
    mix: Below1 = Field(
        2 / 3,
        description="sides of the boxes by which clean images are pasted into the views (BCP, CVPR 2023), as a "
        "share of the patch's; 0 pastes nothing. In joint mode",
    )
    jitter: Below1 = Field(
        0.3,
        description="largest relative change of contrast, and shift of brightness in units of the normalised "
        "intensity, of each view that the student sees; the teacher sees the view as it is",
    )
    pseudo_from: Literal["student", "teacher"] = Field(
        "teacher", description="whose predictions make the pseudo labels (the paper: student)"
    )
    relabel: int = Field(
        0,
        ge=0,
        le=1000,
        description="how many times in stage 2 all unlabelled and noisy scans are predicted whole, for pseudo "
        "labels that hold until the next time. 0: each patch has pseudo labels of its own at each "
        "step, the mean over its views",
    )
    teacher_noise: Noise = Field(
        0.1,
        description="SD of the Gaussian noise on the teacher's input, in units of the normalised intensity",
    )
    teacher_twice: bool = Field(
        False,
        description="in paper mode, move the teacher after each of a step's two updates, as in the public code",
    )
    teacher_counts: Literal["stage", "epoch"] = Field(
        "stage",
        description="from where the teacher's decay rises to teacher_decay: from the start of the stage, or, as "
        "in the public code, from that of each epoch, when the teacher becomes the student again",
    )
    pseudo_weight: Weight = Field(1.0, description="factor of the weighted costs")
    pseudo_dice: bool = Field(
        True, description="add the weighted labels' soft Dice loss to their cross-entropy"
    )
    ple_weight: Weight = Field(
        0.0,
        description="factor of the consistency of views, of pixels that no clean one covers in any two: few, "
        "unless mix is 0",
    )
    teacher_weight: Weight = Field(0.0, description="factor of the distance to the teacher's predictions")
    chunk: Patches | None = Field(
        None,
        description="images per pass of the network, for the least memory, at the price of one more pass; "
        "empty: all at once",
    )

    def weighing(self, *, noisy: bool) -> Weighing:
        """Return how pixels are weighed.

        Args:
            noisy: Whether labels that nobody checked come with cases; unless sources are named, they are one.
        """
        sources: tuple[str, ...] = ("initial", "pseudo") if noisy else ("pseudo",)
        if self.sources is not None:
            sources = tuple(dict.fromkeys(self.sources))
        return Weighing(sources, self.weighting, self.decides, self.per_source, self.per_image)
