"""The generated scans: reproducible, varied, with both structures where and as large as they should be."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from scipy.ndimage import binary_dilation, distance_transform_edt, label

from mlbseg.data.phantom import CLASS_NAMES, phantom, write_phantoms
from mlbseg.data.readers import read_label, read_scan
from mlbseg.errors import UserError

Drawn = tuple[npt.NDArray[np.float32], npt.NDArray[np.uint8], tuple[float, float, float]]


@pytest.fixture(scope="module")
def many() -> list[Drawn]:
    return [phantom(seed) for seed in range(25)]


def test_equal_seeds_give_equal_scans_bit_for_bit() -> None:
    for a, b in zip(phantom(7), phantom(7), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def test_different_seeds_give_different_anatomy_and_scanner(many: list[Drawn]) -> None:
    assert len({image.tobytes() for image, _, _ in many}) == 25
    assert len({labels.tobytes() for _, labels, _ in many}) == 25
    assert len({spacing for _, _, spacing in many}) == 25


def test_global_random_state_is_neither_used_nor_moved() -> None:
    np.random.seed(1)
    before = np.random.get_state()[1].copy()  # type: ignore[index,union-attr]
    phantom(3)
    assert np.array_equal(before, np.random.get_state()[1])  # type: ignore[index]


def test_types_shapes_and_spacing(many: list[Drawn]) -> None:
    for image, labels, spacing in many:
        assert image.shape == labels.shape == (40, 48, 48)
        assert (image.dtype, labels.dtype) == (np.float32, np.uint8)
        assert np.isfinite(image).all()
        assert image.min() >= 0  # a magnitude image
        assert all(1.5 < s < 2.5 for s in spacing)


def test_both_structures_are_there_in_plausible_volume(many: list[Drawn]) -> None:
    for _, labels, spacing in many:
        assert set(np.unique(labels)) == {0, *CLASS_NAMES}
        millilitres = np.bincount(labels.ravel()) * np.prod(spacing) / 1000
        assert 3 < millilitres[1] < 30
        assert 0.5 < millilitres[2] < 5


def test_organ_is_one_piece_but_for_crumbs_and_the_vessel_runs_along_it(many: list[Drawn]) -> None:
    for _, labels, _ in many:
        pieces, _ = label(labels == 1)
        sizes = np.bincount(pieces.ravel())[1:]
        assert sizes.max() > 0.8 * sizes.sum()
        assert (binary_dilation(labels == 1, iterations=2) & (labels == 2)).any()


def test_vessel_is_thin_and_long(many: list[Drawn]) -> None:
    for _, labels, _ in many:
        vessel, organ = labels == 2, labels == 1
        assert distance_transform_edt(vessel).max() < 3.5  # voxels from its middle to its outside
        assert distance_transform_edt(organ).max() > distance_transform_edt(vessel).max()
        assert np.ptp(np.flatnonzero(vessel.any((1, 2)))) >= 10  # slices


def test_structures_move_from_scan_to_scan(many: list[Drawn]) -> None:
    centres = np.array([np.argwhere(labels == 1).mean(0) for _, labels, _ in many])
    assert (centres.std(0) > 1).all()
    everywhere = np.logical_and.reduce([labels == 1 for _, labels, _ in many])
    assert everywhere.sum() < 0.1 * min((labels == 1).sum() for _, labels, _ in many)


def test_contrast_varies_in_strength_and_in_sign(many: list[Drawn]) -> None:
    contrasts = []
    for image, labels, _ in many:
        near = binary_dilation(labels > 0, iterations=4) & ~binary_dilation(labels > 0, iterations=1)
        contrasts.append(image[labels == 1].mean() / np.median(image[near]))
    assert min(contrasts) < 0.95
    assert max(contrasts) > 1.4
    assert np.std(contrasts) > 0.1


def test_the_far_side_holds_what_looks_like_the_organ_but_is_not_labelled(many: list[Drawn]) -> None:
    for image, labels, _ in many:
        assert (labels[:, :, 32:] > 0).sum() == 0
        organ = image[labels == 1]
        low, high = np.percentile(organ, [25, 75])
        far = image[:, 12:36, 27:42]
        assert ((far > low) & (far < high)).sum() > 100


@pytest.mark.parametrize("size", [(16, 16, 16), (24, 40, 32), (64, 64, 64)])
def test_size_sets_the_resolution_and_not_what_is_seen(size: tuple[int, int, int]) -> None:
    image, labels, spacing = phantom(5, size=size)
    assert image.shape == labels.shape == size
    assert set(np.unique(labels)) == {0, 1, 2}
    assert np.multiply(size, spacing) == pytest.approx(np.multiply((40, 48, 48), phantom(5)[2]))


@pytest.mark.parametrize("size", [(8, 48, 48), (48, 48)])
def test_a_size_too_small_for_the_vessel_is_refused(size: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="three axes of at least 16 voxels"):
        phantom(0, size=size)  # type: ignore[arg-type]


def test_files_are_written_with_the_geometry_of_the_scan(tmp_path: Path) -> None:
    write_phantoms(tmp_path / "scans", count=3, seed=11)
    names = [f"phantom_{i:03d}.nii.gz" for i in range(3)]
    assert sorted(p.name for p in (tmp_path / "scans").iterdir()) == ["images", "labels"]
    spacings = set()
    for folder in ("images", "labels"):
        assert sorted(p.name for p in (tmp_path / "scans" / folder).iterdir()) == names
    for name in names:
        scan = read_scan([tmp_path / "scans" / "images" / name])
        labels, geometry = read_label(tmp_path / "scans" / "labels" / name)
        assert scan.geometry == geometry
        assert scan.geometry.size == (48, 48, 40)
        assert geometry.spacing[0] == pytest.approx(geometry.spacing[1])
        assert geometry.spacing[2] == pytest.approx(1.2 * geometry.spacing[0], rel=1e-5)
        assert set(np.unique(labels)) == {0, 1, 2}
        spacings.add(geometry.spacing)
    assert len(spacings) == 3


def test_a_set_is_reproducible_and_a_longer_one_begins_alike(tmp_path: Path) -> None:
    size = (16, 16, 16)
    for name, count, seed in (("a", 2, 1), ("b", 3, 1), ("c", 2, 2)):
        write_phantoms(tmp_path / name, count=count, seed=seed, size=size)

    def image(folder: str, i: int) -> npt.NDArray[np.float32]:
        return read_scan([tmp_path / folder / "images" / f"phantom_{i:03d}.nii.gz"]).array

    for i in range(2):
        assert np.array_equal(image("a", i), image("b", i))
        assert not np.array_equal(image("a", i), image("c", i))
    assert not np.array_equal(image("a", 0), image("a", 1))


def test_an_existing_empty_folder_is_used(tmp_path: Path) -> None:
    write_phantoms(tmp_path, count=1, seed=0, size=(16, 16, 16))
    assert (tmp_path / "labels" / "phantom_000.nii.gz").is_file()


def test_a_folder_with_something_in_it_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="exists already and is not empty"):
        write_phantoms(tmp_path, count=1, seed=0)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]
    with pytest.raises(UserError, match="is a file, expected a folder"):
        write_phantoms(tmp_path / "thesis.txt", count=1, seed=0)
    with pytest.raises(UserError, match="cannot be made a folder"):
        write_phantoms(tmp_path / "thesis.txt" / "below", count=1, seed=0)
