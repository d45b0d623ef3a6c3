"""NIfTI files of all kinds: scaled labels, channels on a fourth axis, pairs, Analyze, NIfTI-2, hostile sizes."""

from __future__ import annotations

import gzip
import json
import struct
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813

from data.broken import mask, noise, patch
from mlbseg import memory
from mlbseg.data.cases import find_cases, find_scans
from mlbseg.data.check import check
from mlbseg.data.formats import nifti as module
from mlbseg.data.geometry import geometry_difference
from mlbseg.data.hashes import content_hash
from mlbseg.data.readers import read_label, read_scan, write_image, write_label
from mlbseg.errors import ReadError
from mlbseg.types import Geometry

AFFINE = np.array([[-1.2, 0, 0, 20], [0, -1.2, 0, -15], [0, 0, 2, -30], [0, 0, 0, 1.0]])


def save(path: Path, array: np.ndarray, kind: Any = nibabel.Nifti1Image) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(kind(array, AFFINE), path)
    return path


def scaled(path: Path, array: np.ndarray, slope: float, inter: float = 0.0) -> Path:
    """Write stored integers and state a scale."""
    save(path, array)
    patch(path, (112, "<2f", [slope, inter]))
    return path


@pytest.mark.parametrize("stored", [np.uint8, np.int16, np.uint16])
@pytest.mark.parametrize("top", [1, 2, 7, 21])
def test_whole_labels_behind_a_scale(stored: type, top: int, tmp_path: Path) -> None:
    """As nibabel saves a label of floating point under an integer header."""
    label = np.arange(6 * 5 * 4).reshape(6, 5, 4) % (top + 1)
    image = nibabel.Nifti1Image(label.astype(float), AFFINE)
    image.set_data_dtype(stored)
    nibabel.save(image, tmp_path / "a.nii.gz")
    assert (
        not np.array_equal(nibabel.load(tmp_path / "a.nii.gz").get_fdata(), label)
        or top == 1
        or stored is np.uint8
    )
    array, _ = read_label(tmp_path / "a.nii.gz")
    assert np.array_equal(array, label.T)


@pytest.mark.parametrize("slope", [1.0000001, 0.99998, 1.00002])
def test_a_scale_that_was_meant_to_be_one(slope: float, tmp_path: Path) -> None:
    label = mask((4, 5, 6), 9)
    array, _ = read_label(scaled(tmp_path / "a.nii.gz", label.T, slope))
    assert np.array_equal(array, label)


@pytest.mark.parametrize(
    ("slope", "inter", "found"),
    [
        (0.5, 0, "0.5"),
        (1.3, 0, "1.3"),
        (1, 0.5, "0.5"),
        (0.05, 0, "0.05"),
        (0.01, 0, "0.01"),
        (1 / 255, 0, "0.0039"),
    ],
)
def test_other_values_behind_a_scale_are_refused(
    slope: float, inter: float, found: str, tmp_path: Path
) -> None:
    path = scaled(tmp_path / "a.nii.gz", mask((4, 5, 6)).T, slope, inter)
    with pytest.raises(
        ReadError, match=rf"label value {found}\d* at voxel \(\d, \d, \d\), expected whole numbers"
    ):
        read_label(path)


def test_label_in_single_precision(tmp_path: Path) -> None:
    label = mask((4, 5, 6), 3).astype(np.float32)
    array, _ = read_label(save(tmp_path / "a.nii", (label * np.float32(0.9999999)).T))
    assert np.array_equal(array, label)
    with pytest.raises(ReadError, match=r"label value 2.997 at voxel \(1, 1, 1\)"):
        read_label(save(tmp_path / "a.nii", (label * 0.999).T))


