"""From facts about the data to decisions, each with its reason in a sentence.

| Field | Rule |
|---|---|
| ndim | 2 if the scans are 2D, if slices lie more than 3.5 times as far apart as their pixels, or if there are fewer than 8 slices; else 3. |
| orientation | LPS; for a 2D network the array's first axis runs across the slices. |
| label_values, class_names | Background and the values that the data declares, else those in the clean labels. |
| spacing | Median over cases; the 10th percentile along an axis more than 3 times coarser than the others; across slices each case's own (0). |
| crop | If the box of non-background voxels saves more than 10 % in the median case. |
| normalisation, intensity | ct (clip to the 0.5th and 99.5th percentile under clean labels, then their mean and SD) if the intensities are Hounsfield units; else zscore per scan over its non-background voxels. |
| network, network_channels | unet, halved as long as the smallest side of the median scan keeps 4 voxels; at most 4 levels from 16 features on a CPU, 5 from 32 on a GPU; features double per level. |
| patch_size | The median prepared scan in multiples of what the network needs, its longest side shortened until a step fits the cap on voxels (CPU 64×64×48 or 256×256, GPU 128³ or 512×512) and half the memory. |
| batch_size, unlabelled_batch_size | 2 of each; 4 of tiny patches; 1 if 2 of the smallest sensible patch would not fit. No unlabelled ones without unlabelled or noisy cases. |
| steps | 2,000 on a CPU, 20,000 on a GPU, times the fourth root of (training cases / 50), kept within 0.75 to 1.5. |
| flip_axes | None for 3D scans: a flip exchanges left and right organs. All for 2D images, whose files know no left or right. |
"""  # noqa: E501 - a table has long rows

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, get_type_hints

import numpy as np
from pydantic import ConfigDict, Field, TypeAdapter

from mlbseg.data.fingerprint import CaseFacts, Fingerprint, Intensity, fingerprint
from mlbseg.data.records import read_record, validate, write_record
from mlbseg.errors import UserError, nearest
from mlbseg.nets import required_multiple
from mlbseg.types import Role

__all__ = ["CaseFacts", "Fingerprint", "Intensity", "Plan", "fingerprint", "make_plan"]

PositiveInt = Annotated[int, Field(gt=0)]
Spacing = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Finite = Annotated[float, Field(allow_inf_nan=False)]

