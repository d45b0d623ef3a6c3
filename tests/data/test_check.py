"""Every broken input yields its fault, all at once; healthy data yields none."""

from __future__ import annotations

import hashlib
import json
import os
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from data.broken import BROKEN, cut, healthy, left_atrium, mask, noise, pictures, save, series
from mlbseg.data.cases import find_cases
from mlbseg.data.check import CheckResult, check, without_bad
from mlbseg.errors import Fault, FaultsError, UserError
from mlbseg.types import Role


def run(path: Path) -> CheckResult:
    return check(find_cases(path))


def faults(path: Path) -> list[str]:
    """What the user reads: one line per fault."""
    try:
        return [str(fault) for fault in run(path).faults]
    except UserError as error:
        return [str(error).splitlines()[0]]


def tree(root: Path) -> dict[str, str]:
    found = {}
    for folder, folders, files in os.walk(root):
        for name in (*folders, *files):
            path = Path(folder) / name
            if path.is_symlink():
                content = str(path.readlink()).encode()
            else:
                content = path.read_bytes() if path.is_file() else b""
            found[str(path)] = hashlib.sha256(content).hexdigest()
    return found


# What the one line must say: where, and what. A fault of another kind must not pass for it.
EXPECTED = {
    "truncated_gzip": "^images/b.nii.gz: truncated",
    "truncated_gzip_label": "^labels/b.nii.gz: truncated",
    "gzip_without_its_checksum": "^images/b.nii.gz: truncated",
    "text_named_nii_gz": "^images/b.nii.gz: not a NIfTI file",
    "text_in_gzip": "^images/b.nii.gz: not a NIfTI file",
    "zero_bytes_image": "^images/b.nii.gz: an empty file",
    "zero_bytes_label": "^labels/b.nii.gz: an empty file",
    "truncated_nii": "^images/b.nii: holds .* bytes",
    "truncated_nrrd": "^images/b.nrrd: b.nrrd holds .* bytes of pixels",
    "truncated_mha": "^images/b.mha: .* holds .* bytes",
    "mhd_without_pixels": "^images/b.mhd: its pixel file b.raw is missing",
    "truncated_png": "^images/b.png: cannot be read",
    "broken_link": "^images/e.nii.gz: cannot be opened .No such file",
    "link_loop_file": "^images/e.nii.gz: cannot be opened .Too many levels of symbolic links",
    "gzip_named_nii": "^images/b.nii: .*rename it to .nii.gz",
    "header_more_voxels_than_file": "^images/b.nii.gz: holds 1920 bytes of voxels, expected the 768000 ",
    "header_of_half_the_universe": "^images/b.nii.gz: its header announces .* GiB of pixels, expected at most",
    "header_zero_size": "^images/b.nii.gz: size .0, 8, 6.",
    "header_negative_size": "^images/b.nii.gz: size .-8, 8, 6.",
    "header_nine_axes": "^images/b.nii.gz: size .* 1 to 7 axes",
    "header_unknown_voxel_type": "^images/b.nii.gz: voxel type 9999",
    "header_spacing_zero": "^images/b.nii.gz: spacing 0 ",
    "header_spacing_negative": "^images/b.nii.gz: spacing -1 ",
    "header_spacing_nan": "^images/b.nii.gz: spacing .* nan ",
    "header_spacing_infinite": "^images/b.nii.gz: spacing .* inf ",
    "header_qform_and_sform_disagree": "^images/b.nii.gz: qform and sform lie .* apart",
    "header_sform_nan": "^images/b.nii.gz: position or direction is not a number",
    "header_sform_of_other_spacing": "^images/b.nii.gz: sform spacing 3 ",
    "header_sheared": "^images/b.nii.gz: sheared",
    "header_complex_voxels": "^images/b.nii.gz: complex values",
    "nan_pixel": "^images/b.nii.gz: 24 values are NaN or infinite",
    "nan_pixel_nrrd": "^images/b.nrrd: 24 values are NaN or infinite",
    "infinite_pixel": "^images/b.nii.gz: 24 values are NaN or infinite",
    "constant_image": "^images/b.nii.gz: every pixel is 7",
    "channels_and_times": "^images/b.nii.gz: 5D image of 10×8×6×2×3, expected .*split",
    "four_axes_among_three": "^b: an image of 3 channels, expected 1",
    "label_of_four_axes": "^labels/b.nii.gz: a label of 10×8×6×2: 2 maps in one file, expected one label map",
    "nifti_bent": "^images/b.nii.gz: sheared axes in sform: .* move by up to 1.1",
    "label_without_a_place": "^labels/b.nii.gz: place not stated in its header, expected the place as its image",
    "pair_without_pixels": "^images/e.hdr: its pixel file e.img is missing",
    "pair_without_magic": "^images/e.hdr: not a NIfTI file",
    "identical_images": "^d: the same image as a",
    "label_of_other_size": "^labels/b.nii.gz: size 10×8×5, expected 10×8×6",
    "label_of_other_spacing": "^labels/b.nii.gz: spacing 1×1×2 mm, expected 1×1×1",
    "label_of_other_origin": "^labels/b.nii.gz: origin",
    "label_of_other_direction": "^labels/b.nii.gz: direction",
    "far_off_spacing": "^d: spacing 1×1×9 mm",
    "flat_scan_among_volumes": "^e: an image of 2 axes",
    "two_channels_among_one": "^e: an image of 2 channels",
    "label_not_whole": "^labels/b.nii.gz: label value 0.5",
    "label_nan": "^labels/b.nii.gz: 24 values are NaN",
    "label_unexpected_value": "^b: label values {0, 7}, expected {0, 1}",
    "label_beyond_int32": "^labels/b.nii.gz: label value 4000000000",
    "label_negative": "^b: label values {-1, 0}, expected {0, 1}",
    "label_wrapped_around": "^b: label values {0, 255}, expected {0, 1}",
    "label_only_background": "^labels/b.nii.gz: only background",
    "label_without_image": "^labels/z.nii.gz: a label without an image",
    "label_in_colour": r"^labels/b.png: a mask in colours \(RGB\), expected one label value",
    "no_labels_at_all": "no clean case among 4",
    "one_name_twice": r"^a: two cases of this name \(a.nii.gz, a.nrrd\)",
    "one_label_twice": r"^a: two labels \(a.nii.gz, a.nrrd\)",
    "name_with_newline": r"^'e\\nrm -rf': a name with .* control character",
    "name_with_backslash": "^'e.*f': a name with a separator",
    "name_too_long": "^'e+': a name of 238 bytes, of which 235 are the most .*, expected a plain file name .rename it",
    "list_of_unknown_case": "^train.list: names 'nobody'",
    "list_not_text": "test.list: cannot be read as text",
    "names_with_spaces_unicode_and_html": "^images/<b>&amp;<script>.nii.gz: truncated",
    "empty_folder": "no known layout .found: nothing",
    "missing_folder": "no/such/folder: cannot be opened",
    "file_instead_of_folder": "notes.txt: a file that is no datalist",
    "images_is_a_file": "images: cannot be listed .Not a directory",
    "images_is_empty": "images: no scans in it",
    "link_loop": "images: cannot be listed .Too many levels",
    "link_loop_of_labels": "labels: cannot be listed .Too many levels",
    "link_to_the_folder_itself": "^images/again: a folder without DICOM files",
    "unknown_layout": "no known layout .found: stuff/",
    "dataset_json_broken": "^dataset.json: cannot be used",
    "nnunet_channel_missing": "^b: channels 0001, expected numbers from 0000",
    "nnunet_channels_of_other_geometry": "^imagesTr/c_0001.nii.gz: spacing 1×1×2 mm, expected 1×1×1",
    "csv_empty": "cases.csv: no cases in it",
    "csv_only_a_header": "cases.csv: no cases in it",
    "csv_without_image_column": "cases.csv: found columns id, label, picture",
    "csv_row_without_image": "^cases.csv, line 3: no image",
    "csv_too_many_cells": "cases.csv: .*line 2 has more cells",
    "csv_leaves_its_folder": "^cases.csv, line 3: .* leaves the folder",
    "csv_id_leaves_its_folder": "^'../b': a name that .* starts with a dot",
    "csv_missing_file": "^cases.csv, line 3: no file 'images/nobody.nii.gz'",
    "csv_unknown_role": "^cases.csv, line 3: unknown role 'teest' .did you mean 'test'",
    "csv_clean_without_label": "^cases.csv, line 3: role clean without a label",
    "csv_one_id_twice": "^a: two cases of this name",
    "json_broken": "cases.json: not a valid datalist",
    "json_no_list": "cases.json: .* no list of objects",
    "json_image_is_a_number": "^cases.json, entry 1: no image",
    "csv_not_utf8": "cases.csv: not a valid datalist",
    "mhd_points_elsewhere": "^images/b.mhd: keeps its pixels in '../labels/b.raw'",
    "nrrd_points_elsewhere": "^images/b.nhdr: keeps its pixels in '/etc/passwd'",
    "hdf5_truncated": "^n1/mri_norm2.h5: cannot be read: truncated",
    "hdf5_not_hdf5": "^n1/mri_norm2.h5: cannot be read: file signature",
    "hdf5_without_image": "^n1/mri_norm2.h5: no data set 'image'",
    "hdf5_links_elsewhere": "^n1/mri_norm2.h5: no data set 'image' of its own",
    "dicom_missing_slice": "^images/bad_case: 5 mm between 001.dcm and 003.dcm",
    "dicom_gantry_tilt": "^images/bad_case: .*gantry tilt of 16",
    "dicom_slice_twice": "^images/bad_case: 004.dcm and 005.dcm lie at the same position",
    "dicom_two_series": "^images/bad_case: 2 series: .*(3 files).*(3 files)",
    "dicom_two_orientations": "^images/bad_case/001.dcm: another orientation",
    "dicom_two_pixel_sizes": "^images/bad_case/001.dcm: slice of 14×12 pixels of 0.8×0.8 mm",
    "dicom_truncated_slice": "^images/bad_case/003.dcm: cannot be read",
    "dicom_slice_cut_in_half": "^images/bad_case/003.dcm: cannot be read",
    "folder_without_slices": "^images/empty: a folder without DICOM files",
}


