"""From facts about the data to decisions, each with its reason in a sentence.

| Field | Rule |
|---|---|
| ndim | 2 if the scans are 2D, if slices lie more than 3.5 times as far apart as their pixels, or if there are fewer than 8 slices; else 3. |
| orientation | LPS; for a 2D network the array's first axis runs across the slices. |
| label_values, class_names | Background and the values that the data declares, else those in the clean labels. |
| spacing | Median over cases; the 10th percentile along an axis more than 3 times coarser than the others; across slices each case's own (0). Finer axes become coarser where a patch at this spacing holds neither a whole scan nor 1.5 times the largest structure: until it holds a whole scan, or, if that takes voxels twice as coarse as the structure does, the structure; and only as far as every structure of the clean labels, brought to this spacing and back, keeps a mean Dice of 0.975. |
| crop | If the box of non-background voxels saves more than 10 % in the median case. |
| normalisation, intensity | ct (clip to the 0.5th and 99.5th percentile under clean labels, then their mean and SD) if the intensities are Hounsfield units; else zscore per scan over its non-background voxels. |
| network, network_strides, network_channels, network_options | unet; each axis is halved until 4 to 8 voxels are left at the deepest level, an axis twice as coarse as another later; features double per level, from 16 to at most 256 on a CPU, from 32 to at most 512 on a GPU. No options. With weights to start from: the network that they are of. |
| patch_size | The median prepared scan; for a 2D network on a CPU 1.5 times the largest structure, at least 96 pixels a side, if that is less than 40 % of a slice or image. In multiples of what the network needs, its longest side (one longer than the largest structure and its surroundings first) shortened until a step fits the cap on voxels (CPU 64×64×48 or 224×256, GPU 128³ or 512×512) and half the memory. |
| batch_size, unlabelled_batch_size | As many patches, an even number, as a step may hold voxels (CPU 64×64×48 or 4×224×256, GPU 128³ or 12×512×512) and memory allows; at least 2, at most 4 in 3D, in 2D 20 on a CPU and 32 on a GPU; 1 if 2 of the smallest sensible patch would not fit. No unlabelled ones without unlabelled or noisy cases. |
| steps | 2,000 on a CPU, 20,000 on a GPU, times the fourth root of (training cases / 50), kept within 0.75 to 1.5. |
| largest_component | The values of which the largest connected component holds 95 % or more in each clean label (3 or more): masks keep it alone. |
| flip_axes | None for 3D scans: a flip exchanges left and right organs. For 2D images, whose files know no left or right, all but those along which a structure of the clean labels (3 or more) lies off the middle, or behind another structure, by more than 2 standard deviations. |
"""  # noqa: E501 - a table has long rows

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar, get_type_hints

from pydantic import AfterValidator, ConfigDict, Field, TypeAdapter

from mlbseg.data import budget as limits
from mlbseg.data import rules
from mlbseg.data.facts import Intensity
from mlbseg.data.fingerprint import CaseFacts, Fingerprint, fingerprint
from mlbseg.data.geometry import shown
from mlbseg.data.lattice import is_orientation
from mlbseg.data.records import read_record, validate, write_record
from mlbseg.errors import UserError, nearest
from mlbseg.networks import count_weights, side_multiples

__all__ = ["CaseFacts", "Fingerprint", "Intensity", "Plan", "fingerprint", "make_plan"]

T = TypeVar("T")


def _axis_code(code: str) -> str:
    if not is_orientation(code):
        raise ValueError("expected one letter of each of L/R, P/A, S/I, such as LPS")
    return code


def _spacing(value: float) -> float:
    if 0 < value < 1e-9:
        raise ValueError("expected 0, which keeps each scan's own, or 1e-09 or more")
    return value


# The bounds are far beyond any use: nothing above them can be computed, or ends.
PositiveInt = Annotated[int, Field(gt=0, le=65_536)]
Side = Annotated[int, Field(gt=0, le=4096)]
Spacing = Annotated[float, Field(ge=0, le=1e4, allow_inf_nan=False), AfterValidator(_spacing)]
Finite = Annotated[float, Field(ge=-1e12, le=1e12, allow_inf_nan=False)]
Name = Annotated[str, Field(max_length=1000)]
Options = tuple[Side | tuple[Side, ...], ...]

ARCHITECTURE = ("ndim", "network", "network_channels", "network_strides", "network_options")
"""Fields that say what the network is."""


