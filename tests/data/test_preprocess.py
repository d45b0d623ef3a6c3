from __future__ import annotations

import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import SimpleITK as sitk  # noqa: N813 - as its documentation does
from hypothesis import given, settings
from hypothesis import strategies as st

from mlbseg.data import preprocess
from mlbseg.data.lattice import at_spacing, content_box, crop, orientation, reorient
from mlbseg.data.plan import Plan
from mlbseg.data.preprocess import (
    Frame,
    prepare_label,
    prepare_scan,
    restore_label,
    restore_probability,
)
from mlbseg.data.readers import read_label, read_scan
from mlbseg.errors import UserError
from mlbseg.metrics import dice
from mlbseg.types import Geometry, Scan

PLAN = Plan(
    ndim=3,
    scan_ndim=3,
    channels=1,
    label_values=(0, 3, 7),
    class_names=("background", "a", "b"),
    spacing=(0.0, 0.0, 0.0),
    patch_size=(32, 32, 32),
    normalisation=("zscore",),
    intensity=(),
    crop=False,
    network="unet",
    network_channels=(8, 16, 32),
    batch_size=2,
    unlabelled_batch_size=2,
    steps=100,
    flip_axes=(),
)
PLAN_2D = replace(PLAN, ndim=2, scan_ndim=2, spacing=(0.0, 0.0), patch_size=(32, 32))


def oblique() -> tuple[float, ...]:
    """A rotation by 20 degrees about an axis that is none of the scan's."""
    axis, angle = np.array([1.0, 2.0, 3.0]) / np.sqrt(14), np.deg2rad(20)
    k = np.array([[0, -axis[2], axis[1]], [axis[2], 0, -axis[0]], [-axis[1], axis[0], 0]])
    return tuple((np.eye(3) + np.sin(angle) * k + (1 - np.cos(angle)) * k @ k).ravel().tolist())


DIRECTIONS = {
    "LPS": (1.0, 0, 0, 0, 1, 0, 0, 0, 1),
    "RAS": (-1.0, 0, 0, 0, -1, 0, 0, 0, 1),
    "LAS": (1.0, 0, 0, 0, -1, 0, 0, 0, 1),
    "sagittal": (0.0, 0, -1, 1, 0, 0, 0, -1, 0),
    "oblique": oblique(),
}


def native(direction: str = "LPS", spacing: tuple[float, ...] = (1.0, 1.0, 1.0)) -> Geometry:
    return Geometry((30, 26, 22), spacing, (-11.0, 42.5, 7.0), DIRECTIONS[direction])


def label_on(geometry: Geometry) -> npt.NDArray[np.int32]:
    """Two ellipsoids off the centre, so that every flip and permutation shows."""
    axes = [np.linspace(-1, 1, n) for n in reversed(geometry.size)]
    grid = np.meshgrid(*axes, indexing="ij")
    big = sum(((g - c) / r) ** 2 for g, c, r in zip(grid, (0.1, -0.2, 0.3), (0.7, 0.6, 0.5), strict=False))
    small = sum(((g - c) / r) ** 2 for g, c, r in zip(grid, (-0.2, 0.1, 0.3), (0.35,) * 3, strict=False))
    return np.where(small < 1, 7, np.where(big < 1, 3, 0)).astype(np.int32)


def scan_on(geometry: Geometry, channels: int = 1, *, seed: int = 0) -> Scan:
    shape = tuple(reversed(geometry.size))
    noise = np.random.default_rng(seed).uniform(1, 2, (channels, *shape))
    return Scan((noise + 10 * label_on(geometry)).astype(np.float32), geometry)


def one_hot(indices: npt.NDArray[np.uint8], classes: int) -> npt.NDArray[np.float32]:
    return np.stack([(indices == k) for k in range(classes)]).astype(np.float32)


