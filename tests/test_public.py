"""The package from Python: its functions, what they return as tables, and a run as a model for arrays."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.testing import assert_array_equal

import mlbseg
from conftest import Command
from mlbseg.data.readers import read_label, read_scan
from mlbseg.errors import UserError
from mlbseg.metrics import SCORE_NAMES
from mlbseg.types import Geometry, Scan

FUNCTIONS = sorted(set(mlbseg.__all__) - {"__version__"})


@pytest.fixture(scope="module")
def model(supervised_run: Path) -> Any:
    return mlbseg.load(supervised_run, device="cpu")


@pytest.fixture(scope="module")
def masks(supervised_run: Path, scans: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The masks of two scans, with their probabilities."""
    out = tmp_path_factory.mktemp("masks")
    mlbseg.predict(supervised_run, scans, out, only=["case_3", "case_6"], probabilities=True, device="cpu")
    return out


# --- names ------------------------------------------------------------------------------------------------


def test_every_command_is_a_function_of_its_name() -> None:
    from mlbseg.cli import COMMANDS

    assert set(COMMANDS) - {"demo", "config"} <= set(FUNCTIONS)  # these two are for terminals alone
    for name in FUNCTIONS:
        function = getattr(mlbseg, name)
        assert callable(function)
        assert function.__name__ == name
        assert function.__doc__
    assert set(FUNCTIONS) <= set(dir(mlbseg))
    with pytest.raises(AttributeError, match="has no attribute 'segment'"):
        mlbseg.segment  # noqa: B018 - the look is the test


