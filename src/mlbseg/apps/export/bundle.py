"""A run as a MONAI bundle: a folder that MONAI alone can run, MONAI Label among others, without mlbseg."""

from __future__ import annotations

import json
import re
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from jinja2 import Environment, PackageLoader, StrictUndefined

from mlbseg.apps.export.output import files_in, write_json
from mlbseg.errors import UserError
from mlbseg.files import write_atomic
from mlbseg.networks import NETWORKS
from mlbseg.runs import Run
from mlbseg.runs.weights import dump_tensors
from mlbseg.staging import require_new, staged

VENDORED = (
    "mlbseg.types",
    "mlbseg.errors",
    "mlbseg.registry",
    "mlbseg.core.sides",
    "mlbseg.networks",
    "mlbseg.networks.builder",
    "mlbseg.networks.dynunet",
    "mlbseg.networks.nested_unet",
    "mlbseg.networks.nnunet",
    "mlbseg.networks.swin_unetr",
    "mlbseg.networks.unet",
    "mlbseg.networks.unetplusplus",
    "mlbseg.networks.vnet",
    "mlbseg.components",
    "mlbseg.data.lattice",
    "mlbseg.data.preprocess",
    "mlbseg.apps.export.steps",
)
"""Modules that a bundle carries as its folder ``scripts``: the networks, and how scans are prepared and masks brought
back. The last imports the others, and none imports more of the package."""

SCHEMA = "https://project-monai.github.io/schema/meta_schema_20240725.json"
"""What ``python -m monai.bundle verify_metadata`` checks the metadata against."""

_NEEDED = ("nibabel", "SimpleITK", "scipy", "pytorch-ignite", "einops")
"""That a bundle runs with besides MONAI; the tests run it with these versions."""
_TESTED = {"nibabel": "5.4.2", "pytorch-ignite": "0.5.5", "dynamic-network-architectures": "0.4.4"}
_OF_NNUNET = ("nnunet", "resenc")
"""Networks that need dynamic-network-architectures."""

_PLAN = (
    "scan_ndim",
    "channels",
    "label_values",
    "spacing",
    "orientation",
    "crop",
    "normalisation",
    "intensity",
    "largest_component",
)
"""Fields of the plan that preparing a scan and writing its mask look at."""


def export_bundle(run: Run, out: Path, *, network: str | None = None, overwrite: bool = False) -> list[Path]:
    """Write a MONAI bundle.

    Args:
        run: The run.
        out: The bundle's folder; its name is the bundle's.
        network: ``student`` or ``teacher``; the method's preferred one when None.
        overwrite: Replace files that are there already.

    Returns:
        The files.

    Raises:
        UserError: if training has not finished, there is no such network, it is another package's, or the folder cannot
            be written.
    """
    require_new(out, overwrite=overwrite)
    if (source := NETWORKS.source(run.plan.network)) is not None:
        raise UserError(
            f"{run.root}: its network {run.plan.network!r} comes from {source}, but a bundle carries networks of "
            "mlbseg alone (use --format onnx)"
        )
    model = run.network(network)
    metadata = _metadata(run, out.resolve().name)
    classes = list(zip(run.plan.label_values, run.plan.class_names, strict=True))
    with staged(out, overwrite=overwrite) as folder:
        for name in ("configs", "models", "docs", "scripts"):
            (folder / name).mkdir()
        write_json(folder / "configs" / "metadata.json", metadata)
        write_json(folder / "configs" / "inference.json", inference(run))
        write_atomic(folder / "models" / "model.pt", dump_tensors(model.state_dict()))
        for name, content in _scripts().items():
            write_atomic(folder / "scripts" / name, content.encode())
        pages = Environment(
            loader=PackageLoader("mlbseg.apps.export"),
            undefined=StrictUndefined,
            keep_trailing_newline=True,
            autoescape=False,  # noqa: S701 - Markdown
        )
        text = pages.get_template("bundle.md.j2").render(
            plan=run.plan, classes=classes, metadata=metadata, mlbseg=version("mlbseg")
        )
        write_atomic(folder / "docs" / "README.md", text.encode())
        write_atomic(folder / "LICENSE", pages.get_template("bundle_licence.txt.j2").render().encode())
    return files_in(out)


