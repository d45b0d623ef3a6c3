"""A MONAI bundle runs without mlbseg and writes the masks that mlbseg would."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813 - as its documentation does
import torch
from monai.bundle import ConfigParser, verify_metadata
from monai.data.meta_tensor import MetaTensor
from monai.transforms import SaveImaged

import mlbseg
from blocks import TINY, blocks, save, write_blocks, write_case
from mlbseg.apps.export import bundle as room
from mlbseg.apps.export import export, steps
from mlbseg.inference import predict
from mlbseg.types import Geometry

TURNED = (0.8, -0.6, 0, 0.6, 0.8, 0, 0, 0, 1)
RUNNER = """
import runpy, sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition('.')[0] == 'mlbseg':
            raise ModuleNotFoundError('mlbseg is not to be found here', name='mlbseg')
sys.meta_path.insert(0, Blocked())
runpy.run_module('monai.bundle', run_name='__main__', alter_sys=True)
"""
"""Runs MONAI's command as if mlbseg were not installed."""


@pytest.fixture(scope="module")
def flat(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a 2D network on cropped 3D scans whose label values have a gap."""
    root = tmp_path_factory.mktemp("flat")
    write_blocks(root / "scans", values=(0, 2, 5))
    mlbseg.train(
        str(root / "scans"), str(root / "run"), method="mean-teacher", device="cpu",
        overrides=[*TINY, "steps=80", "checkpoint_every=80", "plan.ndim=2", "network_strides=[[1, 2], [2, 2]]",
                   "plan.crop=true", "plan.spacing=1.3"],
    )  # fmt: skip
    return root / "run"


def monai(bundle: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(
        [sys.executable, "-c", RUNNER, *arguments],
        cwd=bundle, env={**environment, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip


def pose_scans(folder: Path) -> None:
    """Write scans that lie in several ways, of several spacings, one of them mostly air."""
    write_case(
        folder,
        "oblique.nii.gz",
        90,
        labelled=False,
        direction=TURNED,
        spacing=(1, 1.1, 1.4),
        origin=(3, -7, 11),
    )
    write_case(folder, "las.nii.gz", 91, labelled=False, axes=(1,), direction=(1, 0, 0, 0, -1, 0, 0, 0, 1))
    write_case(
        folder,
        "sagittal.nii.gz",
        92,
        labelled=False,
        direction=(0, 0, 1, 1, 0, 0, 0, 1, 0),
        spacing=(2, 1.2, 1),
    )
    image, _ = blocks(93)
    wide = np.zeros((30, 30, 28), np.float32)
    wide[5:21, 6:24, 4:24] = image
    save(folder / "images" / "wide.nii.gz", wide, spacing=(0.6, 0.6, 0.7))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["3d", "sliced"])
def test_monai_alone_writes_the_masks_of_predict(
    kind: str, mlb_run: Path, flat: Path, tmp_path: Path
) -> None:
    run = flat if kind == "sliced" else mlb_run
    pose_scans(tmp_path)
    bundle = tmp_path / "my bundle"
    done = export(run, bundle, "bundle")
    scripts = {"__init__", *(name.rpartition(".")[2] for name in room.VENDORED)}
    assert {path.stem for path in (bundle / "scripts").iterdir()} == scripts
    assert {path.relative_to(bundle).as_posix() for path in done.files} >= {
        "configs/metadata.json", "configs/inference.json", "models/model.pt", "docs/README.md", "LICENSE",
    }  # fmt: skip
    ran = monai(
        bundle, "run", "--config_file", "configs/inference.json",
        "--dataset_dir", str(tmp_path / "images"), "--output_dir", str(tmp_path / "masks"),
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    ours = predict(run, tmp_path / "images", tmp_path / "ours", device="cpu", precision="32").masks
    assert len(ours) == 4
    for name, path in ours.items():
        expected, found = (
            sitk.ReadImage(str(path)),
            sitk.ReadImage(str(tmp_path / "masks" / f"{name}.nii.gz")),
        )
        np.testing.assert_allclose(found.GetOrigin(), expected.GetOrigin(), atol=1e-4)
        np.testing.assert_allclose(found.GetDirection(), expected.GetDirection(), atol=1e-5)
        np.testing.assert_allclose(found.GetSpacing(), expected.GetSpacing(), atol=1e-5)
        one, other = (sitk.GetArrayFromImage(image) for image in (expected, found))
        assert len(np.unique(one)) > 1, "a mask without a structure compares nothing"
        # The two read a header's position with other rounding, which may tip a voxel between two classes.
        assert (one == other).mean() > 0.9995


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:parsing:UserWarning")  # MONAI's advice to trust the file
def test_metadata_fit_the_schema_as_monai_checks_it(mlb_run: Path, tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    export(mlb_run, bundle, "bundle")
    schema = tmp_path / "schema.json"
    tensor = {
        "type": "object",
        "required": ["type", "format", "num_channels", "spatial_shape", "dtype", "value_range"],
        "properties": {
            "num_channels": {"type": "integer"},
            "spatial_shape": {"type": "array", "items": {"type": ["string", "integer"]}},
            "value_range": {"type": "array", "items": {"type": "number"}},
            "is_patch_data": {"type": "boolean"},
            "channel_def": {"type": "object"},
        },
    }
    tensors = {"type": "object", "minProperties": 1, "additionalProperties": tensor}
    texts = ("schema", "version", "monai_version", "pytorch_version", "numpy_version", "task", "description",
             "authors", "copyright")  # fmt: skip
    # What MONAI's specification of bundles asks for; its own schema would be fetched from the network.
    content = {
        "type": "object",
        "required": [*texts, "required_packages_version", "network_data_format"],
        "properties": {
            **{name: {"type": "string", "minLength": 1} for name in texts},
            "required_packages_version": {"type": "object"},
            "references": {"type": "array", "items": {"type": "string"}},
            "network_data_format": {
                "type": "object",
                "required": ["inputs", "outputs"],
                "properties": {"inputs": tensors, "outputs": tensors},
            },
        },
    }
    schema.write_text(json.dumps(content))
    path = bundle / "configs" / "metadata.json"
    arguments = {
        "meta_file": str(path), "filepath": str(schema), "hash_type": "sha256",
        "hash_val": hashlib.sha256(schema.read_bytes()).hexdigest(),
    }  # fmt: skip
    verify_metadata(**arguments)
    record = json.loads(path.read_text())
    names = json.loads((mlb_run / "plan.json").read_text())["class_names"]
    assert list(record["network_data_format"]["outputs"]["pred"]["channel_def"].values()) == names
    del record["network_data_format"]["inputs"]["image"]["dtype"]
    path.write_text(json.dumps(record))
    with pytest.raises(ValueError, match="Failed validating"):
        verify_metadata(**arguments)


@pytest.mark.slow
@pytest.mark.filterwarnings(
    "ignore:NvImgCodecPydicomReader:UserWarning"
)  # MONAI's, of a decoder that nothing uses
@pytest.mark.filterwarnings("ignore:parsing config_file:UserWarning")  # MONAI's advice to trust the file
def test_monai_label_can_take_it_apart(
    mlb_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As its BundleInferTask does, which instantiates the parts one by one and writes the mask itself."""
    pose_scans(tmp_path)
    bundle = tmp_path / "bundle"
    export(mlb_run, bundle, "bundle")
    metadata = json.loads((bundle / "configs" / "metadata.json").read_text())
    assert list(metadata["network_data_format"]["inputs"]) == ["image"]
    assert list(metadata["network_data_format"]["outputs"]) == ["pred"]

    parser = ConfigParser()
    parser.read_config(str(bundle / "configs" / "inference.json"))
    parser.config.update({"bundle_root": str(bundle), "device": "cpu"})  # a name, not a device

    def part(name: str) -> object:
        """Instantiate with the bundle's scripts imported anew, and forget them at once."""
        for module in [m for m in sys.modules if m.partition(".")[0] == "scripts"]:
            del sys.modules[module]
        with monkeypatch.context() as patch:
            patch.syspath_prepend(str(bundle))
            return parser.get_parsed_content(name, instantiate=True)

    network = part("network_def")
    network.load_state_dict(torch.load(bundle / "models" / "model.pt", weights_only=True))
    data = {"image": str(tmp_path / "images" / "oblique.nii.gz")}
    for transform in part("preprocessing").transforms:
        data = transform(data)
    with torch.no_grad():
        data["pred"] = part("inferer")(data["image"][None], network.eval())[0]
    for transform in part("postprocessing").transforms:
        if not isinstance(transform, SaveImaged):
            data = transform(data)
    path = predict(
        mlb_run, tmp_path / "images", tmp_path / "ours", only=["oblique"], device="cpu", precision="32"
    )
    expected = sitk.GetArrayFromImage(sitk.ReadImage(str(path.masks["oblique"])))
    found = data["pred"]
    assert tuple(found.shape[1:]) == tuple(int(n) for n in data["image"].meta["spatial_shape"])
    assert (expected == found[0].numpy().T).mean() > 0.9995


def test_affines_and_grids_are_the_same() -> None:
    for grid in (
        Geometry((4, 5, 6), (1.5, 0.5, 2.0), (3.0, -7.0, 11.0), TURNED),
        Geometry((4, 5), (1.5, 0.5), (1.0, 2.0), (1.0, 0.0, 0.0, 1.0)),
    ):
        back = steps.grid_geometry(steps.to_affine(grid), grid.size[::-1])
        assert back.size == grid.size
        for name in ("spacing", "origin", "direction"):
            np.testing.assert_allclose(getattr(back, name), getattr(grid, name), atol=1e-12)


def test_2d_scans_come_back_on_their_own_pixels() -> None:
    plan = {
        "scan_ndim": 2, "channels": 1, "label_values": [0, 7], "spacing": [1.0, 1.0], "orientation": "LPS",
        "crop": False, "normalisation": ["zscore"], "intensity": [],
        "largest_component": [],
    }  # fmt: skip
    image = torch.rand(1, 8, 6)
    meta = {
        "spatial_shape": (8, 6),
        "original_affine": np.diag([1.0, 2.0, 1.0, 1.0]),
        "filename_or_obj": "a.nii.gz",
    }
    prepared = steps.Prepared("image", plan)({"image": MetaTensor(image, meta=meta)})
    assert tuple(prepared["image"].shape) == (1, 12, 8)
    likely = (torch.arange(12)[:, None] > 5).expand(12, 8).float()
    data = {**prepared, "pred": torch.stack([1 - likely, likely])}
    mask = steps.Restored("pred", "image", plan)(data)["pred"]
    assert tuple(mask.shape) == (1, 8, 6)
    assert set(mask[0, :, :2].unique().tolist()) == {0}
    assert set(mask[0, :, 4:].unique().tolist()) == {7}


@pytest.mark.parametrize(("unit", "mm"), [(0, 1.0), (2, 1.0), (10, 1.0), (3, 1e-3), (1, 1e3)])
def test_the_unit_of_length_is_the_headers(unit: int, mm: float) -> None:
    affine = np.diag([-1.0, -2.0, 3.0, 1.0])
    affine[:3, 3] = 4, 5, 6
    meta = {"spatial_shape": (8, 6, 4), "original_affine": affine, "xyzt_units": np.array(unit, np.uint8)}
    native = steps.native_geometry(meta)
    np.testing.assert_allclose(native.spacing, np.array([1, 2, 3]) * mm)
    np.testing.assert_allclose(native.origin, np.array([-4, -5, 6]) * mm)
    np.testing.assert_allclose(native.direction, np.eye(3).ravel(), atol=1e-12)
    assert meta["original_affine"][0, 3] == 4


def test_channels_of_a_scan_are_found_together(tmp_path: Path) -> None:
    for name in ("a_0000", "a_0001", "b_0000", "b_0001"):
        (tmp_path / f"{name}.nii.gz").touch()
    assert [len(scan["image"]) for scan in steps.find_scans(str(tmp_path), 2)] == [2, 2]
    assert len(steps.find_scans(str(tmp_path), 1)) == 4
    (tmp_path / "b_0001.nii.gz").unlink()
    with pytest.raises(mlbseg.errors.UserError, match="b has 1 channel"):
        steps.find_scans(str(tmp_path), 2)
    with pytest.raises(mlbseg.errors.UserError, match="no NIfTI files"):
        steps.find_scans(str(tmp_path / "none"), 1)
