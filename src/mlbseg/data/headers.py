"""What ITK reads past in silence: a file whose bytes contradict its header.

ITK fills the missing part of a truncated NIfTI file with zeros, mends a spacing of zero without a word and
follows a detached header to any file of the machine. `verify` looks first, so no such scan enters training.
"""

from __future__ import annotations

import gzip
import math
import re
import zlib
from io import BufferedIOBase
from pathlib import Path, PurePosixPath
from typing import Any, Literal, NoReturn

import numpy as np
import numpy.typing as npt

from mlbseg.errors import Fault, ReadError

_GZIP = b"\x1f\x8b"
_CHUNK = 1 << 20
_ORDERS: tuple[Literal["<", ">"], ...] = ("<", ">")

# Offsets: nifti1.h of the NIfTI data format working group. ITK reads no NIfTI-2.
_VOXELS = ["dim", "datatype", "bitpix", "pixdim", "vox_offset"]
_PLACE = ["qform", "sform", "quatern", "qoffset", "srow", "magic"]
_NIFTI = np.dtype(
    {
        "names": [*_VOXELS, *_PLACE],
        "formats": ["(8,)i2", "i2", "i2", "(8,)f4", "f4", "i2", "i2", "(3,)f4", "(3,)f4", "(3,4)f4", "S4"],
        "offsets": [40, 70, 72, 76, 108, 252, 254, 256, 268, 280, 344],
        "itemsize": 348,
    }
)
_NIFTI_BITS = {2: 8, 4: 16, 8: 32, 16: 32, 32: 64, 64: 64, 128: 24, 256: 8, 512: 16, 768: 32}
_NIFTI_BITS |= {1024: 64, 1280: 64, 1536: 128, 1792: 128, 2048: 256, 2304: 32}
_NIFTI_FLOATS: dict[int, np.dtype[Any]] = {16: np.dtype("f4"), 64: np.dtype("f8")}
_MET_BYTES = {"CHAR": 1, "SHORT": 2, "INT": 4, "LONG": 4, "LONG_LONG": 8, "FLOAT": 4, "DOUBLE": 8}


def verify(path: Path) -> None:
    """Raise if a NIfTI, MetaImage, NRRD or JPEG file cannot be what its header says; other files pass.

    All pixels must be there: a compressed file is read to its end. The name says the format.

    Raises:
        ReadError: With the contradiction.
    """
    name = path.name.lower()
    if name.endswith((".nii", ".nii.gz")):
        _verify_nifti(path)
    elif name.endswith((".mha", ".mhd")):
        _verify_meta(path)
    elif name.endswith((".nrrd", ".nhdr")):
        _verify_nrrd(path)
    elif name.endswith((".jpg", ".jpeg")):
        _verify_jpeg(path)


def fail(path: Path, found: str, expected: str = "", remedy: str = "", kind: str = "unreadable") -> NoReturn:
    """Raise a `ReadError` about `path`."""
    raise ReadError(Fault(str(path), found, expected, remedy, kind=kind))


def _head(path: Path, count: int) -> bytes:
    with path.open("rb") as file:
        return file.read(count)


def _verify_nifti(path: Path) -> None:
    compressed = _head(path, 2) == _GZIP
    if compressed and not path.name.lower().endswith(".gz"):
        fail(path, "gzip data under a .nii name", remedy="rename it to .nii.gz")
    try:
        with gzip.open(path) if compressed else path.open("rb") as file:
            header = _parse_nifti(path, file.read(_NIFTI.itemsize))
            _verify_nifti_header(path, header)
            _verify_nifti_content(path, file, header)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        fail(path, "truncated or damaged gzip data", "a complete .nii.gz file", f"copy it again; {error}")


