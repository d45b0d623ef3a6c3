"""Exported networks compute in onnxruntime what they compute in torch."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

import mlbseg
from blocks import TINY, write_blocks
from mlbseg.apps.export import Exported, export
from mlbseg.apps.export import onnx as room
from mlbseg.errors import UserError
from mlbseg.runs import Run
from mlbseg.windows import predict_grid


@pytest.fixture(scope="module")
def flat_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a 2D network on 3D scans."""
    root = tmp_path_factory.mktemp("flat")
    write_blocks(root / "scans")
    mlbseg.train(
        str(root / "scans"), str(root / "run"), method="supervised", device="cpu",
        overrides=[*TINY, "steps=40", "checkpoint_every=40", "plan.ndim=2", "network_strides=[[1, 2], [2, 2]]"],
    )  # fmt: skip
    return root / "run"


@pytest.fixture(scope="module")
def flat_export(flat_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return export(flat_run, tmp_path_factory.mktemp("onnx") / "new", "onnx")


def session(path: Path) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])


@pytest.mark.slow
@pytest.mark.parametrize("ndim", [2, 3])
def test_onnxruntime_equals_torch(
    ndim: int, supervised_run: Path, flat_run: Path, flat_export: Exported, tmp_path: Path
) -> None:
    root = supervised_run if ndim == 3 else flat_run
    done = export(root, tmp_path / "onnx", "onnx") if ndim == 3 else flat_export
    assert [path.name for path in done.files] == ["model.onnx", "model.json"]
    run = Run.open(root)
    network = run.network()
    runtime = session(done.files[0])
    rng = np.random.default_rng(0)
    multiple = json.loads(done.files[1].read_text())["size_multiple"]
    sizes = [run.plan.patch_size, tuple(multiple * (3 + axis) for axis in range(ndim))]
    for batch, size in ((1, sizes[0]), (3, sizes[0]), (5, sizes[1])):
        image = rng.normal(size=(batch, 1, *size)).astype(np.float32)
        with torch.no_grad():
            expected = network(torch.from_numpy(image)).numpy()
        (found,) = runtime.run(["logits"], {"image": image})
        assert found.shape == (batch, 3, *size)
        np.testing.assert_allclose(found, expected, atol=1e-4)
        assert np.abs(expected).max() > 0.1


@pytest.mark.slow
def test_the_file_and_the_sidecar_say_how_to_use_it(flat_run: Path, flat_export: Exported) -> None:
    done = flat_export
    plan = Run.open(flat_run).plan
    model = onnx.load(done.files[0])
    inside = {entry.key: entry.value for entry in model.metadata_props}
    beside = json.loads(done.files[1].read_text())
    for name in ("spacing", "patch_size", "class_names", "label_values", "normalisation", "intensity"):
        assert json.loads(inside[name]) == beside[name] == json.loads(json.dumps(getattr(plan, name)))
    assert inside["orientation"] == beside["orientation"] == "LPS"
    assert any("slice by slice" in step for step in beside["steps"])

    # Windows as the steps say, with onnxruntime for the network, give the probabilities of the package itself.
    runtime = session(done.files[0])

    class Runtime(torch.nn.Module):
        def forward(self, window: torch.Tensor) -> torch.Tensor:
            return torch.from_numpy(runtime.run(None, {"image": window.numpy()})[0])

    image = np.random.default_rng(1).normal(size=(1, 5, 24, 20)).astype(np.float32)
    ours, theirs = (
        predict_grid(network, image, patch_size=plan.patch_size, device=torch.device("cpu"))
        for network in (Run.open(flat_run).network(), Runtime())
    )
    np.testing.assert_allclose(theirs, ours, atol=1e-4)


@pytest.mark.slow
def test_windows_of_networks_that_trace_their_size_are_fixed(
    flat_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "FIXED_SIZE", frozenset({"unet"}))
    done = export(flat_run, tmp_path, "onnx")
    shape = session(done.files[0]).get_inputs()[0].shape
    assert shape == ["batch", 1, *Run.open(flat_run).plan.patch_size]
    assert json.loads(done.files[1].read_text())["size_is_fixed"]


@pytest.mark.slow
def test_an_extra_that_is_missing_is_named_and_nothing_is_overwritten(
    supervised_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "model.onnx").write_text("mine")
    with pytest.raises(UserError, match="not empty"):
        export(supervised_run, tmp_path / "used", "onnx")
    assert (tmp_path / "used" / "model.onnx").read_text() == "mine"
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "onnxscript" else find(name)
    )
    with pytest.raises(UserError, match=r"no package onnxscript.*mlbseg\[export\]"):
        export(supervised_run, tmp_path / "new", "onnx")
    assert not (tmp_path / "new").exists()
