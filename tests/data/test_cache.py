from __future__ import annotations

import errno
import json
import multiprocessing
import os
import signal
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813 - as its documentation does

from mlbseg.data import cache as cache_module
from mlbseg.data.cache import STALE_SECONDS, Cache, content_hash, default_cache_root
from mlbseg.data.plan import Plan
from mlbseg.data.preprocess import prepare_label, prepare_scan
from mlbseg.data.readers import read_label, read_scan, write_image, write_label
from mlbseg.errors import ReadError, UserError
from mlbseg.types import Case, Geometry, Role

PLAN = Plan(
    ndim=3,
    scan_ndim=3,
    channels=1,
    label_values=(0, 2, 5),
    class_names=("background", "a", "b"),
    spacing=(2.0, 1.0, 1.0),
    patch_size=(16, 16, 16),
    normalisation=("zscore",),
    intensity=(),
    crop=False,
    network="unet",
    network_channels=(8, 16),
    batch_size=2,
    unlabelled_batch_size=2,
    steps=10,
    flip_axes=(),
)
SHAPE = (30, 70, 75)


def make_case(folder: Path, *, seed: int = 0, role: Role = Role.CLEAN, name: str = "a") -> Case:
    random = np.random.default_rng(seed)
    geometry = Geometry((75, 70, 30), (1.0, 1.0, 1.0), (3.0, 4.0, 5.0), (-1.0, 0, 0, 0, -1, 0, 0, 0, 1))
    label = np.zeros(SHAPE, np.int32)
    label[5:20, 10:50, 20:60] = 2
    label[10:12, 30:33, 30:33] = 5
    image = random.normal(size=SHAPE).astype(np.float32) + label
    folder.mkdir(parents=True, exist_ok=True)
    write_image(folder / f"{name}.nii.gz", image, geometry)
    write_label(folder / f"{name}_label.nii.gz", label, geometry)
    return Case(name, (folder / f"{name}.nii.gz",), folder / f"{name}_label.nii.gz", role)


def entries(root: Path) -> list[str]:
    return sorted(p.name for p in root.glob("v*/*"))


def test_what_is_cached_is_what_preparation_gives(tmp_path: Path) -> None:
    case = make_case(tmp_path)
    cached = Cache(tmp_path / "cache", PLAN)
    image = cached.image(case)
    prepared, frame = prepare_scan(read_scan(case.images), PLAN)
    assert np.array_equal(image.array[:], prepared)
    assert image.array.dtype == np.float32
    assert image.frame == frame
    assert max(image.array.chunks) <= 64
    label = cached.label(case)
    values, _ = read_label(case.label)
    assert np.array_equal(label[:], prepare_label(values, frame.native, frame.grid, PLAN))
    assert label.dtype == np.uint8


def test_foreground_positions_lie_on_their_class(tmp_path: Path) -> None:
    case = make_case(tmp_path)
    cached = Cache(tmp_path / "cache", PLAN)
    positions = cached.foreground(case)
    label = cached.label(case)[:]
    assert positions.dtype == np.int32
    assert np.array_equal(label[tuple(positions[:, :3].T)], positions[:, 3])
    assert np.count_nonzero(positions[:, 3] == 1) == 2000
    assert np.count_nonzero(positions[:, 3] == 2) == np.count_nonzero(label == 2) > 0
    assert len(np.unique(positions, axis=0)) == len(positions)
    elsewhere = Cache(tmp_path / "other", PLAN)
    assert np.array_equal(elsewhere.foreground(case), positions)


def test_an_empty_label_has_no_foreground(tmp_path: Path) -> None:
    case = make_case(tmp_path)
    values, geometry = read_label(case.label)
    write_label(case.label, np.zeros_like(values), geometry)
    assert Cache(tmp_path / "cache", PLAN).foreground(case).shape == (0, 4)