THICK_SLICES = 3.5
FEW_SLICES = 8
COARSE_AXIS = 3.0
VOXEL_CAP = {("cpu", 2): 256 * 256, ("cpu", 3): 64 * 64 * 48, ("gpu", 2): 512 * 512, ("gpu", 3): 128**3}
BASE_FEATURES = {"cpu": 16, "gpu": 32}
MAX_LEVELS = {"cpu": 4, "gpu": 5}
BASE_STEPS = {"cpu": 2_000, "gpu": 20_000}
FIXED_CHANNELS = {"unet++": 5, "vnet": 5, "swin-unetr": 5}
"""Levels of the networks that have no choice."""
VIEWS = 5
"""Copies of each unlabelled patch that a bootstrapping step looks at."""
ACTIVATIONS = 12
"""Feature maps kept per level and feature for the backward pass. Rough: two residual units down, one up."""


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
        network: Name in `mlbseg.nets.NETWORKS`.
        network_channels: Features per level.
        batch_size: Clean patches per step.
        unlabelled_batch_size: Unlabelled and noisy patches per step.
        steps: Optimiser steps.
        flip_axes: Axes of a patch whose flip keeps anatomy valid.
        reasons: One sentence per field.
        orientation: Direction of a prepared 3D scan's (x, y, z) axes; reversed, that of the array's.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    ndim: Literal[2, 3]
    scan_ndim: Literal[2, 3]
    channels: PositiveInt
    label_values: tuple[Annotated[int, Field(ge=0)], ...]
    class_names: tuple[str, ...]
    spacing: tuple[Spacing, ...]
    patch_size: tuple[PositiveInt, ...]
    normalisation: tuple[Literal["zscore", "ct"], ...]
    intensity: tuple[dict[Literal["lower", "upper", "mean", "std"], Finite], ...]
    crop: bool
    network: str
    network_channels: tuple[PositiveInt, ...]
    batch_size: PositiveInt
    unlabelled_batch_size: Annotated[int, Field(ge=0)]
    steps: PositiveInt
    flip_axes: tuple[Annotated[int, Field(ge=0)], ...]
    reasons: dict[str, str] = field(default_factory=dict)
    orientation: str = "LPS"

    @property
    def num_classes(self) -> int:
        """Number of classes, background among them."""
        return len(self.label_values)

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
    overrides: Mapping[str, object] | None = None,
) -> Plan:
    """Decide everything, in an order in which each decision rests on those before it.

    Args:
        facts: What the training cases have in common.
        class_names: Name of each label value, if the data declares them; other values are then unexpected.
        memory_bytes: Memory of the device; a step plans with half of it.
        device: ``cpu``, or anything else for an accelerator.
        overrides: Fields set by the user; None leaves the decision to the rule, a scalar counts for every
            axis or channel.

    Raises:
        UserError: An override is no field, not of its type or at odds with another; or nothing is labelled.
    """
    kind = "cpu" if device == "cpu" else "gpu"
    desk = _Desk(facts, overrides or {})
    desk.take("ndim", *_ndim(facts))
    if desk["ndim"] > facts.scan_ndim:
        raise UserError(f"plan.ndim: found 3, expected 2: the scans have {facts.scan_ndim} dimensions")
    desk.take("orientation", *_orientation(facts, desk["ndim"]))
    if "label_values" not in desk.overrides:
        desk.take("label_values", *_label_values(facts, class_names or {}))
    else:
        desk.take("label_values", (), "")
    names = {0: "background", **(class_names or {})}
    desk.take(
        "class_names",
        tuple(names.get(v, f"label {v}") for v in desk["label_values"]),
        "As the data names them." if class_names else "The data names no classes: called by their value.",
    )
    axes = _axes(facts.scan_ndim, desk["orientation"])
    desk.take("spacing", *_spacing(facts.spacings[:, axes], desk["ndim"]))
    desk.take("crop", *_crop(facts))
    desk.take("normalisation", *_normalisation(facts))
    desk.take("intensity", *_intensity(facts, desk["normalisation"]))
    sizes = (facts.box_sizes if desk["crop"] else facts.sizes)[:, axes]
    median = _prepared_size(sizes, facts.spacings[:, axes], desk["spacing"])[-desk["ndim"] :]
    desk.take("network", "unet", "A residual U-Net: the fastest of the networks, and good on few labels.")
    desk.take("network_channels", *_network_channels(kind, desk["network"], median))
    multiple = required_multiple(desk["network"], desk["network_channels"])
    budget = memory_bytes // 2
    pool = facts.count(Role.UNLABELLED, Role.NOISY)
    desk.take("patch_size", *_patch_size(kind, median, multiple, desk["network_channels"], budget))
    desk.take("batch_size", *_batch_size(kind, desk["patch_size"], desk["network_channels"], budget))
    if pool:
        desk.take("unlabelled_batch_size", desk["batch_size"], "As many as clean ones.")
    else:
        desk.take("unlabelled_batch_size", 0, "There is no unlabelled or noisy case.")
    desk.take("steps", *_steps(kind, len(facts.cases)))
    desk.take("flip_axes", *_flip_axes(facts))
    plan = Plan(**desk.values, reasons=desk.reasons)
    _check(plan, "plan")
    return plan


