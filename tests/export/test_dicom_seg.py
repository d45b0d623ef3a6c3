"""DICOM segmentations hold the mask, voxel for voxel, on the slices that they refer to."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import highdicom
import numpy as np
import pydicom
import pytest
import SimpleITK as sitk  # noqa: N813 - as its documentation does

from blocks import blocks
from conftest import Command
from data.dicom_files import frames
from export.seg_series import SPACING, write_series
from mlbseg.apps.export import export
from mlbseg.data.readers import read_label, read_scan, write_label
from mlbseg.errors import UserError
from mlbseg.inference import predict

POSES: dict[str, dict] = {
    "axial": {},
    "backwards": {"backwards": True},
    "oblique": {"cosines": (0.8, 0.6, 0, -0.48, 0.64, 0.6)},
    "sagittal": {"cosines": (0, 1, 0, 0, 0, -1), "backwards": True},
}


def series(folder: Path, seed: int, **pose: object) -> list[str]:
    return write_series(folder, blocks(seed)[0].round(), **pose)  # type: ignore[arg-type]


def by_source(path: Path, uids: list[str]) -> np.ndarray:
    """Return the label map (Z, Y, X) by the instances that frames refer to, not by where they lie."""
    found = highdicom.seg.segread(str(path))
    return found.get_pixels_by_source_instance(
        source_sop_instance_uids=uids,
        combine_segments=True,
        assert_missing_frames_are_empty=True,  # slices without a segment have no frame
    )


@pytest.mark.slow
def test_a_segmentation_holds_the_mask_on_its_own_slices(supervised_run: Path, tmp_path: Path) -> None:
    uids = {
        name: series(tmp_path / "scans" / name, 60 + i, **pose)
        for i, (name, pose) in enumerate(POSES.items())
    }
    done = export(supervised_run, tmp_path / "seg", "dicom-seg", scans=tmp_path / "scans", device="cpu")
    assert not done.faults
    masks = predict(supervised_run, tmp_path / "scans", tmp_path / "masks", device="cpu").masks
    assert [path.name for path in done.files] == [f"{name}.dcm" for name in sorted(POSES)]
    for name, path in zip(sorted(POSES), done.files, strict=True):
        mask, _ = read_label(masks[name])
        assert set(np.unique(mask)) == {0, 1, 2}
        np.testing.assert_array_equal(by_source(path, uids[name]), mask)

        found = highdicom.seg.segread(str(path))
        source = pydicom.dcmread(next((tmp_path / "scans" / name).iterdir()))
        for keyword in ("FrameOfReferenceUID", "StudyInstanceUID", "PatientID", "PatientName"):
            assert found[keyword].value == source[keyword].value
        assert found.ReferencedSeriesSequence[0].SeriesInstanceUID == source.SeriesInstanceUID
        assert found.SeriesInstanceUID != source.SeriesInstanceUID

        # Where the frames say that they lie is where the mask file says.
        volume = found.get_volume(combine_segments=True)
        image = sitk.ReadImage(str(masks[name]))
        for index in np.argwhere(volume.array)[::37]:
            place = volume.affine @ [*index, 1]
            z, y, x = (round(v) for v in reversed(image.TransformPhysicalPointToContinuousIndex(place[:3])))
            assert mask[z, y, x] == volume.array[tuple(index)]
        np.testing.assert_allclose(volume.spacing, SPACING, atol=1e-5)
        assert (volume.array > 0).sum() == (mask > 0).sum()


@pytest.mark.slow
@pytest.mark.parametrize("order", ["up", "down", "interleaved"])
def test_a_file_of_many_frames_is_referred_to_frame_by_frame(
    order: str, supervised_run: Path, tmp_path: Path
) -> None:
    array = blocks(61)[0].round().clip(0).astype(np.uint16)
    numbers = list(range(len(array)))
    stored = {"up": numbers, "down": numbers[::-1], "interleaved": numbers[::2] + numbers[1::2]}[order]
    source = frames(tmp_path / "one" / "a.dcm", array, stored)
    done = export(supervised_run, tmp_path / "seg", "dicom-seg", scans=tmp_path / "one", device="cpu")
    assert not done.faults
    masks = predict(supervised_run, tmp_path / "one", tmp_path / "masks", device="cpu").masks
    mask, geometry = read_label(masks["one"])
    assert set(np.unique(mask)) == {0, 1, 2}
    found = highdicom.seg.segread(str(done.files[0]))
    by_frame = found.get_pixels_by_source_frame(
        source_sop_instance_uid=pydicom.dcmread(source).SOPInstanceUID,
        source_frame_numbers=[k + 1 for k in range(len(stored))],
        combine_segments=True,
        assert_missing_frames_are_empty=True,
    )
    np.testing.assert_array_equal(by_frame, mask[stored])
    volume = found.get_volume(combine_segments=True)
    image = sitk.ReadImage(str(masks["one"]))
    for index in np.argwhere(volume.array)[::37]:
        place = volume.affine @ [*index, 1]
        z, y, x = (round(v) for v in reversed(image.TransformPhysicalPointToContinuousIndex(place[:3])))
        assert mask[z, y, x] == volume.array[tuple(index)]
    np.testing.assert_allclose(volume.spacing, geometry.spacing[::-1], atol=1e-5)


@pytest.mark.slow
def test_probabilities_can_be_written(supervised_run: Path, tmp_path: Path) -> None:
    uids = series(tmp_path / "one", 70)
    export(
        supervised_run, tmp_path / "seg", "dicom-seg", scans=tmp_path / "one", fractional=True, device="cpu"
    )
    found = highdicom.seg.segread(str(tmp_path / "seg" / "one.dcm"))
    assert (found.SegmentationType, found.SegmentationFractionalType) == ("FRACTIONAL", "PROBABILITY")
    values = found.get_pixels_by_source_instance(
        source_sop_instance_uids=uids, assert_missing_frames_are_empty=True
    )
    predict(supervised_run, tmp_path / "one", tmp_path / "p", probabilities=True, device="cpu")
    for index, value in enumerate((1, 2)):
        expected = sitk.GetArrayFromImage(
            sitk.ReadImage(str(tmp_path / f"p/probabilities/one_{value}.nii.gz"))
        )
        np.testing.assert_allclose(values[..., index], expected, atol=0.5 / 255 + 1e-6)
        assert expected.max() > 0.5


@pytest.mark.slow
def test_masks_are_taken_as_they_are_and_segments_are_coded(supervised_run: Path, tmp_path: Path) -> None:
    uids = series(tmp_path / "one", 71, **POSES["oblique"])
    mask = predict(supervised_run, tmp_path / "one", tmp_path / "masks", device="cpu").masks["one"]
    _, geometry = read_label(mask)
    drawn = np.zeros(geometry.size[::-1], np.uint8)
    drawn[3, 4, 5], drawn[7, 2:5, 9] = 2, 1
    write_label(mask, drawn, geometry)
    name = json.loads((supervised_run / "plan.json").read_text())["class_names"][1]
    codes = tmp_path / "codes.json"
    codes.write_text(json.dumps({name: ["64033007", "SCT", "Kidney"]}))
    options = {"scans": tmp_path / "one", "masks": tmp_path / "masks", "codes": codes}
    export(supervised_run, tmp_path / "seg", "dicom-seg", **options)
    path = tmp_path / "seg" / "one.dcm"
    np.testing.assert_array_equal(by_source(path, uids), drawn)
    first, second = highdicom.seg.segread(str(path)).SegmentSequence
    assert first.SegmentLabel == name
    assert first.SegmentedPropertyTypeCodeSequence[0].CodeMeaning == "Kidney"
    assert second.SegmentedPropertyTypeCodeSequence[0].CodeMeaning == "Organ"
    assert first.SegmentationAlgorithmIdentificationSequence[0].AlgorithmName == "mlbseg supervised"
    assert first.RecommendedDisplayCIELabValue != second.RecommendedDisplayCIELabValue

    again = export(supervised_run, tmp_path / "seg", "dicom-seg", **options)
    assert "exists already" in again.faults[0].found
    assert not export(supervised_run, tmp_path / "seg", "dicom-seg", overwrite=True, **options).faults

    codes.write_text(json.dumps({"liver": ["64033007", "SCT", "Kidney"]}))
    with pytest.raises(UserError, match="no class is called 'liver'"):
        export(supervised_run, tmp_path / "other", "dicom-seg", **options)
    codes.write_text(json.dumps({name: ["64033007"]}))
    with pytest.raises(UserError, match=r"codes\.json: '.*' has \['64033007'\], expected three texts"):
        export(supervised_run, tmp_path / "other", "dicom-seg", **options)


@pytest.mark.slow
def test_an_empty_mask_is_a_segmentation_too(supervised_run: Path, tmp_path: Path) -> None:
    uids = series(tmp_path / "one", 72)
    mask = predict(supervised_run, tmp_path / "one", tmp_path / "masks", device="cpu").masks["one"]
    _, geometry = read_label(mask)
    write_label(mask, np.zeros(geometry.size[::-1], np.uint8), geometry)
    options = {"scans": tmp_path / "one", "masks": tmp_path / "masks"}
    assert not export(supervised_run, tmp_path / "seg", "dicom-seg", **options).faults
    assert not by_source(tmp_path / "seg" / "one.dcm", uids).any()


@pytest.mark.slow
def test_what_is_no_series_or_does_not_fit_is_named_and_the_others_are_written(
    supervised_run: Path, scans: Path, tmp_path: Path
) -> None:
    series(tmp_path / "scans" / "good", 73)
    series(tmp_path / "scans" / "moved", 74)
    series(tmp_path / "scans" / "unmasked", 75)
    shutil.copy(scans / "images" / "case_0.nii.gz", tmp_path / "scans")
    masks = predict(supervised_run, tmp_path / "scans", tmp_path / "masks", device="cpu").masks
    image = sitk.ReadImage(str(masks["moved"]))
    image.SetOrigin((50, 0, 0))
    sitk.WriteImage(image, str(masks["moved"]))
    masks["unmasked"].unlink()
    done = export(
        supervised_run, tmp_path / "seg", "dicom-seg", scans=tmp_path / "scans", masks=tmp_path / "masks"
    )
    assert [path.name for path in done.files] == ["good.dcm"]
    faults = {fault.case_id: str(fault) for fault in done.faults}
    assert "not a DICOM series" in faults["case_0"]
    assert "origin" in faults["moved"]
    assert "no such mask" in faults["unmasked"]
    assert [path.name for path in (tmp_path / "seg").iterdir()] == ["good.dcm"]


def change(folder: Path, *absent: str, bare: bool = False) -> None:
    """Take headers, or preamble and file meta information, out of the files of a series."""
    for path in folder.iterdir():
        data = pydicom.dcmread(path)
        for keyword in absent:
            delattr(data, keyword)
        if bare:
            content = pydicom.Dataset({element.tag: element for element in data})
            content.save_as(path, implicit_vr=True, little_endian=True)
            assert path.read_bytes()[128:132] != b"DICM"
        else:
            data.save_as(path)


@pytest.mark.slow
def test_series_with_poor_headers_are_completed_or_named_and_stop_no_other(
    command: Command, supervised_run: Path, tmp_path: Path
) -> None:
    scans = tmp_path / "scans"
    uids = {name: series(scans / name, 76) for name in ("bare", "flat", "frameless", "good", "unstudied")}
    change(scans / "bare", bare=True)
    change(scans / "flat", "SliceThickness", "PixelSpacing")
    change(scans / "frameless", "FrameOfReferenceUID")
    change(scans / "unstudied", "StudyInstanceUID")
    masks = predict(supervised_run, scans, tmp_path / "masks", device="cpu").masks
    options = ("--format", "dicom-seg", "--scans", scans, "--masks", tmp_path / "masks", "--json")
    done = command("export", supervised_run, tmp_path / "seg", *options)
    assert done.code == 2
    faults = {fault["case_id"]: fault for fault in done.json["faults"]}
    assert set(faults) == {"frameless", "unstudied"}
    assert faults["frameless"]["found"] == "no FrameOfReferenceUID"
    assert faults["unstudied"]["found"] == "no StudyInstanceUID"
    for name, fault in faults.items():
        assert fault["where"] == f"{name}/001.dcm"
        assert fault["expected"]
        assert fault["remedy"]
    assert [Path(path).name for path in done.json["files"]] == ["bare.dcm", "flat.dcm", "good.dcm"]
    for name in ("bare", "flat", "good"):
        mask, geometry = read_label(masks[name])
        path = tmp_path / "seg" / f"{name}.dcm"
        np.testing.assert_array_equal(by_source(path, uids[name]), mask)
        measures = highdicom.seg.segread(str(path)).SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0]
        assert list(measures.PixelSpacing) == pytest.approx([geometry.spacing[1], geometry.spacing[0]])
        assert measures.SliceThickness == pytest.approx(SPACING[0])


@pytest.mark.slow
def test_what_highdicom_refuses_is_a_fault_of_its_series(supervised_run: Path, tmp_path: Path) -> None:
    for name in ("good", "mixed"):
        series(tmp_path / "scans" / name, 77)
    first = tmp_path / "scans" / "mixed" / "001.dcm"
    data = pydicom.dcmread(first)
    data.FrameOfReferenceUID = pydicom.uid.generate_uid()
    data.save_as(first)
    predict(supervised_run, tmp_path / "scans", tmp_path / "masks", device="cpu")
    done = export(
        supervised_run, tmp_path / "seg", "dicom-seg", scans=tmp_path / "scans", masks=tmp_path / "masks"
    )
    assert [path.name for path in done.files] == ["good.dcm"]
    (fault,) = done.faults
    assert (fault.where, fault.case_id) == ("mixed", "mixed")
    assert "must all be part of the same series" in fault.found


@pytest.mark.slow
@pytest.mark.realdata
def test_real_series(realdata: Path, supervised_run: Path, tmp_path: Path) -> None:
    names = sorted(path.name for path in (realdata / "dicom").iterdir() if path.is_dir())
    masks = {}
    (tmp_path / "masks").mkdir()
    for name in names:
        scan = read_scan([realdata / "dicom" / name])
        low, high = np.quantile(scan.array[0], [0.7, 0.95])
        masks[name] = (scan.array[0] > low).astype(np.uint8) + (scan.array[0] > high)
        write_label(tmp_path / "masks" / f"{name}.nii.gz", masks[name], scan.geometry)
    done = export(
        supervised_run, tmp_path / "seg", "dicom-seg", scans=realdata / "dicom", masks=tmp_path / "masks"
    )
    assert not done.faults
    assert [path.stem for path in done.files] == names
    for path in done.files:
        series = (realdata / "dicom" / path.stem).iterdir()
        files = [pydicom.dcmread(file, stop_before_pixels=True) for file in series]
        normal = np.cross(files[0].ImageOrientationPatient[:3], files[0].ImageOrientationPatient[3:])
        files.sort(key=lambda file: float(np.dot(file.ImagePositionPatient, normal)))
        found = by_source(path, [str(file.SOPInstanceUID) for file in files])
        np.testing.assert_array_equal(found, masks[path.stem])