def test_scaled_images_have_the_values_that_nibabel_and_itk_read(tmp_path: Path) -> None:
    stored = np.arange(-60, 60).reshape(6, 5, 4).astype(np.int16)
    path = scaled(tmp_path / "a.nii", stored, 0.25, -7)
    array = read_scan([path]).array[0]
    assert np.array_equal(array, nibabel.load(path).get_fdata().T)
    assert np.array_equal(array, sitk.GetArrayFromImage(sitk.ReadImage(str(path))))
    for nothing in (0.0, float("nan")):
        patch(path, (112, "<2f", [nothing, 5]))
        assert np.array_equal(read_scan([path]).array[0], stored.T)
    patch(path, (112, "<2f", [3e38, 0]))
    with pytest.raises(ReadError, match=r"values up to 1.8e\+40, expected at most 3.4e\+38"):
        read_scan([path])


@pytest.mark.parametrize("shape", [(4, 5, 6, 3), (4, 5, 6, 1, 3), (4, 5, 6, 3, 1, 1), (4, 5, 1, 3)])
def test_the_fourth_axis_holds_channels(shape: tuple[int, ...], tmp_path: Path) -> None:
    array = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    path = save(tmp_path / "a.nii.gz", array)
    scan = read_scan([path])
    flat = array.reshape((*shape[:3], 3))
    assert np.array_equal(scan.array, np.moveaxis(flat, -1, 0).transpose(0, 3, 2, 1))
    assert scan.geometry.size == shape[:3]
    assert "read as 3 channels" in scan.notes[0]
    nibabel.save(nibabel.Nifti1Image(flat[..., 0], AFFINE), tmp_path / "b.nii.gz")
    assert geometry_difference(read_scan([tmp_path / "b.nii.gz"]).geometry, scan.geometry) is None
    with pytest.raises(ReadError, match="3 maps in one file, expected one label map"):
        read_label(path)


def test_other_axes_of_one_are_dropped(tmp_path: Path) -> None:
    scan = read_scan([save(tmp_path / "a.nii", noise(0, (4, 5, 6, 1, 1)))])
    assert (scan.array.shape, scan.notes) == ((1, 6, 5, 4), ())
    label, _ = read_label(save(tmp_path / "b.nii", mask((4, 5, 6, 1))))
    assert label.shape == (6, 5, 4)


def test_channels_beside_times_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ReadError, match="5D image of 4×5×6×2×3"):
        read_scan([save(tmp_path / "a.nii", noise(0, (4, 5, 6, 2, 3)))])


def test_itk_and_this_program_read_each_others_components(tmp_path: Path) -> None:
    for shape in ((6, 5, 4), (5, 4)):
        channels = np.stack([noise(0, shape), noise(1, shape)])
        geometry = Geometry.identity(shape[::-1])
        write_image(tmp_path / "a.nii.gz", channels, geometry)
        itk = sitk.ReadImage(str(tmp_path / "a.nii.gz"))
        assert itk.GetSize() == shape[::-1]
        assert np.array_equal(np.moveaxis(sitk.GetArrayFromImage(itk), -1, 0), channels)
        sitk.WriteImage(itk, str(tmp_path / "b.nii.gz"))
        scan = read_scan([tmp_path / "b.nii.gz"])
        assert np.array_equal(scan.array, channels)
        assert scan.geometry == geometry


def test_colours_are_components(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (6, 5, 4, 3)).astype(np.uint8)
    sitk.WriteImage(sitk.GetImageFromArray(pixels, isVector=True), str(tmp_path / "itk.nii"))
    colours = pixels.transpose(2, 1, 0, 3).copy().view([("R", "u1"), ("G", "u1"), ("B", "u1")])[..., 0]
    path = save(tmp_path / "a.nii", colours)
    assert np.array_equal(read_scan([path]).array, np.moveaxis(pixels, -1, 0))
    assert np.array_equal(read_scan([tmp_path / "itk.nii"]).array, np.moveaxis(pixels, -1, 0))
    with pytest.raises(ReadError, match="3 components per pixel"):
        read_label(path)


