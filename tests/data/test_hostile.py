"""Files that mean harm or are merely broken: never more memory, time or files than they announce and may have."""

from __future__ import annotations

import os
import subprocess
import sys
import zlib
from pathlib import Path

import h5py
import numpy as np
import pytest
from pydicom import dcmread

from data.broken import mask, noise, save
from data.mutate import FORMATS, examine, write
from mlbseg.data.formats import hdf5
from mlbseg.data.formats.hdf5 import has_label
from mlbseg.data.readers import read_label, read_scan
from mlbseg.errors import ReadError

REPOSITORY = Path(__file__).resolve().parents[2]
OWN = ("nrrd", "nhdr", "mha", "mhd", "h5")
FEW = 12


@pytest.mark.slow
def test_damaged_files_are_read_or_refused() -> None:
    """`benchmarks/fuzz_readers.py` is the same with thousands."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(REPOSITORY / "src"), *sys.path])}
    command = [sys.executable, str(REPOSITORY / "tests/data/mutate.py"), ",".join(OWN), "0", str(FEW)]
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment, errors="replace", check=False
    )
    ends = [line.split(" ", 3) for line in done.stdout.splitlines() if line.startswith("@end ")]
    assert done.returncode == 0, done.stdout[-500:] + done.stderr[-2000:]
    assert len(ends) == FEW * len(OWN)
    assert [end for end in ends if end[3] not in ("read", "refused")] == []
    assert {end[3] for end in ends} == {"read", "refused"}


def test_a_damaged_file_is_the_same_each_time(tmp_path: Path) -> None:
    for kind in OWN[:4]:
        contents = []
        for name in "ab":
            folder = tmp_path / name / kind
            folder.mkdir(parents=True)
            path = write(kind, 5, folder)
            contents.append(path.read_bytes().replace(str(folder).encode(), b""))
        assert contents[0] == contents[1]


@pytest.mark.parametrize("kind", FORMATS)
def test_what_is_damaged_was_whole(kind: str, tmp_path: Path) -> None:
    for number, seed in enumerate(FORMATS[kind][0]()):
        root = tmp_path / str(number)
        for name, content in seed.files.items():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_bytes(content)
        assert examine(kind, root / seed.read) == "read"


# HDF5.


def announce(path: Path, shape: tuple[int, ...], **options: object) -> Path:
    with h5py.File(path, "w") as file:
        file.create_dataset("image", shape, "f4", fillvalue=7, **options)
    return path


def test_hdf5_that_announces_more_than_memory_is_refused_unread(tmp_path: Path) -> None:
    path = announce(tmp_path / "a.h5", (2**14,) * 3, chunks=(64, 64, 64))
    assert path.stat().st_size < 10_000
    with pytest.raises(ReadError, match=r"announces .* GiB of pixels, expected at most"):
        read_scan([path])


def test_hdf5_chunk_larger_than_memory_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = announce(tmp_path / "a.h5", (4, 4, 4), maxshape=(None,) * 3, chunks=(128, 256, 256))
    assert read_scan([path]).array.max() == 7
    monkeypatch.setattr("mlbseg.memory.free_memory", lambda: 1 << 20)
    with pytest.raises(ReadError, match=r"GiB of pixels"):
        read_scan([path])


def test_hdf5_chunk_far_larger_than_its_pixels_is_refused(tmp_path: Path) -> None:
    path = announce(tmp_path / "a.h5", (4, 4, 4), maxshape=(None,) * 3, chunks=(512, 512, 512))
    with pytest.raises(ReadError, match=r"chunks of 536870912 bytes for 256 bytes of pixels"):
        read_scan([path])


def test_hdf5_chunk_that_inflates_to_more_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hdf5, "free_memory", lambda: 1 << 20)
    path = tmp_path / "a.h5"
    for stored in (zlib.compress(bytes(1 << 26)), b"no zlib" * 9999):
        with h5py.File(path, "w") as file:
            options = {"chunks": (8, 8, 8), "compression": "gzip"}
            file.create_dataset("image", (8, 8, 8), "u1", **options).id.write_direct_chunk((0, 0, 0), stored)
        with pytest.raises(ReadError, match=r"more pixels than it announces|incorrect header"):
            read_scan([path])


def test_honest_hdf5_compression_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hdf5, "free_memory", lambda: 0)  # so that every chunk is looked at
    path = tmp_path / "a.h5"
    for array in (noise(0), np.zeros((64, 64, 64), np.float32)):
        for options in ({"compression": "gzip", "shuffle": True, "fletcher32": True}, {"compression": "lzf"}):
            with h5py.File(path, "w") as file:
                file.create_dataset("image", data=array, **options)
            assert np.array_equal(read_scan([path]).array[0], array.T)


@pytest.mark.parametrize("shape", [(0, 4, 4), (4, 4, 0), (0, 0)])
def test_hdf5_without_pixels(shape: tuple[int, ...], tmp_path: Path) -> None:
    with pytest.raises(ReadError, match="at least one pixel along each axis"):
        read_scan([announce(tmp_path / "a.h5", shape)])


def test_hdf5_filters_from_elsewhere_are_not_looked_for(tmp_path: Path) -> None:
    path = announce(tmp_path / "a.h5", (8, 8, 8), scaleoffset=2)
    with pytest.raises(ReadError, match="compressed by scaleoffset, expected gzip, lzf or none"):
        read_scan([path])


def test_hdf5_spacing_of_thousands_of_numbers(tmp_path: Path) -> None:
    path = announce(tmp_path / "a.h5", (8, 8, 8))
    with h5py.File(path, "a") as file:
        file.attrs["spacing"] = np.ones(8_000)
    with pytest.raises(ReadError, match=r"spacing 8000, expected 3 finite numbers"):
        read_scan([path])


def test_hdf5_label_behind_a_link_is_no_label(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["label"] = mask()
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["image"] = noise(0)
        file["label"] = h5py.ExternalLink("other.h5", "label")
    assert has_label(tmp_path / "other.h5")
    assert not has_label(tmp_path / "a.h5")


def test_hdf5_half_precision_label(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["label"] = np.array([[0, 1], [2, np.inf]], np.float16)
        file["image"] = np.ones((2, 2), np.float16)
    assert read_scan([tmp_path / "a.h5"]).array.max() == 1
    with pytest.raises(ReadError, match="label value inf"):
        read_label(tmp_path / "a.h5")


def test_what_itk_reads_is_compared_with_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mlbseg.memory.free_memory", lambda: 100)
    for suffix in (".nii.gz", ".nrrd", ".mha"):
        with pytest.raises(ReadError, match=r"GiB of pixels, expected at most"):
            read_scan([save(tmp_path / f"a{suffix}", noise(0))])


def test_dicom_frames_of_more_pixels_than_the_header_says(tmp_path: Path) -> None:
    (seed,) = FORMATS["frames"][0]()
    path = tmp_path / "frames.dcm"
    path.write_bytes(seed.files[seed.target])
    data = dcmread(path)
    data.Rows = 1
    data.save_as(path)
    with pytest.raises(ReadError, match="672 numbers of pixels, expected 56"):
        read_scan([path])