@pytest.mark.parametrize("role", [Role.UNLABELLED, Role.TEST])
def test_labels_of_other_roles_are_never_read(tmp_path: Path, role: Role) -> None:
    case = make_case(tmp_path, role=role)
    case.label.unlink()  # nothing may need it
    cached = Cache(tmp_path / "cache", PLAN)
    cached.image(case)
    with pytest.raises(ValueError, match="not to be read"):
        cached.label(case)
    with pytest.raises(ValueError, match="not to be read"):
        cached.foreground(case)
    assert [name.split("-")[0] for name in entries(tmp_path / "cache")] == ["image"]


def test_a_second_run_reads_no_scan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case(tmp_path)
    first = Cache(tmp_path / "cache", PLAN)
    first.label(case)

    def refuse(*_: object) -> None:
        raise AssertionError("read again")

    monkeypatch.setattr(cache_module, "read_scan", refuse)
    monkeypatch.setattr(cache_module, "read_label", refuse)
    again = Cache(tmp_path / "cache", PLAN)
    assert np.array_equal(again.image(case).array[:], first.image(case).array[:])
    assert again.image(case).frame == first.image(case).frame
    assert np.array_equal(again.label(case)[:], first.label(case)[:])


def test_a_copy_of_the_scan_elsewhere_is_the_same_entry(tmp_path: Path) -> None:
    case = make_case(tmp_path / "one")
    moved = make_case(tmp_path / "two", name="b")
    Cache(tmp_path / "cache", PLAN).image(case)
    Cache(tmp_path / "cache", PLAN).image(moved)
    assert len(entries(tmp_path / "cache")) == 1


@pytest.mark.parametrize(
    ("change", "count"),
    [
        ({"steps": 99, "batch_size": 4, "network": "dynunet", "patch_size": (32, 32, 32)}, 2),
        ({"label_values": (0, 5, 2)}, 3),
        ({"spacing": (2.0, 2.0, 2.0)}, 4),
        ({"crop": True}, 4),
        ({"orientation": "RAS"}, 4),
    ],
)
def test_only_decisions_that_shape_an_entry_make_a_new_one(
    tmp_path: Path, change: dict[str, Any], count: int
) -> None:
    case = make_case(tmp_path)
    Cache(tmp_path / "cache", PLAN).label(case)
    Cache(tmp_path / "cache", replace(PLAN, **change)).label(case)
    assert len(entries(tmp_path / "cache")) == count


def test_changed_content_makes_a_new_entry(tmp_path: Path) -> None:
    case = make_case(tmp_path)
    before = Cache(tmp_path / "cache", PLAN).image(case).array[:]
    make_case(tmp_path, seed=1)
    after = Cache(tmp_path / "cache", PLAN).image(case).array[:]
    assert not np.array_equal(before, after)
    values, geometry = read_label(case.label)
    labels = Cache(tmp_path / "cache", PLAN).label(case)[:]
    write_label(case.label, np.where(values == 5, 0, values), geometry)
    assert np.any(Cache(tmp_path / "cache", PLAN).label(case)[:] != labels)


def test_the_data_file_of_a_header_counts(tmp_path: Path) -> None:
    image = sitk.GetImageFromArray(np.arange(24, dtype=np.int16).reshape(2, 3, 4))
    sitk.WriteImage(image, str(tmp_path / "a.mhd"))
    before = content_hash(tmp_path / "a.mhd")
    data = next(tmp_path.glob("a.*raw"))
    content = bytearray(data.read_bytes())
    content[3] ^= 1
    data.write_bytes(content)
    os.utime(data, ns=(1, 1))  # the clock may be too coarse to show the change
    assert content_hash(tmp_path / "a.mhd") != before
    assert content_hash(tmp_path / "a.mhd") == content_hash(tmp_path / "a.mhd")


def test_every_file_of_a_series_counts(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name).write_text(name)
    before = content_hash(tmp_path)
    (tmp_path / "c").write_text("c")
    assert content_hash(tmp_path) != before


def test_a_missing_scan_is_a_users_fault(tmp_path: Path) -> None:
    case = Case("a", (tmp_path / "gone.nii.gz",))
    with pytest.raises(UserError, match=r"gone\.nii\.gz: cannot be read"):
        Cache(tmp_path / "cache", PLAN).image(case)