def round_trip(geometry: Geometry, plan: Plan) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32], Frame]:
    label = label_on(geometry)
    prepared, frame = prepare_scan(scan_on(geometry, plan.channels), plan)
    indices = prepare_label(label, frame.native, frame.grid, plan)
    assert indices.shape == prepared.shape[1:]
    assert indices.dtype == np.uint8
    return label, restore_label(one_hot(indices, plan.num_classes), frame, plan), frame


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (0.7, 0.7, 3.1)])
def test_a_label_returns_unchanged_at_its_own_spacing(direction: str, spacing: tuple[float, ...]) -> None:
    label, restored, _ = round_trip(native(direction, spacing), PLAN)
    assert np.array_equal(restored, label)
    assert restored.dtype == np.int32


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("target", [(2.0, 2.0, 2.0), (2.0, 1.0, 2.0), (0.6, 0.6, 0.6)])
def test_a_label_returns_nearly_unchanged_from_another_spacing(
    direction: str, target: tuple[float, ...]
) -> None:
    geometry = replace(native(direction), size=(60, 52, 44))  # structures of 10 to 40 voxels
    label, restored, frame = round_trip(geometry, replace(PLAN, spacing=target))
    assert tuple(reversed(frame.grid.spacing)) == target
    for value in (3, 7):
        assert dice(restored == value, label == value) > 0.9


def test_a_2d_label_returns_unchanged_and_nearly_so_from_half_resolution() -> None:
    geometry = Geometry((60, 44), (0.5, 0.5), (3.0, -2.0), (1.0, 0.0, 0.0, 1.0))
    label, restored, _ = round_trip(geometry, PLAN_2D)
    assert np.array_equal(restored, label)
    label, restored, frame = round_trip(geometry, replace(PLAN_2D, spacing=(1.0, 1.0)))
    assert frame.grid.size == (30, 22)
    assert dice(restored == 3, label == 3) > 0.9


def test_a_2d_plan_of_3d_scans_keeps_each_scans_own_slices() -> None:
    geometry = native("RAS", (0.5, 0.5, 4.0))
    plan = replace(PLAN, ndim=2, spacing=(0.0, 1.0, 1.0), patch_size=(16, 16))
    label, restored, frame = round_trip(geometry, plan)
    assert frame.grid.size == (15, 13, 22)
    assert frame.grid.spacing == (1.0, 1.0, 4.0)
    assert dice(restored == 3, label == 3) > 0.9


def test_sagittal_slices_come_first_in_a_plan_oriented_so() -> None:
    geometry = native("sagittal", (0.5, 0.5, 4.0))  # slices run from right to left, 22 of them
    plan = replace(PLAN, ndim=2, spacing=(0.0, 0.5, 0.5), orientation="PSL", patch_size=(16, 16))
    prepared, frame = prepare_scan(scan_on(geometry), plan)
    assert prepared.shape == (1, 22, 26, 30)
    assert frame.grid.spacing[2] == 4.0
    label, restored, _ = round_trip(geometry, plan)
    assert np.array_equal(restored, label)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_orientation_agrees_with_simpleitk(direction: str) -> None:
    scan = scan_on(native(direction))
    image = sitk.GetImageFromArray(scan.array[0])
    image.SetSpacing(scan.geometry.spacing)
    image.SetOrigin(scan.geometry.origin)
    image.SetDirection(scan.geometry.direction)
    oriented = sitk.DICOMOrient(image, "LPS")
    turned = reorient(scan.geometry, "LPS")
    assert turned.size == oriented.GetSize()
    assert np.allclose(turned.origin, oriented.GetOrigin())
    assert np.allclose(turned.direction, oriented.GetDirection())
    assert orientation(turned) == "LPS"
    mean, std = scan.array.mean(), scan.array.std()
    prepared, _ = prepare_scan(scan, PLAN)
    assert np.allclose(prepared[0], (sitk.GetArrayFromImage(oriented) - mean) / std, atol=1e-2)


