"""Axes that are not quite at right angles, in formats whose axes SimpleITK takes as they are."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813

from data import dicom_files
from mlbseg.data.geometry import HALF, geometry_difference, onto, straight
from mlbseg.data.readers import read_label, read_scan, write_image, write_label
from mlbseg.errors import ReadError
from mlbseg.types import Geometry

SIZE = (50, 40, 30)
SPACING = (0.8, 1.1, 2.5)
ORIGIN = (-12.5, 30.25, 7.5)
OBLIQUE = np.array([[0.8, -0.48, 0.36], [0.6, 0.64, -0.48], [0.0, 0.6, 0.8]])


def labels() -> np.ndarray:
    """(z, y, x), of no symmetry."""
    label = np.zeros(SIZE[::-1], np.uint8)
    label[3:9, 5:20, 30:45] = 1
    label[20:28, 30, 2:9] = 2
    return label


def skewed(shear: float) -> np.ndarray:
    """Let y lean towards x, as (3, 3) columns of length 1."""
    direction = OBLIQUE.copy()
    direction[:, 1] += shear * direction[:, 0]
    return direction / np.linalg.norm(direction, axis=0)


def image(array: np.ndarray, direction: np.ndarray) -> sitk.Image:
    n = array.ndim
    made = sitk.GetImageFromArray(array)
    made.SetSpacing(SPACING[:n])
    made.SetOrigin(ORIGIN[:n])
    made.SetDirection(direction.ravel().tolist())
    return made


def corners(geometry: Geometry) -> np.ndarray:
    n = geometry.ndim
    index = np.array(list(itertools.product(*((0, size - 1) for size in geometry.size))))
    return index * geometry.spacing @ np.reshape(geometry.direction, (n, n)).T + geometry.origin


def of_itk(made: sitk.Image) -> Geometry:
    return Geometry(made.GetSize(), made.GetSpacing(), made.GetOrigin(), made.GetDirection())


def lies_within(geometry: Geometry, made: sitk.Image, voxels: float) -> bool:
    """Say whether every corner is within a share of the shortest side of a voxel of where ITK has it."""
    apart = np.linalg.norm(corners(geometry) - corners(of_itk(made)), axis=1)
    return bool(apart.max() <= voxels * min(geometry.spacing) + 1e-9)


def is_straight(geometry: Geometry) -> bool:
    direction = np.reshape(geometry.direction, (geometry.ndim, geometry.ndim))
    return np.allclose(direction.T @ direction, np.eye(geometry.ndim), rtol=0, atol=2e-6)


@pytest.mark.parametrize("suffix", [".mha", ".nrrd"])
@pytest.mark.parametrize(("shear", "most"), [(2e-5, None), (5e-4, "0.01"), (1e-3, "0.1"), (-1e-2, "0.5")])
def test_rounded_axes_are_straightened_and_masks_keep_them(
    suffix: str, shear: float, most: str | None, tmp_path: Path
) -> None:
    """What ITK computes with scan and mask needs the same direction to 1e-6."""
    path = tmp_path / f"a{suffix}"
    sitk.WriteImage(image(labels().astype(np.int16), skewed(shear)), str(path))
    made = sitk.ReadImage(str(path))
    scan = read_scan([path])
    assert is_straight(scan.geometry)
    assert not is_straight(of_itk(made))
    assert lies_within(scan.geometry, made, HALF)
    assert [note.split("less than ")[1].split(" ")[0] for note in scan.notes] == ([most] if most else [])
    mask = tmp_path / f"mask{suffix}"
    write_label(mask, labels(), scan.geometry)
    both = sitk.Mask(made, sitk.ReadImage(str(mask)))  # raises where they do not lie at the same place
    assert np.array_equal(sitk.GetArrayFromImage(both), labels())
    assert lies_within(of_itk(sitk.ReadImage(str(mask))), made, 1e-6)
    label, geometry = read_label(mask)
    assert np.array_equal(onto(label, geometry, scan.geometry, where="", whose="its scan"), labels())


@pytest.mark.parametrize("suffix", [".mha", ".nrrd"])
@pytest.mark.parametrize("shear", [5e-4, 1e-3, -1e-2])
def test_labels_of_any_format_and_order_fit_a_skewed_scan(suffix: str, shear: float, tmp_path: Path) -> None:
    """ITK straightens about the first voxel where it writes NIfTI."""
    direction = skewed(shear)
    sitk.WriteImage(image(labels().astype(np.int16), direction), str(tmp_path / f"a{suffix}"))
    scan = read_scan([tmp_path / f"a{suffix}"])
    own = image(labels(), direction)
    for name, made in {
        "label.mha": own,
        "label.nrrd": own,
        "label.nii.gz": own,
        "flipped.mha": sitk.Flip(own, (True, False, True), False),
        "turned.nrrd": sitk.PermuteAxes(own, (2, 0, 1)),
    }.items():
        sitk.WriteImage(made, str(tmp_path / name))
        label, geometry = read_label(tmp_path / name)
        turned = onto(label, geometry, scan.geometry, where=name, whose="its scan")
        assert np.array_equal(turned, labels())


@pytest.mark.parametrize("shear", [1e-3, -5e-3])
def test_a_cropped_segmentation_of_a_skewed_scan(shear: float, tmp_path: Path) -> None:
    """Its own middle is not the scan's."""
    own = image(labels(), skewed(shear))
    sitk.WriteImage(sitk.Cast(own, sitk.sitkInt16), str(tmp_path / "a.nrrd"))
    part = own[28:48, 4:36, 2:10]
    for key, value in {"ID": "s", "Name": "one", "LabelValue": "1", "Layer": "0"}.items():
        part.SetMetaData(f"Segment0_{key}", value)
    sitk.WriteImage(part, str(tmp_path / "a.seg.nrrd"))
    scan = read_scan([tmp_path / "a.nrrd"])
    label, geometry = read_label(tmp_path / "a.seg.nrrd")
    whole = onto(label, geometry, scan.geometry, where="", whose="its scan")
    assert np.array_equal(whole, np.where(labels() == 1, 1, 0))


