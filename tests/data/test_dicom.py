"""DICOM: files of many frames are what their slices are, projections are 2D, and what is no image is passed over."""

from __future__ import annotations

import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import pytest
import SimpleITK as sitk  # noqa: N813
from pydicom.uid import JPEG2000Lossless, JPEGLosslessSV1, RLELossless

from data.dicom_files import (
    CAPTURE,
    COMPANIONS,
    ENHANCED_MR,
    FILM,
    LEGACY_CT,
    MR,
    NUCLEAR,
    OBLIQUE,
    ORIGIN,
    SPACING,
    XRAY,
    companions,
    dataset,
    frames,
    items,
    position,
    slices,
    volume,
    write,
)
from mlbseg.data.cases import find_cases, find_scans
from mlbseg.data.check import check
from mlbseg.data.formats import dicom_pixels
from mlbseg.data.geometry import geometry_difference
from mlbseg.data.readers import mask_suffix, read_label, read_scan, write_label
from mlbseg.errors import ReadError, UserError
from mlbseg.types import Scan

SAGITTAL = (0.0, 1.0, 0.0, 0.0, 0.0, -1.0)


def assert_same(found: Scan, expected: Scan) -> None:
    np.testing.assert_array_equal(found.array, expected.array)
    assert geometry_difference(found.geometry, expected.geometry) is None


# Files of many frames


@pytest.mark.parametrize("cosines", [(1, 0, 0, 0, 1, 0), OBLIQUE, SAGITTAL])
@pytest.mark.parametrize(
    "order", [[0, 1, 2, 3, 4, 5], [5, 4, 3, 2, 1, 0], [0, 2, 4, 1, 3, 5]], ids=["up", "down", "interleaved"]
)
@pytest.mark.parametrize("sop", [ENHANCED_MR, LEGACY_CT])
def test_many_frames_are_what_their_slices_are(
    sop: str, order: list[int], cosines: tuple[float, ...], tmp_path: Path
) -> None:
    array = volume()
    single = read_scan([slices(tmp_path / "slices", array, cosines=cosines)])
    many = read_scan([frames(tmp_path / "many" / "a.dcm", array, order, sop=sop, cosines=cosines)])
    assert_same(many, single)
    assert_same(read_scan([tmp_path / "many"]), single)
    np.testing.assert_array_equal(many.array[0], array)
    direction = np.reshape(many.geometry.direction, (3, 3))
    assert np.linalg.det(direction) == pytest.approx(1)
    assert many.geometry.spacing == pytest.approx(SPACING[::-1])

    # A NIfTI file at the same place, as nibabel and SimpleITK see it.
    to_ras = np.diag([-1, -1, 1, 1]) @ np.block(
        [
            [direction * many.geometry.spacing, np.reshape(many.geometry.origin, (3, 1))],
            [np.zeros((1, 3)), np.ones((1, 1))],
        ]
    )
    np.testing.assert_allclose(many.geometry.origin, ORIGIN, atol=1e-6)
    nib.save(nib.Nifti1Image(array.T.astype(np.float32), to_ras), tmp_path / "a.nii.gz")
    assert geometry_difference(read_scan([tmp_path / "a.nii.gz"]).geometry, many.geometry) is None
    write_label(tmp_path / "mask.nii.gz", (array > 2000).astype(np.uint8), many.geometry)
    np.testing.assert_allclose(nib.load(tmp_path / "mask.nii.gz").affine, to_ras, atol=1e-5)
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(tmp_path / "slices")))
    assert sitk.ReadImage(str(tmp_path / "mask.nii.gz")).GetDirection() == pytest.approx(
        reader.Execute().GetDirection(), abs=1e-5
    )


@pytest.mark.parametrize("places", ["shared", "own"])
def test_each_frame_has_its_own_rescaling(places: str, tmp_path: Path) -> None:
    array = volume()
    scale = [{"RescaleSlope": 1 + k, "RescaleIntercept": -1024 + k, "RescaleType": "HU"} for k in range(6)]
    if places == "own":
        each = [{"PixelValueTransformationSequence": one} for one in scale]
        path = frames(tmp_path / "a.dcm", array, range(6)[::-1], each=each[::-1])
        expected = array * (1.0 + np.arange(6))[:, None, None] - 1024 + np.arange(6)[:, None, None]
    else:
        path = frames(tmp_path / "a.dcm", array)
        data = pydicom.dcmread(path)
        data.SharedFunctionalGroupsSequence[0].PixelValueTransformationSequence = items(**scale[3])
        write(path, data)
        expected = array * 4.0 - 1021
    np.testing.assert_array_equal(read_scan([path]).array[0], expected)