def test_zscore_is_taken_over_the_voxels_above_the_background() -> None:
    array = np.zeros((1, 20, 20, 20), np.float32)
    array[0, 5:15, 5:15, 5:15] = np.random.default_rng(0).normal(500, 30, (10, 10, 10))
    prepared, _ = prepare_scan(Scan(array, Geometry.identity((20, 20, 20))), PLAN)
    inside = prepared[0, 5:15, 5:15, 5:15]
    assert abs(float(inside.mean())) < 1e-3
    assert float(inside.std()) == pytest.approx(1, abs=1e-3)
    assert np.all(prepared[0, :5] < -10)


def test_large_intensities_are_normalised_as_small_ones() -> None:
    scan = scan_on(native())
    small, _ = prepare_scan(scan, PLAN)
    large, _ = prepare_scan(Scan(scan.array * np.float32(1e5), scan.geometry), PLAN)
    assert np.allclose(small, large, atol=1e-3)


def test_a_constant_scan_becomes_zero() -> None:
    scan = Scan(np.full((1, 8, 8, 8), 7, np.float32), Geometry.identity((8, 8, 8)))
    prepared, _ = prepare_scan(scan, replace(PLAN, crop=True))
    assert not prepared.any()


def test_ct_is_clipped_and_scaled_by_the_plan() -> None:
    window = {"lower": -100.0, "upper": 300.0, "mean": 100.0, "std": 50.0}
    plan = replace(PLAN, normalisation=("ct",), intensity=(window,))
    array = np.full((1, 4, 4, 4), -1000, np.float32)
    array[0, 2], array[0, 3] = 150, 3000
    prepared, _ = prepare_scan(Scan(array, Geometry.identity((4, 4, 4))), plan)
    assert prepared[0, :, 0, 0].tolist() == [-4, -4, 1, 4]


def test_channels_are_normalised_each_by_itself() -> None:
    plan = replace(PLAN, channels=2, normalisation=("zscore", "zscore"))
    scan = scan_on(native(), channels=2)
    scan.array[1] *= 100
    prepared, _ = prepare_scan(scan, plan)
    assert prepared.shape[0] == 2
    assert np.allclose(prepared.std(axis=(1, 2, 3)), 1, atol=0.01)


def test_the_scan_itself_is_left_as_it_was() -> None:
    scan = scan_on(native("oblique"))
    before = scan.array.copy()
    prepare_scan(scan, replace(PLAN, spacing=(2.0, 2.0, 2.0), crop=True))
    assert np.array_equal(scan.array, before)


def padded(margin: int) -> Scan:
    geometry = native("RAS")
    inner = scan_on(geometry).array
    wide = ((0, 0), *((margin, margin),) * 3)
    return Scan(
        np.pad(inner, wide, constant_values=-1000),
        replace(geometry, size=tuple(n + 2 * margin for n in geometry.size)),
    )