def _verify_nifti_content(path: Path, file: BufferedIOBase, header: Any) -> None:
    """Read to the end, where gzip's checksum lies; ITK's NIfTI library turns NaN into 0: look here."""
    voxels = math.prod(int(n) for n in header["dim"][1 : 1 + header["dim"][0]])
    needed = voxels * int(header["bitpix"]) // 8
    number = _NIFTI_FLOATS.get(int(header["datatype"]))
    held = bad = 0
    file.seek(max(int(header["vox_offset"]), header.dtype.itemsize))
    while chunk := file.read(_CHUNK):
        if number and held < needed:
            whole = min(len(chunk), needed - held) // number.itemsize * number.itemsize
            values = np.frombuffer(chunk[:whole], number.newbyteorder(header.dtype["dim"].base.byteorder))
            bad += values.size - int(np.isfinite(values).sum())
        held += len(chunk)
    if held < needed:
        fail(
            path, f"holds {held} bytes of voxels", f"the {needed} that its header announces", "copy it again"
        )
    if bad:
        fail(path, f"{bad} values are NaN or infinite", "finite values", "export it again", "nan")


def _parse_nifti(path: Path, raw: bytes) -> Any:
    for order in _ORDERS:
        size = int.from_bytes(raw[:4], "little" if order == "<" else "big")
        if size == 540:
            fail(path, "a NIfTI-2 file", "NIfTI-1", "convert it")
        if size == len(raw) == _NIFTI.itemsize:
            header = np.frombuffer(raw, _NIFTI.newbyteorder(order))[0]
            if header["magic"][:3] == b"n+1":
                return header
    return fail(path, "not a NIfTI file", "a NIfTI header", "replace it, or give it the suffix of its format")


def _verify_nifti_header(path: Path, header: Any) -> None:
    ndim = int(header["dim"][0])
    size = [int(n) for n in header["dim"][1 : 1 + max(ndim, 0)]]
    if not 1 <= ndim <= 7 or min(size) < 1:
        fail(path, f"size {size}", "at least one voxel along each of 1 to 7 axes", "write the file again")
    if _NIFTI_BITS.get(int(header["datatype"])) != header["bitpix"]:
        found = f"voxel type {header['datatype']} of {header['bitpix']} bits"
        fail(path, found, "one that NIfTI defines", "write the file again")
    if not 0 <= header["vox_offset"] < 2**31:
        fail(
            path, f"voxels at byte {header['vox_offset']}", "a place after the header", "write the file again"
        )
    ndim = min(ndim, 3)
    spacing = header["pixdim"][1 : 1 + ndim].astype(float)
    if not (np.isfinite(spacing).all() and (spacing > 0).all()):
        shown = " × ".join(f"{s:g}" for s in spacing)
        fail(path, f"spacing {shown} mm", "finite spacing above 0", "correct pixdim in the header", "spacing")
    if ndim == 3:
        _verify_nifti_affine(path, header, spacing)


def _verify_nifti_affine(path: Path, header: Any, spacing: npt.NDArray[np.float64]) -> None:
    """Refuse a header that states two different places, since whichever is believed may be the wrong one.

    A qform and an sform of different codes are two coordinate systems (scanner and template) and may differ.
    """
    remedy = "correct qform and sform in the header"
    srow = header["srow"].astype(float)
    qform = _qform(header, spacing)
    if (header["sform"] > 0 and not np.isfinite(srow).all()) or (
        header["qform"] > 0 and not np.isfinite(qform).all()
    ):
        fail(path, "position or direction is not a number", "finite numbers", remedy, "geometry")
    if header["sform"] > 0 and header["sform"] == header["qform"]:
        edge = header["dim"][1:4].astype(float) - 1
        corners = np.array([[x, y, z, 1] for x in (0, edge[0]) for y in (0, edge[1]) for z in (0, edge[2])])
        apart = np.linalg.norm(corners @ (srow - qform).T, axis=1).max()
        if apart > spacing.min() / 2:
            fail(path, f"qform and sform lie {apart:.3g} mm apart", "one place", remedy, "geometry")
    elif header["sform"] > 0 and header["qform"] <= 0:
        scale = np.linalg.norm(srow[:, :3], axis=0)
        cosines = srow[:, :3] / np.maximum(scale, np.finfo(float).tiny)
        if not np.allclose(cosines.T @ cosines, np.eye(3), atol=1e-3):
            fail(path, "sheared or missing axes in sform", "axes at right angles", remedy, "geometry")
        if not np.allclose(scale, spacing, rtol=0.01):
            shown = " × ".join(f"{s:g}" for s in scale)
            fail(
                path,
                f"sform spacing {shown} mm",
                f"pixdim's {' × '.join(f'{s:g}' for s in spacing)}",
                remedy,
                "geometry",
            )


