"""Files to arrays and back: every format, one geometry."""

from __future__ import annotations

import resource
import signal
import zlib
from pathlib import Path

import h5py
import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813

from data.broken import dicom_series, mask, noise, patch, save
from mlbseg.data import readers
from mlbseg.data.geometry import geometry_difference
from mlbseg.data.readers import (
    is_scan_file,
    mask_suffix,
    read_label,
    read_scan,
    stem,
    write_image,
    write_label,
)
from mlbseg.errors import ReadError, UserError
from mlbseg.types import Geometry

OBLIQUE = Geometry(
    size=(10, 8, 6),
    spacing=(0.5, 0.75, 3.0),
    origin=(-12.0, 30.5, 7.25),
    direction=(0.8, -0.6, 0.0, 0.6, 0.8, 0.0, 0.0, 0.0, 1.0),
)


@pytest.mark.parametrize("suffix", [".nii.gz", ".nii", ".nrrd", ".nhdr", ".mha", ".mhd"])
def test_image_comes_back_with_its_geometry(suffix: str, tmp_path: Path) -> None:
    array = noise(0)
    spelt = {"spacing": OBLIQUE.spacing, "origin": OBLIQUE.origin, "direction": OBLIQUE.direction}
    path = save(tmp_path / f"a{suffix}", array, **spelt)
    scan = read_scan([path])
    assert scan.array.dtype == np.float32
    assert np.array_equal(scan.array, array[None])
    assert geometry_difference(scan.geometry, OBLIQUE) is None


@pytest.mark.parametrize("suffix", [".nii.gz", ".nrrd", ".mha"])
@pytest.mark.parametrize(("top", "kind"), [(1, "uint8"), (255, "uint8"), (256, "uint16"), (70000, "uint32")])
def test_label_is_written_in_the_smallest_type(suffix: str, top: int, kind: str, tmp_path: Path) -> None:
    array = mask().astype(np.int64) * top
    path = tmp_path / f"a{suffix}"
    write_label(path, array, OBLIQUE)
    back, geometry = read_label(path)
    assert back.dtype == np.int32
    assert np.array_equal(back, array)
    assert geometry_difference(geometry, OBLIQUE) is None
    assert sitk.GetArrayFromImage(sitk.ReadImage(str(path))).dtype == kind
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_write_image_with_channels(tmp_path: Path) -> None:
    channels = np.stack([noise(0), noise(1)])
    write_image(tmp_path / "p.nii.gz", channels, OBLIQUE)
    assert np.array_equal(read_scan([tmp_path / "p.nii.gz"]).array, channels)
    write_image(tmp_path / "q.nii.gz", channels[:1], OBLIQUE)
    assert np.array_equal(read_scan([tmp_path / "q.nii.gz"]).array, channels[:1])
    write_image(tmp_path / "r.nrrd", channels[1], OBLIQUE)
    assert np.array_equal(read_scan([tmp_path / "r.nrrd"]).array[0], channels[1])


def test_write_into_missing_folder_is_a_users_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no/a.nii.gz: could not be written"):
        write_label(tmp_path / "no" / "a.nii.gz", mask(), OBLIQUE)