class _Desk:
    """Collects decisions; a field that the user set is taken as set."""

    def __init__(self, facts: Fingerprint, overrides: Mapping[str, object]) -> None:
        self.overrides = {name: value for name, value in overrides.items() if value is not None}
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

    def __getitem__(self, name: str) -> Any:
        return self.values[name]

    def take(self, name: str, value: object, reason: str) -> None:
        """Note the rule's `value` for a field, or the user's if there is one."""
        if name in self.overrides:
            kind = TypeAdapter(get_type_hints(Plan, include_extras=True)[name])
            value = validate(kind, self._broadcast(name, self.overrides[name]), f"plan.{name}")
            reason = "Set by the user."
        self.values[name], self.reasons[name] = value, reason

    def _broadcast(self, name: str, value: object) -> object:
        lengths = {
            "spacing": "scan_ndim",
            "patch_size": "ndim",
            "normalisation": "channels",
            "intensity": "channels",
        }
        if isinstance(value, int | float | str | Mapping):
            if name in lengths:
                return (value,) * self.values[lengths[name]]
            if name == "flip_axes":
                return (value,)
        return value


def _ndim(facts: Fingerprint) -> tuple[int, str]:
    if facts.scan_ndim == 2:
        return 2, "The scans are 2D."
    spacing, size = facts.median_spacing, facts.median_size
    ratio = sorted(spacing)[-1] / sorted(spacing)[-2]
    if ratio > THICK_SLICES:
        return 2, f"Slices lie {ratio:.1f} times as far apart as their pixels (more than {THICK_SLICES})."
    if min(size) < FEW_SLICES:
        return 2, f"The median scan has only {min(size):g} slices (fewer than {FEW_SLICES})."
    return 3, f"The coarsest axis has {ratio:.1f} times the spacing of the next (at most {THICK_SLICES})."


def _orientation(facts: Fingerprint, ndim: int) -> tuple[str, str]:
    if facts.scan_ndim == 2:
        return "LPS", "2D scans are left as they lie."
    spacing, size = facts.median_spacing, facts.median_size
    ratio = sorted(spacing)[-1] / sorted(spacing)[-2]
    across = int(np.argmax(spacing)) if ratio > THICK_SLICES else int(np.argmin(size))
    thick = ratio > THICK_SLICES or min(size) < FEW_SLICES
    if ndim == 3 or not thick or across == 0:
        return "LPS", "Axes run to the patient's left, posterior and superior."
    return {1: "LSP", 2: "PSL"}[across], "The array's first axis runs across the slices, for a 2D network."


def _axes(ndim: int, orientation: str) -> list[int]:
    """Return which of the LPS array axes (z, y, x) each axis of the prepared array is."""
    if ndim == 2:
        return [0, 1]
    order = {"S": 0, "I": 0, "P": 1, "A": 1, "L": 2, "R": 2}
    return [order.get(letter, 0) for letter in reversed(orientation)]


def _label_values(facts: Fingerprint, class_names: Mapping[int, str]) -> tuple[tuple[int, ...], str]:
    if class_names:
        return tuple(sorted({0, *class_names})), "Background and the values that the data declares."
    found = facts.label_values()
    if not set(found) - {0}:
        raise UserError(
            "no case has a label with anything in it, expected at least one clean case (add labels)"
        )
    return tuple(sorted({0, *found})), "Background and the values in the labels."


def _spacing(spacings: np.ndarray, ndim: int) -> tuple[tuple[float, ...], str]:
    """Decide from (cases, axes) in the prepared order."""
    target = np.median(spacings, axis=0)
    reason = f"Median of {len(spacings)} cases"
    if spacings.shape[1] == 3 and ndim == 2:
        target[0] = 0.0
        reason += "; 0: across slices each scan keeps its own"
    elif spacings.shape[1] == 3 and np.sort(target)[-1] > COARSE_AXIS * np.sort(target)[-2]:
        axis = int(target.argmax())
        target[axis] = np.percentile(spacings[:, axis], 10)
        reason += f"; the 10th percentile along axis {axis}, more than {COARSE_AXIS:g} times coarser"
    return tuple(round(float(v), 6) for v in target), reason + "."


