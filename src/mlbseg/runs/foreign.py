"""What nnU-Net's plans and MONAI's bundles say of their networks, in the words of our plan."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

NETWORKS = {
    "PlainConvUNet": ("nnunet", "n_conv_per_stage"),
    "ResidualEncoderUNet": ("resenc", "n_blocks_per_stage"),
}
"""Classes of dynamic-network-architectures, and what their blocks are called in a plan."""
NNSSL = {
    "ResEncL": {
        "features_per_stage": [32, 64, 128, 256, 320, 320],
        "strides": [[1, 1, 1], *[[2, 2, 2]] * 5],
        "kernel_sizes": [[3, 3, 3]] * 6,
        "n_blocks_per_stage": [1, 3, 4, 6, 6, 6],
        "n_conv_per_stage_decoder": [1] * 5,
    }
}
"""Networks that nnssl's checkpoints name without describing them (Wald et al. 2024)."""
_LETTERS = "SPL"
"""Where the axes of an array, as SimpleITK gives it, point to."""


@dataclass(frozen=True)
class Proposal:
    """What weights from elsewhere propose for the plan; what the user sets goes before it.

    Attributes:
        fields: Values of plan fields, of the network and of whatever does not depend on the scans.
        what: Where they come from, in words.
        notes: What the user should know of them.
        class_names: Of the classes of their head; None if unknown.
        spacing: mm along each axis of the network, array order; empty if unknown.
        orientation: Letters of the array's axes; empty if unknown.
        schemes: ``ct`` or ``zscore`` for each of their channels; empty if unknown.
        intensity: Lower, upper, mean and std of each of their ct channels, {} for others.
    """

    fields: Mapping[str, Any] = field(default_factory=dict)
    what: str = "the starting weights"
    notes: tuple[str, ...] = ()
    class_names: tuple[str, ...] | None = None
    spacing: tuple[float, ...] = ()
    orientation: str = ""
    schemes: tuple[str, ...] = ()
    intensity: tuple[dict[str, float], ...] = ()

    def of(self, scan_ndim: int, channels: int) -> dict[str, Any]:
        """Return the plan fields for scans of so many axes and channels."""
        fields = dict(self.fields)
        if self.spacing and len(self.spacing) <= scan_ndim:
            # Across slices a 2D network knows no spacing.
            fields["spacing"] = (0.0,) * (scan_ndim - len(self.spacing)) + self.spacing
        if self.orientation and scan_ndim == 3:
            fields["orientation"] = self.orientation
        if self.schemes and (len(set(self.schemes)) == 1 or len(self.schemes) == channels):
            order = [channel % len(self.schemes) for channel in range(channels)]
            fields["normalisation"] = tuple(self.schemes[i] for i in order)
            if "ct" in self.schemes:
                fields["intensity"] = tuple(self.intensity[i] for i in order)
        return fields


def nnunet_proposal(content: Any) -> Proposal | None:
    """Return what a checkpoint of nnU-Net v2 or nnssl proposes; None of any other file.

    Args:
        content: Of the file.
    """
    if not isinstance(content, Mapping) or "network_weights" not in content:
        return None
    plan = content.get("nnssl_adaptation_plan")
    if isinstance(plan, Mapping):
        return _of_nnssl(plan)
    arguments = content.get("init_args")
    plans = arguments.get("plans") if isinstance(arguments, Mapping) else None
    if not isinstance(plans, Mapping) or not isinstance(arguments, Mapping):
        return None
    name = arguments.get("configuration")
    configuration = _configuration(plans, name)
    what = f"nnU-Net's plan {plans.get('plans_name')}, {name}"
    architecture = configuration.get("architecture")
    if isinstance(architecture, Mapping):
        kind, settings = str(architecture.get("network_class_name", "")), architecture.get("arch_kwargs", {})
    else:
        kind, settings = _legacy(configuration)
    proposal = _network(kind, settings, what)
    return _prepared(proposal, plans, configuration, arguments.get("dataset_json"))