def test_one_frame_in_functional_groups_is_a_slice(tmp_path: Path) -> None:
    each = [
        {"PixelValueTransformationSequence": {"RescaleSlope": 2, "RescaleIntercept": 5, "RescaleType": "US"}}
    ]
    scan = read_scan([frames(tmp_path / "a.dcm", volume()[:1], each=each)])
    assert scan.geometry.size == (10, 8, 1)
    assert scan.geometry.spacing == pytest.approx(SPACING[::-1])
    np.testing.assert_array_equal(scan.array[0], volume()[:1] * 2.0 + 5)


def test_a_volume_in_several_files_of_frames(tmp_path: Path) -> None:
    frames(tmp_path / "s" / "1.dcm", volume(), [0, 1, 2], ConcatenationUID="1.2.7")
    frames(tmp_path / "s" / "0.dcm", volume(), [5, 4, 3], ConcatenationUID="1.2.7")
    np.testing.assert_array_equal(read_scan([tmp_path / "s"]).array[0], volume())


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"order": [0, 1, 2, 4, 5]}, "4 mm between a.dcm frame 3 and a.dcm frame 4, expected 2 mm"),
        ({"order": [0, 1, 2, 0, 1, 2]}, "a.dcm frame 1 and a.dcm frame 4 lie at the same position"),
        ({"order": [0, 1, 2], "places": [0, 1, 2.5]}, "expected 2.5 mm|expected 2 mm"),
        (
            {"order": [0, 1], "each": [{}, {"PixelMeasuresSequence": {"PixelSpacing": [2, 2]}}]},
            "frame 2 of 10×8 pixels of 2×2 mm, expected 10×8 pixels of 1.2×1.3 mm as in a.dcm frame 1",
        ),
        (
            {
                "order": [0, 1],
                "each": [{}, {"PlaneOrientationSequence": {"ImageOrientationPatient": list(SAGITTAL)}}],
            },
            "frame 2 has another orientation, expected that of a.dcm frame 1 .export the stacks one by one",
        ),
        ({"NumberOfFrames": 5}, "5 frames, and the places of 6"),
        ({"PerFrameFunctionalGroupsSequence": None}, "6 frames without a position in the patient"),
        ({"SharedFunctionalGroupsSequence": None}, "no ImageOrientationPatient"),
        ({"NumberOfFrames": 2_000_000_000, "PerFrameFunctionalGroupsSequence": None}, "that its header announces"),
        ({"Rows": 60}, "cannot be read: .* bytes, of .* that its header announces"),
    ],
)  # fmt: skip
def test_frames_that_are_no_volume_are_refused(change: dict, found: str, tmp_path: Path) -> None:
    path = frames(tmp_path / "a.dcm", volume(), **change)
    with pytest.raises(ReadError, match=found):
        read_scan([path])


def test_a_film_is_no_volume(tmp_path: Path) -> None:
    film = dataset(FILM, volume(), NumberOfFrames=6, FrameIncrementPointer=0x00181063, FrameTime="33")
    with pytest.raises(ReadError, match="6 frames without a position in the patient: a film"):
        read_scan([write(tmp_path / "a.dcm", film)])
    film.ImagePositionPatient, film.ImageOrientationPatient = position(0), [1, 0, 0, 0, 1, 0]
    film.PixelSpacing, film.SpacingBetweenSlices = list(SPACING[1:]), 2
    with pytest.raises(ReadError, match="a film"):
        read_scan([write(tmp_path / "a.dcm", film)])


@pytest.mark.parametrize("gap", [2.0, -2.0])
def test_frames_that_follow_one_position(gap: float, tmp_path: Path) -> None:
    """Nuclear medicine has one position and orientation, and a distance that may be negative."""
    array = volume()[:: 1 if gap > 0 else -1]
    data = dataset(NUCLEAR, np.ascontiguousarray(array), NumberOfFrames=6, FrameIncrementPointer=0x00540080)
    data.PixelSpacing, data.SpacingBetweenSlices = list(SPACING[1:]), gap
    place = position(0 if gap > 0 else 5)
    data.DetectorInformationSequence = items(
        ImagePositionPatient=place, ImageOrientationPatient=[1, 0, 0, 0, 1, 0]
    )
    assert_same(
        read_scan([write(tmp_path / "a.dcm", data)]), read_scan([slices(tmp_path / "slices", volume())])
    )


