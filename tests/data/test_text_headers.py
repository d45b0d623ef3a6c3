"""MetaImage and NRRD: read here, from one header, and equal to what ITK reads."""

from __future__ import annotations

import bz2
import functools
import gzip
import itertools
import os
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813

from data.broken import noise, save
from mlbseg.data.hashes import content_hash
from mlbseg.data.readers import pixel_file, read_label, read_scan
from mlbseg.errors import ReadError

SECRET = b"root:x:0:0:root:/root:/bin/bash\n" * 400
TYPES = ["i1", "u1", "i2", "u2", "i4", "u4", "i8", "u8", "f4", "f8"]
ROTATIONS = {
    2: [(1, 0, 0, 1), (0, -1, 1, 0), (0.8, -0.6, 0.6, 0.8)],
    3: [(1, 0, 0, 0, 1, 0, 0, 0, 1), (0, 0, -1, 1, 0, 0, 0, 1, 0), (0.8, -0.6, 0, 0.6, 0.8, 0, 0, 0, -1)],
}
# Without the time: the parallel runs of the tests name them by these bytes.
gzipped = functools.partial(gzip.compress, mtime=0)
PLAIN = np.arange(24, dtype="<i2")


def same_as_itk(path: Path) -> None:
    """Compare pixels and place with what SimpleITK reads."""
    image, scan = sitk.ReadImage(str(path)), read_scan([path])
    array = sitk.GetArrayFromImage(image)
    expected = np.moveaxis(array, -1, 0) if image.GetNumberOfComponentsPerPixel() > 1 else array[None]
    n = scan.geometry.ndim
    total = image.GetDimension()
    assert np.array_equal(scan.array, expected.astype(np.float32).reshape(scan.array.shape))
    assert scan.array.shape[1:] == image.GetSize()[:n][::-1]
    assert scan.geometry.spacing == pytest.approx(image.GetSpacing()[:n])
    assert scan.geometry.origin == pytest.approx(image.GetOrigin()[:n])
    direction = np.reshape(image.GetDirection(), (total, total))[:n, :n]
    assert scan.geometry.direction == pytest.approx(direction.ravel(), abs=1e-6)


@pytest.mark.parametrize("suffix", [".mha", ".mhd", ".nrrd", ".nhdr"])
@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("vector", [False, True])
@pytest.mark.parametrize("shape", [(5, 4), (6, 5, 4), (1, 6, 5, 4)])
def test_what_simpleitk_writes(
    suffix: str, compressed: bool, vector: bool, shape: tuple[int, ...], tmp_path: Path
) -> None:
    n = len(shape)
    full = (*shape, 3) if vector else shape
    for kind, rotation in zip(TYPES, itertools.cycle(ROTATIONS[min(n, 3)]), strict=False):
        image = sitk.GetImageFromArray(noise(1, full).astype(kind), isVector=vector)
        image.SetSpacing((0.5, 0.75, 3.0, 1.0)[:n])
        image.SetOrigin((-12.0, 30.5, 7.25, 0.0)[:n])
        direction = np.eye(n)
        direction[: min(n, 3), : min(n, 3)] = np.reshape(rotation, (min(n, 3),) * 2)
        image.SetDirection(direction.ravel().tolist())
        path = tmp_path / f"a{suffix}"
        sitk.WriteImage(image, str(path), useCompression=compressed)
        same_as_itk(path)


def meta(fields: str = "", data: str = "LOCAL", size: str = "2 3 4", kind: str = "MET_SHORT") -> bytes:
    n = len(size.split())
    text = f"ObjectType = Image\nNDims = {n}\n{fields}DimSize = {size}\nElementType = {kind}\n"
    return f"{text}ElementDataFile = {data}".encode()


def nrrd(fields: str = "", size: str = "2 3 4", kind: str = "short", encoding: str = "raw") -> bytes:
    text = f"NRRD0004\ntype: {kind}\ndimension: {len(size.split())}\nsizes: {size}\nencoding: {encoding}\n"
    return f"{text}endian: little\n{fields}\n".encode()


