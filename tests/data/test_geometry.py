"""Where voxels lie, for nibabel and for SimpleITK, and labels that have them in another order."""

from __future__ import annotations

import itertools
from pathlib import Path

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813

from data.broken import noise
from mlbseg.data.geometry import HALF, geometry_difference, onto, orthogonalised
from mlbseg.data.readers import read_label, read_scan, write_image, write_label
from mlbseg.errors import ReadError
from mlbseg.types import Geometry

SHAPE = (9, 7, 5)  # x, y, z
SPACING = np.array([0.8, 1.1, 2.5])
CODES = [(0, 0), (1, 0), (0, 1), (0, 2), (1, 1), (1, 2), (2, 1), (2, 2), (1, 4)]


def rotation(degrees: float) -> np.ndarray:
    c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    return np.array([[1, 0, 0], [0, c, -s], [0, s, c]]) @ np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]])


def affine(matrix: np.ndarray, origin: tuple[float, ...] = (-12.5, 30.25, 7.5)) -> np.ndarray:
    result = np.eye(4)
    result[:3, :3] = matrix * SPACING
    result[:3, 3] = origin
    return result


AXIAL = affine(np.diag([-1.0, -1, 1]))
SAGITTAL = affine(np.array([[0.0, 0, 1], [1, 0, 0], [0, -1, 0]]))
CORONAL = affine(np.array([[1.0, 0, 0], [0, 0, 1], [0, -1, 0]]))
OBLIQUE = affine(rotation(20) @ np.diag([1.0, -1, 1]))
PLACES = {"axial": AXIAL, "sagittal": SAGITTAL, "coronal": CORONAL, "oblique": OBLIQUE}


def save(path: Path, array: np.ndarray, qform: np.ndarray, codes: tuple[int, int], sform: np.ndarray) -> Path:
    """Write (x, y, z) with nibabel, with what counts of the two places."""
    image = nibabel.Nifti1Image(array, None)
    image.set_qform(qform, codes[0])
    image.set_sform(sform, codes[1])
    image.header.set_xyzt_units("mm", "sec")
    nibabel.save(image, path)
    return path


def structure() -> np.ndarray:
    """(x, y, z), of no symmetry."""
    label = np.zeros(SHAPE, np.uint8)
    label[1:4, 2:3, 1:4] = 1
    label[6, 1:5, 0] = 2
    return label


def positions_nibabel(path: Path) -> dict[int, np.ndarray]:
    """Where each value's voxels lie, RAS mm, sorted."""
    image = nibabel.load(path)
    data = np.asarray(image.dataobj)
    return {
        v: np.array(
            sorted(nibabel.affines.apply_affine(image.affine, np.argwhere(data == v)).round(3).tolist())
        )
        for v in (1, 2)
    }


def positions_itk(path: Path) -> dict[int, np.ndarray]:
    """The same in LPS mm."""
    image = sitk.ReadImage(str(path))
    data = sitk.GetArrayFromImage(image)
    return {
        v: np.array(
            sorted(
                np.round(image.TransformIndexToPhysicalPoint([int(i) for i in at[::-1]]), 3).tolist()
                for at in np.argwhere(data == v)
            )
        )
        for v in (1, 2)
    }


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(
    ("codes", "differ"), [*((c, False) for c in CODES), *((c, True) for c in CODES if c[0] != c[1])]
)
def test_masks_lie_where_the_scan_lies_for_every_program(
    place: str, codes: tuple[int, int], differ: bool, tmp_path: Path
) -> None:
    """A mask that has the scan's own values must lie on the scan in nibabel, in SimpleITK, and field by field."""
    sform = PLACES[place].copy()
    sform[:3, 3] += (5, -8, 6) if differ else 0
    path = save(tmp_path / "scan.nii.gz", structure().astype(np.int16), PLACES[place], codes, sform)
    scan = read_scan([path])
    write_label(tmp_path / "mask.nii.gz", scan.array[0].astype(np.uint8), scan.geometry)
    write_image(tmp_path / "map.nii.gz", scan.array[0], scan.geometry)
    write_image(tmp_path / "maps.nii.gz", np.concatenate([scan.array] * 3), scan.geometry)
    ours = nibabel.load(path).header
    for name in ("mask", "map", "maps"):
        theirs = nibabel.load(tmp_path / f"{name}.nii.gz").header
        for field in ("qform_code", "sform_code", "xyzt_units", "quatern_b", "qoffset_x", "srow_x", "srow_z"):
            assert np.array_equal(ours[field], theirs[field]), field
        assert np.array_equal(ours["pixdim"][:4], theirs["pixdim"][:4])
    for positions in (positions_nibabel, positions_itk):
        wanted, found = positions(path), positions(tmp_path / "mask.nii.gz")
        for value in (1, 2):
            assert np.allclose(found[value], wanted[value], atol=2e-3)
    # And this program believes the place that ITK does.
    itk = sitk.ReadImage(str(path))
    assert np.allclose(scan.geometry.origin, itk.GetOrigin(), atol=1e-4)
    assert np.allclose(scan.geometry.spacing, itk.GetSpacing(), rtol=1e-6)
    assert np.allclose(scan.geometry.direction, itk.GetDirection(), atol=1e-6)


