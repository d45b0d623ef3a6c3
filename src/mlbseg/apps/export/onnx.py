"""A run's network as an ONNX file, with what a program around it has to know in the file and beside it."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mlbseg.apps.export.output import require_extra
from mlbseg.data.plan import Plan
from mlbseg.data.preprocess import SMOOTH_ABOVE
from mlbseg.data.records import write_record
from mlbseg.files import write_atomic
from mlbseg.networks import required_multiple
from mlbseg.runs import Run
from mlbseg.staging import require_new, staged

MODEL = "model.onnx"
SIDECAR = "model.json"

FIXED_SIZE = frozenset({"swin-unetr"})
"""Networks that take windows of the patch's size only: they pad and mask by sizes that are traced as constants."""


def export_onnx(run: Run, out: Path, *, network: str | None = None, overwrite: bool = False) -> list[Path]:
    """Write the network, and how to prepare scans for it.

    Args:
        run: The run.
        out: The folder for both files.
        network: ``student`` or ``teacher``; the method's preferred one when None.
        overwrite: Replace files that are there already.

    Returns:
        The files.

    Raises:
        UserError: if the extra is not installed, training has not finished, or the folder cannot be written.
    """
    require_extra("the format onnx", "onnx", "onnxscript")
    require_new(out, overwrite=overwrite)
    content = to_onnx(run.network(network), run.plan)
    with staged(out, overwrite=overwrite) as folder:
        write_atomic(folder / MODEL, content)
        write_record(folder / SIDECAR, {**facts(run.plan), "made_by": f"mlbseg {version('mlbseg')}"})
    return [out / MODEL, out / SIDECAR]


def to_onnx(network: nn.Module, plan: Plan) -> bytes:
    """Return an ONNX model from ``image`` (B, C, *S) to ``logits`` (B, K, *S), float32; B is free, and S mostly too.

    Args:
        network: In evaluation mode, on the CPU.
        plan: Of its run.
    """
    import onnx

    example = torch.zeros(2, plan.channels, *plan.patch_size)  # a batch of one would be taken for a constant
    dynamic: dict[int, Any] = {0: torch.export.Dim("batch")}
    if plan.network not in FIXED_SIZE:
        dynamic |= {axis + 2: torch.export.Dim.DYNAMIC for axis in range(plan.ndim)}
    with _quiet():
        program = torch.onnx.export(
            network,
            (example,),
            input_names=["image"],
            output_names=["logits"],
            dynamic_shapes=(dynamic,),
            dynamo=True,
            verbose=False,
        )
    if program is None:  # only without dynamo
        raise RuntimeError("torch.onnx.export returned nothing")
    model = program.model_proto
    onnx.helper.set_model_props(
        model,
        {name: value if isinstance(value, str) else json.dumps(value) for name, value in facts(plan).items()},
    )
    onnx.checker.check_model(model)
    return bytes(model.SerializeToString())


def facts(plan: Plan) -> dict[str, Any]:
    """Return what a program has to know to use the network; axes are in array order ([z,] y, x), lengths in mm."""
    multiple = required_multiple(plan.network, plan.network_channels, plan.network_strides)
    fixed = plan.network in FIXED_SIZE
    return {
        "input": {"name": "image", "axes": ["batch", "channel", *_axes(plan)], "dtype": "float32"},
        "output": {"name": "logits", "axes": ["batch", "class", *_axes(plan)], "dtype": "float32"},
        "class_names": list(plan.class_names),
        "label_values": list(plan.label_values),
        "orientation": plan.orientation if plan.scan_ndim == 3 else "",
        "spacing": list(plan.spacing),
        "crop": plan.crop,
        "normalisation": list(plan.normalisation),
        "intensity": [dict(channel) for channel in plan.intensity],
        "patch_size": list(plan.patch_size),
        "size_multiple": multiple,
        "size_is_fixed": fixed,
        "overlap": 0.5,
        "largest_component": list(plan.largest_component),
        "steps": _steps(plan, multiple, fixed=fixed),
    }


def _axes(plan: Plan) -> list[str]:
    return ["z", "y", "x"][-plan.ndim :]


def _steps(plan: Plan, multiple: int, *, fixed: bool) -> list[str]:
    """Return in words what `prepare_scan`, `predict_grid` and `restore_label` do."""
    steps = []
    if plan.scan_ndim == 3:
        steps.append(
            f"Permute and flip the axes, without interpolation, so that x, y, z run to {', '.join(plan.orientation)} "
            "(DICOM's letters); the array's axes are z, y, x."
        )
    if plan.crop:
        steps.append(
            "Crop to the voxels above the smallest value of their channel and 4 voxels around them, unless that "
            "removes 10 % or less."
        )
    steps += [
        "Resample linearly to `spacing` mm (0: keep the scan's own along that axis) on a concentric grid that covers "
        f"the field of view; before, where voxels grow by more than {SMOOTH_ABOVE} times along an axis, smooth with a "
        "Gaussian of half the difference in mm.",
        "For each channel: `zscore` subtracts the mean and divides by the SD of the scan's voxels above its smallest "
        "value, before resampling; `ct` clips to `intensity`'s lower and upper, subtracts mean, divides by std.",
        (
            "Slide windows of `patch_size`"
            + ("" if fixed else f" (or any sides that are multiples of {multiple})")
            + (", slice by slice along the first axis," if plan.ndim < plan.scan_ndim else "")
            + " with half their side overlapping; continue a scan that is smaller than a window by its edge."
        ),
        "Take the softmax over classes of each window's logits, and the mean of overlapping windows weighted by a "
        "Gaussian around the window's centre (SD an eighth of its side).",
        "Resample each class's probability linearly back to the scan's own voxels (background outside), take the "
        "likeliest class, and write its `label_values`.",
    ]
    if plan.largest_component:
        steps.append(
            "Of the values in `largest_component` keep the largest connected component (neighbours by face, edge or "
            "corner); the rest becomes background."
        )
    return steps


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence what torch's exporter says of other packages and of itself."""
    logger = logging.getLogger("torch.onnx._internal.exporter._registration")
    level = logger.level
    logger.setLevel(logging.ERROR)  # it misses torchvision, which nothing here needs
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # its own, within torch and onnxscript
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        logger.setLevel(level)