@pytest.mark.parametrize(
    "fields",
    [
        "",
        "BinaryData = True\nBinaryDataByteOrderMSB = True\n",
        "ElementByteOrderMSB = true\n",
        "ElementSize = 1 2 3\n",
        "ElementSize = 1 2 3\nElementSpacing = 4 5 6\n",
        "Position = 1 2 3\n",
        "Origin = 1 2 3\n",
        "Offset = -1e1 2.5 .5\nRotation = 0 1 0 -1 0 0 0 0 1\nCenterOfRotation = 5 5 5\n",
        "Orientation = 0 1 0 -1 0 0 0 0 1\nAnatomicalOrientation = LPI\n",
        "HeaderSize = 0\n",
        "Comment = anything, even LIST and ElementDataFile\nModality = MET_MOD_MR\n",
    ],
)
def test_metaimage_fields_as_itk_reads_them(fields: str, tmp_path: Path) -> None:
    path = tmp_path / "a.mha"
    path.write_bytes(meta(fields) + b"\n" + PLAIN.tobytes())
    same_as_itk(path)
    path.write_bytes(meta(fields).replace(b" = ", b"=").replace(b"\n", b"\r\n") + b"\r\n" + PLAIN.tobytes())
    same_as_itk(path)


@pytest.mark.parametrize("data", ["Local", "local", "LOCAL  "])
def test_metaimage_spellings_of_local(data: str, tmp_path: Path) -> None:
    (tmp_path / "a.mha").write_bytes(meta(data=data) + b"\n" + PLAIN.tobytes())
    same_as_itk(tmp_path / "a.mha")


@pytest.mark.parametrize("end", [b"", b"\n", b"\r\n"])
@pytest.mark.parametrize("data", ["x y.raw", "./x y.raw"])
@pytest.mark.parametrize(("fields", "before"), [("", 0), ("HeaderSize = 5\n", 5), ("HeaderSize = -1\n", 7)])
def test_hand_written_mhd(data: str, end: bytes, fields: str, before: int, tmp_path: Path) -> None:
    (tmp_path / "a.mhd").write_bytes(meta(fields, data) + end)
    (tmp_path / "x y.raw").write_bytes(bytes(before) + PLAIN.tobytes())
    if end:  # without it ITK 5.4 reads nothing
        same_as_itk(tmp_path / "a.mhd")
    assert np.array_equal(read_scan([tmp_path / "a.mhd"]).array.ravel(), PLAIN)
    assert pixel_file(tmp_path / "a.mhd") == tmp_path / "x y.raw"


def test_metaimage_as_text_and_as_gzip(tmp_path: Path) -> None:
    path = tmp_path / "a.mha"
    path.write_bytes(meta("BinaryData = False\n") + b"\n" + " ".join(map(str, PLAIN)).encode() + b"\n")
    same_as_itk(path)
    for packed in (zlib.compress(PLAIN.tobytes()), gzipped(PLAIN.tobytes())):
        path.write_bytes(meta("CompressedData = True\n") + b"\n" + packed)
        assert np.array_equal(read_scan([path]).array.ravel(), PLAIN)


SPACES = ["left-posterior-superior", "LPS", "RAS", "right-anterior-superior", "LAS", "scanner-xyz"]


@pytest.mark.parametrize("space", [*SPACES, "3D-left-handed"])
@pytest.mark.parametrize("place", ["space origin: (1,2,3)\n", ""])
def test_nrrd_spaces_as_itk_reads_them(space: str, place: str, tmp_path: Path) -> None:
    path = tmp_path / "a.nrrd"
    fields = f"# a comment\nspace: {space}\nspace directions: (0,2,0) (3, 0,0) (0,0,4e0)\n{place}key:=data file: x\n"
    path.write_bytes(nrrd(fields) + PLAIN.tobytes())
    same_as_itk(path)
    path.write_bytes(nrrd(fields).replace(b"\n", b"\r\n") + PLAIN.tobytes())
    same_as_itk(path)