def test_values_of_a_mask_are_not_scaled(tmp_path: Path) -> None:
    write_label(tmp_path / "a.nii", structure().T, Geometry.identity(SHAPE))
    raw = (tmp_path / "a.nii").read_bytes()
    assert np.frombuffer(raw[112:120], "<f4").tolist() == [1, 0]


@pytest.mark.parametrize(("unit", "mm"), [("micron", 1e-3), ("meter", 1e3), ("mm", 1), (0, 1)])
def test_units_of_length(unit: str | int, mm: float, tmp_path: Path) -> None:
    path = save(tmp_path / "a.nii", structure(), OBLIQUE, (1, 1), OBLIQUE)
    image = nibabel.load(path)
    image.header.set_xyzt_units(unit)
    nibabel.save(image, path)
    geometry = read_scan([path]).geometry
    itk = sitk.ReadImage(str(path))
    assert np.allclose(geometry.spacing, SPACING * mm)
    assert np.allclose(geometry.spacing, itk.GetSpacing())
    assert np.allclose(geometry.origin, itk.GetOrigin(), rtol=1e-5)
    write_label(tmp_path / "m.nii", structure().T, geometry)
    mask = nibabel.load(tmp_path / "m.nii")
    assert np.array_equal(mask.affine, image.affine)
    assert mask.header.get_xyzt_units()[0] == image.header.get_xyzt_units()[0]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("codes", CODES)
def test_a_label_saved_with_the_scans_affine_fits(place: str, codes: tuple[int, int], tmp_path: Path) -> None:
    """As nibabel's users save one, and as SimpleITK's do."""
    sform = PLACES[place].copy()
    sform[:3, 3] += (5, -8, 6) if codes[0] != codes[1] else 0
    path = save(tmp_path / "scan.nii.gz", structure().astype(np.int16), PLACES[place], codes, sform)
    scan = read_scan([path])
    nibabel.save(nibabel.Nifti1Image(structure(), nibabel.load(path).affine), tmp_path / "label.nii.gz")
    itk = sitk.ReadImage(str(path), sitk.sitkUInt8)
    sitk.WriteImage(itk, str(tmp_path / "itk.nii.gz"))
    sitk.WriteImage(itk, str(tmp_path / "itk.nrrd"))
    for name in ("label.nii.gz", "itk.nii.gz", "itk.nrrd"):
        label, geometry = read_label(tmp_path / name)
        turned = onto(label, geometry, scan.geometry, where=name, whose="its image")
        assert np.array_equal(turned, scan.array[0])


ORIENTATIONS = [
    "".join(letters)
    for axes in itertools.permutations(["LR", "PA", "SI"])
    for letters in itertools.product(*axes)
]