def test_every_broken_input_is_expected_to_say_something() -> None:
    assert set(EXPECTED) == set(BROKEN)
    assert len(BROKEN) >= 40


@pytest.mark.parametrize("name", BROKEN)
def test_broken_input_gives_its_fault_and_is_left_alone(
    name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = BROKEN[name](tmp_path)
    before = tree(tmp_path)
    capfd.readouterr()
    found = faults(path)
    assert re.search(EXPECTED[name], found[0]), found
    assert all("\n" not in line and len(line) < 400 + len(str(path)) for line in found)
    assert not re.search(r"0x[0-9a-f]{6}|\.cxx|\.hxx|Traceback", " ".join(found))
    assert tree(tmp_path) == before
    assert capfd.readouterr() == ("", ""), "ITK's own words must not reach the terminal"


@pytest.mark.parametrize("build", [healthy, pictures, left_atrium, series])
def test_healthy_data_has_no_fault(build: object, tmp_path: Path) -> None:
    result = run(build(tmp_path))  # type: ignore[operator]
    assert result.faults == ()
    assert result.warnings == ()
    assert without_bad(result) == result.dataset


def test_odd_names_are_no_fault(tmp_path: Path) -> None:
    names = ("left atrium", "Herz_größe_心臓", "<b>&amp;<script>", "a.b.c")
    result = run(healthy(tmp_path, names=names))
    assert result.faults == ()
    assert {case.id for case in result.dataset.cases} == set(names)


def test_all_faults_are_reported_together(tmp_path: Path) -> None:
    healthy(tmp_path, names=("a", "b", "c", "d", "e", "f"))
    cut(tmp_path / "images" / "a.nii.gz")
    save(tmp_path / "labels" / "b.nii.gz", mask((5, 8, 10)))
    save(tmp_path / "images" / "e.nii.gz", np.ones((6, 8, 10)))
    save(tmp_path / "labels" / "z.nii.gz", mask())
    result = run(tmp_path)
    assert {(fault.case_id, fault.kind) for fault in result.faults} == {
        ("a", "unreadable"),
        ("b", "geometry"),
        ("e", "constant"),
        ("z", "orphan"),
    }
    rest = without_bad(result)
    assert [case.id for case in rest.cases] == ["c", "d", "f"]
    assert check(rest).faults == ()


def test_image_and_label_may_both_be_bad(tmp_path: Path) -> None:
    healthy(tmp_path)
    cut(tmp_path / "images" / "a.nii.gz")
    cut(tmp_path / "labels" / "a.nii.gz")
    assert [fault.where for fault in run(tmp_path).faults] == ["images/a.nii.gz", "labels/a.nii.gz"]


def test_skipping_all_clean_cases_is_refused(tmp_path: Path) -> None:
    healthy(tmp_path)
    for name in "abc":
        cut(tmp_path / "labels" / f"{name}.nii.gz")
    with pytest.raises(FaultsError, match="no clean case among 1"):
        without_bad(run(tmp_path))


def test_a_fault_of_the_whole_data_set_is_not_skipped(tmp_path: Path) -> None:
    with pytest.raises(FaultsError, match="no clean case among 4"):
        without_bad(run(BROKEN["no_labels_at_all"](tmp_path)))


def test_no_clean_case_is_no_fault_where_nothing_is_trained(tmp_path: Path) -> None:
    dataset = find_cases(BROKEN["no_labels_at_all"](tmp_path))
    assert check(dataset, require_roles=False).faults == ()


def test_no_unlabelled_case_is_a_warning(tmp_path: Path) -> None:
    healthy(tmp_path, names=("a", "b", "c"))
    result = run(tmp_path)
    assert result.faults == ()
    assert ["no unlabelled case" in str(warning) for warning in result.warnings] == [True]


def test_expected_labels_given_or_named_or_common(tmp_path: Path) -> None:
    healthy(tmp_path)
    save(tmp_path / "labels" / "c.nii.gz", mask(value=2))
    dataset = find_cases(tmp_path)
    assert [fault.case_id for fault in check(dataset).faults] == ["c"]
    assert check(dataset, labels=[0, 1, 2]).faults == ()
    assert [fault.case_id for fault in check(dataset, labels=[2]).faults] == ["a", "b"]
    named = replace(dataset, class_names={0: "background", 1: "atrium", 2: "wall"})
    assert check(named).faults == ()


def test_of_two_labelled_cases_every_value_is_expected(tmp_path: Path) -> None:
    healthy(tmp_path)
    (tmp_path / "labels" / "c.nii.gz").unlink()
    save(tmp_path / "labels" / "b.nii.gz", mask(value=3))
    assert run(tmp_path).faults == ()


def test_empty_label_of_a_test_scan_or_a_slice_is_a_warning(tmp_path: Path) -> None:
    healthy(tmp_path / "3d")
    (tmp_path / "3d" / "test.list").write_text("c\n")
    save(tmp_path / "3d" / "labels" / "c.nii.gz", np.zeros((6, 8, 10), np.uint8))
    pictures(tmp_path / "2d")
    save(tmp_path / "2d" / "labels" / "c.png", np.zeros((20, 24), np.uint8))
    for folder in ("3d", "2d"):
        result = run(tmp_path / folder)
        assert result.faults == ()
        assert [(warning.case_id, warning.kind) for warning in result.warnings] == [("c", "empty-label")]


def test_constant_alpha_channel_is_left_out_with_a_note(tmp_path: Path) -> None:
    for seed, name in enumerate("abcd"):
        colours = noise(seed, (20, 24, 4)).astype(np.uint8)
        colours[..., 3] = 255
        save(tmp_path / "images" / f"{name}.png", colours, vector=True)
        if seed < 3:
            save(tmp_path / "labels" / f"{name}.png", mask((20, 24)))
    result = run(tmp_path)
    assert result.faults == ()
    assert {(w.kind, w.found) for w in result.warnings} == {("note", "its transparency (alpha) is left out")}
    assert result.summary["channels"] == [3]


def test_spacing_is_compared_along_the_axes_of_the_patient(tmp_path: Path) -> None:
    healthy(tmp_path)
    for name in "abc":
        save(tmp_path / "images" / f"{name}.nii.gz", noise(ord(name)), spacing=(0.5, 0.5, 5))
        save(tmp_path / "labels" / f"{name}.nii.gz", mask(), spacing=(0.5, 0.5, 5))
    sagittal = (0, 0, 1, 1, 0, 0, 0, 1, 0)  # columns: the patient's y, z, x
    save(tmp_path / "images" / "d.nii.gz", noise(3), spacing=(0.5, 5, 0.5), direction=sagittal)
    assert run(tmp_path).faults == ()
    save(tmp_path / "images" / "d.nii.gz", noise(3), spacing=(5, 0.5, 0.5), direction=sagittal)
    assert [(fault.case_id, fault.kind) for fault in run(tmp_path).faults] == [("d", "spacing")]


def test_summary_counts_and_is_json(tmp_path: Path) -> None:
    result = run(healthy(tmp_path))
    summary = json.loads(json.dumps(result.summary))
    assert summary["roles"] == {"clean": 3, "unlabelled": 1, "noisy": 0, "test": 0}
    assert summary["labels"] == {"0": 3, "1": 3}
    assert summary["size"]["3D"]["median"] == [10, 8, 6]
    assert summary["spacing"]["3D"]["max"] == [1, 1, 1]
    assert [entry["id"] for entry in summary["per_case"]] == ["a", "b", "c", "d"]
    assert summary["per_case"][0]["labels"] == {"0": 456, "1": 24}


def test_progress_is_told_after_each_case(tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    check(find_cases(healthy(tmp_path)), progress=lambda done, total: told.append((done, total)))
    assert told == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_faults_are_named_for_programs(tmp_path: Path) -> None:
    save(healthy(tmp_path) / "labels" / "b.nii.gz", mask((5, 8, 10)))
    assert run(tmp_path).faults == (
        Fault(
            "labels/b.nii.gz",
            "size 10×8×5",
            "10×8×6 as its image",
            "resample it onto the image",
            "b",
            "geometry",
        ),
    )


@pytest.mark.realdata
def test_real_scans_have_no_fault(realdata: Path) -> None:
    dataset = find_cases(realdata / "hippocampus")
    some = replace(dataset, cases=dataset.cases[:20])
    result = check(some, labels=[1, 2])
    assert result.faults == ()
    assert result.summary["labels"] == {"0": 20, "1": 20, "2": 20}
    assert all(case.role is Role.CLEAN for case in some.cases)
