"""Random changes of a network's features, at its deepest layer or at every level, whatever the network.

Every image has a seed of its own, as in `mlbseg.core.perturb`. A network is changed for the time of one pass only:

    layer = deepest_layer(network, image)
    with changed_features(network, layer, lambda z: channels_dropped(seeds, z), first=4):
        logits = network(images)  # the features of all but the first four images lack half of their channels
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from mlbseg.core.losses import widened
from mlbseg.core.perturb import uniform
from mlbseg.core.scope import layers_in_order


def deepest_layer(model: nn.Module, x: Tensor) -> str:
    """Return the name of the module with the deepest features that a network has before its last layer.

    It is the last one to end of those with the coarsest output, so that a block counts as a whole, its skip connection
    included. A network that is nowhere coarser than its input has its middle module. A module that runs more than once
    is passed over. Skip connections around the deepest layer, such as those of a U-Net, are not part of it.

    Args:
        model: A network; it is run once, in evaluation mode and without gradient.
        x: (B, C, *S); its first image is used.

    Raises:
        ValueError: if nothing comes before the last layer.
    """
    x = x[:1]
    head = layers_in_order(model, x)[-1][0]
    layers = layers_in_order(model, x, containers=True)
    names = [name for name, _ in layers]
    runs = Counter(names)
    before = names.index(head) if runs[head] == 1 else len(names) - 1 - names[::-1].index(head)
    hidden = [(name, size) for name, size in layers[:before] if runs[name] == 1]
    if not hidden:
        raise ValueError("the network has no features before its last layer")
    coarsest = min(size for _, size in hidden)
    if coarsest >= x[0, 0].numel():
        return hidden[len(hidden) // 2][0]
    return [name for name, size in hidden if size == coarsest][-1]


@dataclass(frozen=True)
class Level:
    """Features of one resolution on a network's way down.

    Attributes:
        layer: Name of the module whose output they are.
        onwards: Names of the modules by which the encoder goes on from them to the next level.
    """

    layer: str
    onwards: frozenset[str] = frozenset()


def feature_levels(model: nn.Module, x: Tensor) -> list[Level]:
    """Return what a network's encoder hands to its decoder, the deepest first.

    Before the deepest layer (see `deepest_layer`), a level ends where a resolution has come for the first time and its
    modules end. Skip connections start there, in all networks of ours. A network that is nowhere coarser than its input
    has one level, its middle module.

    Args:
        model: A network; it is run once or twice, in evaluation mode and without gradient.
        x: (B, C, *S); its first image is used.

    Raises:
        ValueError: if nothing comes before the last layer.
    """
    deepest = deepest_layer(model, x)
    layers = layers_in_order(model, x[:1], containers=True)
    runs = Counter(name for name, _ in layers)
    end = next(i for i, (name, _) in enumerate(layers) if name == deepest)
    coarsest = layers[end][1]
    ends: list[int] = []
    whole = x[0, 0].numel()
    finest = whole + 1
    for i, (_, size) in enumerate(layers[:end]):
        # Halvings alone: a transformer's blocks have their channels last, and so no size.
        if coarsest < size < finest and whole % size == 0 and (whole // size).bit_count() == 1:
            ends.append(i)
            finest = size
        elif ends and size == layers[ends[-1]][1] and i == ends[-1] + 1:
            ends[-1] = i  # of the same block, or around it
    levels = [Level(deepest)]
    for here, then in reversed(list(pairwise([*ends, end]))):
        if runs[layers[here][0]] == 1:
            between = layers[here + 1 : then + 1]
            onwards = frozenset(name for name, size in between if size == layers[then][1])
            levels.append(Level(layers[here][0], onwards))
    return levels


def parameters_after(model: nn.Module, x: Tensor, layer: str) -> frozenset[str]:
    """Return the names of the parameters of all modules that run after a layer alone: those of its decoder.

    Args:
        model: A network; it is run once, in evaluation mode and without gradient.
        x: (B, C, *S); its first image is used.
        layer: Name of a module that runs once (see `deepest_layer`).
    """
    names = [name for name, _ in layers_in_order(model, x[:1], containers=True)]
    end = names.index(layer)
    after = set(names[end + 1 :]) - set(names[: end + 1])
    return frozenset(name for name, _ in model.named_parameters() if name.rpartition(".")[0] in after)


@contextlib.contextmanager
def changed_levels(
    model: nn.Module, levels: Sequence[Level], change: Callable[[Tensor, int], Tensor], first: int = 0
) -> Iterator[None]:
    """Let the decoder of a network see changed features of every level, while its encoder goes on with its own.

    Args:
        model: The network.
        levels: Of the network (see `feature_levels`).
        change: From features (B, C, *S) and the number of their level to features of the same shape.
        first: Images before this one in the batch keep theirs.
    """
    with contextlib.ExitStack() as stack:
        for number, level in enumerate(levels):

            def own(features: Tensor, number: int = number) -> Tensor:
                return change(features, number)

            stack.enter_context(changed_features(model, level.layer, own, first, level.onwards))
        yield


@contextlib.contextmanager
def changed_features(
    model: nn.Module,
    layer: str,
    change: Callable[[Tensor], Tensor],
    first: int = 0,
    onwards: Collection[str] = (),
) -> Iterator[None]:
    """Let passes of a network go on with changed features of the images from the index `first` on.

    Args:
        model: The network.
        layer: Name of the module whose output is changed (see `deepest_layer`).
        change: From features (B, C, *S) to features of the same shape.
        first: Images before this one in the batch keep theirs.
        onwards: Names of modules that are given the features as they are, where they are given them.
    """
    seen: list[tuple[Tensor, Tensor]] = []  # changed, and as they were

    def hook(_: nn.Module, __: object, output: Tensor) -> Tensor:
        kept, own = output.tensor_split([first])
        changed = torch.cat([kept, change(own).to(output.dtype)])
        seen[:] = [(changed, output)]
        return changed

    def undone(_: nn.Module, inputs: tuple[object, ...]) -> tuple[object, ...]:
        return tuple(next((was for now, was in seen if now is x), x) for x in inputs)

    handles = [model.get_submodule(layer).register_forward_hook(hook)]
    handles += [model.get_submodule(name).register_forward_pre_hook(undone) for name in onwards]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def channels_dropped(seeds: Sequence[int], features: Tensor, probability: float = 0.5) -> Tensor:
    """Return the features (B, C, *S) with each channel dropped with this probability, the others scaled up for it.

    Source: Tompson et al., Efficient Object Localization Using Convolutional Networks (CVPR 2015), section 3.2.
    """
    exact = widened(features)
    kept = uniform(seeds, (features.shape[1], *(1,) * (features.ndim - 2)), exact) >= probability
    return exact * kept / (1 - probability)


def features_with_noise(seeds: Sequence[int], features: Tensor, most: float = 0.3) -> Tensor:
    """Return the features (B, C, *S), each times 1 + N with its own N uniform in [-most, most).

    Source: F-Noise of Ouali et al., cross-consistency training (CVPR 2020).
    """
    exact = widened(features)
    return exact * (1 + most * (2 * uniform(seeds, features.shape[1:], exact) - 1))


def active_dropped(seeds: Sequence[int], features: Tensor, share: tuple[float, float] = (0.6, 0.9)) -> Tensor:
    """Return the features (B, C, *S) without the places of an image that are most active.

    Source: F-Drop of Ouali et al., cross-consistency training (CVPR 2020). The activity of a place is the sum over its
    channels, here of absolute values, as not every network's features are positive.

    Args:
        seeds: One per image.
        features: (B, C, *S).
        share: Of the image's greatest activity: from this range each image draws where dropping begins.
    """
    exact = widened(features)
    activity = exact.detach().abs().sum(1, keepdim=True)
    low, high = share
    drawn = low + (high - low) * uniform(seeds, (1,) * (features.ndim - 1), exact)
    return exact * (activity < drawn * activity.flatten(1).amax(1).reshape(drawn.shape))