@pytest.mark.parametrize("codes", [(0, 0), (1, 2), (1, 1)])
@pytest.mark.parametrize("place", PLACES)
def test_any_storage_order_fits(place: str, codes: tuple[int, int], tmp_path: Path) -> None:
    """All 48 orders in which nibabel can store the same voxels."""
    sform = PLACES[place].copy()
    sform[:3, 3] += (5, -8, 6) if codes[0] != codes[1] else 0
    path = save(tmp_path / "scan.nii.gz", structure().astype(np.int16), PLACES[place], codes, sform)
    scan = read_scan([path])
    image = nibabel.Nifti1Image(structure(), nibabel.load(path).affine)
    own = nibabel.orientations.io_orientation(image.affine)
    assert len(set(ORIENTATIONS)) == 48
    for letters in ORIENTATIONS:
        wanted = nibabel.orientations.axcodes2ornt(letters)
        nibabel.save(
            image.as_reoriented(nibabel.orientations.ornt_transform(own, wanted)), tmp_path / "label.nii"
        )
        label, geometry = read_label(tmp_path / "label.nii")
        turned = onto(label, geometry, scan.geometry, where="label.nii", whose="its image")
        assert np.array_equal(turned, scan.array[0]), letters
        assert turned.flags.c_contiguous


def test_channels_in_another_order_are_turned(tmp_path: Path) -> None:
    first = save(tmp_path / "a.nii", structure().astype(np.float32), OBLIQUE, (1, 1), OBLIQUE)
    second = nibabel.as_closest_canonical(nibabel.load(first))
    nibabel.save(second, tmp_path / "b.nii")
    scan = read_scan([first, tmp_path / "b.nii"])
    assert second.shape == SHAPE
    assert not np.array_equal(np.asarray(second.dataobj), structure())
    assert np.array_equal(scan.array[0], scan.array[1])


@pytest.mark.parametrize("moved", ["place", "turned", "spacing", "size"])
def test_what_lies_elsewhere_is_refused(moved: str, tmp_path: Path) -> None:
    path = save(tmp_path / "scan.nii", structure(), OBLIQUE, (1, 1), OBLIQUE)
    scan, other, array = read_scan([path]), OBLIQUE.copy(), structure()
    if moved == "place":
        other[:3, 3] += (0, 0, 1)
    elif moved == "turned":
        other = affine(rotation(21) @ np.diag([1.0, -1, 1]))
    elif moved == "spacing":
        other[:3, 0] *= 1.01
    else:
        array = array[1:]
    label, geometry = read_label(save(tmp_path / "label.nii", array, other, (1, 1), other))
    with pytest.raises(ReadError) as caught:
        onto(
            label,
            geometry,
            scan.geometry,
            where="label.nii",
            whose="its image",
            remedy="mend it",
            case_id="a",
        )
    fault = caught.value.fault
    word = {"place": "origin", "turned": "direction", "spacing": "spacing", "size": "size 8×7×5"}[moved]
    assert fault.found.startswith(word)
    assert fault.expected.endswith("as its image")
    assert (fault.where, fault.remedy, fault.case_id, fault.kind) == ("label.nii", "mend it", "a", "geometry")


@pytest.mark.parametrize("flat", [0, 1, 2])
def test_a_2d_label_of_one_slice_and_the_reverse(flat: int, tmp_path: Path) -> None:
    """Of an oblique slice along any axis: a 2D NIfTI as nibabel cuts it, and a picture."""
    array = np.take(structure(), [2], axis=flat).astype(np.int16)
    volume = read_scan([save(tmp_path / "scan.nii", array, OBLIQUE, (1, 1), OBLIQUE)])
    plane = np.squeeze(array, flat).astype(np.uint8)
    cut = affine(rotation(20) @ np.diag([1.0, -1, 1]))[:, [*(a for a in range(3) if a != flat), flat, 3]]
    nibabel.save(nibabel.Nifti1Image(plane, cut), tmp_path / "plane.nii")
    assert nibabel.load(tmp_path / "plane.nii").ndim == 2
    sitk.WriteImage(sitk.GetImageFromArray(plane.T), str(tmp_path / "plane.png"))
    for name in ("plane.nii", "plane.png"):
        label, geometry = read_label(tmp_path / name)
        turned = onto(label, geometry, volume.geometry, where=name, whose="its image")
        assert np.array_equal(turned, volume.array[0])
        back = onto(volume.array, volume.geometry, geometry, where="scan.nii", whose="its label")
        assert np.array_equal(back[0], label)
    with pytest.raises(ReadError, match="size"):
        onto(label, geometry, Geometry.identity((20, 20, 1)), where="", whose="its image")
    with pytest.raises(ReadError, match="size"):
        onto(label, geometry, Geometry.identity((*plane.shape, 2)), where="", whose="its image")