def test_errors_name_the_case(tmp_path: Path) -> None:
    case = make_case(tmp_path)
    with pytest.raises(UserError, match=r"^a: label values \[5\]"):
        Cache(tmp_path / "cache", replace(PLAN, label_values=(0, 2))).label(case)
    with pytest.raises(UserError, match=r"^a: the scan is 3D"):
        Cache(tmp_path / "cache", replace(PLAN, channels=2, normalisation=("zscore",) * 2)).image(case)
    (tmp_path / "text.nii.gz").write_text("no scan")
    with pytest.raises(ReadError, match=r"text\.nii\.gz"):
        Cache(tmp_path / "cache", PLAN).image(Case("t", (tmp_path / "text.nii.gz",)))


def test_a_label_that_lies_elsewhere_is_refused(tmp_path: Path) -> None:
    case = make_case(tmp_path)
    values, geometry = read_label(case.label)
    write_label(case.label, values, replace(geometry, origin=(90.0, 4.0, 5.0)))
    with pytest.raises(UserError, match=r"^a: label has origin"):
        Cache(tmp_path / "cache", PLAN).label(case)


def test_a_full_disk_is_explained_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case(tmp_path)

    def full(_: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(cache_module, "_flush", full)
    with pytest.raises(UserError, match=r"No space left.*--cache DIR"):
        Cache(tmp_path / "cache", PLAN).image(case)
    assert entries(tmp_path / "cache") == []
    monkeypatch.undo()
    assert Cache(tmp_path / "cache", PLAN).image(case).array.shape == (1, 15, 70, 75)


def test_a_cache_that_cannot_be_a_folder_is_explained(tmp_path: Path) -> None:
    case = make_case(tmp_path)
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(UserError, match=r"--cache DIR"):
        Cache(tmp_path / "file", PLAN).image(case)


def test_a_damaged_entry_is_named(tmp_path: Path) -> None:
    case = make_case(tmp_path)
    Cache(tmp_path / "cache", PLAN).image(case)
    (entry,) = (tmp_path / "cache").glob("v*/image-*")
    (entry / "zarr.json").unlink()
    with pytest.raises(UserError, match="damaged cache entry"):
        Cache(tmp_path / "cache", PLAN).image(case)
    (entry / "zarr.json").write_text("{")
    with pytest.raises(UserError, match="damaged cache entry"):
        Cache(tmp_path / "cache", PLAN).image(case)


def test_remains_of_killed_builds_are_swept_after_a_day(tmp_path: Path) -> None:
    folder = tmp_path / "v1"
    old, young, entry = folder / ".image-00.aa", folder / ".image-00.bb", folder / "image-00"
    for path in (old, young, entry):
        path.mkdir(parents=True)
    past = time.time() - 2 * STALE_SECONDS
    for path in (old, entry):
        os.utime(path, (past, past))
    Cache(tmp_path, PLAN)
    assert not old.exists()
    assert young.is_dir()
    assert entry.is_dir()


def test_2d_plans_get_chunks_of_one_slice(tmp_path: Path) -> None:
    case = make_case(tmp_path)
    plan = replace(PLAN, ndim=2, spacing=(0.0, 1.0, 1.0), patch_size=(16, 16))
    assert Cache(tmp_path / "cache", plan).image(case).array.chunks == (1, 1, 70, 75)


def test_2d_scans_are_cached(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    geometry = Geometry.identity((50, 40))
    write_image(tmp_path / "a.mha", random.random((40, 50)).astype(np.float32), geometry)
    plan = replace(PLAN, ndim=2, scan_ndim=2, spacing=(1.0, 1.0), patch_size=(16, 16))
    image = Cache(tmp_path / "cache", plan).image(Case("a", (tmp_path / "a.mha",)))
    assert image.array.shape == (1, 40, 50)
    assert image.frame.native == geometry


def test_the_root_is_where_the_environment_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("MLBSEG_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert default_cache_root() == tmp_path / ".cache" / "mlbseg"
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert default_cache_root() == Path("/x/mlbseg")
    monkeypatch.setenv("MLBSEG_CACHE", "/y")
    assert default_cache_root() == Path("/y")


def test_without_a_home_that_can_be_written_a_private_temporary_folder_is_the_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("MLBSEG_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    own = tmp_path / f"mlbseg-{os.getuid()}"

    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "home", no_home)
        assert default_cache_root() == own
    assert own.stat().st_mode & 0o077 == 0
    with monkeypatch.context() as patch:  # root may write everywhere
        patch.setattr(Path, "home", lambda: tmp_path / "home")
        patch.setattr(os, "access", lambda path, _: path != tmp_path)
        assert default_cache_root() == own
        own.chmod(0o755)
        with pytest.raises(UserError, match=r"expected a folder of your own .*--cache DIR .*MLBSEG_CACHE"):
            default_cache_root()
        own.rmdir()
        own.symlink_to(tmp_path)
        with pytest.raises(UserError, match="expected a folder of your own"):
            default_cache_root()
        patch.setattr(tempfile, "tempdir", str(tmp_path / "gone"))
        with pytest.raises(UserError, match=r"no folder for prepared scans: .*--cache DIR .*MLBSEG_CACHE"):
            default_cache_root()


def _die_before_renaming(root: Path, case: Case) -> None:
    cache_module._flush = lambda _: os.kill(os.getpid(), signal.SIGKILL)
    Cache(root, PLAN).image(case)


def _build_in_step(root: Path, case: Case, barrier: Any, results: Any) -> None:
    flush = cache_module._flush

    def wait(folder: Path) -> None:
        flush(folder)
        barrier.wait(60)  # both have built, neither has renamed

    cache_module._flush = wait
    image = Cache(root, PLAN).image(case)
    results.put(float(np.abs(image.array[:]).sum()))


def _read_patch(array: Any, results: Any) -> None:
    results.put(float(array[:, 2:9, 3:40, 5:66].sum()))


@pytest.mark.slow
def test_a_build_killed_half_way_leaves_no_entry(tmp_path: Path) -> None:
    case = make_case(tmp_path)
    process = multiprocessing.get_context("spawn").Process(
        target=_die_before_renaming, args=(tmp_path / "cache", case)
    )
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    (remains,) = entries(tmp_path / "cache")
    assert remains.startswith(".")
    image = Cache(tmp_path / "cache", PLAN).image(case)
    assert np.array_equal(image.array[:], prepare_scan(read_scan(case.images), PLAN)[0])
    assert len(entries(tmp_path / "cache")) == 2


@pytest.mark.slow
def test_two_processes_may_build_the_same_entry(tmp_path: Path) -> None:
    case = make_case(tmp_path)
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(2), context.Queue()
    both = [
        context.Process(target=_build_in_step, args=(tmp_path / "cache", case, barrier, results))
        for _ in range(2)
    ]
    for process in both:
        process.start()
    sums = [results.get(timeout=90) for _ in both]
    for process in both:
        process.join(60)
        assert process.exitcode == 0
    expected = float(np.abs(prepare_scan(read_scan(case.images), PLAN)[0]).sum())
    assert sums == [pytest.approx(expected)] * 2
    (entry,) = entries(tmp_path / "cache")
    assert entry.startswith("image-")


@pytest.mark.slow
def test_an_open_entry_is_read_in_a_worker_process(tmp_path: Path) -> None:
    array = Cache(tmp_path / "cache", PLAN).image(make_case(tmp_path)).array
    expected = float(array[:, 2:9, 3:40, 5:66].sum())
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    process = context.Process(target=_read_patch, args=(array, results))
    process.start()
    assert results.get(timeout=60) == expected
    process.join(60)


def test_entries_say_where_the_scan_lies_in_plain_json(tmp_path: Path) -> None:
    case = make_case(tmp_path)
    frame = Cache(tmp_path / "cache", PLAN).image(case).frame
    (entry,) = (tmp_path / "cache").glob("v*/image-*")
    attributes = json.loads((entry / "zarr.json").read_text())["attributes"]
    assert tuple(attributes["native"]["origin"]) == frame.native.origin
    assert str(tmp_path) not in json.dumps(attributes)