def test_a_data_set_of_the_decathlon_with_channels(tmp_path: Path) -> None:
    for seed in range(3):
        array = np.stack([noise(seed, (9, 8, 7)), noise(seed + 9, (9, 8, 7))], -1)
        save(tmp_path / f"imagesTr/b_{seed}.nii.gz", array)
        save(tmp_path / f"labelsTr/b_{seed}.nii.gz", mask((9, 8, 7)))
    labels = {"0": "background", "1": "tumour"}
    (tmp_path / "dataset.json").write_text(json.dumps({"modality": {"0": "T1", "1": "T2"}, "labels": labels}))
    result = check(find_cases(tmp_path), require_roles=False)
    assert result.faults == ()
    assert result.summary["channels"] == [2]
    assert {fault.kind for fault in result.warnings} == {"note"}


def test_nifti_2(tmp_path: Path) -> None:
    array = noise(0, (4, 5, 6))
    scan = read_scan([save(tmp_path / "a.nii.gz", array, nibabel.Nifti2Image)])
    one = read_scan([save(tmp_path / "b.nii.gz", array)])
    assert np.array_equal(scan.array, one.array)
    assert geometry_difference(scan.geometry, one.geometry) is None
    write_label(tmp_path / "m.nii.gz", mask((6, 5, 4)), scan.geometry)
    assert np.allclose(nibabel.load(tmp_path / "m.nii.gz").affine, AFFINE)
    long = np.zeros((40_000, 1, 2), np.uint8)
    write_label(tmp_path / "long.nii", long.T, Geometry.identity(long.shape))
    assert isinstance(nibabel.load(tmp_path / "long.nii"), nibabel.Nifti2Image)
    assert read_label(tmp_path / "long.nii")[1].size == long.shape


@pytest.mark.parametrize("code", [5, 7, 255, -1, 2**30])
def test_codes_that_nobody_defined_stay(code: int, tmp_path: Path) -> None:
    array = noise(0, (4, 5, 6))
    path = save(tmp_path / "a.nii", array, nibabel.Nifti2Image)
    raw = bytearray(path.read_bytes())
    for field, value in (("sform_code", code), ("qform_code", 0), ("xyzt_units", 2)):
        struct.pack_into("<i", raw, nibabel.Nifti2Header().structarr.dtype.fields[field][1], value)
    path.write_bytes(raw)
    write_label(tmp_path / "m.nii", mask((6, 5, 4)), read_scan([path]).geometry)
    stored = np.frombuffer((tmp_path / "m.nii").read_bytes()[252:256], "<i2")
    assert stored.tolist() == [0, min(code, 32767)]


def test_pairs(tmp_path: Path) -> None:
    array = noise(0, (4, 5, 6))
    one = read_scan([save(tmp_path / "b.nii", array)])
    path = save(tmp_path / "images/a.hdr", array, nibabel.Nifti1Pair)
    scan = read_scan([path])
    assert np.array_equal(scan.array, one.array)
    assert geometry_difference(scan.geometry, one.geometry) is None
    cases = find_scans(tmp_path / "images").cases
    assert [(case.id, case.images) for case in cases] == [("a", (path,))]
    before = content_hash(path)
    pixels = path.with_suffix(".img")
    pixels.write_bytes(pixels.read_bytes()[:-1] + b"x")
    assert content_hash(path) != before
    pixels.with_name("a.img.gz").write_bytes(gzip.compress(array.T.tobytes()))
    pixels.unlink()
    assert np.array_equal(read_scan([path]).array, one.array)
    (tmp_path / "images/a.img.gz").write_bytes(gzip.compress(array.tobytes()[:-4]))
    with pytest.raises(ReadError, match=r"a.img.gz: holds 476 bytes of voxels"):
        read_scan([path])


