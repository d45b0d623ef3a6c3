"""The command and what is common to all formats."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from conftest import Command
from mlbseg.apps.export import FORMATS, export
from mlbseg.apps.export.labels import class_indices, colour, itk_snap, slicer
from mlbseg.data.plan import Plan
from mlbseg.errors import UserError
from mlbseg.pictures import COLOURS
from mlbseg.runs import Run
from mlbseg.staging import staged

REPOSITORY = Path(__file__).resolve().parents[2]


def plan(names: tuple[str, ...], values: tuple[int, ...]) -> Plan:
    return Plan(
        ndim=3, scan_ndim=3, channels=1, label_values=values, class_names=names, spacing=(1.0, 1.0, 1.0),
        patch_size=(16, 16, 16), normalisation=("zscore",), intensity=(), crop=False, network="unet",
        network_channels=(4, 8), batch_size=1, unlabelled_batch_size=0, steps=1, flip_axes=(),
    )  # fmt: skip


def test_label_descriptions_hold_every_value_with_name_and_colour() -> None:
    many = ("background", *(f"class {i}" for i in range(1, 9)))
    text = itk_snap(plan(many, (0, *range(2, 10))))
    rows = [
        re.fullmatch(r'\s*(\d+)\s+(\d+)\s+(\d+)\s+(\d+)\s+(\d)\s+(\d)\s+(\d)\s+"([^"]*)"', line)
        for line in text.splitlines()
        if not line.startswith("#")
    ]
    assert all(rows)
    assert [row[8] for row in rows if row] == list(many)
    assert [int(row[1]) for row in rows if row] == [0, *range(2, 10)]
    assert [row.group(5, 6, 7) for row in rows[:2] if row] == [("0", "0", "0"), ("1", "1", "1")]
    first = rows[1]
    assert first
    assert "#{:02x}{:02x}{:02x}".format(*(int(first[i]) for i in (2, 3, 4))) == COLOURS[0]
    assert colour(1) == colour(1 + len(COLOURS))


def test_names_cannot_break_the_files() -> None:
    odd = plan(("background", 'left "upper" lobe', "a\nb"), (0, 1, 2))
    assert len([line for line in itk_snap(odd).splitlines() if not line.startswith("#")]) == 3
    rows = [line.split() for line in slicer(odd).splitlines() if not line.startswith("#")]
    assert [len(row) for row in rows] == [6, 6, 6]
    assert [row[1] for row in rows] == ["background", 'left_"upper"_lobe', "a_b"]
    assert [row[5] for row in rows] == ["0", "255", "255"]


def test_values_become_indices_and_others_are_refused() -> None:
    label = np.array([[0, 5], [2, 2]], np.int32)
    odd = plan(("background", "a", "b"), (0, 2, 5))
    np.testing.assert_array_equal(class_indices(label, odd, "x"), [[0, 2], [1, 1]])
    with pytest.raises(UserError, match=r"x: label values \[3\], expected only \[0, 2, 5\]"):
        class_indices(label + (label == 5) * -2, odd, "x")


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    out = tmp_path / "a" / "out"

    def fail_half_way() -> None:
        with staged(out, overwrite=False) as folder:
            (folder / "one").write_text("1")
            raise RuntimeError("half way")

    with pytest.raises(RuntimeError, match="half way"):
        fail_half_way()
    assert list((tmp_path / "a").iterdir()) == []
    with staged(out, overwrite=False) as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "one").write_text("1")
        assert not out.exists()
    assert (out / "sub" / "one").read_text() == "1"
    (out / "mine").write_text("kept")
    with pytest.raises(UserError, match="not empty"), staged(out, overwrite=False):
        pytest.fail("an occupied folder was offered")
    with staged(out, overwrite=True) as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "one").write_text("2")
    assert (out / "sub" / "one").read_text() == "2"
    assert (out / "mine").read_text() == "kept"
    with pytest.raises(UserError, match="a file"), staged(out / "mine", overwrite=True):
        pytest.fail("a file was taken for a folder")


def test_an_empty_folder_on_another_disk_is_filled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    out = tmp_path / "out"
    out.symlink_to(disk)

    def as_between_disks(call: Callable[..., object]) -> Callable[..., object]:
        def move(source: Path, target: Path) -> object:
            if len({disk in Path(path).resolve().parents for path in (source, target)}) > 1:
                raise OSError(errno.EXDEV, os.strerror(errno.EXDEV), str(source))
            return call(source, target)

        return move

    monkeypatch.setattr(os, "replace", as_between_disks(os.replace))
    monkeypatch.setattr(os, "rename", as_between_disks(os.rename))
    with staged(out, overwrite=False) as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "one").write_text("1")
        assert not (out / "sub").exists()
    assert [path.name for path in disk.rglob("*")] == ["sub", "one"]
    assert out.is_symlink()


@pytest.mark.slow
def test_the_command_writes_and_says_what_it_wrote(
    command: Command, supervised_run: Path, tmp_path: Path
) -> None:
    done = command("export", supervised_run, tmp_path / "labels", "--format", "itksnap")
    assert done.code == 0
    assert "labels.txt" in done.out
    assert (tmp_path / "labels" / "labels.ctbl").is_file()
    again = command("export", supervised_run, tmp_path / "labels", "--format", "itksnap", "--json")
    assert again.code == 2
    assert "not empty" in again.json["error"]
    replaced = command(
        "export", supervised_run, tmp_path / "labels", "--format", "itksnap", "--overwrite", "--json"
    )
    assert replaced.code == 0
    assert [Path(path).name for path in replaced.json["files"]] == ["labels.txt", "labels.ctbl"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--format", "bundel"], "did you mean 'bundle'"),
        (["--format", "onnx", "--trust", "0.5"], "--trust: an option of nnunet, not of onnx"),
        (["--format", "bundle", "--fractional"], "--fractional: an option of dicom-seg"),
        (["--format", "nnunet", "--trust-maps", "nowhere"], "nowhere: not a folder"),
        (["--format", "nnunet", "--also", "noisy,tests"], "--also tests"),
        (["--format", "dicom-seg"], "needs --scans"),
        (["--format", "dicom-seg", "--scans", "nowhere"], "nowhere"),
        (["--format", "dicom-seg", "--scans", ".", "--masks", ".", "--fractional"], "leave one of them out"),
        (["--format", "onnx", "--network", "teacher"], "no 'teacher' network"),
    ],
)
def test_the_command_refuses_clearly(
    command: Command, supervised_run: Path, tmp_path: Path, arguments: list[str], words: str
) -> None:
    done = command("export", supervised_run, tmp_path / "out", *arguments)
    assert done.code == 2
    assert words in done.err
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_faults_of_single_cases_are_named_with_exit_code_2(
    command: Command, supervised_run: Path, scans: Path, tmp_path: Path
) -> None:
    done = command(
        "export",
        supervised_run,
        tmp_path / "out",
        "--format",
        "dicom-seg",
        "--scans",
        scans / "images",
        "--json",
    )
    assert done.code == 2
    assert done.json["files"] == []
    assert len(done.json["faults"]) == 8


def test_a_model_of_pictures_makes_no_dicom_segmentation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Flat:
        root = tmp_path

        class plan:  # noqa: N801 - stands for an object
            scan_ndim = 2

    monkeypatch.setattr(Run, "open", lambda path: Flat)
    with pytest.raises(UserError, match="a model of 2D images"):
        export(tmp_path, tmp_path / "out", "dicom-seg", scans=tmp_path)


def test_help_and_document_name_the_formats_and_options_that_there_are(command: Command) -> None:
    help_text = command("export", "--help").out
    document = (REPOSITORY / "docs" / "export.md").read_text(encoding="utf-8")
    for name, kind in FORMATS.items():
        assert name in help_text
        assert f"--format {name}" in document
        for option in kind.options:
            assert f"--{option.replace('_', '-')} " in help_text
            assert f"--{option.replace('_', '-')}" in document
    named = set(re.findall(r"--format ([\w-]+)", document))
    assert named - {"FORMAT"} == set(FORMATS)


def test_a_full_disk_is_told_of_the_copy_and_not_of_the_scan(tmp_path: Path) -> None:
    def copy() -> None:  # as `shutil.copyfile` raises it
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "scan.nii.gz", None, "copy.nii.gz")

    with (
        pytest.raises(UserError, match=r"^copy\.nii\.gz: cannot be written: No space"),
        staged(tmp_path / "out", overwrite=False),
    ):
        copy()
    assert list(tmp_path.iterdir()) == []