@dataclass(frozen=True)
class Plan:
    """Every decision about preparing scans and training on them. Axes are in array order ([z,] y, x).

    Attributes:
        ndim: Dimension of the network, 2 or 3.
        scan_ndim: Dimension of the scans. With 3D scans a 2D network sees the slices along the first axis.
        channels: Channels of a scan.
        label_values: The value in a label file of each class; the first is the background, 0.
        class_names: A name for each class.
        spacing: mm along each of `scan_ndim` axes; 0 keeps each scan's own along that axis.
        patch_size: Voxels along each of `ndim` axes.
        normalisation: ``zscore`` or ``ct``, per channel.
        intensity: Per channel lower, upper, mean and std for ``ct``, else empty.
        crop: Whether scans are cropped to their non-background box.
        network: Name in `mlbseg.networks.NETWORKS`.
        network_channels: Features per level.
        network_strides: By how much each axis is divided between each two levels, 1 or 2; empty for 2 along every axis.
        batch_size: Clean patches per step.
        unlabelled_batch_size: Unlabelled and noisy patches per step.
        steps: Optimiser steps.
        flip_axes: Axes of a patch whose flip keeps anatomy valid.
        largest_component: Label values of which a predicted mask keeps the largest connected component alone.
        reasons: One sentence per field.
        orientation: Direction of a prepared 3D scan's (x, y, z) axes; reversed, that of the array's.
        network_options: What this network alone is told, such as the blocks of each level; see `Builder.options`.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    ndim: Literal[2, 3]
    scan_ndim: Literal[2, 3]
    channels: PositiveInt
    label_values: tuple[Annotated[int, Field(ge=0, lt=2**31)], ...]
    class_names: tuple[Name, ...]
    spacing: tuple[Spacing, ...]
    patch_size: tuple[Side, ...]
    normalisation: tuple[Literal["zscore", "ct"], ...]
    intensity: tuple[dict[Literal["lower", "upper", "mean", "std"], Finite], ...]
    crop: bool
    network: Name
    network_channels: Annotated[tuple[Side, ...], Field(min_length=1, max_length=10)]
    batch_size: Side
    unlabelled_batch_size: Annotated[int, Field(ge=0, le=4096)]
    steps: Annotated[int, Field(gt=0, le=1_000_000_000)]
    flip_axes: tuple[Annotated[int, Field(ge=0)], ...]
    reasons: dict[Name, str] = field(default_factory=dict)
    orientation: Annotated[str, AfterValidator(_axis_code)] = "LPS"
    network_strides: tuple[tuple[Literal[1, 2], ...], ...] = ()
    largest_component: tuple[int, ...] = ()
    network_options: dict[Name, Options] = field(default_factory=dict)

    @property
    def num_classes(self) -> int:
        """Number of classes, background among them."""
        return len(self.label_values)

    def count_weights(self) -> int:
        """Return how many weights its network has, without building it; see `mlbseg.networks.count_weights`.

        Raises:
            UserError: The network cannot be built.
        """
        return count_weights(
            self.network,
            ndim=self.ndim,
            in_channels=self.channels,
            num_classes=self.num_classes,
            channels=self.network_channels,
            options=self.network_options,
        )

    @property
    def structures(self) -> dict[int, str]:
        """Name of each class's value, background left out."""
        return {v: name for v, name in zip(self.label_values, self.class_names, strict=True) if v}

    def as_dict(self) -> dict[str, Any]:
        """Return the fields, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, record: Mapping[str, object], where: str = "plan") -> Plan:
        """Rebuild a plan from `as_dict`.

        Raises:
            UserError: A field is missing, unknown, or not what it should be.
        """
        plan = validate(TypeAdapter(cls), dict(record), where)
        _check(plan, where)
        return plan

    def write(self, path: Path) -> None:
        """Write the plan as JSON, whole or not at all."""
        write_record(path, self.as_dict())

    @classmethod
    def read(cls, path: Path) -> Plan:
        """Read a plan that `write` wrote, or a user edited.

        Raises:
            UserError: The file is not a plan; the message says which field and why.
        """
        return cls.from_dict(read_record(path, "a plan written by mlbseg"), str(path))


def make_plan(
    facts: Fingerprint,
    *,
    class_names: Mapping[int, str] | None = None,
    memory_bytes: int,
    device: str = "cpu",
    views: int = limits.VIEWS,
    overrides: Mapping[str, object] | None = None,
    proposed: Mapping[str, object] | None = None,
    proposer: str = "",
) -> Plan:
    """Decide everything, in an order in which each decision rests on those before it.

    Args:
        facts: What the training cases have in common.
        class_names: Name of each label value, if the data declares them; other values are then unexpected.
        memory_bytes: Memory of the device; a step plans with half of it.
        device: ``cpu``, or anything else for an accelerator.
        views: Views of each unlabelled patch that a step looks at, the patch itself among them; 0 if the method
            uses none.
        overrides: Fields set by the user; None leaves the decision to the rule, a scalar counts for every
            axis or channel.
        proposed: Fields that come with the weights to start from; what the user sets goes before them.
        proposer: Where these come from, for the reasons.

    Raises:
        UserError: An override is no field, not of its type or at odds with another; or nothing is labelled.
    """
    kind = "cpu" if device == "cpu" else "gpu"
    desk = _Desk(facts, overrides or {}, proposed or {}, proposer)
    decide = desk.decide
    ndim = decide("ndim", rules.decide_ndim, facts)
    desk.require_same_ndim()
    if ndim > facts.scan_ndim:
        raise UserError(f"plan.ndim: found 3, expected 2 as the scans have {facts.scan_ndim} dimensions")
    axes = rules.array_axes(decide("orientation", rules.decide_orientation, facts, ndim), facts.scan_ndim)
    values = decide("label_values", rules.decide_label_values, facts, class_names or {})
    decide("class_names", rules.decide_class_names, values, class_names or {})

    spacings = facts.spacings[:, axes]
    sizes = (facts.box_sizes if decide("crop", rules.decide_crop, facts) else facts.sizes)[:, axes]
    spacing = decide("spacing", limits.decide_spacing, kind, facts, axes, sizes, spacings, ndim)
    if "spacing" in desk.overrides:
        rules.require_holdable(sizes, spacings, spacing, facts.channels, memory_bytes)
    decide(
        "intensity", rules.decide_intensity, facts, decide("normalisation", rules.decide_normalisation, facts)
    )
    _decide_training(
        desk,
        kind,
        facts,
        limits.View.of(facts, axes, sizes, spacings, spacing, ndim),
        memory_bytes // 2,
        views,
    )
    decide("flip_axes", rules.decide_flip_axes, facts)
    decide("largest_component", rules.decide_largest_component, facts, values)
    plan = Plan(**desk.values, reasons=desk.reasons)
    _check(plan, "plan")
    if desk.overrides.keys() & {"network_channels", "patch_size", "batch_size"}:
        net = (plan.network, plan.patch_size, plan.network_channels, plan.network_strides)
        limits.require_trainable(plan.count_weights(), *net, plan.batch_size, memory_bytes)
    return plan


def _decide_training(
    desk: _Desk, kind: str, facts: Fingerprint, view: limits.View, budget: int, views: int
) -> None:
    """Decide the network, and what it is trained on; `budget` is the memory of a step in bytes."""
    decide = desk.decide
    network = decide("network", limits.decide_network)
    given = desk.given("patch_size")
    fixed = desk.given("network_channels") is not None
    strides = decide("network_strides", limits.decide_strides, kind, network, view, given, fixed)
    channels = decide("network_channels", limits.decide_network_channels, kind, network, strides)
    decide("network_options", limits.decide_network_options)
    net = (network, channels, strides)
    patch = decide("patch_size", limits.decide_patch_size, kind, view, *net, budget, views)
    batch = decide("batch_size", limits.decide_batch_size, kind, patch, *net, budget, views)
    decide("unlabelled_batch_size", limits.decide_unlabelled_batch_size, facts, batch)
    decide("steps", limits.decide_steps, kind, len(facts.cases), patch, batch)


_ONE_FOR_EACH = {
    "spacing": "scan_ndim",
    "patch_size": "ndim",
    "normalisation": "channels",
    "intensity": "channels",
}
"""Fields with one value for each axis or channel, by the field that says how many."""


class _Desk:
    """Collects decisions; a field that the user set is taken as set."""

    def __init__(
        self,
        facts: Fingerprint,
        overrides: Mapping[str, object],
        proposed: Mapping[str, object],
        proposer: str,
    ) -> None:
        self.overrides = {name: value for name, value in overrides.items() if value is not None}
        # What belongs together is not mixed of both: the shape of a network, the way of normalising.
        mixed = {
            name
            for group in (ARCHITECTURE[1:], ("normalisation", "intensity"))
            if self.overrides.keys() & set(group)
            for name in group
        }
        self.proposed = {
            name: value for name, value in proposed.items() if name not in {*mixed, *self.overrides}
        }
        self.proposer = proposer
        self.values: dict[str, Any] = {"scan_ndim": facts.scan_ndim, "channels": facts.channels}
        self.reasons = {
            "scan_ndim": f"The scans have {facts.scan_ndim} dimensions.",
            "channels": f"Each scan has {facts.channels} channel(s).",
        }
        decided = {f.name for f in fields(Plan)} - {"scan_ndim", "channels", "reasons"}
        for name in self.overrides:
            if name in self.values:
                raise UserError(f"plan.{name}: is a fact of the data, not a choice (remove it)")
            if name not in decided:
                raise UserError(f"plan.{name}: no such field, {nearest(name, decided)}")

    def decide(self, name: str, rule: Callable[..., tuple[T, str]], *facts: object) -> T:
        """Note and return a field's value: the user's if there is one, else the rule's."""
        value: T | None = self.given(name)
        reason = "Set by the user."
        if value is None or (name == "ndim" and name not in self.overrides):
            value, reason = rule(*facts)
        elif name not in self.overrides:
            reason = f"As {self.proposer} has it, which the weights to start from come with."
        self.values[name], self.reasons[name] = value, reason
        return value

    def given(self, name: str) -> Any:
        """Return the value of a field that the user sets, or that is proposed; None if there is none.

        Raises:
            UserError: It is not of the field's type.
        """
        for origin in (self.overrides, self.proposed):
            if name in origin:
                kind = TypeAdapter(get_type_hints(Plan, include_extras=True)[name])
                where = f"plan.{name}" if origin is self.overrides else f"{self.proposer}: {name}"
                return validate(kind, self._broadcast(name, origin[name]), where)
        return None

    def require_same_ndim(self) -> None:
        """Refuse a network of other dimensions than those of the weights to start from.

        Raises:
            UserError: saying which both are.
        """
        ndim, theirs = self.values["ndim"], self.proposed.get("ndim")
        if "network" in self.proposed and theirs is not None and theirs != ndim:
            raise UserError(
                f"{self.proposer}: weights of a {theirs}D network, expected those of a {ndim}D one: "
                f"{self.reasons['ndim']} (choose other weights, or -o plan.ndim={theirs})"
            )

    def _broadcast(self, name: str, value: object) -> object:
        """Repeat a scalar for every axis or channel; refuse a sequence of another length."""
        if name in ("flip_axes", "largest_component") and isinstance(value, int | str):
            return (value,)
        if name not in _ONE_FOR_EACH:
            return value
        count = self.values[_ONE_FOR_EACH[name]]
        if isinstance(value, int | float | str | Mapping):
            return (value,) * count
        if isinstance(value, Sequence) and len(value) != count:
            raise UserError(f"plan.{name}: found {len(value)} values, expected one or {count}")
        return value


