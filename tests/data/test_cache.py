from __future__ import annotations

import contextlib
import errno
import json
import multiprocessing
import os
import shutil
import signal
import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlbseg.data import cache as cache_module
from mlbseg.data import entries as entries_module
from mlbseg.data import known as known_module
from mlbseg.data import reading as reading_module
from mlbseg.data.cache import FORMAT, Cache
from mlbseg.data.cache_root import default_cache_root
from mlbseg.data.plan import Plan
from mlbseg.data.preprocess import prepare_label, prepare_scan
from mlbseg.data.readers import read_label, read_scan, write_image, write_label
from mlbseg.data.reading import Reading
from mlbseg.errors import ReadError, UserError
from mlbseg.temporaries import temporary_folder
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
    monkeypatch.setattr(known_module, "read_label", refuse)
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
    write_label(case.label, values, replace(geometry, origin=(90.0, 4.0, 5.0), stored=()))
    with pytest.raises(UserError, match=r"label.*: origin \(90, 4, 5\) mm, expected .* as its image"):
        Cache(tmp_path / "cache", PLAN).label(case)


def test_a_full_disk_is_explained_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case(tmp_path)

    def full(_: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(entries_module, "_flush", full)
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


def chunk_of(entry: Path) -> Path:
    return sorted(p for p in entry.rglob("*") if p.is_file() and p.parent.name.isdecimal())[0]


def rewritten(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def flipped(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def emptied(entry: Path) -> None:
    shutil.rmtree(entry)
    entry.mkdir()


def a_file(entry: Path) -> None:
    shutil.rmtree(entry)
    entry.write_text("no folder")


def a_link_to_nowhere(entry: Path) -> None:
    shutil.rmtree(entry)
    entry.symlink_to(entry.parent / "gone")


def a_chunk_that_is_a_folder(entry: Path) -> None:
    chunk = chunk_of(entry)
    chunk.unlink()
    chunk.mkdir()


def exchanged(entry: Path) -> None:
    """Let two chunks of one size change places, as far as a name goes: each is whole in itself."""
    first, second = sorted(p for p in entry.rglob("*") if p.is_file() and p.parent.name.isdecimal())[:2]
    content = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(content)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "chunk removed": lambda entry: chunk_of(entry).unlink(),
    "all chunks removed": lambda entry: shutil.rmtree(entry / "array" / "c"),
    "chunk truncated": lambda entry: os.truncate(chunk_of(entry), 100),
    "chunk emptied": lambda entry: os.truncate(chunk_of(entry), 0),
    "chunk longer": lambda entry: chunk_of(entry).write_bytes(chunk_of(entry).read_bytes() + b"0"),
    "chunk flipped": lambda entry: flipped(chunk_of(entry)),
    "chunks exchanged": exchanged,
    "chunk a folder": a_chunk_that_is_a_folder,
    "array removed": lambda entry: shutil.rmtree(entry / "array"),
    "zarr.json removed": lambda entry: (entry / "zarr.json").unlink(),
    "zarr.json truncated": lambda entry: os.truncate(entry / "array" / "zarr.json", 30),
    "zarr.json no JSON": lambda entry: (entry / "zarr.json").write_text("{"),
    "other shape": lambda entry: rewritten(entry / "array" / "zarr.json", shape=[1, 2, 3, 4]),
    "other type": lambda entry: rewritten(entry / "array" / "zarr.json", data_type="int16"),
    "attributes missing": lambda entry: rewritten(entry / "zarr.json", attributes={}),
    "attributes of another type": lambda entry: rewritten(entry / "zarr.json", attributes={"native": 3}),
    "manifest removed": lambda entry: (entry / "manifest.json").unlink(),
    "manifest flipped": lambda entry: flipped(entry / "manifest.json"),
    "manifest no list": lambda entry: (entry / "manifest.json").write_text("[1, 2]"),
    "manifest lacks files": lambda entry: (entry / "manifest.json").write_text("{}"),
    "folder empty": emptied,
    "folder a file": a_file,
    "folder a dead link": a_link_to_nowhere,
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Case, Path]:
    """A case and a cache that holds it."""
    root = tmp_path_factory.mktemp("whole")
    case = make_case(root)
    Cache(root / "cache", PLAN).label(case)
    return case, root / "cache"


def contents(cached: Cache, case: Case) -> tuple[bytes, bytes, bytes]:
    return (
        cached.image(case).array[:].tobytes(),
        cached.label(case)[:].tobytes(),
        cached.foreground(case).tobytes(),
    )


@pytest.mark.parametrize("kind", ["image", "label"])
@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_entry_is_noticed_and_made_anew(
    whole: tuple[Case, Path], tmp_path: Path, damage: Callable[[Path], object], kind: str
) -> None:
    case, root = whole[0], shutil.copytree(whole[1], tmp_path / "cache")
    expected = contents(Cache(root, PLAN), case)
    (entry,) = root.glob(f"v*/{kind}-*")
    damage(entry)
    with pytest.warns(UserWarning, match=r"^a: its entry in the cache is damaged .*it is made anew") as notes:
        assert contents(Cache(root, PLAN), case) == expected
    assert len(notes) == 1
    assert contents(Cache(root, PLAN), case) == expected  # with no further note
    assert len(entries(root)) == 2  # and nothing left behind


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_an_entry_that_is_damaged_while_it_is_used_is_made_anew(
    whole: tuple[Case, Path], tmp_path: Path, damage: Callable[[Path], object]
) -> None:
    case, root = whole[0], shutil.copytree(whole[1], tmp_path / "cache")
    cached = Cache(root, PLAN)
    array = cached.image(case).array
    expected = array[:]
    (entry,) = root.glob("v*/image-*")
    damage(entry)
    with warnings.catch_warnings(record=True) as notes:
        warnings.simplefilter("always")
        assert array[:].tobytes() == expected.tobytes()
    # What has been read of an entry that is open, such as its shape, is not read again.
    assert len(notes) == (0 if array_is_untouched(damage) else 1)


def array_is_untouched(damage: Callable[[Path], object]) -> bool:
    name = next(name for name, one in DAMAGES.items() if one is damage)
    return name.startswith(("zarr.json", "other", "attributes", "manifest"))


@pytest.mark.parametrize("what", ["entry", "root"])
def test_an_entry_that_has_gone_while_it_is_used_is_made_anew(
    whole: tuple[Case, Path], tmp_path: Path, what: str
) -> None:
    case, root = whole[0], shutil.copytree(whole[1], tmp_path / "cache")
    cached = Cache(root, PLAN)
    expected = contents(cached, case)
    shutil.rmtree(root if what == "root" else next(root.glob("v*/image-*")))
    with pytest.warns(UserWarning, match=r"^a: its entry in the cache has gone; it is made anew"):
        assert cached.image(case).array[:].tobytes() == expected[0]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
@pytest.mark.parametrize("where", [".", "array/zarr.json"])
def test_an_entry_that_must_not_be_read_is_made_anew(
    whole: tuple[Case, Path], tmp_path: Path, where: str
) -> None:
    case, root = whole[0], shutil.copytree(whole[1], tmp_path / "cache")
    expected = contents(Cache(root, PLAN), case)
    (entry,) = root.glob("v*/image-*")
    (entry / where).chmod(0)
    with pytest.warns(UserWarning, match=r"cannot be read: Permission denied.*made anew"):
        assert contents(Cache(root, PLAN), case) == expected
    assert len(entries(root)) == 2


@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO, errno.ESTALE])
def test_a_file_that_the_disk_does_not_give_back_is_damage(
    number: int, whole: tuple[Case, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case, root = whole[0], shutil.copytree(whole[1], tmp_path / "cache")
    expected = contents(Cache(root, PLAN), case)
    (entry,) = root.glob("v*/image-*")
    original, failing = Path.read_bytes, [number]

    def read_bytes(path: Path) -> bytes:
        if path.is_relative_to(entry) and path.parent.name == "0" and failing:
            raise OSError(failing.pop(), os.strerror(number))
        return original(path)

    monkeypatch.setattr(Path, "read_bytes", read_bytes)
    with pytest.warns(
        UserWarning, match=rf"array/c/0/0/0/0 cannot be read: {os.strerror(number)}.*made anew"
    ):
        assert contents(Cache(root, PLAN), case) == expected


def test_too_many_open_files_are_no_damage(whole: tuple[Case, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    case, root = whole

    def fail(_: Path) -> bytes:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    cached = Cache(root, PLAN)
    monkeypatch.setattr(Path, "read_bytes", fail)
    with pytest.raises(OSError, match="Too many open files"):
        cached.image(case)


def test_a_disk_that_damages_all_that_is_written_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = make_case(tmp_path)
    original = entries_module._flush

    def flush(folder: Path) -> None:
        flipped(chunk_of(folder))
        original(folder)

    monkeypatch.setattr(entries_module, "_flush", flush)
    with (
        pytest.warns(UserWarning, match="is damaged"),
        pytest.raises(UserError, match=r"damaged as soon as it is made .*--cache DIR"),
    ):
        Cache(tmp_path / "cache", PLAN).image(case)


def test_a_chunk_of_background_is_written_too(whole: tuple[Case, Path]) -> None:
    case, root = whole
    label = Cache(root, PLAN).label(case)
    assert not label[:2].any()
    (entry,) = root.glob("v*/label-*")
    per_axis = [-(-n // c) for n, c in zip(label.shape, label.chunks, strict=True)]
    assert len([p for p in (entry / "array" / "c").rglob("*") if p.is_file()]) == np.prod(per_axis)


def test_a_scan_that_changes_while_it_is_read_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = make_case(tmp_path)
    original = cache_module.read_scan

    def read_and_change(paths: Sequence[Path]) -> Any:
        scan = original(paths)
        flipped(paths[0])
        return scan

    monkeypatch.setattr(cache_module, "read_scan", read_and_change)
    with pytest.raises(UserError, match=r"a\.nii\.gz: has changed since it was first read \(restore it"):
        Cache(tmp_path / "cache", PLAN).image(case)
    assert entries(tmp_path / "cache") == []


def test_a_label_that_changes_while_it_is_read_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = make_case(tmp_path)
    original = known_module.read_label

    def read_and_change(path: Path) -> Any:
        label = original(path)
        flipped(path)
        return label

    monkeypatch.setattr(known_module, "read_label", read_and_change)
    with pytest.raises(UserError, match=r"a_label\.nii\.gz: has changed since it was first read"):
        Cache(tmp_path / "cache", PLAN).label(case)
    assert [name.split("-")[0] for name in entries(tmp_path / "cache")] == ["image"]


def test_an_entry_is_not_made_anew_of_a_scan_that_has_changed(tmp_path: Path) -> None:
    case = make_case(tmp_path)
    cached = Cache(tmp_path / "cache", PLAN)
    array = cached.image(case).array
    shutil.rmtree(tmp_path / "cache")
    make_case(tmp_path, seed=1)
    with pytest.warns(UserWarning, match="has gone"), pytest.raises(UserError, match="has changed since"):
        array[:]
    assert entries(tmp_path / "cache") == []


def test_remains_of_killed_builds_are_swept_and_nothing_else(tmp_path: Path) -> None:
    folder = tmp_path / f"v{FORMAT}"
    entry, remain = folder / "image-00", folder / f".mlbseg-{'0' * 32}"
    for path in (entry, remain):
        path.mkdir(parents=True)
    with temporary_folder(folder) as in_use:
        Cache(tmp_path, PLAN)
        assert in_use.is_dir()
    assert not remain.exists()
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
    entries_module._flush = lambda _: os.kill(os.getpid(), signal.SIGKILL)
    Cache(root, PLAN).image(case)


def _build_in_step(root: Path, case: Case, barrier: Any, results: Any) -> None:
    flush = entries_module._flush

    def wait(folder: Path) -> None:
        flush(folder)
        barrier.wait(60)  # both have built, neither has renamed

    entries_module._flush = wait
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
    remains = entries(tmp_path / "cache")
    assert len(remains) == 2  # a folder and its lock
    assert all(name.startswith(".") for name in remains)
    image = Cache(tmp_path / "cache", PLAN).image(case)
    assert np.array_equal(image.array[:], prepare_scan(read_scan(case.images), PLAN)[0])
    assert len(entries(tmp_path / "cache")) == 1


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


def _mend_in_step(root: Path, case: Case, barrier: Any, results: Any) -> None:
    flush = entries_module._flush

    def wait(folder: Path) -> None:
        flush(folder)
        barrier.wait(60)  # both have found the damage and built, neither has put its own there

    entries_module._flush = wait
    with warnings.catch_warnings(record=True):
        warnings.simplefilter("always")
        array = Cache(root, PLAN).image(case).array
    results.put([float(np.abs(array[:]).sum()) for _ in range(5)])


def _read_until(stop: Any, root: Path, case: Case, results: Any) -> None:
    array = Cache(root, PLAN).image(case).array
    seen: set[float] = set()
    with warnings.catch_warnings(record=True):
        warnings.simplefilter("always")
        results.put(0.0)
        while not stop.is_set():
            seen.add(float(np.abs(array[:]).sum()))
    results.put(seen)


@pytest.mark.slow
def test_two_processes_may_mend_the_same_entry(whole: tuple[Case, Path], tmp_path: Path) -> None:
    case, root = whole[0], shutil.copytree(whole[1], tmp_path / "cache")
    expected = float(np.abs(Cache(root, PLAN).image(case).array[:]).sum())
    (entry,) = root.glob("v*/image-*")
    flipped(chunk_of(entry))
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(2), context.Queue()
    both = [context.Process(target=_mend_in_step, args=(root, case, barrier, results)) for _ in range(2)]
    for process in both:
        process.start()
    sums = [results.get(timeout=90) for _ in both]
    for process in both:
        process.join(60)
        assert process.exitcode == 0
    assert sums == [[expected] * 5] * 2
    assert len(entries(root)) == 2
    assert Cache(root, PLAN).image(case).array[:].shape == (1, 15, 70, 75)


@pytest.mark.slow
def test_a_process_that_reads_outlives_the_mending_by_another(
    whole: tuple[Case, Path], tmp_path: Path
) -> None:
    case, root = whole[0], shutil.copytree(whole[1], tmp_path / "cache")
    expected = float(np.abs(Cache(root, PLAN).image(case).array[:]).sum())
    (entry,) = root.glob("v*/image-*")
    context = multiprocessing.get_context("spawn")
    stop, results = context.Event(), context.Queue()
    reader = context.Process(target=_read_until, args=(stop, root, case, results))
    reader.start()
    assert results.get(timeout=60) == 0
    for number in range(10):
        damage = list(DAMAGES.values())[number]
        # The reader may be mending it too.
        with contextlib.suppress(OSError, IndexError, ValueError):
            damage(entry)
        with warnings.catch_warnings(record=True):
            warnings.simplefilter("always")
            assert float(np.abs(Cache(root, PLAN).image(case).array[:]).sum()) == expected
    stop.set()
    assert results.get(timeout=60) == {expected}
    reader.join(60)
    assert reader.exitcode == 0


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


def folders(root: Path) -> dict[str, bytes]:
    """Return the files of all entries."""
    return {
        str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()
    }


def labelled_cases(root: Path) -> list[Case]:
    cases = [make_case(root / str(seed), seed=seed) for seed in range(4)]
    return [replace(case, id=str(number)) for number, case in enumerate(cases)]


@pytest.mark.slow
def test_processes_prepare_what_one_prepares(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cases = labelled_cases(tmp_path)
    Cache(tmp_path / "one", PLAN).fill(cases)
    monkeypatch.setattr(reading_module, "SOON", -1.0)
    told: list[tuple[int, int]] = []
    cached = Cache(tmp_path / "two", PLAN)
    cached.image(cases[1])  # is there already
    cached.fill(cases, reading=Reading(2), progress=lambda done, total: told.append((done, total)))
    one, two = folders(tmp_path / "one" / f"v{FORMAT}"), folders(tmp_path / "two" / f"v{FORMAT}")
    assert len({name.split("/")[0] for name in one}) >= len(cases)
    assert one == two
    assert told[-1] == (4, 4)


def test_what_is_prepared_is_not_prepared_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cases = labelled_cases(tmp_path)
    Cache(tmp_path / "cache", PLAN).fill(cases)

    def refuse(*_: object) -> None:
        raise AssertionError

    monkeypatch.setattr(cache_module, "_prepare", refuse)
    told: list[int] = []
    Cache(tmp_path / "cache", PLAN).fill(cases, progress=lambda done, _: told.append(done))
    assert told == [4]


@pytest.mark.slow
def test_the_first_case_that_cannot_be_prepared_is_named_and_nothing_is_left_half_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cases = labelled_cases(tmp_path)
    for case in cases[1:3]:
        case.images[0].write_bytes(case.images[0].read_bytes()[:500])
    said = []
    for name, reading in (("one", Reading()), ("two", Reading(2))):
        monkeypatch.setattr(reading_module, "SOON", -1.0)
        with pytest.raises(UserError) as raised:
            Cache(tmp_path / name, PLAN).fill(cases, reading=reading)
        said.append(str(raised.value))
        assert not any(entry.startswith(".") for entry in entries(tmp_path / name))
    assert said[0] == said[1]
    assert str(cases[1].images[0]) in said[0]