@pytest.mark.parametrize("suffix", [".mha", ".nrrd"])
def test_a_rotation_of_three_decimals_is_read(suffix: str, tmp_path: Path) -> None:
    angle = np.radians(17.3)
    c, s = round(float(np.cos(angle)), 3), round(float(np.sin(angle)), 3)
    path = tmp_path / f"a{suffix}"
    rounded = np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]])
    sitk.WriteImage(image(labels().astype(np.int16), rounded), str(path))
    scan = read_scan([path])
    assert is_straight(scan.geometry)
    assert lies_within(scan.geometry, sitk.ReadImage(str(path)), 0.1)


@pytest.mark.parametrize("suffix", [".mha", ".nrrd"])
def test_flat_images(suffix: str, tmp_path: Path) -> None:
    path, array = tmp_path / f"a{suffix}", labels()[5]
    sitk.WriteImage(image(array, np.array([[1.0, 2e-3], [0.0, 1.0]])), str(path))
    scan = read_scan([path])
    assert is_straight(scan.geometry)
    assert len(scan.notes) == 1
    write_label(tmp_path / f"mask{suffix}", array, scan.geometry)
    made = sitk.ReadImage(str(path))
    sitk.Mask(made, sitk.ReadImage(str(tmp_path / f"mask{suffix}")))
    label, geometry = read_label(tmp_path / f"mask{suffix}")
    assert geometry_difference(geometry, scan.geometry) is None
    assert np.array_equal(label, array)


def test_what_becomes_nifti_is_straight_for_itk(tmp_path: Path) -> None:
    sitk.WriteImage(image(labels().astype(np.int16), skewed(5e-3)), str(tmp_path / "a.mha"))
    geometry = read_scan([tmp_path / "a.mha"]).geometry
    write_image(tmp_path / "a.nii.gz", labels().astype(np.float32), straight(geometry))
    made = sitk.ReadImage(str(tmp_path / "a.nii.gz"))
    assert is_straight(of_itk(made))
    assert lies_within(of_itk(made), sitk.ReadImage(str(tmp_path / "a.mha")), HALF)


@pytest.mark.parametrize("suffix", [".mha", ".nrrd"])
def test_more_shear_is_refused_with_the_true_remedy(suffix: str, tmp_path: Path) -> None:
    sitk.WriteImage(image(labels(), skewed(0.05)), str(tmp_path / f"a{suffix}"))
    with pytest.raises(ReadError) as caught:
        read_scan([tmp_path / f"a{suffix}"])
    fault = caught.value.fault
    assert fault.found.startswith("sheared axes: at right angles, voxels would move by up to ")
    assert fault.expected == "axes at right angles, within half a voxel"
    assert fault.remedy == "resample it onto a straight grid, with the label the same way"


@pytest.mark.parametrize(
    ("matrix", "found"),
    [
        ("2 0 0 0 1 0 0 0 1", "directions of length (2, 1, 1)"),
        ("1 0 0 1 0 0 0 0 1", "direction (1, 1, 0, 0, 0, 0, 0, 0, 1)"),
        ("1e300 0 0 0 1e300 0 0 0 1e300", "directions of length"),
        ("0 0 0 0 0 0 0 0 0", "directions of length (0, 0, 0)"),
    ],
)
def test_directions_that_are_none(matrix: str, found: str, tmp_path: Path) -> None:
    path = tmp_path / "a.mha"
    sitk.WriteImage(image(labels(), np.eye(3)), str(path))
    raw = path.read_bytes()
    assert b"TransformMatrix = 1 0 0 0 1 0 0 0 1\n" in raw
    path.write_bytes(raw.replace(b"1 0 0 0 1 0 0 0 1", matrix.encode(), 1))
    with pytest.raises(ReadError) as caught:
        read_scan([path])
    assert caught.value.fault.found.startswith(found)
    assert caught.value.fault.remedy == "correct the header"


@pytest.mark.parametrize(("shear", "most"), [(0.0, None), (1e-3, "0.1"), (8e-3, "0.1")])
def test_dicom_slices_whose_cosines_are_rounded(shear: float, most: str | None, tmp_path: Path) -> None:
    array = dicom_files.volume(shape=(6, 40, 50))
    direction = skewed(shear)
    folder = dicom_files.slices(tmp_path / "a", array, cosines=direction[:, :2].T.ravel().round(6).tolist())
    scan = read_scan([folder])
    assert np.array_equal(scan.array[0], array)
    assert [note.split("less than ")[1] for note in scan.notes] == ([f"{most} of one"] if most else [])
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(folder)))
    made = reader.Execute()
    if shear > 5e-3:  # GDCM takes such slices for axial ones
        assert made.GetDirection() == tuple(np.eye(3).ravel())
        made.SetDirection(direction.ravel().tolist())
    assert is_straight(scan.geometry)
    assert lies_within(scan.geometry, made, HALF)


def test_sheared_dicom_slices_are_refused(tmp_path: Path) -> None:
    array = dicom_files.volume(shape=(6, 200, 250))
    cosines = skewed(0.009)[:, :2].T.ravel().round(6).tolist()
    folder = dicom_files.slices(tmp_path / "a", array, cosines=cosines)
    with pytest.raises(
        ReadError, match="ImageOrientationPatient: at right angles, voxels would move by up to"
    ):
        read_scan([folder])