@pytest.mark.parametrize("suffix", [".nii.gz", ".nrrd", ".mha"])
def test_full_disk_leaves_the_old_file_alone(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"a{suffix}"
    write_label(path, mask(), OBLIQUE)
    before = path.read_bytes()
    big = np.random.default_rng(0).integers(0, 200, (64, 64, 64)).astype(np.uint8)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(UserError, match="could not be written"):
            write_label(path, big, Geometry.identity((64, 64, 64)))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_channels_from_several_files_are_stacked(tmp_path: Path) -> None:
    paths = [save(tmp_path / f"a_{i:04d}.nii.gz", noise(i)) for i in range(3)]
    array = read_scan(paths).array
    assert array.shape == (3, 6, 8, 10)
    assert np.array_equal(array[2], noise(2))


def test_channels_of_other_geometry_are_refused(tmp_path: Path) -> None:
    paths = [save(tmp_path / "a.nii.gz", noise(0)), save(tmp_path / "b.nii.gz", noise(1), origin=(0, 0, 3))]
    with pytest.raises(ReadError, match=r"b.nii.gz: origin \(0, 0, 3\) mm, .* as in a.nii.gz"):
        read_scan(paths)


@pytest.mark.parametrize("suffix", [".nrrd", ".mha", ".nii.gz"])
def test_trailing_axis_of_one_is_dropped_and_others_are_a_fault(suffix: str, tmp_path: Path) -> None:
    path = save(tmp_path / f"a{suffix}", noise(0)[None])
    scan = read_scan([path])
    assert scan.array.shape == (1, 6, 8, 10)
    assert scan.geometry == Geometry.identity((10, 8, 6))
    save(path, noise(0, (2, 6, 8, 10)))
    if suffix == ".nii.gz":  # as the Decathlon has channels
        assert read_scan([path]).array.shape == (2, 6, 8, 10)
        return
    with pytest.raises(ReadError) as caught:
        read_scan([path])
    assert caught.value.fault.kind == "4d"


def test_one_slice_in_3d_stays_3d_and_2d_stays_2d(tmp_path: Path) -> None:
    for shape in ((1, 8, 10), (8, 10)):
        scan = read_scan([save(tmp_path / "a.nii.gz", noise(0, shape))])
        assert (scan.array.shape, scan.geometry.size) == ((1, *shape), shape[::-1])


@pytest.mark.parametrize("suffix", [".png", ".tif", ".jpg"])
def test_pictures_have_no_mm(suffix: str, tmp_path: Path) -> None:
    grey = save(tmp_path / f"g{suffix}", noise(0, (20, 24)).astype(np.uint8), spacing=(0.3, 0.3))
    scan = read_scan([grey])
    assert scan.geometry == Geometry.identity((24, 20))
    assert scan.array.shape == (1, 20, 24)
    colours = save(tmp_path / f"c{suffix}", noise(0, (20, 24, 3)).astype(np.uint8), vector=True)
    assert read_scan([colours]).array.shape == (3, 20, 24)


def test_picture_masks(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    write_label(path, mask((20, 24), 255), Geometry((24, 20), (0.5, 0.5), (3.0, 4.0), (1.0, 0.0, 0.0, 1.0)))
    array, geometry = read_label(path)
    assert np.array_equal(np.unique(array), [0, 255])
    assert geometry == Geometry.identity((24, 20))


def test_jpeg_that_announces_gigapixels_is_refused_unread(tmp_path: Path) -> None:
    path = save(tmp_path / "a.jpg", noise(0, (20, 24)).astype(np.uint8))
    raw = bytearray(path.read_bytes())
    frame = raw.index(b"\xff\xc2")
    raw[frame + 5 : frame + 9] = b"\xff\x00\xff\x00"
    path.write_bytes(raw)
    with pytest.raises(ReadError, match="65280×65280 pixels, expected at most"):
        read_scan([path])


def test_truncated_jpeg_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path / "a.jpg", noise(0, (20, 24)).astype(np.uint8))
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(ReadError, match="truncated"):
        read_scan([path])


@pytest.mark.parametrize(
    ("field", "value", "found"),
    [
        ("ElementSpacing = 1 1 1", "ElementSpacing = -1 1 1", "spacing -1×1×1"),
        ("ElementSpacing = 1 1 1", "ElementSpacing = 0 1 1", "spacing 0×1×1"),
        ("TransformMatrix = 1 0 0", "TransformMatrix = 1 1 0", "direction"),
        ("TransformMatrix = 1 0 0", "TransformMatrix = 0 0 0", "direction"),
        ("Offset = 0 0 0", "Offset = inf 0 0", "Offset = inf 0 0, expected finite"),
        ("ElementSpacing = 1 1 1", "ElementSpacing = 1 x 1", "ElementSpacing = 1 x 1, expected finite"),
        ("DimSize = 10 8 6", "DimSize = 10 80 6", "holds 1920 bytes"),
        ("DimSize = 10 8 6", "DimSize = ten 8 6", "damaged header"),
        ("ElementType = MET_FLOAT", "ElementType = MET_STRANGE", "damaged header"),
        ("ElementDataFile = LOCAL", "ElementDataFile = LIST", "names a file for each slice"),
        ("ElementDataFile = LOCAL", "Nothing = LOCAL", "not a MetaImage"),
    ],
)
def test_metaimage_headers_that_lie(field: str, value: str, found: str, tmp_path: Path) -> None:
    path = save(tmp_path / "a.mha", noise(0))
    raw = path.read_bytes()
    assert field.encode() in raw
    path.write_bytes(raw.replace(field.encode(), value.encode()))
    with pytest.raises(ReadError, match=found):
        read_scan([path])


def test_compressed_metaimage(tmp_path: Path) -> None:
    path = tmp_path / "a.mha"
    sitk.WriteImage(sitk.GetImageFromArray(noise(0)), str(path), useCompression=True)
    assert np.array_equal(read_scan([path]).array[0], noise(0))
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(ReadError, match="bytes of pixels"):
        read_scan([path])


def test_sheared_nrrd_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path / "a.nrrd", noise(0))
    path.write_bytes(path.read_bytes().replace(b"(1,0,0)", b"(1,1,0)"))
    with pytest.raises(ReadError, match="at right angles"):
        read_scan([path])


