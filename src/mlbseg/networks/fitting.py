"""Weights from elsewhere fitted to a network: by name and shape, the first layer adapted, other heads drawn anew."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mlbseg.core.scope import parameters_in_scope
from mlbseg.errors import UserError, brief

ENOUGH = 0.5
"""Share of the encoder's kernels, counted by name, that must come from elsewhere."""
_DEEPEST_PREFIX = 5
_FIRST = 4
_ALIAS = {"conv": "all_modules.0", "norm": "all_modules.1"}
"""Second names that dynamic-network-architectures gives to the parts of a block without dropout."""


@dataclass(frozen=True)
class Fitted:
    """What became of the weights of a file.

    Attributes:
        loaded: Names in the network whose weights were taken as they are.
        adapted: Names whose weights were changed to fit, and how.
        drawn: Names that keep the values which they were drawn with, and why.
        left: Names in the file that have no place in the network.
    """

    loaded: tuple[str, ...]
    adapted: dict[str, str]
    drawn: dict[str, str]
    left: tuple[str, ...]

    def rows(self) -> list[tuple[str, int, str]]:
        """Return what was loaded, adapted, drawn anew and left over: word, number of tensors, the first names."""
        return [
            ("loaded", len(self.loaded), _first(self.loaded)),
            ("adapted", len(self.adapted), _grouped(self.adapted)),
            ("drawn anew", len(self.drawn), _grouped(self.drawn)),
            ("left over", len(self.left), _first(self.left)),
        ]


def fit(
    network: nn.Module,
    found: Mapping[str, Tensor],
    *,
    ndim: int,
    in_channels: int,
    num_classes: int,
    sides: Sequence[int],
    same_classes: bool = True,
    where: str = "the starting weights",
) -> Fitted:
    """Load into a network, in place, what fits of weights that another one had.

    A weight fits by its name and its shape. Prefixes such as ``module.`` or ``backbone.``, on either side, are seen
    through: those are left away and put before with which most weights fit. A first layer for another number of
    channels is repeated and scaled, or summed for one channel, so that its answers stay about as large. A head for
    other classes keeps the values that it was drawn with. Norm layers take scale and shift from norms of any kind.

    Args:
        network: From `make_network`.
        found: Weights by name.
        ndim: Spatial dimensions of the network.
        in_channels: Channels of its images.
        num_classes: Its classes.
        sides: Of an image that it can look at, the smaller the better.
        same_classes: Whether a head of the right shape is for these classes too, as far as is known.
        where: The file, for messages.

    Raises:
        UserError: Less than half of the encoder's kernels are there, or one of them is no finite number.
    """
    own = network.state_dict()
    places = _places(found, own)
    names: dict[str, str] = {}
    for theirs, place in places.items():
        names.setdefault(place, theirs)
    probe = torch.zeros(1, in_channels, *sides)
    decoder = parameters_in_scope(network, probe, "decoder")
    head = parameters_in_scope(network, probe, "head")
    loaded: list[str] = []
    adapted: dict[str, str] = {}
    drawn: dict[str, str] = {}
    for name, target in own.items():
        source = names.get(name)
        if source is None:
            drawn[name] = "not there"
            continue
        value = found[source]
        if name in head and not same_classes:
            drawn[name] = "a head for other classes"
            continue
        if value.shape == target.shape:
            loaded.append(name)
        elif (stem := _as_stem(value, target, in_channels)) is not None:
            value, adapted[name] = stem
        elif _differ_by_classes(value, target, num_classes):
            drawn[name] = "a head for other classes"
            continue
        else:
            drawn[name] = f"another shape, {_shape(value)}, expected {_shape(target)}"
            continue
        if value.is_floating_point() != target.is_floating_point() or not value.isfinite().all():
            raise UserError(
                f"{where}: weight {brief(source)} holds values that are no finite numbers, expected weights of a "
                "network that was trained (choose another checkpoint)"
            )
        with torch.no_grad():
            target.copy_(value)  # `state_dict` gives the network's own tensors
    # Biases and norms fit any network of the same widths.
    encoder = [name for name, p in network.named_parameters() if name not in decoder and p.ndim > 1]
    taken = len({*loaded, *adapted}.intersection(encoder))
    if taken < ENOUGH * len(encoder):
        raise UserError(_too_little(where, found, own, encoder, taken, ndim))
    held = {found[source].data_ptr() for source in places}  # a weight of two names is not left over
    left = [name for name, value in found.items() if name not in places and value.data_ptr() not in held]
    return Fitted(tuple(loaded), adapted, drawn, tuple(left))


