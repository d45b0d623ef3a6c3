"""The algorithm as pure functions on tensors: no files, no framework, usable in anyone's own loop."""

from mlbseg.core.directional import central_difference, directional_derivative, gradient, loss_and_gradient
from mlbseg.core.losses import cross_entropy_map, soft_dice_loss, supervised_loss
from mlbseg.core.metaweights import PixelWeights, alignment, normalise, pixel_weights
from mlbseg.core.optimisers import precondition, virtual_step
from mlbseg.core.ranks import ALONE, Ranks
from mlbseg.core.scope import parameters_in_scope

__all__ = [
    "ALONE",
    "PixelWeights",
    "Ranks",
    "alignment",
    "central_difference",
    "cross_entropy_map",
    "directional_derivative",
    "gradient",
    "loss_and_gradient",
    "normalise",
    "parameters_in_scope",
    "pixel_weights",
    "precondition",
    "soft_dice_loss",
    "supervised_loss",
    "virtual_step",
]