@pytest.mark.slow
def test_no_module_hides_a_function_once_everything_is_imported() -> None:
    script = (
        "import pkgutil, importlib, sys, mlbseg\n"
        "for found in pkgutil.walk_packages(mlbseg.__path__, 'mlbseg.'):\n"
        "    if not found.name.endswith('__main__'): importlib.import_module(found.name)\n"
        "sys.exit(', '.join(n for n in mlbseg.__all__ if n != '__version__' and not callable(getattr(mlbseg, n))) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_checking_loads_what_reading_needs_and_no_more() -> None:
    """Of torch alone the import takes seconds, and each process that reads would pay for it."""
    heavy = "{'torch', 'monai', 'lightning', 'scipy.ndimage', 'zarr', 'pandas', 'matplotlib', 'loky'}"
    script = f"import sys, mlbseg.checking; sys.exit(', '.join({heavy} & set(sys.modules)) or 0)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("module", ["mlbseg", "mlbseg.cli"])
def test_importing_the_package_loads_nothing_heavy(module: str) -> None:
    heavy = "{'torch', 'monai', 'numpy', 'pandas'}"
    script = f"import sys, {module}; sys.exit(', '.join({heavy} & set(sys.modules)) or 0)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_check_starts_without_torch() -> None:
    script = "import sys, mlbseg.checking; sys.exit(', '.join({'torch', 'monai'} & set(sys.modules)) or 0)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


# --- a run as a model -------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["case_3", "case_6"])
def test_a_model_gives_the_masks_of_the_command_bit_for_bit(
    case: str, model: Any, masks: Path, scans: Path
) -> None:
    path = scans / "images" / f"{case}.nii.gz"
    expected, _ = read_label(masks / f"{case}.nii.gz")
    assert expected.any()
    scan = read_scan([path])
    for given in (path, str(path), [path], scan):
        assert_array_equal(model.predict(given), expected)
    spacing = scan.geometry.spacing[::-1]
    # The axes of an array are taken to run along the patient's, as a scan of this geometry says too.
    plain = replace(scan, geometry=Geometry.identity(scan.geometry.size, scan.geometry.spacing))
    for array in (scan.array[0], scan.array, scan.array.astype(np.float64)):
        assert_array_equal(model.predict(array, spacing=spacing), model.predict(plain))


def test_a_model_gives_the_probabilities_of_the_command(model: Any, masks: Path, scans: Path) -> None:
    found = model.probabilities(scans / "images" / "case_3.nii.gz")
    assert list(model.class_names) == [0, 1, 2]
    assert len(found) == 3
    for value, probability in enumerate(found):
        written = read_scan([masks / "probabilities" / f"case_3_{value}.nii.gz"])
        assert_array_equal(probability, written.array[0])


def test_an_array_of_the_patient_axes_gives_the_mask_of_its_file(
    model: Any, supervised_run: Path, tmp_path: Path, scans: Path
) -> None:
    from mlbseg.data.readers import write_image

    scan = read_scan([scans / "images" / "case_5.nii.gz"])
    array, spacing = scan.array[0][:, ::-1].copy(), (1.5, 1.0, 1.25)
    file = tmp_path / "scan.mha"
    write_image(file, array, Geometry.identity(array.shape[::-1], spacing[::-1]))
    mlbseg.predict(supervised_run, file, tmp_path / "masks", device="cpu")
    expected, _ = read_label(tmp_path / "masks" / "scan.mha")
    assert expected.any()
    assert_array_equal(model.predict(array, spacing=spacing), expected)


def test_a_model_takes_the_options_of_the_command(supervised_run: Path, scans: Path, tmp_path: Path) -> None:
    path = scans / "images" / "case_6.nii.gz"
    mlbseg.predict(
        supervised_run, path, tmp_path, largest=True, overlap=0.25, network="student", device="cpu"
    )
    model = mlbseg.load(supervised_run, largest=True, overlap=0.25, network="student", device="cpu")
    assert_array_equal(model.predict(path), read_label(tmp_path / "case_6.nii.gz")[0])


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda m: m.predict(np.zeros((9, 9), np.float32), spacing=(1, 1)), "the array has 2 axes"),
        (lambda m: m.predict(np.zeros((9, 9, 9), np.float32)), "give spacing=(z, y, x) in mm"),
        (lambda m: m.predict(np.zeros((9, 9, 9)), spacing=(1, 1)), "expected 3 positive numbers"),
        (lambda m: m.predict(np.zeros((9, 9, 9)), spacing=(1, 0, 1)), "expected 3 positive numbers"),
        (lambda m: m.predict(np.zeros((9, 9, 9), complex), spacing=(1, 1, 1)), "expected real numbers"),
        (lambda m: m.predict(np.zeros((9, 0, 9)), spacing=(1, 1, 1)), "the array has no voxels"),
        (lambda m: m.predict(np.zeros((2, 9, 9, 9)), spacing=(1, 1, 1)), "the scan is 3D with 2 channel(s)"),
        (lambda m: m.predict(np.full((9, 9, 9), np.nan), spacing=(1, 1, 1)), "NaN or infinite"),
        (lambda m: m.predict("scan.nii.gz", spacing=(1, 1, 1)), "only an array needs one"),
        (lambda m: m.predict("nowhere.nii.gz"), "nowhere.nii.gz"),
        (lambda m: mlbseg.load(m.runs[0].root, flips=True), "the run's plan allows no flips"),
        (lambda m: mlbseg.load(m.runs[0].root, overlap=1.0), "expected a number from 0 to 0.9"),
        (lambda m: mlbseg.load(m.runs[0].root, network="teacher"), "has no 'teacher' network"),
        (lambda m: mlbseg.load(m.runs[0].root.parent), "not a run folder"),
    ],
)
def test_what_a_model_refuses(act: Callable[[Any], object], message: str, model: Any) -> None:
    with pytest.raises(UserError) as caught:
        act(model)
    assert message in str(caught.value)


def test_a_scan_in_memory_keeps_its_own_lattice(model: Any, scans: Path) -> None:
    scan = read_scan([scans / "images" / "case_6.nii.gz"])
    turned = Scan(scan.array[:, ::-1].copy(), scan.geometry)
    assert model.predict(turned).shape == scan.array.shape[1:]


# --- results ----------------------------------------------------------------------------------------------


def test_check_returns_what_the_command_prints(scans: Path, command: Command) -> None:
    result = mlbseg.check(str(scans))
    assert json.loads(json.dumps(result.as_dict())) == command("check", scans, "--json").json
    scans_seen = result.to_pandas()
    assert list(scans_seen["id"]) == [f"case_{i}" for i in range(8)]
    assert set(scans_seen["faults"]) == {""}
    faulty = mlbseg.check(scans, labels=[0, 1])
    assert len(faulty.faults) == 4
    assert sum("label values" in text for text in faulty.to_pandas()["faults"]) == 4