def _check(plan: Plan, where: str) -> None:
    """Raise UserError if the fields of a plan contradict each other."""
    try:
        multiples = side_multiples(plan.network, plan.ndim, plan.network_channels, plan.network_strides)
    except UserError as error:
        raise UserError(f"{where}.network: {error}") from error
    demands: list[tuple[bool, str, object, str]] = [
        (plan.ndim <= plan.scan_ndim, "ndim", plan.ndim, f"at most {plan.scan_ndim}"),
        (len(plan.spacing) == plan.scan_ndim, "spacing", plan.spacing, f"{plan.scan_ndim} numbers"),
        (len(plan.patch_size) == plan.ndim, "patch_size", plan.patch_size, f"{plan.ndim} numbers"),
        (
            all(side % step == 0 for side, step in zip(plan.patch_size, multiples, strict=False)),
            "patch_size",
            plan.patch_size,
            f"multiples of {multiples[0] if len(set(multiples)) == 1 else shown(multiples)} for {plan.network} with "
            f"{len(plan.network_channels)} levels, such as "
            f"{tuple(step * math.ceil(side / step) for side, step in zip(plan.patch_size, multiples, strict=False))}",
        ),
        (
            len(plan.normalisation) == plan.channels,
            "normalisation",
            plan.normalisation,
            f"{plan.channels} names",
        ),
        (
            all(
                kind == "zscore" or (len(plan.intensity) == plan.channels and len(plan.intensity[i]) == 4)
                for i, kind in enumerate(plan.normalisation)
            ),
            "intensity",
            plan.intensity,
            "lower, upper, mean and std for each ct channel",
        ),
        (
            all(
                not i or (i.get("std", 1) >= 1e-6 and i.get("lower", 0) <= i.get("upper", 0))
                for i in plan.intensity
            ),
            "intensity",
            plan.intensity,
            "lower at most upper, std 1e-06 or more",
        ),
        (
            set(plan.largest_component) <= set(plan.label_values) - {0},
            "largest_component",
            plan.largest_component,
            "values of structures, not of the background",
        ),
        (
            set(plan.flip_axes) <= set(range(plan.ndim)),
            "flip_axes",
            plan.flip_axes,
            f"axes below {plan.ndim}",
        ),
        (
            1 < len(plan.label_values) <= 256
            and plan.label_values[0] == 0
            and len(set(plan.label_values)) == len(plan.label_values),
            "label_values",
            plan.label_values,
            "0 first, then at least one and at most 255 other values, each once",
        ),
        (
            len(plan.class_names) == len(plan.label_values),
            "class_names",
            plan.class_names,
            f"{len(plan.label_values)} names, one for each of the label values",
        ),
    ]
    for holds, name, found, expected in demands:
        if not holds:
            raise UserError(f"{where}.{name}: found {found}, expected {expected}")
