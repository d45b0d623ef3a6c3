"""Greys that interpolation and compression make of masks are found; no structure is taken for one."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813
from PIL import Image
from scipy import ndimage
from scipy.spatial import cKDTree

from mlbseg.data.cases import find_cases
from mlbseg.data.check import CheckResult, check
from mlbseg.data.grey import find_greys
from mlbseg.evaluation import evaluate

SOFT = (Image.Resampling.BILINEAR, Image.Resampling.BICUBIC, Image.Resampling.LANCZOS)


def balls(shape: tuple[int, ...], values: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """Return a label with a round structure for each value, later ones over earlier ones."""
    rng = np.random.default_rng(seed)
    places = np.stack(np.indices(shape), -1) / np.array(shape)
    label = np.zeros(shape, np.int32)
    for value in values:
        label[
            np.linalg.norm(places - rng.uniform(0.3, 0.7, len(shape)), axis=-1) < rng.uniform(0.15, 0.25)
        ] = value
    return label


def parcels(shape: tuple[int, ...], count: int, seed: int = 0) -> np.ndarray:
    """Return an atlas: each voxel belongs to the nearest of `count` points."""
    rng = np.random.default_rng(seed)
    points = rng.uniform(0, 1, (count, len(shape))) * shape
    nearest = cKDTree(points).query(np.stack(np.indices(shape), -1).reshape(-1, len(shape)))[1]
    return rng.permutation(count)[nearest].reshape(shape).astype(np.int32)


# Greys


@pytest.mark.parametrize("size", [(40, 40), (72, 64), (100, 100), (311, 207)])
@pytest.mark.parametrize("how", SOFT)
def test_a_picture_that_was_resized_with_interpolation(how: Image.Resampling, size: tuple[int, int]) -> None:
    small = Image.fromarray(balls((64, 64), (255,)).astype(np.uint8))
    greys = find_greys(np.asarray(small.resize(size, how)).astype(np.int32))
    assert greys is not None
    assert greys.inside == (0, 255)
    label = np.asarray(small.resize(size, how))
    assert greys.voxels == ((label > 0) & (label < 255)).sum()
    assert find_greys(np.asarray(small.resize(size, Image.Resampling.NEAREST)).astype(np.int32)) is None


@pytest.mark.parametrize("quality", [30, 50, 75, 90, 95])
@pytest.mark.parametrize("side", [64, 256])
def test_a_mask_that_was_jpeg_once(side: int, quality: int) -> None:
    file = io.BytesIO()
    Image.fromarray(balls((side, side), (255,)).astype(np.uint8)).save(file, "JPEG", quality=quality)
    assert find_greys(np.asarray(Image.open(file)).astype(np.int32)) is not None


@pytest.mark.parametrize("values", [(10,), (5, 10), (1, 8), (100, 200), (205, 420, 500, 550, 600, 820, 850)])
@pytest.mark.parametrize("factor", [1.3, 2, 3])
@pytest.mark.parametrize("shape", [(64, 64), (16, 32, 32)])
def test_a_label_that_was_resampled_and_rounded(
    shape: tuple[int, ...], factor: float, values: tuple[int, ...]
) -> None:
    label = balls(shape, values).astype(float)
    soft = np.rint(ndimage.zoom(label, factor, order=1)).astype(np.int32)
    greys = find_greys(soft)
    assert greys is not None
    assert set(greys.edge) - set(values)
    assert find_greys(ndimage.zoom(label.astype(np.int32), factor, order=0)) is None
    assert find_greys(soft, stated=np.unique(soft).tolist()) is None


# Structures


@pytest.mark.parametrize(
    ("shape", "count"),
    [((64, 64), 100), ((20, 20, 20), 100), ((20, 20, 20), 400), ((32, 32, 32), 130), ((128, 128), 2000)],
)
def test_an_atlas_is_no_grey(shape: tuple[int, ...], count: int) -> None:
    assert find_greys(parcels(shape, count)) is None


@pytest.mark.parametrize("thick", [1, 2, 3])
@pytest.mark.parametrize("under", [0, 90])
def test_a_parcelled_cortex_is_no_grey(under: int, thick: int) -> None:
    """A ribbon of 1 to 3 voxels, its parcels between the background and what lies under it."""
    side = 32
    far = np.linalg.norm(np.stack(np.indices((side,) * 3), -1) - side / 2 + 0.5, axis=-1)
    ribbon = np.where(far < side * 0.42, parcels((side,) * 3, 80) + 1, 0)
    assert find_greys(np.where(far < side * 0.42 - thick, under, ribbon).astype(np.int32)) is None


def test_lesions_of_a_voxel_are_no_greys() -> None:
    rng = np.random.default_rng(0)
    scattered = (rng.random((30, 40, 40)) < 0.01).astype(np.int32)
    assert find_greys(scattered) is None
    numbered = np.zeros((30, 40, 40), np.int32)
    numbered.flat[rng.choice(numbered.size, 60, replace=False)] = np.arange(1, 61)
    assert find_greys(numbered) is None
    organs = balls((30, 40, 40), (1, 2, 3, 4))
    organs[scattered > 0] = 5
    assert find_greys(organs) is None


def test_thin_layers_and_vessels_are_no_greys() -> None:
    depth, along = np.indices((64, 100))
    for thick in (2, 3, 5):  # layers of a retina, their values in order
        layers = np.clip((depth - 15 - 5 * np.sin(along / 15)) / thick, 0, 9).astype(np.int32)
        assert find_greys(layers) is None
    vessels = np.zeros((64, 64), np.int32)
    for value, row in enumerate(range(5, 60, 9), start=1):
        vessels[row, 4:60] = value
    assert find_greys(vessels) is None


def test_touching_cells_with_numbers_are_no_greys() -> None:
    cells = parcels((128, 128), 300)
    cells[ndimage.minimum_filter(cells, 3) != cells] = 0
    assert find_greys(cells) is None


def test_many_organs_with_thin_walls_are_no_greys() -> None:
    label = balls((24, 48, 48), tuple(range(1, 14)), seed=3)
    wall = (ndimage.maximum_filter(label, 3) > 0) & (label == 0)
    label[wall] = 14
    assert find_greys(label) is None


@pytest.mark.realdata
@pytest.mark.parametrize("pattern", ["hippocampus/labelsTr/*.nii.gz", "acdc/labels/*", "fetal/labels/*.png"])
def test_real_labels_are_no_greys(pattern: str, realdata: Path) -> None:
    files = sorted(realdata.glob(pattern))[:40]
    assert files
    for file in files:
        assert find_greys(sitk.GetArrayFromImage(sitk.ReadImage(str(file))).astype(np.int32)) is None, (
            file.name
        )


# In `check` and `evaluate`


def soft_set(root: Path, labelled: int, suffix: str = ".png") -> Path:
    for folder in ("images", "labels"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    for seed in range(6):
        scan = np.random.default_rng(seed).integers(0, 255, (64, 72)).astype(np.uint8)
        Image.fromarray(scan).save(root / "images" / f"p{seed}{suffix}")
        if seed < labelled:
            mask = Image.fromarray(balls((32, 36), (255,), seed).astype(np.uint8))
            mask.resize((72, 64), SOFT[0]).save(root / "labels" / f"p{seed}{suffix}")
    return root


def run(root: Path, **options: list[int]) -> CheckResult:
    return check(find_cases(root), **options)


@pytest.mark.parametrize("labelled", [1, 2, 4])
@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_grey_edges_are_a_fault_at_any_number_of_labels(suffix: str, labelled: int, tmp_path: Path) -> None:
    result = run(soft_set(tmp_path, labelled, suffix))
    assert [(fault.case_id, fault.kind) for fault in result.faults] == [
        (f"p{i}", "grey") for i in range(labelled)
    ]
    text = str(result.faults[0])
    assert "lie only at the edges of others" in text
    assert "expected values of structures only, here 0, 255" in text
    assert "resize the mask with nearest neighbour" in text
    assert "state them with --labels" in text


def test_greys_of_other_labels_are_never_expected(tmp_path: Path) -> None:
    root = soft_set(tmp_path, 4)
    for name in ("p0", "p1", "p2"):
        sharp = np.asarray(Image.open(root / "labels" / f"{name}.png")) > 127
        Image.fromarray(sharp.astype(np.uint8) * 255).save(root / "labels" / f"{name}.png")
    result = run(root)
    assert [(fault.case_id, fault.kind) for fault in result.faults] == [("p3", "grey")]
    assert result.summary["labels"] == {"0": 3, "255": 3}


def test_values_that_are_stated_are_no_greys(tmp_path: Path) -> None:
    root = soft_set(tmp_path, 2)
    assert {fault.kind for fault in run(root, labels=[255]).faults} == {"grey"}
    assert run(root, labels=list(range(256))).faults == ()


def test_jpeg_labels_are_a_fault(tmp_path: Path) -> None:
    root = soft_set(tmp_path, 0, ".jpg")
    for seed in range(2):
        Image.fromarray(balls((64, 72), (255,), seed).astype(np.uint8)).save(root / "labels" / f"p{seed}.jpg")
    found = [str(fault) for fault in run(root).faults if fault.case_id]
    assert len(found) == 2
    assert found[0].startswith(
        "labels/p0.jpg: a JPEG file, whose compression changes label values, expected a PNG file"
    )


def test_evaluate_names_grey_masks_and_scores_the_others(tmp_path: Path) -> None:
    soft_set(tmp_path, 3)
    sharp = tmp_path / "sharp"
    sharp.mkdir()
    for path in sorted((tmp_path / "labels").iterdir()):
        Image.fromarray((np.asarray(Image.open(path)) > 127).astype(np.uint8) * 255).save(sharp / path.name)
    (tmp_path / "labels" / "p0.png").write_bytes((sharp / "p0.png").read_bytes())
    result = evaluate(sharp, tmp_path / "labels")
    assert result.cases == ("p0",)
    assert [(fault.case_id, fault.where, fault.kind) for fault in result.faults] == [
        ("p1", "labels/p1.png", "grey"),
        ("p2", "labels/p2.png", "grey"),
    ]
    everything = {value: str(value) for value in range(1, 256)}
    assert len(evaluate(sharp, tmp_path / "labels", classes=everything).cases) == 3