def _qform(header: Any, spacing: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Return the (3, 4) affine of the quaternion, as nifti1.h defines it (method 2)."""
    b, c, d = header["quatern"].astype(float)
    a = math.sqrt(max(0.0, 1 - b * b - c * c - d * d)) if math.isfinite(b + c + d) else math.nan
    rotation = np.array(
        [
            [a * a + b * b - c * c - d * d, 2 * (b * c - a * d), 2 * (b * d + a * c)],
            [2 * (b * c + a * d), a * a + c * c - b * b - d * d, 2 * (c * d - a * b)],
            [2 * (b * d - a * c), 2 * (c * d + a * b), a * a + d * d - b * b - c * c],
        ]
    )
    handed = -1.0 if header["pixdim"][0] < 0 else 1.0
    return np.column_stack([rotation * spacing * (1, 1, handed), header["qoffset"].astype(float)])


def _verify_meta(path: Path) -> None:
    """Check sizes in a MetaImage (https://itk.org/Wiki/ITK/MetaIO/Documentation)."""
    head = _head(path, _CHUNK)
    named = re.search(rb"^ElementDataFile\s*=[^\n]*\n", head, re.MULTILINE)
    if not named:
        fail(path, "not a MetaImage file", "a header that names ElementDataFile", "replace it")
    pairs = (line.split("=", 1) for line in head[: named.end()].decode("latin-1").splitlines() if "=" in line)
    fields = {key.strip(): value.strip() for key, value in pairs}
    for key in ("ElementSpacing", "Offset", "Position", "Origin", "TransformMatrix"):
        if not all(_is_finite(word) for word in fields.get(key, "").split()):
            fail(path, f"{key} = {fields[key]}", "finite numbers", "correct the header", "geometry")
    data, start = path, named.end()
    if fields["ElementDataFile"] != "LOCAL":
        data, start = _beside(path, fields["ElementDataFile"]), 0
    try:
        element = _MET_BYTES[
            fields["ElementType"].removeprefix("MET_").removeprefix("U").removesuffix("_ARRAY")
        ]
        voxels = math.prod(int(n) for n in fields["DimSize"].split())
        needed = voxels * element * int(fields.get("ElementNumberOfChannels", 1))
        if fields.get("CompressedData", "").lower() == "true":
            needed = int(fields.get("CompressedDataSize", 1))
    except (KeyError, ValueError) as error:
        fail(path, f"damaged header ({error})", "DimSize and a numeric ElementType", "write the file again")
    available = data.stat().st_size - max(start, 0)
    if available < needed:
        fail(path, f"{data.name} holds {available} bytes of pixels", f"{needed}", "copy it again")


def _is_finite(word: str) -> bool:
    try:
        return math.isfinite(float(word))
    except ValueError:
        return False


def _verify_nrrd(path: Path) -> None:
    """See that a detached NRRD header names a file beside it (https://teem.sourceforge.net/nrrd/format.html)."""
    head = _head(path, _CHUNK)
    if not head.startswith(b"NRRD"):
        fail(path, "not an NRRD file", "a header that starts with NRRD", "replace it")
    for line in head.split(b"\n\n")[0].decode("latin-1").splitlines():
        key, _, value = line.partition(":")
        if key.strip().lower() in ("data file", "datafile"):
            _beside(path, value.strip())


def _beside(path: Path, name: str) -> Path:
    """Return the pixel file that a detached header names; it must lie beside the header."""
    if name != PurePosixPath(name).name or "\\" in name or name in ("", "..", "LIST"):
        fail(
            path,
            f"keeps its pixels in {name!r}",
            "a file name in the same folder",
            "put both files in one folder",
        )
    data = path.parent / name
    if not data.is_file():
        fail(path, f"its pixel file {name} is missing", remedy="put both files in one folder")
    return data


def _verify_jpeg(path: Path) -> None:
    if b"\xff\xd9" not in path.read_bytes()[-64:]:
        fail(path, "truncated, or not a JPEG file", "a complete JPEG file", "copy it again")