@pytest.mark.parametrize(
    ("size", "fields"),
    [
        ("2 3 2 2", "kinds: list domain domain domain\nspace: LPS\nspace directions: none (1,0,0) (0,1,0) (0,0,2)\n"),
        ("3 2 2 2", "kinds: space space space vector\nspace: RAS\nspace directions: (1,0,0) (0,1,0) (0,0,2) none\n"),
        ("3 2 4", "kinds: RGB-color domain domain\nspacings: nan 2 3\n"),
        ("1 2 3 4", "kinds: list domain domain domain\nspace: LPS\nspace directions: none (1,0,0) (0,1,0) (0,0,2)\n"),
        ("2 3 4", "spacings: 1 2 3\n"),
        ("2 3 4", "spacings: 1 2 3\naxis mins: 10 20 30\n"),
        ("2 3 4", "spacings: 1 2 3\naxis mins: 10 20 30\ncenterings: node node node\n"),
        ("2 3 4", "axis mins: 10 20 30\nold min: 3\n"),
        ("4 6", "space dimension: 2\nspace directions: (2,0) (0,3)\nspace origin: (5,6)\n"),
    ],
)  # fmt: skip
def test_nrrd_axes_as_itk_reads_them(size: str, fields: str, tmp_path: Path) -> None:
    path = tmp_path / "a.nrrd"
    path.write_bytes(nrrd(fields, size) + PLAIN.tobytes())
    same_as_itk(path)


@pytest.mark.parametrize(
    ("encoding", "fields", "stored"),
    [
        ("gz", "byte skip: 3\n", gzipped(b"xyz" + PLAIN.tobytes())),
        ("ascii", "", b" ".join(b"%d" % v for v in PLAIN)),
        ("raw", "byte skip: -1\n", b"xyz" + PLAIN.tobytes()),
        ("raw", "line skip: 2\nbyte skip: 1\n", b"a\nbc\nx" + PLAIN.tobytes()),
        ("bzip2", "", bz2.compress(PLAIN.tobytes())),
        ("gzip", "", gzipped(PLAIN[:9].tobytes()) + gzipped(PLAIN[9:].tobytes())),
    ],
)
def test_nrrd_encodings(encoding: str, fields: str, stored: bytes, tmp_path: Path) -> None:
    whole, detached = tmp_path / "a.nrrd", tmp_path / "b.nhdr"
    whole.write_bytes(nrrd(fields, encoding=encoding) + stored)
    detached.write_bytes(nrrd(fields + "data file: ./b.pix\n", encoding=encoding)[:-1])  # ends with the file
    (tmp_path / "b.pix").write_bytes(stored)
    for path in (whole, detached):
        assert np.array_equal(read_scan([path]).array.ravel(), PLAIN)
    if encoding != "bzip2" and stored[-18:] != gzipped(PLAIN[9:].tobytes())[-18:]:  # ITK has no bzip2
        same_as_itk(whole)


# Headers that lead elsewhere.

LEADS: dict[str, tuple[str, Callable[[str], bytes], str]] = {
    "second ElementDataFile": ("a.mha", lambda s: meta(data=s) + b"\nElementDataFile = LOCAL\n", "same folder"),
    "indented": ("a.mha", lambda s: meta(data=s).replace(b"E", b" E") + b"\nElementDataFile = LOCAL", "same folder"),
    "after much": ("a.nrrd", lambda s: nrrd("# x\n" * 400_000 + f"data file: {s}\n"), "same folder"),
    "in capitals": ("a.nhdr", lambda s: nrrd(f"Data File: {s}\n"), "same folder"),
    "up": ("a.mhd", lambda s: meta(data="../../../../../../../.." + s), "same folder"),
    "a pattern": ("a.mhd", lambda s: meta(data="%s%n%s%n 1 4 1"), "a file for each slice"),
    "a list": ("a.mhd", lambda s: meta(data=f"LIST 2\n{s}"), "a file for each slice"),
    "LIST2": ("a.mhd", lambda s: meta(data=f"LIST2\n{s}\n{s}"), "LIST2 is missing"),
    "a list of NRRD": ("a.nhdr", lambda s: nrrd(f"data file: LIST\n{s}\n"), "a file for each slice"),
    "a NUL": ("a.mhd", lambda s: meta(data=f"{s}\0.raw"), "not a MetaImage"),
    "nothing": ("a.mhd", lambda s: meta(data=""), "same folder"),
    "a folder": ("a.mhd", lambda s: meta(data="."), "same folder"),
    "itself": ("a.mhd", lambda s: meta(data="a.mhd"), "names itself"),
    "backslashes": ("a.mhd", lambda s: meta(data="..\\x.raw"), "same folder"),
    "a link": ("a.mhd", lambda s: meta(data="link.raw"), "a link to another folder"),
    "twice": ("a.nhdr", lambda s: nrrd("data file: ok.raw\n" f"datafile: {s}\n"), "twice"),
    "letters": ("a.mhd", lambda s: meta(data="OK.RAW"), "the folder has ok.raw"),
}  # fmt: skip


