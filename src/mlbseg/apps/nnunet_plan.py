"""What nnU-Net's own planner decides for the same labelled scans, to lay beside ours."""

from __future__ import annotations

import json
import math
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from mlbseg.data.fingerprint import CaseFacts, Fingerprint
from mlbseg.data.plan import Plan
from mlbseg.errors import UserError, brief
from mlbseg.files import machines_temporary_folder
from mlbseg.temporaries import temporary_folder
from mlbseg.types import Role

_DATASET = "Dataset001_Plan"
_PATIENCE = 300  # seconds; the planner takes about ten
# In a process of its own: nnU-Net reads where its folders are when it is imported, and prints as it plans.
_PLAN = """
from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import ExperimentPlanner
ExperimentPlanner(1).plan_experiment()
"""


@dataclass(frozen=True)
class Configuration:
    """One of nnU-Net's configurations. Axes are in array order, the coarsest one first.

    Attributes:
        name: ``2d``, ``3d_fullres`` or ``3d_lowres``.
        spacing: mm.
        patch_size: Voxels.
        batch_size: Patches a step.
        network_channels: Features per level.
        network_strides: By how much each axis is divided between each two levels.
        normalisation: nnU-Net's name of it, for each channel.
    """

    name: str
    spacing: tuple[float, ...]
    patch_size: tuple[int, ...]
    batch_size: int
    network_channels: tuple[int, ...]
    network_strides: tuple[tuple[int, ...], ...]
    normalisation: tuple[str, ...]


@dataclass(frozen=True)
class NnunetPlan:
    """What nnU-Net's planner decides, for a GPU of 8 GB and its own length of training.

    Attributes:
        version: Of nnunetv2.
        cases: Labelled scans; nnU-Net sees no others.
        configurations: Its choices. The user, or a cross-validation, picks among them.
    """

    version: str
    cases: int
    configurations: tuple[Configuration, ...]

    def as_dict(self) -> dict[str, Any]:
        """Return the fields, for JSON."""
        return asdict(self)


def require_nnunet() -> None:
    """Raise UserError if nnU-Net is not installed."""
    if find_spec("nnunetv2") is None:
        raise UserError("--nnunet: nnunetv2 is not installed (pip install nnunetv2, or leave --nnunet out)")


def nnunet_plan(facts: Fingerprint, plan: Plan) -> NnunetPlan:
    """Ask nnU-Net's planner (`ExperimentPlanner`) about the clean cases of a data set.

    It is told what we have measured of them, in the form of its own fingerprint: sizes without the border of zeros,
    spacings and channels. It reads no scan.

    Args:
        facts: Of the data.
        plan: Ours; says the classes, and which channels are CT.

    Raises:
        UserError: nnU-Net is not installed, or its planner fails.
    """
    require_nnunet()
    cases = [case for case in facts.cases if case.role is Role.CLEAN]
    with temporary_folder(machines_temporary_folder()) as folder:
        raw, prepared = (folder / name / _DATASET for name in ("raw", "preprocessed"))
        for path in (raw, prepared):
            path.mkdir(parents=True)
        (raw / "dataset.json").write_text(json.dumps(_dataset(cases, plan)), encoding="utf-8")
        (prepared / "dataset_fingerprint.json").write_text(json.dumps(_fingerprint(cases)), encoding="utf-8")
        _run(folder)
        plans = json.loads((prepared / "nnUNetPlans.json").read_text(encoding="utf-8"))
    found = tuple(
        _configuration(name, each) for name, each in plans["configurations"].items() if "spacing" in each
    )
    return NnunetPlan(version("nnunetv2"), len(cases), found)


def _run(folder: Path) -> None:
    places = {f"nnUNet_{name}": str(folder / name) for name in ("raw", "preprocessed", "results")}
    try:
        process = subprocess.run(  # noqa: S603 - our own code
            [sys.executable, "-c", _PLAN],
            env={**os.environ, **places},
            capture_output=True,
            text=True,
            timeout=_PATIENCE,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise UserError(f"nnU-Net's planner: no answer within {_PATIENCE} s (leave --nnunet out)") from error
    if process.returncode:
        last = process.stderr.strip().splitlines() or ["no message"]
        raise UserError(f"nnU-Net's planner: {brief(last[-1])} (leave --nnunet out)")


def _dataset(cases: Sequence[CaseFacts], plan: Plan) -> dict[str, Any]:
    """Return what a `dataset.json` of nnU-Net says."""
    modality = {"ct": "CT", "zscore": "zscore"}
    return {
        "channel_names": {str(i): modality[kind] for i, kind in enumerate(plan.normalisation)},
        "labels": {f"class {k}": k for k in range(plan.num_classes)},
        "numTraining": len(cases),
        "file_ending": ".nii.gz",
        "dataset": {
            case.id: {"images": [f"{case.id}.nii.gz"], "label": f"{case.id}.nii.gz"} for case in cases
        },
        "overwrite_image_reader_writer": "SimpleITKIO",
    }


def _fingerprint(cases: Sequence[CaseFacts]) -> dict[str, Any]:
    """Return nnU-Net's `dataset_fingerprint.json`; images of 2D are one slice to it, 999 mm thick."""
    flat = len(cases[0].size) == 2
    kept = statistics.median(math.prod(case.box_size) / math.prod(case.size) for case in cases)
    return {
        "spacings": [[999.0] * flat + list(case.spacing) for case in cases],
        "shapes_after_crop": [[1] * flat + list(case.box_size) for case in cases],
        "median_relative_size_after_cropping": kept,
        "foreground_intensity_properties_per_channel": {},
    }


def _configuration(name: str, plan: dict[str, Any]) -> Configuration:
    network = plan["architecture"]["arch_kwargs"]
    return Configuration(
        name,
        tuple(round(float(v), 6) for v in plan["spacing"]),
        tuple(int(v) for v in plan["patch_size"]),
        int(plan["batch_size"]),
        tuple(network["features_per_stage"]),
        tuple(tuple(stride) for stride in network["strides"][1:]),
        tuple(plan["normalization_schemes"]),
    )