def inference(run: Run) -> dict[str, Any]:
    """Return what ``configs/inference.json`` says: MONAI's components and their settings."""
    plan = run.plan
    sliced = plan.ndim < plan.scan_ndim
    windows = {
        "_target_": f"scripts.steps.{'Slices' if sliced else 'Windows'}",
        "roi_size": list(plan.patch_size),
        "sw_batch_size": "$4 if 'cuda' in str(@device) else 1",  # MONAI Label puts a name in its place
        "overlap": 0.5,
        "mode": "gaussian",
        "padding_mode": "replicate",
        "sw_device": "@device",
        "device": "cpu",
        **({"spatial_dim": 0} if sliced else {}),
    }
    widest = "uint8" if max(plan.label_values) < 256 else "int32"
    return {
        "imports": ["$import torch"],
        "bundle_root": ".",
        "dataset_dir": "$@bundle_root + '/scans'",
        "output_dir": "$@bundle_root + '/masks'",
        "device": "$torch.device('cuda:0' if torch.cuda.is_available() else 'cpu')",
        "plan": {name: _plain(getattr(plan, name)) for name in _PLAN},
        "network_def": {
            "_target_": "scripts.networks.make_network",
            "name": plan.network,
            "ndim": plan.ndim,
            "in_channels": plan.channels,
            "num_classes": plan.num_classes,
            "channels": list(plan.network_channels),
            "strides": [list(stride) for stride in plan.network_strides],
            "norm": run.config.train.norm,
            "dropout": run.config.train.dropout,
            "options": _plain(plan.network_options),
            "deep": run.config.train.deep_supervision,
        },
        "network": "$@network_def.to(@device)",
        "preprocessing": {
            "_target_": "Compose",
            "transforms": [
                {"_target_": "LoadImaged", "keys": "image"},
                {"_target_": "EnsureChannelFirstd", "keys": "image"},
                {"_target_": "scripts.steps.Prepared", "keys": "image", "plan": "@plan"},
            ],
        },
        "dataset": {
            "_target_": "Dataset",
            "data": {
                "_target_": "scripts.steps.find_scans",
                "folder": "@dataset_dir",
                "channels": plan.channels,
            },
            "transform": "@preprocessing",
        },
        "dataloader": {
            "_target_": "DataLoader",
            "dataset": "@dataset",
            "batch_size": 1,
            "shuffle": False,
            "num_workers": 0,
        },
        "inferer": windows,
        "postprocessing": {
            "_target_": "Compose",
            "transforms": [
                {"_target_": "scripts.steps.Restored", "keys": "pred", "image": "image", "plan": "@plan"},
                {
                    "_target_": "SaveImaged",
                    "keys": "pred",
                    "output_dir": "@output_dir",
                    "output_ext": ".nii.gz",
                    "output_dtype": f"$torch.{widest}",
                    "output_postfix": "",
                    "separate_folder": False,
                    "resample": False,
                    "print_log": False,
                },
            ],
        },
        "handlers": [
            {
                "_target_": "CheckpointLoader",
                "load_path": "$@bundle_root + '/models/model.pt'",
                "load_dict": {"model": "@network"},
            },
            {"_target_": "StatsHandler", "iteration_log": False},
        ],
        "evaluator": {
            "_target_": "SupervisedEvaluator",
            "device": "@device",
            "val_data_loader": "@dataloader",
            "network": "@network",
            "inferer": "@inferer",
            "postprocessing": "@postprocessing",
            "val_handlers": "@handlers",
        },
        "run": ["$@evaluator.run()"],
    }


def _metadata(run: Run, name: str) -> dict[str, Any]:
    plan = run.plan
    # By the value in a mask: MONAI Label names segments by it.
    classes = {str(value): label for value, label in zip(plan.label_values, plan.class_names, strict=True)}
    ct = all(kind == "ct" for kind in plan.normalisation)
    shape = list(plan.patch_size)
    needed = (*_NEEDED, *(("dynamic-network-architectures",) if plan.network in _OF_NNUNET else ()))
    return {
        "schema": SCHEMA,
        "version": "0.1.0",
        "changelog": {"0.1.0": f"exported by mlbseg {version('mlbseg')}"},
        "monai_version": version("monai"),
        "pytorch_version": torch.__version__.partition("+")[0],
        "numpy_version": version("numpy"),
        "required_packages_version": {package: _version(package) for package in needed},
        "name": name,
        "task": f"Segmentation of {', '.join(plan.class_names[1:])}",
        "description": (
            f"A {plan.ndim}D {plan.network} that mlbseg trained with the method {run.config.method} on "
            f"{len(run.split.clean)} labelled scans and {len(run.split.unlabelled) + len(run.split.noisy)} others."
        ),
        "authors": "Whoever trained the run that this was exported from",
        "copyright": "That of the weights is their trainer's; scripts/ is mlbseg's, Apache-2.0",
        "data_type": "nibabel",
        "intended_use": "Research only: no clinical use",
        "references": [
            "Wei et al.: Consistency-guided Meta-Learning for Bootstrapping Semi-Supervised Medical Image "
            "Segmentation. MICCAI 2023, arXiv 2307.11604"
        ],
        "network_data_format": {
            "inputs": {
                "image": {
                    "type": "image",
                    "format": "hounsfield" if ct else "magnitude",
                    "modality": "CT" if ct else "n/a",
                    "num_channels": plan.channels,
                    "spatial_shape": shape,
                    "dtype": "float32",
                    "value_range": [],
                    "is_patch_data": True,
                    "channel_def": {str(index): f"channel {index}" for index in range(plan.channels)},
                }
            },
            "outputs": {
                "pred": {
                    "type": "image",
                    "format": "segmentation",
                    "num_channels": plan.num_classes,
                    "spatial_shape": shape,
                    "dtype": "float32",
                    "value_range": [],
                    "is_patch_data": True,
                    "channel_def": classes,
                }
            },
        },
    }


def _version(package: str) -> str:
    """Return the installed version of a package, else the one that the bundle was tested with."""
    name = package.replace("pytorch-", "")
    return version(package) if find_spec(name) is not None else _TESTED[package]


def _scripts() -> dict[str, str]:
    """Return the text of each file in ``scripts``: the package's own modules, importing one another there."""
    files = {"__init__.py": '"""What the bundle needs of mlbseg, Apache-2.0: see LICENSE."""\n'}
    for module in VENDORED:
        spec = find_spec(module)
        if spec is None or spec.origin is None:
            raise UserError(
                f"{module}: no file to copy into the bundle (install mlbseg unpacked, not as a zip)"
            )
        text = Path(spec.origin).read_text(encoding="utf-8")
        for other in VENDORED:
            text = re.sub(
                rf"^from {re.escape(other)} import", f"from .{_stem(other)} import", text, flags=re.M
            )
        files[f"{_stem(module)}.py"] = text
    return files


def _stem(module: str) -> str:
    return module.rpartition(".")[2]


def _plain(value: Any) -> Any:
    """Return tuples as lists, as JSON has them."""
    return json.loads(json.dumps(value))