def test_empty_margins_are_cropped_and_come_back_as_background() -> None:
    plan = replace(PLAN, crop=True)
    scan = padded(20)
    prepared, frame = prepare_scan(scan, plan)
    assert prepared.shape == (1, 22 + 8, 26 + 8, 30 + 8)
    label = np.pad(label_on(native("RAS")), 20)
    indices = prepare_label(label, frame.native, frame.grid, plan)
    assert np.array_equal(restore_label(one_hot(indices, 3), frame, plan), label)
    everywhere = np.stack([np.zeros(indices.shape), np.ones(indices.shape), np.zeros(indices.shape)])
    filled = restore_label(everywhere.astype(np.float32), frame, plan)
    assert set(np.unique(filled[16:-16, 16:-16, 16:-16])) == {3}
    assert filled.sum() == 3 * indices.size


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("target", [(0.0, 0.0, 0.0), (1.7, 0.8, 1.3)])
def test_slabs_change_nothing(
    direction: str, target: tuple[float, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    geometry = native(direction, (1.0, 0.9, 2.1))
    plan = replace(PLAN, spacing=target)
    label = label_on(geometry)
    _, frame = prepare_scan(scan_on(geometry), plan)
    # A grid that reaches over only a part of the scan: some slabs lie beside it.
    inner = crop(frame.grid, tuple((n // 4, n // 2) for n in reversed(frame.grid.size)))
    probability = np.random.default_rng(0).dirichlet(np.ones(3), tuple(reversed(inner.size)))
    probability = np.ascontiguousarray(np.moveaxis(probability, -1, 0), np.float32)
    results = []
    for voxels in (10**9, 2500, 1):
        monkeypatch.setattr(preprocess, "SLAB_VOXELS", voxels)
        indices = prepare_label(label, geometry, frame.grid, plan)
        results.append((indices, restore_label(probability, Frame(geometry, inner), plan)))
    for indices, restored in results[1:]:
        assert np.array_equal(indices, results[0][0])
        assert np.array_equal(restored, results[0][1])
    assert {3, 7} <= set(np.unique(results[0][1]).tolist())
    assert (results[0][1] == 0).mean() > 0.5


def test_a_crop_that_saves_little_is_not_made() -> None:
    scan = padded(1)
    prepared, _ = prepare_scan(scan, replace(PLAN, crop=True))
    assert prepared.shape == scan.array.shape


def test_probabilities_return_to_the_native_lattice() -> None:
    scan = padded(20)
    plan = replace(PLAN, crop=True, spacing=(2.0, 2.0, 2.0))
    _, frame = prepare_scan(scan, plan)
    probability = np.full(tuple(reversed(frame.grid.size)), 0.25, np.float32)
    restored = restore_probability(probability, frame)
    assert restored.shape == scan.array.shape[1:]
    assert restored.dtype == np.float32
    assert np.allclose(restored[30:-30, 30:-30, 30:-30], 0.25)
    assert not restored[:10].any()
    restored += 1  # memory of its own


def test_half_a_probability_each_is_interpolated_between_grid_voxels() -> None:
    plan = replace(PLAN, spacing=(1.0, 1.0, 4.0))
    geometry = Geometry.identity((8, 1, 1))
    frame = Frame(geometry, at_spacing(geometry, plan.spacing))
    assert frame.grid.size == (2, 1, 1)
    restored = restore_probability(np.array([[[0.0, 1.0]]], np.float32), frame)
    assert np.allclose(restored[0, 0], [0, 0, 0.125, 0.375, 0.625, 0.875, 1, 1])


def test_fine_texture_is_smoothed_away_before_down_sampling() -> None:
    array = np.zeros((1, 33, 33, 33), np.float32)
    array[:, :, :, ::2] = 1  # alternating columns: a frequency that no coarser grid holds
    scan = Scan(array, Geometry.identity((33, 33, 33)))
    window = {"lower": -10.0, "upper": 10.0, "mean": 0.0, "std": 1.0}
    plan = replace(PLAN, spacing=(1.0, 1.0, 3.0), normalisation=("ct",), intensity=(window,))
    prepared, _ = prepare_scan(scan, plan)
    assert np.allclose(prepared[0, :, :, 2:-2], 0.5, atol=0.05)


def test_three_classes_meeting_never_make_a_fourth() -> None:
    plan = replace(PLAN, label_values=(0, 1, 9), spacing=(1.0, 1.0, 0.55))
    label = np.repeat(np.array([0, 9, 0, 1], np.int32), 4)[None, None].repeat(3, 0).repeat(3, 1)
    geometry = Geometry.identity((16, 3, 3))
    grid = at_spacing(geometry, plan.spacing)
    indices = prepare_label(label, geometry, grid, plan)
    line = indices[1, 1].tolist()
    assert [k for k, previous in zip(line, [None, *line], strict=False) if k != previous] == [0, 2, 0, 1]


def test_unexpected_label_values_are_named() -> None:
    geometry = native()
    label = label_on(geometry)
    label[0, 0, 0] = 5
    with pytest.raises(UserError, match=r"\[5\].*\[0, 3, 7\]"):
        prepare_label(label, geometry, geometry, PLAN)


def test_a_label_of_another_size_is_refused() -> None:
    with pytest.raises(UserError, match="voxels, expected"):
        prepare_label(np.zeros((2, 2, 2), np.int32), native(), native(), PLAN)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_non_finite_scans_are_refused(value: float) -> None:
    scan = scan_on(native())
    scan.array[0, 3, 3, 3] = value
    with pytest.raises(UserError, match="NaN or infinite"):
        prepare_scan(scan, PLAN)


def test_a_scan_of_other_channels_or_dimension_is_refused() -> None:
    with pytest.raises(UserError, match=r"2 channel.*expected 3D with 1"):
        prepare_scan(scan_on(native(), channels=2), PLAN)
    with pytest.raises(UserError, match="expected 2D"):
        prepare_scan(scan_on(native()), PLAN_2D)


@given(
    size=st.tuples(*[st.integers(1, 40)] * 3),
    own=st.tuples(*[st.floats(0.3, 5)] * 3),
    wanted=st.tuples(*[st.floats(0.3, 5)] * 3),
    direction=st.sampled_from(sorted(DIRECTIONS)),
)
@settings(deadline=None, max_examples=60)
def test_no_native_voxel_lies_outside_the_grids_field_of_view(
    size: tuple[int, int, int],
    own: tuple[float, ...],
    wanted: tuple[float, ...],
    direction: str,
) -> None:
    geometry = Geometry(size, own, (5.0, -3.0, 2.0), DIRECTIONS[direction])
    grid = at_spacing(reorient(geometry, "LPS"), wanted)
    inverse = np.linalg.inv(np.reshape(grid.direction, (3, 3)) * np.asarray(grid.spacing))
    step = np.reshape(geometry.direction, (3, 3)) * np.asarray(geometry.spacing)
    for corner in ((0, 0, 0), np.array(size) - 1):
        index = inverse @ (np.asarray(geometry.origin) + step @ np.asarray(corner) - np.asarray(grid.origin))
        assert np.all(index >= -0.501)
        assert np.all(index <= np.asarray(grid.size) - 1 + 0.501)


def test_cropping_moves_the_origin_to_the_first_kept_voxel() -> None:
    geometry = native("oblique", (0.5, 1.0, 2.0))
    part = crop(geometry, ((2, 10), (3, 11), (4, 12)))
    step = np.reshape(geometry.direction, (3, 3)) * np.asarray(geometry.spacing)
    assert part.size == (8, 8, 8)
    assert np.allclose(part.origin, np.asarray(geometry.origin) + step @ [4, 3, 2])


def test_content_of_any_channel_counts_for_the_box() -> None:
    array = np.zeros((2, 40, 40), np.float32)
    array[0, 10, 12] = array[1, 20, 30] = 1
    assert content_box(array) == ((6, 25), (8, 35))


def test_memory_stays_within_a_few_copies() -> None:
    geometry = Geometry.identity((96, 96, 96))
    scan = Scan(np.random.default_rng(0).random((1, 96, 96, 96), np.float32), geometry)
    copy = scan.array.nbytes
    tracemalloc.start()  # sees NumPy's arrays; SimpleITK adds two images, one channel each
    prepare_scan(scan, replace(PLAN, crop=True))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2 * copy


@pytest.mark.realdata
@pytest.mark.parametrize("spacing", [0.0, 1.25])
def test_a_real_atrium_survives_the_way_there_and_back(realdata: Path, spacing: float) -> None:
    image = min((realdata / "la" / "images").glob("*.nii.gz"))
    label, _ = read_label(realdata / "la" / "labels" / image.name)
    plan = replace(PLAN, label_values=(0, 1), class_names=("background", "atrium"), spacing=(spacing,) * 3)
    _, frame = prepare_scan(read_scan([image]), plan)
    indices = prepare_label(label, frame.native, frame.grid, plan)
    restored = restore_label(one_hot(indices, 2), frame, plan)
    assert dice(restored == 1, label == 1) >= (1 if spacing == 0 else 0.95)
