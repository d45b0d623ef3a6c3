"""Prediction: masks in the scans' own geometry, format and label values; one bad scan stops no other."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813 - as its documentation does
import torch
from torch import Tensor, nn

import mlbseg
from blocks import SIZE, TINY, blocks, save, write_blocks, write_case
from data.broken import dicom_series
from mlbseg import windows
from mlbseg.apps.audit import audit
from mlbseg.apps.export import export
from mlbseg.apps.report import report
from mlbseg.data.layouts import LONGEST_ID
from mlbseg.data.plan import Plan
from mlbseg.data.readers import SUFFIXES
from mlbseg.errors import FaultsError, UserError
from mlbseg.inference import PredictOptions, predict
from mlbseg.inference.targets import targets
from mlbseg.metrics import dice
from mlbseg.runs.weights import WEIGHTS
from mlbseg.types import Case
from mlbseg.windows import predict_grid

CPU = torch.device("cpu")
VALUES = (0, 2, 5)
TURNED = (0.8, -0.6, 0, 0.6, 0.8, 0, 0, 0, 1)
POSES: dict[str, dict] = {
    "plain.nii.gz": {"spacing": (1, 1.1, 1.3)},
    "moved.nrrd": {"spacing": (1.2, 1, 1), "origin": (-31.5, 12, 400)},
    "oblique.mha": {"spacing": (1, 1, 1.2), "direction": TURNED, "origin": (3, -7, 11)},
    "las.nii.gz": {"axes": (1,), "direction": (1, 0, 0, 0, -1, 0, 0, 0, 1), "origin": (0, 19, 0)},
    "sagittal.nrrd": {"direction": (0, 0, 1, 1, 0, 0, 0, 1, 0), "spacing": (1, 1.2, 1)},
    "rsp.mha": {"axes": (0, 2), "direction": (-1, 0, 0, 0, 1, 0, 0, 0, -1)},
}
"""Formats, spacings, origins and directions (axes: stored backwards)."""


@pytest.fixture(scope="module")
def posed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Scans in every pose with their labels, and a run that learned from others in the same poses."""
    root = tmp_path_factory.mktemp("posed")
    for seed, (name, pose) in enumerate(POSES.items()):
        write_case(root / "train", name, seed, labelled=True, values=VALUES, **pose)
        write_case(root / "new", name, 50 + seed, labelled=True, values=VALUES, **pose)
    overrides = [*TINY, "steps=100", "checkpoint_every=50"]
    data, run = str(root / "train"), str(root / "run")
    mlbseg.train(data, run, method="supervised", overrides=overrides, device="cpu")
    return root / "run", root / "new"


def geometry(image: sitk.Image) -> tuple[np.ndarray, ...]:
    return tuple(
        np.array(v) for v in (image.GetSize(), image.GetSpacing(), image.GetOrigin(), image.GetDirection())
    )