def test_a_2d_nifti_that_is_flipped_in_its_plane_is_turned(tmp_path: Path) -> None:
    array = structure()[:, :, 2:3]
    volume = read_scan([save(tmp_path / "scan.nii", array, AXIAL, (1, 1), AXIAL)])
    flipped = AXIAL.copy()
    flipped[:3, 0] *= -1
    flipped[:3, 3] += AXIAL[:3, 0] * (SHAPE[0] - 1)
    nibabel.save(nibabel.Nifti1Image(array[::-1, :, 0], flipped), tmp_path / "label.nii")
    label, geometry = read_label(tmp_path / "label.nii")
    turned = onto(label, geometry, volume.geometry, where="", whose="its image")
    assert np.array_equal(turned, volume.array[0])


def test_straightening_finds_the_nearest_lattice() -> None:
    steps = OBLIQUE[:3, :3] + 0.0
    same, moved = orthogonalised(SHAPE, steps, OBLIQUE[:3, 3])
    assert moved < 1e-9
    assert np.allclose(np.reshape(same.direction, (3, 3)) * same.spacing, steps)
    assert np.allclose(same.origin, OBLIQUE[:3, 3])
    steps[:, 1] += 5e-4 * OBLIQUE[:3, 0]
    straight, moved = orthogonalised(SHAPE, steps, OBLIQUE[:3, 3])
    direction = np.reshape(straight.direction, (3, 3))
    assert np.allclose(direction @ direction.T, np.eye(3), atol=1e-12)
    # The middle stays, so the corners move least: by half of what the skew adds up to over half the axis.
    middle = (np.array(SHAPE) - 1) / 2
    there = np.array(straight.origin) + (direction * straight.spacing) @ middle
    assert np.allclose(there, OBLIQUE[:3, 3] + steps @ middle)
    assert 0 < moved < 5e-4 * SHAPE[1]
    steps[:, 1] += 0.5 * OBLIQUE[:3, 0]
    assert orthogonalised(SHAPE, steps, (0, 0, 0))[1] > HALF
    for bad in (0.0, np.nan, np.inf):
        steps[:, 2] = bad
        assert orthogonalised(SHAPE, steps, (0, 0, 0))[1] == np.inf


def test_pictures_fit_by_their_size() -> None:
    picture, other = Geometry.identity((4, 3)), Geometry((4, 3), (0.5, 0.5), (1.0, 2.0), (1.0, 0.0, 0.0, 1.0))
    assert geometry_difference(picture, other) is None
    far = Geometry((4, 3), (0.5, 0.5), (9.0, 2.0), (1.0, 0.0, 0.0, 1.0))
    assert geometry_difference(far, other) == ("origin (9, 2) mm", "(1, 2)")


def test_a_skewed_scan_and_its_label_fit_and_the_mask_keeps_the_skew(tmp_path: Path) -> None:
    skewed = AXIAL.copy()
    skewed[0, 1] = SPACING[0] * 5e-3
    path = save(tmp_path / "a.nii", noise(0, SHAPE), AXIAL, (0, 1), skewed)
    scan = read_scan([path])
    assert scan.notes == (
        "its axes are not quite at right angles: they are straightened, which moves voxels by less than 0.01 of one; "
        "masks keep the axes of the file",
    )
    nibabel.save(nibabel.Nifti1Image(structure(), skewed), tmp_path / "label.nii")
    label, geometry = read_label(tmp_path / "label.nii")
    assert geometry_difference(geometry, scan.geometry) is None
    write_label(tmp_path / "mask.nii", label, scan.geometry)
    assert np.array_equal(nibabel.load(tmp_path / "mask.nii").affine, nibabel.load(path).affine)
    assert nibabel.load(tmp_path / "mask.nii").header["qform_code"] == 0
