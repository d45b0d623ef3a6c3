"""The rules that weigh the data against a device: spacing, levels, patch, batch and steps.

The table in `mlbseg.data.plan` states them all.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mlbseg.data.fingerprint import Fingerprint
from mlbseg.data.geometry import shown
from mlbseg.data.rules import Reasoned, own_spacing
from mlbseg.errors import UserError
from mlbseg.networks import Strides, find_network, side_multiples
from mlbseg.types import Role

PATCH_VOXELS = {("cpu", 2): 224 * 256, ("cpu", 3): 64 * 64 * 48, ("gpu", 2): 512 * 512, ("gpu", 3): 128**3}
"""The most that a patch holds."""
STEP_VOXELS = {
    ("cpu", 2): 4 * 224 * 256,
    ("cpu", 3): 64 * 64 * 48,
    ("gpu", 2): 12 * 512 * 512,
    ("gpu", 3): 128**3,
}
"""The most that the clean patches of a step hold together, where there are more than two."""
MOST_PATCHES = {("cpu", 2): 20, ("cpu", 3): 4, ("gpu", 2): 32, ("gpu", 3): 4}
SURROUNDINGS = 1.5
"""A patch is to hold this many times the extent of the largest structure, along each axis."""
KEPT = 0.975
"""The Dice that the clean labels must keep at a coarser spacing."""
NARROWEST = 96
"""Pixels that a 2D patch around a structure has along each axis, however small the structure."""
WIDER = 2.0
"""A patch is to hold a whole scan unless that takes voxels this many times as coarse as the structure takes."""
NOTABLE = 1.1
"""Voxels that are not this many times coarser are not worth resampling."""
DEEPEST = 8
"""Voxels that an axis keeps at the deepest level, or up to half as many."""
FILLED = 0.4
"""Share of an image that the largest structure and its surroundings take where they are most of it."""
BASE_FEATURES = {"cpu": 16, "gpu": 32}
MOST_FEATURES = {"cpu": 256, "gpu": 512}
BASE_STEPS = {"cpu": 2_000, "gpu": 20_000}
CORE_SECONDS = {2: 1.2e-6, 3: 0.9e-6}
"""Seconds of supervised training per voxel of a step on one CPU core, by dimension. Measured with 16 features at the
first level, on hippocampi (3D) and ultrasound images (2D)."""
VIEWS = 5
"""Views of each unlabelled patch in the paper: the patch itself, one zoomed in, two zoomed out and one flipped."""


@dataclass(frozen=True)
class View:
    """The median prepared scan as a network sees it, axes in array order.

    Attributes:
        size: Voxels along each axis.
        spacing: mm along each axis.
        wanted: Voxels along each axis that hold the largest structure and its surroundings; 0 if unknown.
    """

    size: tuple[int, ...]
    spacing: tuple[float, ...]
    wanted: tuple[float, ...]

    def field(self, kind: str) -> tuple[tuple[int, ...], bool]:
        """Return the voxels along each axis that a patch is to hold, and whether they are fewer than the scan's.

        On a CPU a 2D network is trained on a structure and its surroundings, unless that is most of an image.
        """
        around = tuple(
            min(side, max(NARROWEST, math.ceil(wanted)))
            for side, wanted in zip(self.size, self.wanted, strict=True)
        )
        small = 0 < math.prod(self.wanted) < FILLED * math.prod(self.size)
        if kind == "cpu" and len(self.size) == 2 and small and around != self.size:
            return around, True
        return self.size, False

    @classmethod
    def of(
        cls,
        facts: Fingerprint,
        axes: Sequence[int],
        sizes: npt.NDArray[np.float64],
        spacings: npt.NDArray[np.float64],
        spacing: tuple[float, ...],
        ndim: int,
    ) -> View:
        """Measure it.

        Args:
            facts: Of the data.
            axes: Which of the facts' axes each axis of a prepared scan is.
            sizes: (cases, axes) voxels, axes in the prepared order.
            spacings: (cases, axes) mm, likewise.
            spacing: Of a prepared scan; 0 keeps each case's own.
            ndim: Of the network.
        """
        wanted = np.where(np.asarray(spacing) == 0, spacings, spacing)
        size = tuple(max(1, math.ceil(v)) for v in np.median(sizes * spacings / wanted, axis=0) - 1e-6)[
            -ndim:
        ]
        own = np.median(wanted, axis=0)[-ndim:]
        extent = facts.extent()
        around = np.zeros(ndim) if extent is None else SURROUNDINGS * extent[list(axes)][-ndim:] / own
        return cls(size, _numbers(own), _numbers(np.minimum(size, around)))


def _numbers(values: npt.NDArray[np.float64]) -> tuple[float, ...]:
    return tuple(float(v) for v in values)


def decide_spacing(
    kind: str,
    facts: Fingerprint,
    axes: Sequence[int],
    sizes: npt.NDArray[np.float64],
    spacings: npt.NDArray[np.float64],
    ndim: int,
) -> Reasoned[tuple[float, ...]]:
    """Take the scans' own spacing; a coarser one where a patch would not hold the largest structure.

    Args:
        kind: ``cpu`` or ``gpu``.
        facts: Of the data.
        axes: Of `View.of`, as are the rest.
        sizes: (cases, axes) voxels.
        spacings: (cases, axes) mm.
        ndim: Of the network.
    """
    finest, reason = own_spacing(spacings, ndim)
    view = View.of(facts, axes, sizes, spacings, finest, ndim)
    cap = PATCH_VOXELS[kind, ndim]
    if math.prod(_padded(view.size)) <= cap:
        return finest, f"{reason}; a patch can hold a whole scan."
    extent = facts.extent()
    if extent is None:
        return finest, f"{reason}; no clean label shows how large the structures are."
    size = f"{shown([round(float(mm), 1) for mm in extent[list(axes)][-ndim:]])} mm"
    if math.prod(_padded(view.wanted)) <= cap:
        return finest, f"{reason}; a patch holds the largest structure ({size}) and its surroundings."
    what, target = _coarser(facts, view, cap)
    if target <= NOTABLE * min(view.spacing):
        return finest, f"{reason}; much coarser voxels would keep the clean labels at a Dice below {KEPT:g}."
    coarser = tuple(round(max(mm, target), 6) if mm else 0.0 for mm in finest)
    return coarser, (
        f"{reason} is {shown(finest)}; made coarser so that a patch holds {what} (the largest structure has {size}). "
        f"The clean labels keep a Dice of {facts.kept(target):.3f} at this spacing."
    )


def _coarser(facts: Fingerprint, view: View, cap: int) -> tuple[str, float]:
    """Return what a patch of `cap` voxels can hold, and the spacing (mm) of the finest axes that this takes."""
    part = _coarse_enough(view.wanted, view.spacing, cap)
    whole = _coarse_enough(view.size, view.spacing, cap)
    if whole <= WIDER * part and facts.kept(whole) >= KEPT:
        return "a whole scan", whole
    if facts.kept(part) >= KEPT:
        return "the largest structure and its surroundings", part
    steps = (float(mm) for mm in np.linspace(part, min(view.spacing), 50))
    # Scans that are finer than the median may lose too much at any spacing.
    kept = next((mm for mm in steps if facts.kept(mm) >= KEPT), min(view.spacing))
    return "more of the largest structure", kept


def _coarse_enough(sides: Sequence[float], spacing: Sequence[float], cap: int) -> float:
    """Return the least spacing (mm) at which a patch of `cap` voxels covers what has these sides at `spacing`."""
    target = min(spacing)
    while True:
        coarser = [side * mm / max(mm, target) for side, mm in zip(sides, spacing, strict=True)]
        if math.prod(_padded(coarser)) <= cap:
            return target
        target *= 1.01


def _halvings(side: float) -> int:
    """Return how often a side is halved until `DEEPEST` voxels are left, or fewer."""
    return max(0, math.ceil(math.log2(max(side, 1) / DEEPEST)))


def _padded(sides: Sequence[float]) -> list[int]:
    """Return the sides in multiples of what their own number of halvings needs."""
    return [math.ceil(side / 2 ** (n := _halvings(side))) * 2**n for side in sides]


def _longest(sides: Sequence[int], wanted: Sequence[float], steps: Sequence[int], axes: Iterable[int]) -> int:
    """Return the axis to shorten by its step: the longest, one that then still has what is wanted before the others."""
    return max(axes, key=lambda axis: (sides[axis] - steps[axis] >= wanted[axis], sides[axis]))


def decide_network() -> Reasoned[str]:
    """Always unet."""
    return "unet", "A residual U-Net: the fastest of the networks, and good on few labels."


def decide_strides(
    kind: str, network: str, view: View, patch: tuple[int, ...] | None, fixed: bool
) -> Reasoned[Strides]:
    """Halve each axis until 4 to 8 voxels are left, coarse axes later than fine ones.

    Args:
        kind: ``cpu`` or ``gpu``.
        network: Its name.
        view: The median prepared scan.
        patch: The user's; None if there is none. Its sides are not halved more often than they can be.
        fixed: Whether the user has set the levels: then they are halvings of every axis.
    """
    if not find_network(network).anisotropic or fixed:
        return (), "Every axis is halved between any two levels."
    field = list(patch or view.field(kind)[0])
    while patch is None and math.prod(field) > PATCH_VOXELS[kind, len(field)]:
        longest = _longest(field, view.wanted, (8,) * len(field), range(len(field)))
        field[longest] = (field[longest] - 1) // 8 * 8
    left = [_halvings(side) for side in field]
    if patch is not None:
        left = [min(n, max(_twos(side), 3)) for n, side in zip(left, field, strict=True)]
    if max(left) < 2:  # three levels, the least that all networks take
        left = [2 if side > 4 or max(field) <= 4 else 0 for side in field]
    at, strides = list(view.spacing), []
    while any(left):
        finest = min(mm for mm, n in zip(at, left, strict=True) if n)
        stride = tuple(2 if n and mm < 2 * finest else 1 for mm, n in zip(at, left, strict=True))
        strides.append(stride)
        at = [mm * step for mm, step in zip(at, stride, strict=True)]
        left = [n - (step == 2) for n, step in zip(left, stride, strict=True)]
    deepest = [side / math.prod(axis) for side, axis in zip(field, zip(*strides, strict=True), strict=True)]
    return tuple(strides), (
        f"Each axis is halved until {DEEPEST // 2} to {DEEPEST} voxels are left "
        f"({shown([math.ceil(side) for side in deepest])} at the deepest level), coarse axes later than fine ones."
    )


def _twos(side: int) -> int:
    """Return how often a side can be halved without a rest."""
    return (side & -side).bit_length() - 1


def decide_network_channels(kind: str, network: str, strides: Strides) -> Reasoned[tuple[int, ...]]:
    """As many levels as there are strides, features doubling up to a bound."""
    builder = find_network(network)
    base = math.ceil(BASE_FEATURES[kind] / builder.first_multiple) * builder.first_multiple
    if (levels := builder.plan_levels) is not None:
        return tuple(base * 2**level for level in range(levels)), (
            f"{network} always has {levels} levels; {base} features at the first."
        )
    levels, most = len(strides) + 1, MOST_FEATURES[kind]
    return tuple(min(most, base * 2**level) for level in range(levels)), (
        f"{levels} levels by the strides; {base} features at the first, doubling, at most {most}."
    )


def decide_network_options() -> Reasoned[dict[str, tuple[int | tuple[int, ...], ...]]]:
    """Always none."""
    return {}, "None: the network's own."


def step_bytes(
    network: str,
    patch: tuple[int, ...],
    channels: tuple[int, ...],
    batch: int,
    views: int,
    strides: Strides = (),
) -> int:
    """Estimate the memory of one training step, bytes: saved maps and as much for gradients. Rough.

    Args:
        network: Its name.
        patch: Voxels along each axis.
        channels: Features per level.
        batch: Clean patches, and as many unlabelled ones.
        views: Views of each unlabelled patch, the patch itself among them; 0 if the method uses none.
        strides: By how much each axis is divided between levels; empty for 2.
    """
    features, coarser = 0.0, 1
    for level, width in enumerate(channels):
        features += width / coarser
        coarser *= math.prod(strides[level]) if level < len(strides) else 2 ** len(patch)
    return int(2 * 4 * math.prod(patch) * features * find_network(network).saved_maps * batch * (1 + views))


def require_trainable(
    weights: int,
    network: str,
    patch: tuple[int, ...],
    channels: tuple[int, ...],
    strides: Strides,
    batch: int,
    memory_bytes: int,
) -> None:
    """Refuse a network or a batch of which a part alone is more than all memory.

    Args:
        weights: Of the network.
        network: Its name.
        patch: Voxels along each axis.
        channels: Features per level.
        strides: By how much each axis is divided between levels.
        batch: Clean patches per step.
        memory_bytes: Memory of the device.

    Raises:
        UserError: So it is: the weights with their gradients, or what the clean patches save in half precision.
    """
    maps = step_bytes(network, patch, channels, batch, 0, strides) // 4
    for name, found, part, needed in (
        ("network_channels", list(channels), f"the weights of {network} with their gradients", 8 * weights),
        ("patch_size", f"{shown(patch)}, with plan.batch_size {batch}", "the feature maps", maps),
    ):
        if needed > memory_bytes:
            raise UserError(
                f"plan.{name}: found {found}, of which {part} alone take {needed / 2**30:.3g} GiB, expected at most "
                f"{memory_bytes / 2**30:.3g} GiB (make it smaller)"
            )


def decide_patch_size(
    kind: str,
    view: View,
    network: str,
    channels: tuple[int, ...],
    strides: Strides,
    budget: int,
    views: int,
) -> Reasoned[tuple[int, ...]]:
    """Start from the median prepared scan; shorten its longest side until a step fits the budget (bytes)."""
    multiples = side_multiples(network, len(view.size), channels, strides)
    field, part = view.field(kind)
    patch = [step * math.ceil(side / step) for side, step in zip(field, multiples, strict=True)]
    if patch == list(multiples):  # a single voxel at the lowest level cannot be normalised
        patch[-1] *= 2
    cap, limit = PATCH_VOXELS[kind, len(patch)], ""
    while spare := [axis for axis, step in enumerate(multiples) if patch[axis] > 2 * step]:
        if math.prod(patch) > cap:
            limit = f", its longest side shortened for at most {cap} voxels on a {kind.upper()}"
        elif step_bytes(network, tuple(patch), channels, 2, views, strides) > budget:
            limit = f", its longest side shortened for a step within {budget / 2**30:.1f} GiB"
        else:
            break
        longest = _longest(patch, view.wanted, multiples, spare)
        patch[longest] -= multiples[longest]
    what = f"The median prepared scan ({shown(view.size)})"
    if part:
        what = (
            f"Of {shown(view.size)} the largest structure and its surroundings, at least {NARROWEST} a side,"
        )
    return tuple(patch), f"{what} in multiples of {shown(multiples)}{limit}."


def decide_batch_size(
    kind: str,
    patch: tuple[int, ...],
    network: str,
    channels: tuple[int, ...],
    strides: Strides,
    budget: int,
    views: int,
) -> Reasoned[int]:
    """As many as a step's voxels allow, an even number, at least 2; 1 if 2 would not fit the budget (bytes)."""
    most = MOST_PATCHES[kind, len(patch)]
    voxels = STEP_VOXELS[kind, len(patch)]

    def fits(count: int) -> bool:
        return step_bytes(network, patch, channels, count, views, strides) <= budget

    if not fits(2):
        return 1, f"2 patches would not fit in {budget / 2**30:.1f} GiB."
    wanted = min(most, voxels // math.prod(patch)) // 2 * 2
    count = next((n for n in range(wanted, 2, -2) if fits(n)), 2)
    reason = f"Patches of {voxels} voxels together, at least 2 and at most {most}"
    return count, f"{reason}, as memory allows." if count < wanted else f"{reason}."


def decide_unlabelled_batch_size(facts: Fingerprint, batch: int) -> Reasoned[int]:
    """As many as clean ones, if there are any cases, or parts of labelled ones, to draw from."""
    if not facts.count(Role.UNLABELLED, Role.NOISY) and not facts.partly_known:
        return 0, "There is no unlabelled or noisy case."
    return batch, "As many as clean ones."


def decide_steps(kind: str, cases: int, patch: tuple[int, ...], batch: int) -> Reasoned[int]:
    """More for more cases, within bounds."""
    factor = min(1.5, max(0.75, (cases / 50) ** 0.25))
    steps = 100 * round(BASE_STEPS[kind] * factor / 100)
    reason = f"{BASE_STEPS[kind]} on a {kind.upper()} times {factor:.2f} for {cases} training cases"
    if kind == "cpu":
        minutes = steps * batch * math.prod(patch) * CORE_SECONDS[len(patch)] / 60
        reason += f"; about {max(1, round(minutes))} minutes of a core for supervised training"
    return steps, f"{reason}."