def assert_same_geometry(one: Path, other: Path) -> None:
    for a, b in zip(*(geometry(sitk.ReadImage(str(path))) for path in (one, other)), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def array(path: Path) -> np.ndarray:
    return sitk.GetArrayFromImage(sitk.ReadImage(str(path)))


@pytest.mark.slow
def test_masks_have_the_geometry_format_and_values_of_their_scans(
    posed: tuple[Path, Path], tmp_path: Path
) -> None:
    run, scans = posed
    result = mlbseg.predict(str(run), str(scans), str(tmp_path / "masks"))
    assert not result.faults
    assert {path.name for path in (tmp_path / "masks").iterdir()} == set(POSES)
    for name in POSES:
        mask = tmp_path / "masks" / name
        assert_same_geometry(mask, scans / "images" / name)
        found, truth = array(mask), array(scans / "labels" / name)
        assert set(np.unique(found)) == set(VALUES)
        for value in VALUES[1:]:
            assert dice(found == value, truth == value) > 0.5, (name, value)
    scores = mlbseg.evaluate(str(tmp_path / "masks"), str(scans / "labels"))
    assert scores.mean_dice > 0.6
    assert not scores.faults


@pytest.mark.slow
def test_a_dicom_series_gets_a_nifti_mask(supervised_run: Path, tmp_path: Path) -> None:
    series = dicom_series(tmp_path / "scans" / "patient 1")
    one = predict(supervised_run, series, tmp_path / "one")
    many = predict(supervised_run, tmp_path / "scans", tmp_path / "many")
    for masks in (one, many):
        assert [path.name for path in masks.masks.values()] == ["patient 1.nii.gz"]
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames([str(path) for path in sorted(series.iterdir())])
    mask = sitk.ReadImage(str(one.masks["patient 1"]))
    for a, b in zip(geometry(mask), geometry(reader.Execute()), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)


@pytest.mark.slow
def test_probabilities_sum_to_one_and_agree_with_the_mask(posed: tuple[Path, Path], tmp_path: Path) -> None:
    run, scans = posed
    predict(run, scans, tmp_path, only=["oblique", "las"], probabilities=True)
    for name in ("oblique.mha", "las.nii.gz"):
        case, suffix = name.split(".", 1)
        files = [tmp_path / "probabilities" / f"{case}_{value}.{suffix}" for value in VALUES]
        for file in files:
            assert_same_geometry(file, scans / "images" / name)
        maps = np.stack([array(file) for file in files])
        np.testing.assert_allclose(maps.sum(0), 1, atol=1e-5)
        assert maps.min() >= 0
        likeliest = np.array(VALUES)[maps.argmax(0)]
        assert (likeliest == array(tmp_path / name)).mean() > 0.999
    # The masks' folder still holds masks only.
    assert mlbseg.evaluate(tmp_path, scans / "labels").cases == ("las", "oblique")


@pytest.mark.slow
def test_outside_a_crop_all_is_background(tmp_path: Path) -> None:
    for i in range(3):
        image, label = blocks(i)
        box = ((9, 12), (5, 8), (6, 14))  # of which a margin of 4 is kept
        save(tmp_path / "scans" / "images" / f"{i}.nii.gz", np.pad(image, box))
        save(tmp_path / "scans" / "labels" / f"{i}.nii.gz", np.pad(label, box))
    overrides = [*TINY, "steps=4", "crop=true"]
    mlbseg.train(tmp_path / "scans", tmp_path / "run", method="supervised", overrides=overrides)
    predict(tmp_path / "run", tmp_path / "scans", tmp_path / "masks", probabilities=True)
    background = array(tmp_path / "masks" / "probabilities" / "0_0.nii.gz")
    assert (background[:3] == 1).all()
    assert not array(tmp_path / "masks" / "0.nii.gz")[:3].any()


@pytest.mark.slow
def test_pictures_get_pictures_with_their_own_values(tmp_path: Path) -> None:
    root = write_blocks(
        tmp_path / "scans", suffix=".png", size=(32, 40), values=(0, 255, 255), count=5, labelled=4
    )
    overrides = [*TINY, "steps=100", "checkpoint_every=50", "normalisation=zscore"]
    mlbseg.train(root, tmp_path / "run", method="supervised", overrides=overrides)
    result = predict(tmp_path / "run", root, tmp_path / "masks", probabilities=True)
    assert [path.name for path in result.masks.values()] == [f"case_{i}.png" for i in range(5)]
    mask = array(tmp_path / "masks" / "case_4.png")
    assert (mask.shape, mask.dtype, set(np.unique(mask))) == ((32, 40), np.uint8, {0, 255})
    assert dice(mask > 0, blocks(4, (32, 40))[1] > 0) > 0.5
    maps = [array(tmp_path / "masks" / "probabilities" / f"case_4_{v}.tiff") for v in (0, 255)]
    np.testing.assert_allclose(maps[0] + maps[1], 1, atol=1e-5)


def test_student_and_teacher_answer_differently(mlb_run: Path, scans: Path, tmp_path: Path) -> None:
    maps = {}
    for name in ("student", "teacher", None):
        predict(mlb_run, scans, tmp_path / str(name), network=name, only=["case_0"], probabilities=True)
        maps[name] = array(tmp_path / str(name) / "probabilities" / "case_0_1.nii.gz")
    assert np.abs(maps["student"] - maps["teacher"]).max() > 1e-4
    np.testing.assert_array_equal(maps["student"], maps[None])


def test_flips_and_overlap_change_the_answer_a_little(supervised_run: Path, tmp_path: Path) -> None:
    scan = save(tmp_path / "a.nii.gz", blocks(1, (16, 18, 40))[0])
    with pytest.raises(UserError, match="--flips: the run's plan allows no flips"):
        predict(supervised_run, scan, tmp_path / "none", flips=True)
    assert not (tmp_path / "none").exists()
    run = tmp_path / "run"
    shutil.copytree(supervised_run, run)
    replace(Plan.read(run / "plan.json"), flip_axes=(0, 2)).write(run / "plan.json")
    maps = []
    for i, options in enumerate([{}, {"flips": True}, {"overlap": 0.0}]):
        predict(run, scan, tmp_path / str(i), probabilities=True, **options)
        maps.append(array(tmp_path / str(i) / "probabilities" / "a_1.nii.gz"))
    for other in maps[1:]:
        assert 1e-4 < np.abs(other - maps[0]).mean() < 0.3


@pytest.mark.parametrize(
    ("only", "expected"),
    [
        ("test", {"case_3"}),
        ("clean", {"case_0", "case_1", "case_2"}),
        (["case_5", "case_7"], {"case_5", "case_7"}),
        (None, {f"case_{i}" for i in range(8)}),
    ],
)
def test_only_some_cases(
    only: str | list[str] | None, expected: set[str], supervised_run: Path, scans: Path, tmp_path: Path
) -> None:
    seen: list[tuple[int, int, str]] = []
    result = predict(supervised_run, scans, tmp_path, only=only, progress=lambda *now: seen.append(now))
    assert set(result.masks) == expected
    assert seen == [(i, len(expected), case) for i, case in enumerate([*sorted(expected), ""])]


@pytest.mark.parametrize(
    ("only", "message"),
    [
        (["case_5", "nobody"], "no scan found for 1 cases, such as nobody"),
        ("tests", "the run's split has no part 'tests': did you mean 'test'"),
        ("noisy", "no case is in the noisy part"),
    ],
)
def test_cases_that_are_not_there(
    only: str | list[str], message: str, supervised_run: Path, scans: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        predict(supervised_run, scans, tmp_path / "masks", only=only)
    assert not (tmp_path / "masks").exists()


def test_two_scans_of_one_name_are_refused(supervised_run: Path, scans: Path, tmp_path: Path) -> None:
    file = scans / "images" / "case_0.nii.gz"
    with pytest.raises(UserError, match="two scans are called 'case_0'"):
        predict(supervised_run, [file, scans], tmp_path / "masks")
    (tmp_path / "twice").mkdir()
    for suffix in (".nii.gz", ".nrrd"):
        save(tmp_path / "twice" / f"a{suffix}", blocks(0)[0])
    with pytest.raises(FaultsError, match="two cases of this name"):
        predict(supervised_run, tmp_path / "twice", tmp_path / "masks")
    assert not (tmp_path / "masks").exists()


def test_a_name_that_cannot_be_used_stops_no_other_scan(supervised_run: Path, tmp_path: Path) -> None:
    root = tmp_path / "scans"
    for name in ("images/a.nii.gz", "images/a.nrrd", "images/b.nii.gz", "labels/b.nrrd", "labels/b.mha"):
        save(root / name, blocks(1)[0])
    result = predict(supervised_run, root, tmp_path / "all")
    assert set(result.masks) == {"b"}
    assert [str(fault) for fault in result.faults] == [
        "a: two cases of this name (a.nii.gz, a.nrrd), expected one (rename or remove one)"
    ]
    assert predict(supervised_run, root, tmp_path / "b", only=["b"]).faults == []
    result = predict(supervised_run, root, tmp_path / "both", only=["a", "b"])
    assert (set(result.masks), len(result.faults)) == ({"b"}, 1)


def test_numbered_scans_get_a_mask_each(supervised_run: Path, tmp_path: Path) -> None:
    for i in range(2):
        save(tmp_path / "scans" / f"im_{i:04d}.nii.gz", blocks(i)[0])
    result = predict(supervised_run, tmp_path / "scans", tmp_path / "masks")
    assert (set(result.masks), result.faults) == ({"im_0000", "im_0001"}, [])


def test_one_bad_scan_stops_no_other(supervised_run: Path, tmp_path: Path) -> None:
    root = tmp_path / "scans"
    for name in ("a", "e"):
        save(root / f"{name}.nii.gz", blocks(1)[0])
    (root / "b.nii.gz").write_bytes(b"not a scan")
    save(root / "c.nii.gz", np.stack([blocks(1)[0]] * 2, -1), vector=True)
    save(root / "d.png", blocks(1, (20, 20))[0].clip(0, 255).astype(np.uint8))
    result = predict(supervised_run, root, tmp_path / "masks")
    assert set(result.masks) == {"a", "e"}
    messages = {fault.case_id: str(fault) for fault in result.faults}
    assert "b.nii.gz" in messages["b"]
    assert "3D with 2 channel(s)" in messages["c"]
    assert "2D with 1 channel(s)" in messages["d"]
    assert {path.name for path in (tmp_path / "masks").iterdir()} == {"a.nii.gz", "e.nii.gz"}


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")])
def test_a_scan_too_large_stops_no_other(
    error: Exception, supervised_run: Path, scans: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = windows.predict_grid
    calls: list[int] = []

    def predict_grid(*arguments: object, **options: object) -> object:
        calls.append(1)
        if len(calls) == 2:
            raise error
        return original(*arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(windows, "predict_grid", predict_grid)
    result = predict(supervised_run, scans, tmp_path, only=["case_0", "case_1", "case_2"])
    assert set(result.masks) == {"case_0", "case_2"}
    assert [str(fault) for fault in result.faults] == ["case_1: not enough memory for this scan"]


def test_an_error_of_ours_is_not_taken_for_a_bad_scan(
    supervised_run: Path, scans: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("sizes do not match")

    monkeypatch.setattr(windows, "predict_grid", broken)
    with pytest.raises(RuntimeError, match="sizes do not match"):
        predict(supervised_run, scans, tmp_path)


def test_nothing_is_written_over_unless_asked(supervised_run: Path, scans: Path, tmp_path: Path) -> None:
    (tmp_path / "case_0.nii.gz").write_text("mine")
    (tmp_path / "probabilities").mkdir()
    (tmp_path / "probabilities" / "case_1_2.nii.gz").write_text("mine too")
    wanted = ["case_0", "case_1", "case_2"]
    result = predict(supervised_run, scans, tmp_path, only=wanted, probabilities=True)
    assert set(result.masks) == {"case_2"}
    assert all("exists already (pass --overwrite" in str(fault) for fault in result.faults)
    assert (tmp_path / "case_0.nii.gz").read_text() == "mine"
    assert (tmp_path / "probabilities" / "case_1_2.nii.gz").read_text() == "mine too"
    again = predict(supervised_run, scans, tmp_path, only=wanted, probabilities=True, overwrite=True)
    assert set(again.masks) == set(wanted)
    assert array(tmp_path / "case_0.nii.gz").shape == SIZE


def test_a_scan_is_never_replaced_by_its_mask(supervised_run: Path, scans: Path, tmp_path: Path) -> None:
    images = tmp_path / "images"
    shutil.copytree(scans / "images", images)
    before = (images / "case_0.nii.gz").read_bytes()
    result = predict(supervised_run, images, images, only=["case_0"], overwrite=True)
    assert "is the scan itself (choose another --out)" in str(result.faults[0])
    assert (images / "case_0.nii.gz").read_bytes() == before


def test_what_cannot_be_predicted_at_all(supervised_run: Path, scans: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no scans in it"):
        predict(supervised_run, tmp_path / "empty", tmp_path / "masks")
    with pytest.raises(UserError, match="cannot be opened"):
        predict(supervised_run, tmp_path / "nothing", tmp_path / "masks")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file: cannot be made a folder: File exists"):
        predict(supervised_run, scans, tmp_path / "file")
    with pytest.raises(UserError, match="not a run folder"):
        predict(scans, scans, tmp_path / "masks")
    assert not (tmp_path / "masks").exists()


def test_labels_are_not_looked_at(mlb_run: Path, scans: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(scans, tmp_path / "scans")
    for path in (copy / "labels").iterdir():
        path.write_bytes(b"not a label")
    predict(mlb_run, scans, tmp_path / "a", only=["case_0"])
    result = predict(mlb_run, copy, tmp_path / "b", only=["case_0"])
    np.testing.assert_array_equal(array(result.masks["case_0"]), array(tmp_path / "a" / "case_0.nii.gz"))


def test_a_run_is_all_that_prediction_needs(supervised_run: Path, scans: Path, tmp_path: Path) -> None:
    for name in (WEIGHTS, "plan.json", "config.yaml", "split.json"):
        (tmp_path / "run").mkdir(exist_ok=True)
        shutil.copy(supervised_run / name, tmp_path / "run" / name)
    predict(supervised_run, scans, tmp_path / "a", only=["case_3"])
    predict(tmp_path / "run", scans / "images" / "case_3.nii.gz", tmp_path / "b")
    np.testing.assert_array_equal(*(array(tmp_path / name / "case_3.nii.gz") for name in "ab"))


# --- the pieces -------------------------------------------------------------------------------------------


class Pointwise(nn.Module):
    """A network that sees one pixel: whatever the windows, its answer is known."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([torch.zeros_like(x), x, x.square()], 1)


class FirstHalf(nn.Module):
    """A network that says class 1 in the first half of the last axis, whatever it sees."""

    def forward(self, x: Tensor) -> Tensor:
        first = (torch.arange(x.shape[-1]) < x.shape[-1] // 2).float().expand_as(x) * 20 - 10
        return torch.cat([torch.zeros_like(x), first], 1)


@pytest.mark.parametrize(
    ("shape", "patch"),
    [((20, 24, 9), (8, 8, 8)), ((5, 6, 7), (8, 8, 8)), ((30, 17), (16, 16)), ((11, 20, 18), (16, 16))],
    ids=["3D", "smaller than a window", "2D", "slices"],
)
@pytest.mark.parametrize("flips", [(), (0, 1)])
def test_windows_flips_and_slices_leave_a_pointwise_answer_alone(
    shape: tuple[int, ...], patch: tuple[int, ...], flips: tuple[int, ...]
) -> None:
    image = np.random.default_rng(0).normal(size=(1, *shape)).astype(np.float32)
    found = predict_grid(Pointwise(), image, patch_size=patch, device=CPU, flip_axes=flips)
    expected = torch.softmax(Pointwise()(torch.from_numpy(image)[None]), 1)[0]
    assert (found.dtype, found.shape) == (np.float32, (3, *shape))
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_flips_are_turned_back_and_averaged() -> None:
    image = np.zeros((1, 8, 8), np.float32)
    plain = predict_grid(FirstHalf(), image, patch_size=(8, 8), device=CPU)
    both = predict_grid(FirstHalf(), image, patch_size=(8, 8), device=CPU, flip_axes=(1,))
    other = predict_grid(FirstHalf(), image, patch_size=(8, 8), device=CPU, flip_axes=(0,))
    assert (plain[1, :, :4] > 0.99).all()
    np.testing.assert_allclose(both, (plain + plain[..., ::-1]) / 2, atol=1e-6)
    np.testing.assert_allclose(other, plain, atol=1e-6)


def test_largest_is_applied_to_masks(
    supervised_run: Path, scans: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def grid(network: nn.Module, image: np.ndarray, **_: object) -> np.ndarray:
        maps = np.zeros((3, *image.shape[1:]), np.float32)
        maps[0] = 0.5
        maps[1, 2:6, 2:6, 2:6] = maps[1, 10, 10, 10] = 1
        return maps

    monkeypatch.setattr(windows, "predict_grid", grid)

    def speck(out: str, *, largest: bool | None = None) -> int:
        result = predict(run, scans, tmp_path / out, only=["case_3"], largest=largest)
        return int(array(result.masks["case_3"])[10, 10, 10])

    run = Path(shutil.copytree(supervised_run, tmp_path / "run"))
    record = json.loads((run / "plan.json").read_text())
    for planned, kept in (([], 1), ([2], 1), ([1], 0)):
        (run / "plan.json").write_text(json.dumps(record | {"largest_component": planned}))
        assert speck(f"planned {planned}") == kept
    assert [speck("all", largest=False), speck("one", largest=True)] == [1, 0]


@pytest.mark.slow
def test_the_longest_id_that_is_taken_can_name_every_output(tmp_path: Path) -> None:
    names = [character * LONGEST_ID for character in "abcd"]
    for index, name in enumerate(names):
        write_case(tmp_path / "scans", f"{name}.nii.gz", index, labelled=index < 2)
    run = tmp_path / "run"
    overrides = [*TINY, "steps=4", "mlb.sources=initial,pseudo"]
    mlbseg.train(tmp_path / "scans", run, overrides=overrides, device="cpu")
    result = predict(run, tmp_path / "scans", tmp_path / "masks", probabilities=True)
    assert (sorted(result.masks), result.faults) == (names, [])
    assert len(audit(run).cases) == 2
    exported = export(run, tmp_path / "raw", "nnunet")
    assert not exported.faults
    assert report(run).scored


def test_no_output_has_a_name_that_is_too_long() -> None:
    options = PredictOptions(probabilities=True, uncertainty=True)
    model = SimpleNamespace(label_values=(0, 2**31 - 1), runs=(1, 2), options=options)
    for suffix in set(SUFFIXES) | {".nii.gz"}:
        case = Case("e" * LONGEST_ID, (Path(f"scan{suffix}"),))
        files = targets(case, Path("masks"), model).all  # type: ignore[arg-type]
        assert len(files) == 5
        assert max(len(path.name.encode()) for path in files) <= 255
