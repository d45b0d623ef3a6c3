"""A label with the scan's voxels in another order, and a scan that states two places: the same everywhere they meet."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813

from data.broken import dicom_series
from mlbseg.apps.audit.auditor import Auditor
from mlbseg.apps.export.dicom_seg import _from_mask
from mlbseg.apps.export.nnunet import _careful, _write_images
from mlbseg.apps.export.trust import TrustMaps
from mlbseg.apps.report.masks import _image, _subject
from mlbseg.apps.report.scoring import mask_on
from mlbseg.data.cache import Cache
from mlbseg.data.cases import find_cases
from mlbseg.data.check import check
from mlbseg.data.fingerprint import fingerprint
from mlbseg.data.formats.dicom import open_dicom
from mlbseg.data.plan import Plan
from mlbseg.data.readers import read_label, read_scan, write_label
from mlbseg.evaluation import evaluate
from mlbseg.types import Case, Role

PLAN = Plan(
    ndim=3, scan_ndim=3, channels=1, label_values=(0, 1, 2), class_names=("background", "a", "b"),
    spacing=(0.0, 0.0, 0.0), patch_size=(8, 8, 8), normalisation=("zscore",), intensity=(), crop=False,
    network="unet", network_channels=(8, 16), batch_size=1, unlabelled_batch_size=1, steps=1, flip_axes=(),
)  # fmt: skip
SHAPE = (14, 12, 10)  # x, y, z


def label() -> np.ndarray:
    array = np.zeros(SHAPE, np.uint8)
    array[2:9, 3:6, 1:8] = 1
    array[10:13, 8:11, 2:4] = 2
    return array


@pytest.fixture(params=["LAS", "SRP", "AIL"])
def cases(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Case, Case]:
    """One scan, with a label as it lies and with one in another order, both with its nibabel affine."""
    affine = nibabel.affines.from_matvec(np.diag([-1.2, -1.2, 2]), (20, -15, -30))
    moved = nibabel.affines.from_matvec(affine[:3, :3], (25, -23, -24))
    rng = np.random.default_rng(0)
    image = nibabel.Nifti1Image((label() * 50 + rng.normal(100, 5, SHAPE)).astype(np.float32), None)
    image.set_qform(affine, 1)
    image.set_sform(moved, 2)
    for folder in ("images", "plain", "labels"):
        (tmp_path / folder).mkdir()
    nibabel.save(image, tmp_path / "images/a.nii.gz")
    plain = nibabel.Nifti1Image(label(), moved)
    nibabel.save(plain, tmp_path / "plain/a.nii.gz")
    own, wanted = (
        nibabel.orientations.io_orientation(moved), nibabel.orientations.axcodes2ornt(request.param),
    )  # fmt: skip
    turned = plain.as_reoriented(nibabel.orientations.ornt_transform(own, wanted))
    nibabel.save(turned, tmp_path / "labels/a.nii.gz")
    assert turned.shape != SHAPE or not np.array_equal(np.asarray(turned.dataobj), label())
    case = Case("a", (tmp_path / "images/a.nii.gz",), tmp_path / "labels/a.nii.gz", Role.CLEAN)
    return replace(case, label=tmp_path / "plain/a.nii.gz"), case


def test_check_and_plan(cases: tuple[Case, Case], tmp_path: Path) -> None:
    shutil.rmtree(tmp_path / "plain")
    assert check(find_cases(tmp_path)).faults == ()
    shutil.copytree(tmp_path / "labels", tmp_path / "plain")
    found = fingerprint([cases[1]]).cases[0]
    assert found.label_voxels == {0: 1680 - 147 - 18, 1: 147, 2: 18}
    assert found.foreground[0] is not None
    assert 150 < found.foreground[0].mean < 160  # other voxels have a mean of 100


def test_training(cases: tuple[Case, Case], tmp_path: Path) -> None:
    plain, turned = (Cache(tmp_path / "cache", PLAN).label(case)[:] for case in cases)
    assert np.array_equal(plain, turned)
    assert set(np.unique(plain)) == {0, 1, 2}
    # What is read from the cache knows both places, too.
    again = Cache(tmp_path / "cache", PLAN).image(cases[0]).frame.native
    assert again.stored == read_scan(cases[0].images).geometry.stored != ()


def test_evaluation(cases: tuple[Case, Case], tmp_path: Path) -> None:
    (tmp_path / "masks").mkdir()
    write_label(tmp_path / "masks/a.nii.gz", label().T, read_scan(cases[0].images).geometry)
    for references in ("plain", "labels"):
        assert evaluate(tmp_path / "masks", tmp_path / references).mean_dice == 1
    assert evaluate(tmp_path / "labels", tmp_path / "masks").mean_dice == 1


def test_audit(cases: tuple[Case, Case]) -> None:
    auditor: Any = SimpleNamespace(plan=PLAN)
    plain, turned = (Auditor._prepared(auditor, case) for case in cases)
    assert np.array_equal(plain[1], turned[1])
    assert np.array_equal(turned[-1], label().T)


def test_report(cases: tuple[Case, Case]) -> None:
    plain, turned = (case.label for case in cases)
    assert plain is not None
    assert turned is not None
    scan = read_scan(cases[0].images)
    assert np.array_equal(mask_on(turned, scan.geometry), label().T)
    image, words = _image(cases[0], read_label(turned)[1])
    assert words == ""
    assert image is not None
    mask, _ = read_label(turned)
    assert image[mask == 2].mean() > 190
    subject = _subject("a", "", turned, plain, {}, None, worst=False)
    assert np.array_equal(subject.masks["label"], subject.masks["prediction"])


def test_exports(cases: tuple[Case, Case], tmp_path: Path) -> None:
    plain, turned = (_careful(case, PLAN)[0] for case in cases)
    assert np.array_equal(plain, turned)
    native = read_scan(cases[0].images).geometry
    trust = TrustMaps(tmp_path / "plain"), TrustMaps(tmp_path / "labels")
    for folder in ("plain", "labels"):
        image = nibabel.load(tmp_path / folder / "a.nii.gz")
        nibabel.save(
            nibabel.Nifti1Image(np.asarray(image.dataobj) / np.float32(2), image.affine), image.get_filename()
        )
    nothing = np.zeros(SHAPE[::-1], np.float32)
    first, second = (one(cases[0], nothing, native) for one in trust)
    assert np.array_equal(first, second)
    assert np.array_equal(first, label().T / 2)


def test_a_mask_of_a_dicom_series(tmp_path: Path) -> None:
    folder = dicom_series(tmp_path / "a")
    geometry = open_dicom(folder).geometry
    values = np.zeros(geometry.size[::-1], np.uint8)
    values[1:3, 2:5, 3:9] = 1
    values[4, 8:, 1] = 2
    write_label(tmp_path / "a.nii.gz", values, geometry)
    nibabel.save(nibabel.as_closest_canonical(nibabel.load(tmp_path / "a.nii.gz")), tmp_path / "a.nii.gz")
    assert not np.array_equal(read_label(tmp_path / "a.nii.gz")[0], values)
    assert np.array_equal(_from_mask(Case("a", (folder,)), tmp_path, PLAN), values)


def test_nnunet_gets_straight_axes(tmp_path: Path) -> None:
    """Of a scan whose axes ITK refuses, as nnU-Net's own reader is ITK; it lies where this program reads it."""
    skewed = np.diag([-1.2, -1.2, 2, 1])
    skewed[0, 1] = 1e-3
    image = nibabel.Nifti1Image(np.random.default_rng(0).normal(size=SHAPE).astype(np.float32), None)
    image.header.set_zooms((1.2, 1.2, 2))
    image.set_sform(skewed, 1)
    nibabel.save(image, tmp_path / "a.nii.gz")
    case = Case("a", (tmp_path / "a.nii.gz",))
    _write_images(case, tmp_path, PLAN)
    back = sitk.ReadImage(str(tmp_path / "a_0000.nii.gz"))
    scan = read_scan(case.images)
    assert np.array_equal(sitk.GetArrayFromImage(back), scan.array[0])
    assert np.allclose(back.GetOrigin(), scan.geometry.origin, atol=1e-4)