def test_nifti_two_coordinate_systems_may_differ(tmp_path: Path) -> None:
    """Scanner (qform, code 1) and template (sform, code 4) are two places on purpose; ITK takes one."""
    path = save(tmp_path / "a.nii.gz", noise(0))
    patch(path, (254, "<h", [4]), (280, "<4f", [-1, 0, 0, 40]))
    assert read_scan([path]).geometry.size == (10, 8, 6)


def test_nifti_qform_alone_and_oblique(tmp_path: Path) -> None:
    spelt = {"spacing": OBLIQUE.spacing, "origin": OBLIQUE.origin, "direction": OBLIQUE.direction}
    path = save(tmp_path / "a.nii", noise(0), **spelt)
    patch(path, (254, "<h", [0]), (280, "<12f", [0.0] * 12))
    assert geometry_difference(read_scan([path]).geometry, OBLIQUE) is None


def test_nifti_of_the_other_byte_order(tmp_path: Path) -> None:
    array = noise(0)
    array[0, 0, 0] = np.nan
    path = tmp_path / "a.nii"
    header = np.zeros(352, np.uint8)
    for offset, value in (
        (0, np.array(348, ">i4")),
        (40, np.array([3, 10, 8, 6, 1, 1, 1, 1], ">i2")),
        (70, np.array([16, 32], ">i2")),
        (76, np.ones(8, ">f4")),
        (108, np.array(352, ">f4")),
        (344, np.frombuffer(b"n+1\0", np.uint8)),
    ):
        raw = np.frombuffer(value.tobytes(), np.uint8)
        header[offset : offset + raw.size] = raw
    path.write_bytes(header.tobytes() + array.astype(">f4").tobytes())
    with pytest.raises(ReadError, match="1 values are NaN"):
        read_scan([path])
    path.write_bytes(header.tobytes() + noise(0).astype(">f4").tobytes())
    assert np.array_equal(read_scan([path]).array[0], noise(0))


def test_nifti_voxels_at_no_place(tmp_path: Path) -> None:
    path = save(tmp_path / "a.nii", noise(0))
    patch(path, (108, "<f", [float("nan")]))
    with pytest.raises(ReadError, match="voxels at byte nan"):
        read_scan([path])


def test_float_label_of_whole_numbers(tmp_path: Path) -> None:
    array, _ = read_label(save(tmp_path / "a.nii.gz", mask().astype(np.float64) * 2))
    assert array.max() == 2


def test_label_that_is_a_folder(tmp_path: Path) -> None:
    with pytest.raises(ReadError, match="a folder, expected a label file"):
        read_label(tmp_path)


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz", ".nrrd", ".mha", ".png", ".tif", ".h5", ".dcm"])
def test_any_damage_is_read_or_refused(suffix: str, tmp_path: Path) -> None:
    """A few flipped bytes, most of them in the header: never another exception than the user's."""
    rng = np.random.default_rng(zlib.crc32(suffix.encode()))
    path = tmp_path / f"a{suffix}"
    if suffix == ".dcm":
        path = dicom_series(tmp_path / "series") / "003.dcm"
    elif suffix == ".h5":
        with h5py.File(path, "w") as file:
            file["image"], file["label"] = noise(0).T, mask().T
    else:
        save(path, mask((20, 24)) if suffix in (".png", ".tif") else noise(0))
    whole = path.read_bytes()
    refused = 0
    for _ in range(40):
        damaged = bytearray(whole)
        for place in rng.integers(0, min(len(whole), 250), rng.integers(1, 5)):
            damaged[-place if suffix == ".tif" else place] = rng.integers(
                256
            )  # TIFF has its header at the end
        path.write_bytes(damaged)
        scan = path.parent if suffix == ".dcm" else path
        for read in (lambda: read_scan([scan]), lambda: read_label(scan)):  # noqa: B023 - called at once
            try:
                read()
            except ReadError:
                refused += 1
    assert refused > 0


# HDF5