def _crop(facts: Fingerprint) -> tuple[bool, str]:
    saved = 1 - float(np.median(np.prod(facts.box_sizes / facts.sizes, axis=1)))
    return saved > 0.1, f"The non-background box saves {saved:.0%} of the median scan."


def _normalisation(facts: Fingerprint) -> tuple[tuple[str, ...], str]:
    kinds = []
    for channel in range(facts.channels):
        lowest = float(np.median([case.minimum[channel] for case in facts.cases]))
        whole = all(case.integers[channel] for case in facts.cases)
        kinds.append("ct" if whole and -3100 <= lowest <= -500 else "zscore")
    if "ct" in kinds:
        return tuple(
            kinds
        ), "Whole numbers that reach down to air: Hounsfield units, comparable between scans."
    return tuple(kinds), "Intensities are in no common unit: each scan is brought to mean 0 and SD 1."


def _intensity(
    facts: Fingerprint, normalisation: tuple[str, ...]
) -> tuple[tuple[dict[str, float], ...], str]:
    if "ct" not in normalisation:
        return (), "z-scores need none."
    result: list[dict[str, float]] = []
    for channel, kind in enumerate(normalisation):
        if kind != "ct":
            result.append({})
            continue
        known = [case.foreground[channel] for case in facts.cases if case.foreground]
        known = known or [case.content[channel] for case in facts.cases]
        parts = [part for part in known if part is not None]
        if not parts:
            raise UserError(
                f"plan.normalisation: channel {channel} is constant in every scan, expected an image"
            )
        mean = float(np.mean([part.mean for part in parts]))
        # Within and between scans: the variance of all voxels, each scan counting the same.
        variance = np.mean([part.std**2 + (part.mean - mean) ** 2 for part in parts])
        result.append(
            {
                "lower": float(np.median([part.low for part in parts])),
                "upper": float(np.median([part.high for part in parts])),
                "mean": mean,
                "std": float(max(math.sqrt(variance), 1e-6)),
            }
        )
    return tuple(result), "Percentiles 0.5 and 99.5, mean and SD under the clean labels."


def _prepared_size(sizes: np.ndarray, spacings: np.ndarray, target: tuple[float, ...]) -> tuple[int, ...]:
    wanted = np.where(np.asarray(target) == 0, spacings, target)
    return tuple(max(1, math.ceil(v)) for v in np.median(sizes * spacings / wanted, axis=0) - 1e-6)


def _network_channels(kind: str, network: str, median: tuple[int, ...]) -> tuple[tuple[int, ...], str]:
    base = 24 if network == "swin-unetr" else BASE_FEATURES[kind]
    if network in FIXED_CHANNELS:
        levels, why = FIXED_CHANNELS[network], f"{network} always has {FIXED_CHANNELS[network]} levels"
    else:
        halvings = int(math.log2(max(1, min(median)) / 4)) if min(median) >= 8 else 0
        levels = min(MAX_LEVELS[kind], max(3, halvings + 1))
        why = f"{levels} levels suit the median scan's smallest side of {min(median)} voxels"
    return tuple(base * 2**level for level in range(levels)), f"{why}; {base} features at the first."


def step_bytes(patch: tuple[int, ...], channels: tuple[int, ...], batch: int) -> int:
    """Estimate the memory of one training step, bytes. Rough: right within a factor of two.

    Args:
        patch: Voxels along each axis.
        channels: Features per level, each level half as fine as the one before.
        batch: Clean patches, and as many unlabelled ones in `VIEWS` views.
    """
    features = sum(width / 2 ** (len(patch) * level) for level, width in enumerate(channels))
    return int(math.prod(patch) * features * ACTIVATIONS * 4 * batch * (1 + VIEWS))


