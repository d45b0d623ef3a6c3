"""Folders, names and lists as other systems and programs leave them."""

from __future__ import annotations

import unicodedata
from pathlib import Path

import pytest
import SimpleITK as sitk  # noqa: N813

from data import dicom_files
from data.broken import healthy, mask, noise, save
from mlbseg.data.cases import find_cases, find_scans
from mlbseg.data.check import check
from mlbseg.data.places import SYSTEM_FOLDERS
from mlbseg.data.readers import read_label, read_scan, stem
from mlbseg.errors import UserError

ONE, TWO = (unicodedata.normalize(form, "Müller_é") for form in ("NFC", "NFD"))
ROWS = [("id", "image", "label"), *((f"c{i}", f"images/{i}.nii.gz", f"labels/{i}.nii.gz") for i in range(2))]


def found(root: Path) -> dict[str, str]:
    dataset = find_cases(root)
    assert dataset.faults == ()
    return {case.id: case.role.value for case in dataset.cases}


@pytest.mark.parametrize(("image", "label"), [(ONE, TWO), (TWO, ONE), (TWO, TWO)])
def test_names_that_look_alike_are_alike(image: str, label: str, tmp_path: Path) -> None:
    """A Mac's file systems and ZIP files have accents as characters of their own."""
    assert ONE != TWO
    save(tmp_path / "images" / f"{image}.nii.gz", noise(0))
    save(tmp_path / "labels" / f"{label}.nii.gz", mask())
    save(tmp_path / "images" / f"a{image}.mha", noise(0))
    (tmp_path / "test.list").write_text(f"a{label}\n")
    assert found(tmp_path) == {ONE: "clean", f"a{ONE}": "test"}
    assert [case.id for case in find_scans(tmp_path / "images").cases] == [ONE, f"a{ONE}"]
    assert stem(Path(f"{TWO}.seg.nrrd")) == ONE


def test_a_folder_of_slices_is_named_like_its_label(tmp_path: Path) -> None:
    dicom_files.slices(tmp_path / "images" / TWO, dicom_files.volume())
    save(tmp_path / "labels" / f"{ONE}.nii.gz", mask())
    assert found(tmp_path) == {ONE: "clean"}


def test_two_names_that_look_alike_are_two_cases_of_one_name(tmp_path: Path) -> None:
    for name in (ONE, TWO):
        save(tmp_path / "images" / f"{name}.nii.gz", noise(0))
    assert [fault.kind for fault in find_cases(tmp_path).faults] == ["duplicate"]


def test_an_id_in_a_list_is_the_name_of_its_masks(tmp_path: Path) -> None:
    save(tmp_path / "images" / "0.nii.gz", noise(0))
    (tmp_path / "cases.csv").write_text(f"id,image,patient\n{TWO},images/0.nii.gz,p\n")
    dataset = find_cases(tmp_path / "cases.csv")
    assert [case.id for case in dataset.cases] == [ONE]
    assert dataset.listed == {ONE: "p"}


@pytest.mark.parametrize("name", SYSTEM_FOLDERS)
def test_a_systems_own_folders_are_passed_over(name: str, tmp_path: Path) -> None:
    root = healthy(tmp_path)
    before = found(root)
    for place in ("images", "labels", "."):
        (root / place / name).mkdir()
        (root / place / name / "._a.nii.gz").write_bytes(b"Mac OS X")
    assert found(root) == before
    where = {note.where for note in find_cases(root).warnings}
    assert where >= {f"images/{name}", f"labels/{name}"}
    assert [note.where for note in find_scans(root / "images").notes] == [f"images/{name}"]


def test_hidden_files_of_a_mac_are_no_scans(tmp_path: Path) -> None:
    root = healthy(tmp_path)
    before = found(root)
    for place in ("images", "labels"):
        (root / place / "._a.nii.gz").write_bytes(b"Mac OS X")
        (root / place / ".DS_Store").write_bytes(b"Mac OS X")
    assert found(root) == before


@pytest.mark.parametrize("name", ["masks", "Labels", "segmentations"])
def test_a_folder_that_may_hold_the_labels_is_named(name: str, tmp_path: Path) -> None:
    root = healthy(tmp_path)
    (root / "labels").rename(root / name)
    assert [note.where for note in find_cases(root).warnings] == [f"{name}/"]
    assert "rename it if it holds the labels" in str(find_cases(root).warnings[0])
    assert find_scans(root).notes == ()
    (root / "labels").mkdir()
    assert find_cases(root).warnings == ()