def test_hdf5_axes_are_x_y_z(tmp_path: Path) -> None:
    path = tmp_path / "mri_norm2.h5"
    with h5py.File(path, "w") as file:
        file["image"], file["label"] = noise(0).T, mask().T
        file["image"].attrs["spacing"] = (0.5, 0.75, 3.0)
    scan = read_scan([path])
    assert np.array_equal(scan.array[0], noise(0))
    assert scan.geometry == Geometry.identity((10, 8, 6), (0.5, 0.75, 3.0))
    label, _ = read_label(path)
    assert np.array_equal(label, mask())


@pytest.mark.parametrize(
    ("image", "spacing", "found"),
    [
        (np.zeros((2, 3, 4, 5)), None, "4D data set"),
        (np.zeros((3, 4, 5)), (1, 0, 1), "spacing"),
        (np.zeros((3, 4, 5)), (1, 1), "spacing"),
        (np.zeros((3, 4, 5), complex), None, "type complex128"),
        (np.array([b"abc"]), None, "type"),
    ],
)
def test_hdf5_faults(image: np.ndarray, spacing: object, found: str, tmp_path: Path) -> None:
    path = tmp_path / "a.h5"
    with h5py.File(path, "w") as file:
        file["image"] = image
        if spacing:
            file.attrs["spacing"] = spacing
    with pytest.raises(ReadError, match=found):
        read_scan([path])


def test_hdf5_with_pixels_in_another_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.h5"
    (tmp_path / "pixels").write_bytes(bytes(480))
    with h5py.File(path, "w") as file:
        file.create_dataset("image", (6, 8, 10), "u1", external=[(str(tmp_path / "pixels"), 0, 480)])
    with pytest.raises(ReadError, match="no data set 'image' of its own"):
        read_scan([path])


# DICOM


def test_dicom_is_ordered_by_position_not_by_name(tmp_path: Path) -> None:
    straight = read_scan([dicom_series(tmp_path / "series")])
    names = [f"{i:03d}.dcm" for i in (3, 0, 5, 1, 4, 2)]
    shuffled = read_scan([dicom_series(tmp_path / "elsewhere" / "series", names=names)])
    assert np.array_equal(straight.array, shuffled.array)
    assert straight.geometry == shuffled.geometry
    assert straight.geometry.size == (14, 12, 6)
    assert straight.geometry.spacing == pytest.approx((0.8, 0.8, 2.5))
    assert straight.geometry.origin == pytest.approx((5, 7, 0))


def test_dicom_agrees_with_simpleitk(tmp_path: Path) -> None:
    folder = dicom_series(tmp_path / "series")
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(folder)))
    image = reader.Execute()
    scan = read_scan([folder])
    assert np.array_equal(scan.array[0], sitk.GetArrayFromImage(image))
    assert scan.geometry.spacing == pytest.approx(image.GetSpacing())
    assert scan.geometry.direction == pytest.approx(image.GetDirection())


def test_dicom_rescale_is_applied_slice_by_slice(tmp_path: Path) -> None:
    plain = read_scan([dicom_series(tmp_path / "a" / "series")])
    stored = plain.array[0]
    slopes = {"0028_1053": lambda i: 2 + i, "0028_1052": lambda i: -100}
    rescaled = read_scan([dicom_series(tmp_path / "b" / "series", **slopes)]).array[0]
    for i in range(6):
        raw = sitk.ImageFileReader()
        raw.SetFileName(str(tmp_path / "b" / "series" / f"{i:03d}.dcm"))
        raw.ReadImageInformation()
        assert float(raw.GetMetaData("0028|1053")) == 2 + i
        assert float(raw.GetMetaData("0028|1052")) == -100
        # The writer stores (value - intercept) / slope, cut to whole numbers.
        assert np.all((rescaled[i] + 100) % (2 + i) == 0)
        assert np.all((stored[i] - rescaled[i] >= 0) & (stored[i] - rescaled[i] < 2 + i))


def test_dicom_of_one_slice(tmp_path: Path) -> None:
    scan = read_scan([dicom_series(tmp_path / "series", count=1)])
    assert scan.array.shape == (1, 1, 12, 14)
    assert scan.geometry.size == (14, 12, 1)


def test_dicom_other_files_in_the_folder_do_not_matter(tmp_path: Path) -> None:
    folder = dicom_series(tmp_path / "series", names=[f"IM{i}" for i in range(6)])
    (folder / "README").write_text("x")
    (folder / "._IM0").write_bytes((folder / "IM0").read_bytes())
    (folder / "DICOMDIR").write_bytes((folder / "IM0").read_bytes())
    assert read_scan([folder]).array.shape == (1, 6, 12, 14)