def _of_nnssl(plan: Mapping[str, Any]) -> Proposal:
    architecture = plan.get("architecture_plans") or {}
    name = str(architecture.get("arch_class_name") or plan.get("architecture_name") or "")
    settings = architecture.get("arch_kwargs") or NNSSL.get(name) or {}
    kind = "ResidualEncoderUNet" if name in NNSSL else name
    note = "nnssl trained them on scans that were normalised by z-score; look at its page for their spacing"
    proposal = _network(kind, settings, f"nnssl's {name}")
    return replace(proposal, notes=(*proposal.notes, note))


def _configuration(plans: Mapping[str, Any], name: Any) -> dict[str, Any]:
    """Return a configuration of nnU-Net's plans with what it inherits."""
    found: dict[str, Any] = {}
    every = plans.get("configurations")
    for _ in range(8):
        own = every.get(name) if isinstance(every, Mapping) else None
        if not isinstance(own, Mapping):
            break
        found = {**own, **found}
        if (name := own.get("inherits_from")) is None:
            break
    return found


def _legacy(configuration: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Return class and arguments as nnU-Net wrote them before version 2.4."""
    kind = str(configuration.get("UNet_class_name", ""))
    strides = configuration.get("pool_op_kernel_sizes") or []
    base, most = (
        configuration.get("UNet_base_num_features", 32),
        configuration.get("unet_max_num_features", 320),
    )
    blocks = NETWORKS.get(kind, ("", "blocks"))[1]
    return kind, {
        "features_per_stage": [min(most, base * 2**stage) for stage in range(len(strides))],
        "strides": strides,
        "kernel_sizes": configuration.get("conv_kernel_sizes") or [],
        blocks: configuration.get("n_conv_per_stage_encoder") or [],
        "n_conv_per_stage_decoder": configuration.get("n_conv_per_stage_decoder") or [],
    }


def _network(kind: str, settings: Mapping[str, Any], what: str) -> Proposal:
    """Return the plan's fields of a network of dynamic-network-architectures; a note if it cannot be rebuilt."""
    name, blocks = NETWORKS.get(kind.rpartition(".")[2], ("", ""))
    try:
        first, *strides = [_whole(stride) for stride in settings["strides"]]
        fields = {
            "ndim": len(first),
            "network": name,
            "network_channels": _whole(settings["features_per_stage"]),
            "network_strides": tuple(strides),
            "network_options": {
                "kernels": tuple(_whole(kernel) for kernel in settings["kernel_sizes"]),
                "blocks": _whole(settings[blocks]),
                "decoder_blocks": _whole(settings["n_conv_per_stage_decoder"]),
            },
        }
    except (LookupError, TypeError, ValueError, AttributeError):
        fields = {}
    if not fields or set(first) != {1} or not name:
        note = f"its network {kind or 'of no name'} cannot be rebuilt, so the plan's own is taken"
        return Proposal(what=what, notes=(note,))
    return Proposal(fields, what=what)


def _whole(values: Any) -> tuple[int, ...]:
    """Return a sequence of whole numbers.

    Raises:
        TypeError: it is none.
    """
    if not isinstance(values, Sequence) or any(type(value) is not int for value in values):
        raise TypeError
    return tuple(values)


_SCHEMES = {"CTNormalization": "ct", "ZScoreNormalization": "zscore"}


def _prepared(
    proposal: Proposal, plans: Mapping[str, Any], configuration: Mapping[str, Any], dataset: Any
) -> Proposal:
    """Add how nnU-Net prepares scans: spacing, axes and normalisation."""
    notes = list(proposal.notes)
    spacing = tuple(
        float(mm) for mm in configuration.get("spacing") or () if isinstance(mm, int | float) and mm > 0
    )
    order = plans.get("transpose_forward")
    orientation = ""
    if spacing and order in ([0, 1, 2], [0, 2, 1], [1, 0, 2], [1, 2, 0], [2, 0, 1], [2, 1, 0]):
        orientation = "".join(_LETTERS[axis] for axis in order)[::-1]
    found = configuration.get("normalization_schemes") or ()
    schemes = tuple(_SCHEMES.get(str(scheme), "") for scheme in found)
    intensity: tuple[dict[str, float], ...] = ()
    if "" in schemes:
        notes.append(
            f"its normalisation {', '.join(map(str, found))} is none of ours, so the plan's own is taken"
        )
        schemes = ()
    elif "ct" in schemes:
        known = plans.get("foreground_intensity_properties_per_channel") or {}
        try:
            intensity = tuple(_intensity(known[str(i)]) if s == "ct" else {} for i, s in enumerate(schemes))
        except (LookupError, TypeError, ValueError):
            notes.append("its plan lacks the intensities of CT, so the plan's own normalisation is taken")
            schemes = ()
    masked = configuration.get("use_mask_for_norm")
    if "zscore" in schemes and not (isinstance(masked, Sequence) and all(masked)):
        notes.append(
            "nnU-Net took mean and SD of whole scans; here they are those of voxels that are no background"
        )
    labels = dataset.get("labels") if isinstance(dataset, Mapping) else None
    names = tuple(map(str, labels)) if isinstance(labels, Mapping) else None
    return replace(
        proposal, notes=tuple(notes), class_names=names, spacing=spacing, orientation=orientation, schemes=schemes,
        intensity=intensity,
    )  # fmt: skip


def _intensity(known: Mapping[str, Any]) -> dict[str, float]:
    names = {"lower": "percentile_00_5", "upper": "percentile_99_5", "mean": "mean", "std": "std"}
    return {ours: float(known[theirs]) for ours, theirs in names.items()}


def bundle_proposal(configs: Path) -> Proposal:
    """Return the network that a MONAI bundle's configuration names, if it is one that we have."""
    what = f"the MONAI bundle {configs.resolve().parent.name}"
    for name in ("inference", "train"):
        for ending in (".json", ".yaml"):
            path = configs / (name + ending)
            if not path.is_file() or path.stat().st_size > 10_000_000:
                continue
            try:
                text = path.read_text(encoding="utf-8")
                read = json.loads(text) if ending == ".json" else yaml.safe_load(text)
                found = _monai(read["network_def"])
            except (
                OSError,
                ValueError,
                LookupError,
                TypeError,
                AttributeError,
                RecursionError,
                yaml.YAMLError,
            ):
                continue
            if found is not None:
                return Proposal(found, what=what)
    return Proposal(
        what=what, notes=("its configuration names no network that we have, so the plan's own is taken",)
    )


def _monai(settings: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the plan's fields of a ``network_def``; None of one that is not ours."""
    kind = str(settings["_target_"]).rpartition(".")[2]
    if kind == "make_network":  # of a bundle that mlbseg wrote
        return {
            "ndim": int(settings["ndim"]),
            "network": str(settings["name"]),
            "network_channels": _whole(settings["channels"]),
            "network_strides": tuple(_whole(stride) for stride in settings["strides"]),
            "network_options": settings.get("options", {}),
        }
    ndim = settings["spatial_dims"]
    if kind == "UNet" and settings.get("num_res_units") == 2:
        return {
            "ndim": ndim,
            "network": "unet",
            "network_channels": _whole(settings["channels"]),
            "network_strides": tuple(_each(stride, ndim) for stride in settings["strides"]),
        }
    if kind == "DynUNet":
        strides = [_each(stride, ndim) for stride in settings["strides"]]
        filters = settings.get("filters") or [
            min(2 ** (5 + i), 320 if ndim == 3 else 512) for i in range(len(strides))
        ]
        return {
            "ndim": ndim,
            "network": "dynunet",
            "network_channels": _whole(filters),
            "network_strides": tuple(strides[1:]),
        }
    if kind == "SwinUNETR":
        base = settings.get("feature_size", 24)
        return {
            "ndim": settings.get("spatial_dims", 3),
            "network": "swin-unetr",
            "network_channels": tuple(base * 2**level for level in range(5)),
        }
    return None


def _each(stride: Any, ndim: int) -> tuple[int, ...]:
    return (stride,) * ndim if isinstance(stride, int) else _whole(stride)