def _patch_size(
    kind: str, median: tuple[int, ...], multiple: int, channels: tuple[int, ...], budget: int
) -> tuple[tuple[int, ...], str]:
    patch = [multiple * math.ceil(side / multiple) for side in median]
    if max(patch) == multiple:  # a single voxel at the lowest level cannot be normalised
        patch[-1] = 2 * multiple
    whole = math.prod(patch)
    cap = VOXEL_CAP[kind, len(patch)]
    reason = f"The median prepared scan ({'×'.join(map(str, median))}) in multiples of {multiple}"
    while max(patch) > 2 * multiple:
        if math.prod(patch) > cap:
            limit = f"at most {cap} voxels on a {kind.upper()}"
        elif step_bytes(tuple(patch), channels, 2) > budget:
            limit = f"a step within {budget / 2**30:.1f} GiB"
        else:
            break
        patch[int(np.argmax(patch))] -= multiple
    if math.prod(patch) < whole:
        reason += f", its longest side shortened for {limit}"
    return tuple(patch), reason + "."


def _batch_size(kind: str, patch: tuple[int, ...], channels: tuple[int, ...], budget: int) -> tuple[int, str]:
    if step_bytes(patch, channels, 2) > budget:
        return 1, f"2 patches would not fit in {budget / 2**30:.1f} GiB."
    if math.prod(patch) <= VOXEL_CAP[kind, 3] // 4 and step_bytes(patch, channels, 4) <= budget:
        return 4, "4 of such small patches fit easily."
    return 2, "2, as is common with patches of this size."


def _steps(kind: str, cases: int) -> tuple[int, str]:
    factor = min(1.5, max(0.75, (cases / 50) ** 0.25))
    steps = round(BASE_STEPS[kind] * factor, -2)
    return int(
        steps
    ), f"{BASE_STEPS[kind]} on a {kind.upper()} times {factor:.2f} for {cases} training cases."


def _flip_axes(facts: Fingerprint) -> tuple[tuple[int, ...], str]:
    if facts.scan_ndim == 2:
        return (0, 1), "2D images carry no left or right; set [] if yours have a fixed pose."
    return (), "A flip would exchange left and right organs; set axes if yours are symmetric."


def _check(plan: Plan, where: str) -> None:
    """Raise UserError if the fields of a plan contradict each other."""
    try:
        multiple = required_multiple(plan.network, plan.network_channels)
    except UserError as error:
        raise UserError(f"{where}.network: {error}") from error
    pairs = {frozenset("LR"), frozenset("PA"), frozenset("SI")}
    letters = [next((p for p in pairs if c in p), None) for c in plan.orientation]
    rules: list[tuple[bool, str, object, str]] = [
        (plan.ndim <= plan.scan_ndim, "ndim", plan.ndim, f"at most {plan.scan_ndim}"),
        (len(plan.spacing) == plan.scan_ndim, "spacing", plan.spacing, f"{plan.scan_ndim} numbers"),
        (len(plan.patch_size) == plan.ndim, "patch_size", plan.patch_size, f"{plan.ndim} numbers"),
        (
            all(side % multiple == 0 for side in plan.patch_size),
            "patch_size",
            plan.patch_size,
            f"multiples of {multiple} for {plan.network} with {len(plan.network_channels)} levels, such as "
            f"{tuple(multiple * math.ceil(side / multiple) for side in plan.patch_size)}",
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
                not i or (i.get("std", 1) > 0 and i.get("lower", 0) <= i.get("upper", 0))
                for i in plan.intensity
            ),
            "intensity",
            plan.intensity,
            "lower at most upper, std above 0",
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
        (
            len(letters) == 3 and set(letters) == pairs,
            "orientation",
            plan.orientation,
            "one letter of each of L/R, P/A, S/I, such as LPS",
        ),
    ]
    for holds, name, found, expected in rules:
        if not holds:
            raise UserError(f"{where}.{name}: found {found}, expected {expected}")