@pytest.mark.parametrize("name", LEADS)
def test_no_header_leads_out_of_its_folder(name: str, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_bytes(SECRET)
    folder = tmp_path / "scans"
    folder.mkdir()
    (folder / "link.raw").symlink_to(secret)
    (folder / "ok.raw").write_bytes(PLAIN.tobytes())
    file, build, words = LEADS[name]
    path = folder / file
    path.write_bytes(build(str(secret)) + (b"" if path.suffix == ".mhd" else PLAIN.tobytes()))
    for read in (lambda: read_scan([path]), lambda: read_label(path)):
        with pytest.raises(ReadError, match=words):
            read()
    before = content_hash(path)  # of the header alone: whoever reads the scan says what is wrong
    secret.write_bytes(b"changed")
    os.utime(secret, (1, 1))
    assert content_hash(path) == before


def test_no_pair_leads_out_of_its_folder(tmp_path: Path) -> None:
    path = save(tmp_path / "scans" / "a.hdr", noise(0))
    (tmp_path / "secret").write_bytes(SECRET)
    path.with_name("a.img").unlink()
    path.with_name("a.img").symlink_to("../secret")
    with pytest.raises(ReadError, match="a link to another folder"):
        read_scan([path])


def test_links_of_header_and_pixels_are_followed_together(tmp_path: Path) -> None:
    real = save(tmp_path / "store" / "a.mhd", noise(0))
    (tmp_path / "data").mkdir()
    for name in ("a.mhd", "a.raw"):
        (tmp_path / "data" / name).symlink_to(real.with_name(name))
    (tmp_path / "tree").symlink_to("store")
    for folder in ("data", "tree"):
        assert np.array_equal(read_scan([tmp_path / folder / "a.mhd"]).array[0], noise(0))


def test_the_cache_sees_a_change_of_the_pixels_that_any_header_names(tmp_path: Path) -> None:
    for name, header in (("a.mha", meta(data="x.pix")), ("a.nrrd", nrrd("data file: x.pix\n"))):
        (tmp_path / name).write_bytes(header)
        (tmp_path / "x.pix").write_bytes(PLAIN.tobytes())
        before = content_hash(tmp_path / name)
        (tmp_path / "x.pix").write_bytes(PLAIN[::-1].tobytes())
        os.utime(tmp_path / "x.pix", (1, 1))
        assert content_hash(tmp_path / name) != before


# Announced and held.


@pytest.mark.parametrize(
    ("path", "content", "words"),
    [
        ("a.mha", meta() + b"\n" + PLAIN.tobytes()[:-2], "46 bytes of pixels, expected 48"),
        ("a.mha", meta() + b"\n" + PLAIN.tobytes() * 2, "96 bytes of pixels, expected 48"),
        ("a.nrrd", nrrd() + PLAIN.tobytes()[:-2], "46 bytes of pixels, expected 48"),
        ("a.nrrd", nrrd() + PLAIN.tobytes() * 2, "96 bytes of pixels, expected 48"),
        ("a.nrrd", nrrd("byte skip: -1\n") + b"12345", "bytes of pixels, expected 48"),
        ("a.nrrd", nrrd(encoding="gzip") + gzipped(bytes(10**8)), "more than 48 bytes of pixels"),
        ("a.nrrd", nrrd(encoding="bz2") + bz2.compress(bytes(10**6)), "more than 48 bytes of pixels"),
        ("a.nrrd", nrrd("byte skip: 999999999\n", encoding="gz") + gzipped(bytes(99)), "skips 999999999"),
        ("a.nrrd", nrrd("byte skip: 9999\n", encoding="gz") + gzipped(bytes(99)), "truncated or damaged"),
        ("a.nrrd", nrrd("line skip: 999999999\n") + bytes(48), "line skip 999999999, expected 0 to"),
        ("a.nrrd", nrrd("line skip: 9\n") + bytes(48), "as many lines in a.nrrd"),
        ("a.nrrd", nrrd(encoding="gzip") + gzipped(PLAIN.tobytes())[:-9], "truncated or damaged gzip"),
        ("a.nrrd", nrrd(encoding="gzip") + gzipped(PLAIN[:9].tobytes()), "18 bytes of pixels"),
        ("a.nrrd", nrrd(encoding="ascii") + b"1 2 3", "3 numbers of text"),
        ("a.nrrd", nrrd(encoding="ascii") + b"x " * 24, "among its pixels"),
        ("a.nrrd", nrrd(encoding="hex") + b"00" * 48, "encoding hex, expected raw, gzip"),
        ("a.mha", meta("CompressedData = True\n") + b"\n" + zlib.compress(bytes(10**8)), "more than 48 bytes"),
        ("a.mha", meta("CompressedData = True\n") + b"\n" + zlib.compress(PLAIN.tobytes())[:-5], "damaged zlib"),
        ("a.mha", meta("CompressedData = True\nCompressedDataSize = 999\n") + b"\nxx", "2 bytes of pixels"),
        ("a.mha", meta(size="99999 99999 99999") + b"\n", "GiB of pixels, expected at most"),
        ("a.mha", meta("ElementNumberOfChannels = 999999999999\n") + b"\n", "GiB of pixels, expected at most"),
        ("a.nrrd", nrrd(size="99999 99999 99999", encoding="gzip"), "GiB of pixels, expected at most"),
        ("a.mha", meta(size="99999999999999999999 1 1") + b"\n", "damaged header .DimSize"),
        ("a.mha", meta(size="2 -3 4") + b"\n", "at least one pixel along each axis"),
        ("a.nrrd", nrrd(size="2 0 4"), "at least one pixel along each axis"),
        ("a.nrrd", nrrd(size="2 2 2 3") + PLAIN.tobytes(), "4D image of 2×2×2×3"),
        ("a.mha", meta("NDims = 2\n") + b"\n", "'NDims' twice in its header"),
        ("a.mha", meta("Offset = 1 2 3\nOrigin = 1 2 4\n") + b"\n" + PLAIN.tobytes(), "one value"),
        ("a.mha", meta("ElementSpacing = nan 1 1\n") + b"\n" + PLAIN.tobytes(), "finite numbers, 3 of them"),
        ("a.mha", meta("BinaryData = maybe\n") + b"\n" + PLAIN.tobytes(), "True or False"),
        ("a.mha", meta().replace(b"Image", b"Tube") + b"\n", "a MetaIO Tube, expected an Image"),
        ("a.nrrd", nrrd(kind="block") + PLAIN.tobytes(), "type block"),
        ("a.nrrd", nrrd().replace(b"endian: little\n", b"") + PLAIN.tobytes(), "no endian"),
        ("a.nrrd", nrrd("kinds: complex domain domain\n") + PLAIN.tobytes(), "complex values"),
        ("a.nrrd", nrrd("space: LPS\nspace directions: (1,0) (0,1) (1,1)\n") + PLAIN.tobytes(), "3 directions"),
        ("a.nrrd", nrrd("space: LPS\nspace directions: (1,0,0) (0,1,0) (0,0,0)\n") + PLAIN.tobytes(), "spacing 1×1×0"),
        ("a.nrrd", nrrd("space: XYZ\nspace directions: (1,0,0) (0,1,0) (0,0,1)\n") + PLAIN.tobytes(), "space xyz"),
        ("a.nrrd", nrrd("x") + PLAIN.tobytes(), "damaged header"),
        ("a.nrrd", nrrd("axis mins: 0 0 0\naxis maxs: 9 9 9\n") + PLAIN.tobytes(), "axis mins and maxs alone"),
        ("a.nrrd", nrrd("# x\n" * (1 << 22)), "a header of more than"),
    ],
    ids=itertools.count(),
)  # fmt: skip
def test_headers_that_lie(path: str, content: bytes, words: str, tmp_path: Path) -> None:
    (tmp_path / path).write_bytes(content)
    with pytest.raises(ReadError, match=words):
        read_scan([tmp_path / path])


def test_a_metaimage_of_no_axes(tmp_path: Path) -> None:
    path = save(tmp_path / "a.mha", noise(0))
    kept = [line for line in path.read_bytes().split(b"\n") if not line.startswith(b"DimSize")]
    path.write_bytes(b"\n".join(kept).replace(b"NDims = 3", b"NDims = 0"))
    with pytest.raises(ReadError, match="0 axis, expected 2 or 3 axes"):
        read_scan([path])