def test_plan_returns_what_the_command_prints(scans: Path, command: Command) -> None:
    overrides = ["network=unet", "patch_size=16"]
    result = mlbseg.plan(scans, overrides=overrides, device="cpu")
    said = command("plan", scans, "--json", "--device", "cpu", *(v for o in overrides for v in ("-o", o)))
    assert said.json["plan"]["patch_size"] == list(result.plan.patch_size) == [16, 16, 16]
    table = result.to_pandas().set_index("decision")
    assert table.loc["patch_size", "value"] == (16, 16, 16)
    assert table.loc["patch_size", "reason"] == result.plan.reasons["patch_size"]


def test_two_arrays_are_scored_as_their_files_are(masks: Path, scans: Path) -> None:
    files = mlbseg.evaluate(masks, {"case_3": scans / "labels" / "case_3.nii.gz"})
    mask, geometry = read_label(masks / "case_3.nii.gz")
    label, _ = read_label(scans / "labels" / "case_3.nii.gz")
    before = (mask.copy(), label.copy())
    arrays = mlbseg.evaluate(mask, label, spacing=geometry.spacing[::-1])
    assert [row.scores for row in arrays.rows] == [row.scores for row in files.rows]
    assert arrays.cases == ("array",)
    assert arrays.summary == files.summary
    ignoring = mlbseg.evaluate(mask, np.where(label == 2, 9, label), spacing=(1, 1, 1), unknown=9)
    assert ignoring.unknown == {"array": int((label == 2).sum())}
    assert_array_equal(mask, before[0])
    assert_array_equal(label, before[1])


def test_scores_as_a_data_frame_are_those_of_the_file(masks: Path, scans: Path, tmp_path: Path) -> None:
    import pandas as pd

    references = {"case_3": scans / "labels" / "case_3.nii.gz"}
    frame = mlbseg.evaluate(masks, references, out=tmp_path / "scores.csv").to_pandas()
    assert list(frame.columns) == ["case", "class", "name", *SCORE_NAMES]
    pd.testing.assert_frame_equal(frame, pd.read_csv(tmp_path / "scores.csv"), rtol=1e-5, check_dtype=False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"spacing": None}, "spacing: found None, expected 3 positive numbers"),
        ({"spacing": (1, 1)}, "expected 3 positive numbers"),
        ({"references": "labels"}, "found an array and a path"),
        ({"references": np.zeros((4, 4, 5), np.int32)}, "expected two arrays of one shape"),
        ({"references": np.zeros((4, 4, 4))}, "expected whole numbers"),
        ({"references": np.zeros((4, 4, 4), np.int32)}, "every label is empty"),
    ],
)
def test_arrays_that_cannot_be_scored(arguments: dict[str, Any], message: str) -> None:
    mask = np.zeros((4, 4, 4), np.int32)
    given = {"references": mask + 1, "spacing": (1, 1, 1), **arguments}
    with pytest.raises(UserError) as caught:
        mlbseg.evaluate(mask, **given)
    assert message in str(caught.value)


def test_folders_need_no_spacing(scans: Path) -> None:
    with pytest.raises(UserError, match="files state their own"):
        mlbseg.evaluate(scans / "labels", scans / "labels", spacing=(1, 1, 1))


def test_suggestions_and_an_audit_as_data_frames(supervised_run: Path, tmp_path: Path) -> None:
    suggested = mlbseg.suggest(supervised_run, n=2, device="cpu").to_pandas()
    assert list(suggested["rank"]) == [1, 2]
    found = mlbseg.audit(supervised_run, out=tmp_path / "audit", device="cpu")
    assert list(found.to_pandas()["case"]) == [case.case for case in found.cases]
    assert len(found.regions_to_pandas()) == sum(len(case.regions) for case in found.cases)


def test_without_pandas_a_table_says_how_to_get_it(scans: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(UserError, match=r"pip install 'mlbseg\[pandas\]'"):
        mlbseg.check(scans).to_pandas()