@pytest.mark.realdata
@pytest.mark.parametrize(
    ("name", "size", "spacing"),
    [
        ("11_HCropVolume", (34, 50, 40), (1, 1, 1)),
        ("13_HCropVolume", (35, 51, 32), (1, 1, 1)),
        ("37830-T2reg-78532", (280, 320, 22), (0.6875, 0.6875, 6.5)),
    ],
)
def test_real_dicom(name: str, size: tuple[int, ...], spacing: tuple[float, ...], realdata: Path) -> None:
    scan = read_scan([realdata / "dicom" / name])
    assert scan.geometry.size == size
    assert scan.geometry.spacing == pytest.approx(spacing)
    folder = str(realdata / "dicom" / name)
    image = sitk.ReadImage(sitk.ImageSeriesReader.GetGDCMSeriesFileNames(folder))
    assert np.array_equal(scan.array[0], sitk.GetArrayFromImage(image))
    assert scan.geometry.origin == pytest.approx(image.GetOrigin())
    assert scan.geometry.direction == pytest.approx(image.GetDirection(), abs=1e-4)


@pytest.mark.realdata
def test_real_mask_goes_back_bit_for_bit(realdata: Path, tmp_path: Path) -> None:
    path = realdata / "hippocampus" / "labelsTr" / "hippocampus_001.nii.gz"
    array, geometry = read_label(path)
    write_label(tmp_path / "a.nii.gz", array, geometry)
    back, place = read_label(tmp_path / "a.nii.gz")
    assert np.array_equal(back, array)
    assert geometry_difference(place, geometry) is None


# Names


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("a.nii.gz", "a"),
        ("a.b.NII.GZ", "a.b"),
        ("a.gz", "a.gz"),
        ("case.1", "case.1"),
        (".nii.gz", ".nii.gz"),
        ("x.mhd", "x"),
    ],
)
def test_stem(name: str, expected: str) -> None:
    assert stem(Path(name)) == expected


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("a.nii", ".nii.gz"),
        ("a.nii.gz", ".nii.gz"),
        ("a.h5", ".nii.gz"),
        ("a.hdr", ".nii.gz"),
        ("series", ".nii.gz"),
        ("a.nrrd", ".nrrd"),
        ("a.nhdr", ".nrrd"),
        ("a.mha", ".mha"),
        ("a.mhd", ".mha"),
        ("a.tiff", ".png"),
        ("a.jpg", ".png"),
        ("a.png", ".png"),
    ],
)
def test_mask_suffix(name: str, expected: str) -> None:
    assert mask_suffix([Path(name)]) == expected


def test_is_scan_file(tmp_path: Path) -> None:
    for name in ("a.nii.gz", ".hidden.nii.gz", "notes.txt"):
        (tmp_path / name).touch()
    (tmp_path / "folder.nii.gz").mkdir()
    assert [p.name for p in sorted(tmp_path.iterdir()) if is_scan_file(p)] == ["a.nii.gz"]


def test_a_file_of_another_kind(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(ReadError, match=r"not the name of a scan, expected one of .nii.gz"):
        read_scan([tmp_path / "a.txt"])


def test_geometry_tolerance() -> None:
    near = Geometry(OBLIQUE.size, (0.50001, 0.75, 3.0), (-12.005, 30.5, 7.25), OBLIQUE.direction)
    assert geometry_difference(near, OBLIQUE) is None
    far = Geometry(OBLIQUE.size, OBLIQUE.spacing, (-12.1, 30.5, 7.25), OBLIQUE.direction)
    assert geometry_difference(far, OBLIQUE) == ("origin (-12.1, 30.5, 7.25) mm", "(-12, 30.5, 7.25)")


def test_every_suffix_has_a_kind_that_can_be_written_or_replaced() -> None:
    for suffix in readers.SUFFIXES:
        assert mask_suffix([Path("a" + suffix)]) in readers.SUFFIXES


@pytest.mark.parametrize("suffix", [".nii", ".mha", ".nrrd", ".h5"])
def test_values_beyond_single_precision_are_not_called_infinite(suffix: str, tmp_path: Path) -> None:
    array = noise(0).astype(np.float64)
    array[1, 2, 3] = -1e300
    path = tmp_path / f"a{suffix}"
    if suffix == ".h5":
        with h5py.File(path, "w") as file:
            file["image"] = array
    else:
        sitk.WriteImage(sitk.GetImageFromArray(array), str(path))
    with pytest.raises(ReadError, match=r"values up to 1e\+300, expected at most 3.4e\+38 \(scale them\)"):
        read_scan([path])