def test_a_scan_in_a_folder_of_its_name(tmp_path: Path) -> None:
    """As ZIP programs unpack it."""
    root = healthy(tmp_path)
    folder = root / "images" / "b.nii.gz"
    folder.rename(root / "moved")
    folder.mkdir()
    (root / "moved").rename(folder / "b.nii.gz")
    fault = next(fault for fault in check(find_cases(root)).faults if fault.where == "images/b.nii.gz")
    assert fault.found == "a folder without DICOM files"
    assert fault.remedy == "it holds b.nii.gz; move scans in it up, beside the others"


def listed(root: Path, content: bytes) -> dict[str, str]:
    for i in range(2):
        save(root / "images" / f"{i}.nii.gz", noise(i))
        save(root / "labels" / f"{i}.nii.gz", mask())
    (root / "list.csv").write_bytes(content)
    return found(root / "list.csv")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("separator", [",", ";", "\t"])
@pytest.mark.parametrize("first", ["", "sep={}"])
def test_lists_as_spreadsheets_save_them(
    encoding: str, end: str, separator: str, first: str, tmp_path: Path
) -> None:
    lines = [*([first.format(separator)] if first else []), *(separator.join(row) for row in ROWS)]
    assert listed(tmp_path, end.join(lines).encode(encoding)) == {"c0": "clean", "c1": "clean"}


def test_names_of_columns_in_capitals_and_cells_that_hold_separators(tmp_path: Path) -> None:
    text = 'ID;Image;Label;Patient\n"c;0";images/0.nii.gz;labels/0.nii.gz;"a,b"\n'
    assert listed(tmp_path, text.encode()) == {"c;0": "clean"}
    assert find_cases(tmp_path / "list.csv").listed == {"c;0": "a,b"}


def test_paths_as_windows_has_them(tmp_path: Path) -> None:
    text = "\n".join(",".join(row).replace("/", "\\") for row in ROWS)
    assert listed(tmp_path, text.encode()) == {"c0": "clean", "c1": "clean"}
    (tmp_path / "below").mkdir()
    (tmp_path / "below" / "list.csv").write_text("image\n..\\images\\0.nii.gz\n")
    assert [fault.kind for fault in find_cases(tmp_path / "below" / "list.csv").faults] == ["path"]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"image,label,image\na,b,c\n", "two columns called 'image'"),
        (b"image,Image\na,b\n", "two columns called 'image'"),
        ("image\nMüller.nii.gz\n".encode("cp1252"), "save it as UTF-8"),
        ("image\na.nii.gz\n".encode("utf-16")[:-1], "save it as UTF-8"),
        (b"sep=;\nimage;label\na;b;c\n", "line 3 has more cells than the header"),
    ],
)
def test_lists_that_cannot_be_understood(content: bytes, said: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=said):
        listed(tmp_path, content)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_names_of_cases_and_descriptions_in_the_texts_of_windows(encoding: str, tmp_path: Path) -> None:
    for name in "ab":
        save(tmp_path / "imagesTr" / f"{name}.nii.gz", noise(0))
        save(tmp_path / "labelsTr" / f"{name}.nii.gz", mask())
    (tmp_path / "test.list").write_bytes("b\r\n".encode(encoding))
    (tmp_path / "dataset.json").write_bytes('{"labels": {"0": "background", "1": "heart"}}'.encode(encoding))
    assert found(tmp_path) == {"a": "clean", "b": "test"}
    assert find_cases(tmp_path).class_names == {0: "background", 1: "heart"}


@pytest.mark.parametrize("suffix", [".mha", ".mhd"])
def test_metaimage_that_itk_made_of_other_formats(suffix: str, tmp_path: Path) -> None:
    """ITK takes over what their headers say, under keys such as dim[1] and 0008|0020, and texts of several lines."""
    image = sitk.ReadImage(str(save(tmp_path / "a.nii.gz", noise(0))))
    assert "dim[1]" in image.GetMetaDataKeys()
    image.SetMetaData("0008|0020", "20200101")
    image.SetMetaData("ITK_FileNotes", "made by\nsomebody\nelse")
    sitk.WriteImage(image, str(tmp_path / f"b{suffix}"))
    header = (tmp_path / f"b{suffix}").read_bytes()
    assert all(text in header for text in (b"dim[1] =", b"0008|0020 =", b"\nsomebody\n"))
    assert (read_scan([tmp_path / f"b{suffix}"]).array[0] == noise(0)).all()
    sitk.WriteImage(sitk.Cast(image > 0, sitk.sitkUInt8), str(tmp_path / f"label{suffix}"))
    assert (read_label(tmp_path / f"label{suffix}")[0] == (noise(0) > 0)).all()