def test_a_volume_that_simpleitk_wrote_as_dicom(tmp_path: Path) -> None:
    image = sitk.GetImageFromArray(volume())
    image.SetSpacing(SPACING[::-1])
    image.SetOrigin(ORIGIN.tolist())
    sitk.WriteImage(image, str(tmp_path / "a.dcm"))
    assert_same(read_scan([tmp_path / "a.dcm"]), read_scan([slices(tmp_path / "slices", volume())]))


@pytest.mark.parametrize("syntax", [RLELossless, JPEG2000Lossless, JPEGLosslessSV1])
def test_compressed_frames(syntax: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    each = [
        {"PixelValueTransformationSequence": {"RescaleSlope": 1 + k, "RescaleIntercept": 3}} for k in range(6)
    ]
    path = frames(tmp_path / "a.dcm", volume(), each=each)
    data = pydicom.dcmread(path)
    if syntax == RLELossless:
        data.compress(RLELossless, encoding_plugin="pydicom")
    else:  # GDCM compresses; the groups are put back
        image = sitk.GetImageFromArray(volume())
        writer = sitk.ImageFileWriter()
        writer.SetFileName(str(tmp_path / "b.dcm"))
        writer.SetImageIO("GDCMImageIO")
        writer.SetUseCompression(True)
        writer.SetCompressor("JPEG2000" if syntax == JPEG2000Lossless else "JPEG")
        writer.Execute(image)
        coded = pydicom.dcmread(tmp_path / "b.dcm")
        assert coded.file_meta.TransferSyntaxUID == syntax
        data.file_meta.TransferSyntaxUID, data["PixelData"] = syntax, coded["PixelData"]
        data.BitsStored, data.HighBit = coded.BitsStored, coded.HighBit
    write(path, data)
    expected = volume() * (1.0 + np.arange(6))[:, None, None] + 3
    np.testing.assert_array_equal(read_scan([path]).array[0], expected)


# Slices


def test_what_is_no_image_is_passed_over_with_one_note(tmp_path: Path) -> None:
    folder = slices(tmp_path / "images" / "a", volume())
    expected = read_scan([folder])
    assert expected.notes == ()
    companions(folder)
    write(folder / "screen.dcm", dataset(CAPTURE, volume(3)[0], series="1.2.8"))
    scan = read_scan([folder])
    assert_same(scan, expected)
    assert len(scan.notes) == 1
    assert scan.notes[0].startswith("passed over, as no slice: DOSE.dcm (dose), PR.dcm (Grayscale Softcopy")
    assert scan.notes[0].endswith("and 3 more")
    warnings = check(find_cases(tmp_path), require_roles=False).warnings
    assert [(w.case_id, w.kind) for w in warnings] == [("a", "note")]


@pytest.mark.parametrize("name", COMPANIONS)
def test_no_image_alone_is_a_fault_that_names_it(name: str, tmp_path: Path) -> None:
    companions(tmp_path / "all")
    (tmp_path / "one").mkdir()
    shutil.copy(tmp_path / "all" / name, tmp_path / "one" / name)
    with pytest.raises(ReadError, match=rf"no image among its DICOM files .{COMPANIONS[name][1]}"):
        read_scan([tmp_path / "one"])
    with pytest.raises(ReadError, match=rf"no image in the file .{COMPANIONS[name][1]}"):
        read_scan([tmp_path / "one" / name])


def test_a_slice_of_the_series_without_a_position_is_a_fault(tmp_path: Path) -> None:
    folder = slices(tmp_path / "a", volume())
    write(folder / "x.dcm", dataset(MR, volume(1)[0]))
    with pytest.raises(ReadError, match=r"x.dcm: no position in the patient, expected a slice"):
        read_scan([folder])


def test_slices_without_the_size_of_a_pixel_are_noted(tmp_path: Path) -> None:
    folder = slices(tmp_path / "a", volume())
    for path in folder.iterdir():
        data = pydicom.dcmread(path)
        del data.PixelSpacing
        write(path, data)
    scan = read_scan([folder])
    assert scan.geometry.spacing == (1, 1, 2)
    assert scan.notes == ("no PixelSpacing: pixels are taken for 1 mm",)


def test_low_values_of_inverted_slices_stay_low(tmp_path: Path) -> None:
    plain = read_scan([slices(tmp_path / "a", volume())])
    inverted = slices(tmp_path / "b", volume(), PhotometricInterpretation="MONOCHROME1")
    assert_same(read_scan([inverted]), plain)


def test_files_without_preamble_or_ending(tmp_path: Path) -> None:
    folder = slices(tmp_path / "a", volume())
    expected = read_scan([folder])
    for path in folder.iterdir():
        path.write_bytes(path.read_bytes()[132:])  # starts with the group of the file's own elements
    assert_same(read_scan([folder]), expected)
    path = frames(tmp_path / "IM0001", volume())
    assert_same(read_scan([path]), expected)
    assert find_scans(path).cases[0].id == "IM0001"


@pytest.mark.parametrize(
    ("keyword", "value", "found"),
    [
        ("ImageOrientationPatient", None, "no ImageOrientationPatient"),
        ("PixelSpacing", [0, 1], "PixelSpacing 0, 1, expected numbers above 0"),
        ("PixelSpacing", [1], r"PixelSpacing \[1.0\], expected 2 numbers"),
        ("ImageOrientationPatient", [1, 0, 0, 1, 0, 0], r".* expected two directions at right angles"),
        ("ImagePositionPatient", [1, 0], r"ImagePositionPatient \[1.0, 0.0\], expected 3 numbers"),
    ],
)
def test_headers_that_say_nonsense(keyword: str, value: object, found: str, tmp_path: Path) -> None:
    folder = slices(tmp_path / "a", volume()[:2])
    data = pydicom.dcmread(folder / "001.dcm")
    if value is None:
        del data[keyword]
    else:
        setattr(data, keyword, value)
    write(folder / "001.dcm", data)
    with pytest.raises(ReadError, match=rf"001.dcm: {found}"):
        read_scan([folder])


# Projection images


@pytest.mark.parametrize("place", ["images/p.dcm", "images/p/x.dcm"])
def test_projections_are_2d_and_png_masks_fit(place: str, tmp_path: Path) -> None:
    image = volume()[0]
    write(tmp_path / place, dataset(XRAY, image, PixelSpacing=[1.3, 1.2]))
    (tmp_path / "labels").mkdir()
    sitk.WriteImage(sitk.GetImageFromArray((image > 2000).astype(np.uint8)), str(tmp_path / "labels/p.png"))
    dataset_ = find_cases(tmp_path)
    assert [(case.id, case.role.value) for case in dataset_.cases] == [("p", "clean")]
    result = check(dataset_)
    assert result.faults == ()
    scan = read_scan(dataset_.cases[0].images)
    assert scan.geometry.size == (10, 8)
    assert scan.geometry.spacing == pytest.approx((1.2, 1.3))
    np.testing.assert_array_equal(scan.array[0], image)
    assert mask_suffix(dataset_.cases[0].images) == ".png"
    write_label(tmp_path / "mask.png", (image > 100).astype(np.uint8), scan.geometry)
    assert geometry_difference(read_label(tmp_path / "mask.png")[1], scan.geometry) is None


def test_a_projection_of_the_detector_or_without_a_size(tmp_path: Path) -> None:
    given = write(tmp_path / "a.dcm", dataset(XRAY, volume()[0], ImagerPixelSpacing=[0.2, 0.1]))
    assert read_scan([given]).geometry.spacing == pytest.approx((0.1, 0.2))
    assert read_scan([write(tmp_path / "b.dcm", dataset(XRAY, volume()[0]))]).geometry.spacing == (1, 1)


def test_inverted_projections_are_turned_so_that_bright_is_bright(tmp_path: Path) -> None:
    image = volume()[0]
    data = dataset(XRAY, image, PhotometricInterpretation="MONOCHROME1", RescaleSlope=2, RescaleIntercept=5)
    scan = read_scan([write(tmp_path / "a.dcm", data)])
    np.testing.assert_array_equal(scan.array[0], (4095.0 - image) * 2 + 5)  # 12 bits are stored


def test_coloured_projections_have_three_channels(tmp_path: Path) -> None:
    image = np.random.default_rng(0).integers(0, 256, (8, 10, 3)).astype(np.uint8)
    scan = read_scan([write(tmp_path / "a.dcm", dataset(CAPTURE, image))])
    np.testing.assert_array_equal(scan.array, np.moveaxis(image, -1, 0))
    assert scan.geometry.size == (10, 8)


def test_several_projections_in_one_case_are_a_fault_with_a_label(tmp_path: Path) -> None:
    for name in ("ap", "lateral"):
        write(tmp_path / f"images/p/{name}.dcm", dataset(XRAY, volume()[0]))
    assert [case.id for case in find_cases(tmp_path).cases] == ["p_ap", "p_lateral"]
    with pytest.raises(ReadError, match="2 images without a position in the patient"):
        read_scan([tmp_path / "images/p"])


@pytest.mark.parametrize("kind", ["segmentation", "projection", "volume"])
def test_dicom_as_a_label_is_refused(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "a.dcm"
    if kind == "volume":
        frames(path, volume())
    else:
        write(path, dataset(COMPANIONS["SEG.dcm"][0] if kind == "segmentation" else XRAY, volume()[0]))
    with pytest.raises(ReadError, match=r"a DICOM file, expected a label file .save the label as .nii.gz"):
        read_label(path)


# Folders as archives export them


def found(path: Path) -> dict[str, str]:
    return {case.id: str(case.images[0].relative_to(path)) for case in find_scans(path).cases}


def test_nested_series_are_found(tmp_path: Path) -> None:
    slices(tmp_path / "PAT1" / "STUDY" / "SER1", volume(1))
    slices(tmp_path / "PAT2" / "STUDY" / "SER1", volume(2))
    slices(tmp_path / "PAT2" / "STUDY" / "SER2", volume(3), series="1.2.5")
    frames(tmp_path / "PAT3" / "IM1", volume(4))
    slices(tmp_path / "PAT4", volume(5))
    companions(tmp_path / "PAT4" / "RT")
    assert found(tmp_path) == {
        "PAT1": "PAT1/STUDY/SER1",
        "PAT2_STUDY_SER1": "PAT2/STUDY/SER1",
        "PAT2_STUDY_SER2": "PAT2/STUDY/SER2",
        "PAT3": "PAT3",
        "PAT4": "PAT4",
    }
    np.testing.assert_array_equal(read_scan(find_scans(tmp_path).cases[2].images).array[0], volume(3))


def test_links_to_folders_and_hidden_ones_are_not_searched(tmp_path: Path) -> None:
    slices(tmp_path / "PAT1" / "A", volume())
    slices(tmp_path / "PAT1" / ".trash", volume(1))
    (tmp_path / "PAT1" / "loop").symlink_to(tmp_path / "PAT1")
    assert found(tmp_path) == {"PAT1": "PAT1/A"}


def test_nested_series_train_under_the_case_that_they_lie_in(tmp_path: Path) -> None:
    slices(tmp_path / "images/a/SER1", volume(1))
    slices(tmp_path / "images/b/SER1", volume(2))
    slices(tmp_path / "images/b/SER2", volume(3))
    for name in "ab":
        geometry = read_scan([tmp_path / f"images/{name}/SER1"]).geometry
        (tmp_path / "labels").mkdir(exist_ok=True)
        write_label(tmp_path / f"labels/{name}.nii.gz", (volume() > 2000).astype(np.uint8), geometry)
    data = find_cases(tmp_path)
    assert [(f.case_id, f.found) for f in data.faults] == [("b", "2 DICOM series (b/SER1, b/SER2)")]
    good = next(case for case in data.cases if case.id == "a")
    assert good.images == (tmp_path / "images/a/SER1",)
    assert good.role.value == "clean"


def test_a_label_is_of_the_slices_beside_it_not_of_a_series_below(tmp_path: Path) -> None:
    folder = slices(tmp_path / "images/a", volume(1))
    slices(folder / "localiser", volume(2))
    (tmp_path / "labels").mkdir()
    write_label(tmp_path / "labels/a.nii.gz", volume() // 4000, read_scan([folder]).geometry)
    data = find_cases(tmp_path)
    assert [case.images for case in data.cases] == [(folder,)]
    assert data.faults == ()
    assert [warning.found for warning in data.warnings] == ["a/localiser passed over"]


def test_one_loose_file_makes_no_series_of_a_folder(tmp_path: Path) -> None:
    slices(tmp_path / "case", volume(1))
    sitk.WriteImage(sitk.GetImageFromArray(volume(2)), str(tmp_path / "n.nii.gz"))
    slices(tmp_path / "lone", volume(3)[:1])
    (tmp_path / "lone" / "000.dcm").rename(tmp_path / "lone.dcm")
    (tmp_path / "lone").rmdir()
    assert found(tmp_path) == {"case": "case", "n": "n.nii.gz", "lone": "lone.dcm"}


def test_a_series_beside_other_scans_is_one_scan(tmp_path: Path) -> None:
    folder = slices(tmp_path / "series", volume(1))
    sitk.WriteImage(sitk.GetImageFromArray(volume(2)), str(folder / "n.nii.gz"))
    slices(folder / "localiser", volume(3))
    assert {case.id: case.images[0] for case in find_scans(folder).cases} == {
        "series": folder,
        "n": folder / "n.nii.gz",
        "localiser": folder / "localiser",
    }


def test_volumes_and_projections_in_one_folder_are_a_scan_each(tmp_path: Path) -> None:
    frames(tmp_path / "a.dcm", volume(1))
    frames(tmp_path / "b.dcm", volume(2))
    write(tmp_path / "x.dcm", dataset(XRAY, volume(3)[0]))
    write(tmp_path / "y.dcm", dataset(XRAY, volume(4)[0]))
    assert found(tmp_path) == {name: f"{name}.dcm" for name in "abxy"}


def test_two_series_in_one_folder_are_a_fault(tmp_path: Path) -> None:
    slices(tmp_path / "s", volume(1), SeriesDescription="T1")
    for path in slices(tmp_path / "t", volume(2), series="1.2.5", SeriesDescription="T2").iterdir():
        path.rename(tmp_path / "s" / f"t{path.name}")
    cases = find_scans(tmp_path / "s").cases
    assert [case.id for case in cases] == ["s"]
    with pytest.raises(ReadError, match=r"2 series: T1 .6 files.; T2 .6 files., expected one series"):
        read_scan(cases[0].images)


def test_loose_slices_of_one_series_are_no_cases(tmp_path: Path) -> None:
    slices(tmp_path / "images", volume())
    faults = find_cases(tmp_path).faults
    assert [str(fault) for fault in faults] == [
        "images/000.dcm: one of several slices of a series, expected images/NAME/*.dcm "
        "(put each series into a folder of its own)"
    ]


def test_a_folder_of_plans_and_reports_has_no_scans(tmp_path: Path) -> None:
    companions(tmp_path / "rt")
    with pytest.raises(UserError, match="no scans in it"):
        find_scans(tmp_path)


def test_a_damaged_file_is_named_by_whoever_reads_it(tmp_path: Path) -> None:
    slices(tmp_path / "good", volume())
    (tmp_path / "bad.dcm").write_bytes(b"not DICOM at all" * 40)
    scans = find_scans(tmp_path).cases
    assert [case.id for case in scans] == ["bad", "good"]
    with pytest.raises(ReadError, match=r"bad.dcm: cannot be read"):
        read_scan(scans[0].images)


def test_the_copy_for_gdcm_names_no_patient_and_does_not_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    frames(tmp_path / "a.dcm", volume())
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    seen = []
    read = sitk.ReadImage

    def look(file: str, **options: object) -> sitk.Image:
        seen.append(pydicom.dcmread(file))
        return read(file, **options)

    monkeypatch.setattr(dicom_pixels.sitk, "ReadImage", look)
    dicom_pixels._by_gdcm(tmp_path / "a.dcm", pydicom.dcmread(tmp_path / "a.dcm"))
    assert len(seen) == 1
    assert "PatientID" not in seen[0]
    assert "PatientName" not in seen[0]
    assert list((tmp_path / "temporary").iterdir()) == []


@pytest.mark.parametrize("seed", range(3))
def test_damaged_headers_are_faults_in_every_place(seed: int, tmp_path: Path) -> None:
    raw = frames(tmp_path / "whole.dcm", volume()).read_bytes()
    rng = np.random.default_rng(seed)
    path = tmp_path / "a" / "a.dcm"
    path.parent.mkdir()
    for number in range(60):
        damaged = bytearray(raw[: rng.integers(1, len(raw))] if number % 5 == 0 else raw)
        for _ in range(4):
            damaged[rng.integers(0, min(len(damaged), len(raw) - volume().nbytes))] = rng.integers(0, 256)
        path.write_bytes(damaged)
        mask_suffix([path])
        for look in (lambda: read_scan([path]), lambda: find_scans(path.parent)):
            try:
                look()
            except UserError as error:
                assert "report this line" not in str(error)  # noqa: PT017 - some are read, as nothing that matters is damaged


def test_files_without_an_ending_are_not_called_unread(tmp_path: Path) -> None:
    folder = slices(tmp_path / "s", volume())
    for path in folder.iterdir():
        path.rename(path.with_suffix(""))
    (folder / "LICENSE.txt").write_text("x")
    scans = find_scans(folder)
    assert [case.id for case in scans.cases] == ["s"]
    assert [note.where for note in scans.notes] == ["LICENSE.txt"]