@pytest.mark.parametrize("order", ["<", ">"])
def test_analyze_has_no_place_and_says_so(order: str, tmp_path: Path) -> None:
    array = noise(0, (4, 5, 6))
    image = nibabel.AnalyzeImage(array, np.diag([-1.2, 1.3, 2, 1]), nibabel.AnalyzeHeader(endianness=order))
    image.header.set_data_dtype(np.float32)
    nibabel.save(image, tmp_path / "a.hdr")
    scan = read_scan([tmp_path / "a.hdr"])
    assert np.array_equal(scan.array[0], array.T)
    assert np.allclose(scan.geometry.spacing, (1.2, 1.3, 2))
    assert "states no place and no orientation" in scan.notes[0]
    write_label(tmp_path / "m.nii.gz", mask((6, 5, 4)), scan.geometry)
    saved = nibabel.load(tmp_path / "m.nii.gz")
    assert (saved.header["qform_code"], saved.header["sform_code"]) == (0, 0)
    assert np.allclose(saved.affine, nibabel.load(tmp_path / "a.hdr").affine)
    label, geometry = read_label(tmp_path / "m.nii.gz")
    assert geometry_difference(geometry, scan.geometry) is None
    assert np.array_equal(label, mask((6, 5, 4)))


def test_a_small_file_that_announces_much_is_refused_unread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save(tmp_path / "a.nii.gz", np.zeros((64, 64, 64), np.int16))
    monkeypatch.setattr(memory, "free_memory", lambda: 64**3 * 6)
    assert read_scan([path]).array.shape == (1, 64, 64, 64)
    monkeypatch.setattr(memory, "free_memory", lambda: 64**3 * 6 - 1)
    monkeypatch.setattr(module, "_voxels", lambda _: pytest.fail("it was read"))
    with pytest.raises(ReadError, match=r"its header announces 0.0 GiB of pixels") as caught:
        read_scan([path])
    assert caught.value.fault.kind == "memory"


def test_other_files_named_nifti(tmp_path: Path) -> None:
    path = save(tmp_path / "a.nii", noise(0, (4, 5, 6)))
    raw = path.read_bytes()
    for change, found in (
        ({70: struct.pack("<2h", 1536, 128)}, "128-bit numbers"),
        ({70: struct.pack("<2h", 1, 1)}, "voxel type 1 of 1 bits"),
        ({344: b"ni1\0"}, "not a NIfTI file"),
        ({344: b"\0\0\0\0"}, "not a NIfTI file"),
        ({40: struct.pack("<2h", 1, 120)}, "1 axis"),
    ):
        damaged = bytearray(raw)
        for place, values in change.items():
            damaged[place : place + len(values)] = values
        path.write_bytes(damaged)
        with pytest.raises(ReadError, match=found):
            read_scan([path])


def test_pixels_of_a_mask_do_not_depend_on_the_time(tmp_path: Path) -> None:
    for name in ("a.nii.gz", "b.nii.gz"):
        write_label(tmp_path / name, mask(), Geometry.identity((10, 8, 6)))
    raw = (tmp_path / "a.nii.gz").read_bytes()
    assert raw == (tmp_path / "b.nii.gz").read_bytes()
    assert raw[4:8] == bytes(4)


def test_bits_that_are_not_stated_are_those_of_the_type(tmp_path: Path) -> None:
    """ITK and nibabel look at the type alone; a number of bits that contradicts it is damage."""
    path = save(tmp_path / "a.nii", noise(0))
    patch(path, (72, "<h", [0]))
    assert np.array_equal(read_scan([path]).array[0], noise(0).T)
    assert np.array_equal(sitk.GetArrayFromImage(sitk.ReadImage(str(path))), noise(0).T)


@pytest.mark.parametrize("offset", [0, 100, 347])
def test_voxels_inside_the_header_are_refused(offset: int, tmp_path: Path) -> None:
    """ITK would read them behind the header, shifted by what lies between, and nibabel would read the header."""
    path = save(tmp_path / "a.nii", noise(0))
    patch(path, (108, "<f", [float(offset)]))
    with pytest.raises(ReadError, match=f"voxels at byte {offset}, inside the header"):
        read_scan([path])


def test_the_label_value_that_is_too_large_is_named(tmp_path: Path) -> None:
    label = np.zeros((4, 5, 6), np.int64)
    for value in (-(2**40), 2**31):
        label[1, 2, 3] = value
        nibabel.save(nibabel.Nifti1Image(label, np.eye(4), dtype=np.int64), tmp_path / "a.nii")
        with pytest.raises(ReadError, match=f"label value {value}, expected values below"):
            read_label(tmp_path / "a.nii")