def _places(found: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, str]:
    """Return the name in the network that each name in the file means, of those that mean one."""
    kept = {name: _kept(name) if any(".all_modules." in other for other in own) else name for name in found}
    by_rest: dict[str, list[str]] = {}
    for name in own:
        for rest, prefix in _cut(name):
            by_rest.setdefault(rest, []).append(prefix)
    votes: Counter[tuple[str, str]] = Counter()
    for name, value in found.items():
        for rest, cut in _cut(kept[name]):
            for put in by_rest.get(rest, ()):
                # A name that fits alone says less than one whose shape fits.
                votes[cut, put] += 1 + 2 * (own[put + rest].shape == value.shape)
    if not votes:
        return {}
    most = max(votes.values())
    cut, put = min((pair for pair, count in votes.items() if count == most), key=lambda p: (len(p[0]), p))
    places = {n: put + k.removeprefix(cut) for n, k in kept.items() if k.startswith(cut)}
    return {name: place for name, place in places.items() if place in own}


def _kept(name: str) -> str:
    """Return a name of dynamic-network-architectures, which has several for one weight, as the one that is kept."""
    name = name.replace("decoder.encoder.", "encoder.")
    return re.sub(
        r"\.(conv|norm)\.(\w+)$",
        lambda m: f".{_ALIAS[m[1]]}.{m[2]}" if _IN_BLOCK.search(name) else m[0],
        name,
    )


_IN_BLOCK = re.compile(r"(convs\.\d+|conv[123]|skip\.\d+)\.(conv|norm)\.\w+$")


def _cut(name: str) -> Iterable[tuple[str, str]]:
    """Yield what is left of a dotted name without each of its leading parts, and these; parts of layers stay whole."""
    parts = name.split(".")
    for count in range(min(len(parts) - 1, _DEEPEST_PREFIX)):
        yield ".".join(parts[count:]), "".join(f"{part}." for part in parts[:count])


def _as_stem(value: Tensor, target: Tensor, in_channels: int) -> tuple[Tensor, str] | None:
    """Return the kernel of a first layer for another number of channels, and how it was made; None for other layers."""
    if (
        target.ndim < 4
        or value.ndim != target.ndim
        or target.shape[1] != in_channels
        or value.shape[0] != target.shape[0]
        or value.shape[2:] != target.shape[2:]
    ):
        return None
    count = value.shape[1]
    if in_channels == 1:
        return value.sum(1, keepdim=True), f"first layer, {count} channels summed to 1"
    repeated = value[:, [channel % count for channel in range(in_channels)]] * (count / in_channels)
    return repeated, f"first layer, {count} channels repeated to {in_channels} and scaled"


def _differ_by_classes(value: Tensor, target: Tensor, num_classes: int) -> bool:
    """Return whether two shapes differ along axes of classes alone; transposed kernels have these second."""
    if value.ndim != target.ndim:
        return False
    other = [axis for axis in range(target.ndim) if value.shape[axis] != target.shape[axis]]
    return bool(other) and all(axis < 2 and target.shape[axis] == num_classes for axis in other)


def _too_little(
    where: str,
    found: Mapping[str, Tensor],
    own: Mapping[str, Tensor],
    encoder: list[str],
    taken: int,
    ndim: int,
) -> str:
    kernels = Counter(value.ndim - 2 for value in found.values() if value.ndim in (4, 5))
    dimension = max(kernels, key=lambda d: kernels[d]) if kernels else ndim
    if dimension != ndim:
        return (
            f"{where}: weights of a {dimension}D network, expected those of a {ndim}D one "
            f"(choose other weights, or another network with -o plan.ndim={dimension})"
        )
    theirs = [f"{name} {_shape(value)}" for name, value in found.items()]
    ours = [f"{name} {_shape(own[name])}" for name in encoder]
    return (
        f"{where}: {taken} of the encoder's {len(encoder)} kernels fit, expected half of them or more\n"
        f"  found {_first(theirs)}\n"
        f"  expected {_first(ours)}\n"
        "choose the network of these weights, such as -o plan.network=resenc -o plan.network_channels=32,64,128"
    )


def _shape(value: Tensor) -> str:
    return "×".join(map(str, value.shape)) or "number"


def _first(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:_FIRST]) + (", ..." if len(names) > _FIRST else "")


def _grouped(reasons: Mapping[str, str]) -> str:
    """Return the first names of each reason."""
    by_reason: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        by_reason.setdefault(reason, []).append(name)
    parts = [f"{_first(names)} ({reason})" for reason, names in by_reason.items()]
    return "; ".join(parts[:_FIRST]) + ("; ..." if len(parts) > _FIRST else "")
