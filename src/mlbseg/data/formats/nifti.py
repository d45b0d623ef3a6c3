"""NIfTI files.

ITK fills the missing part of a truncated file with zeros, mends a spacing of zero without a word and turns NaN
into 0. `verify` looks first, so no such scan enters training.
"""

from __future__ import annotations

import gzip
import math
import zlib
from io import BufferedIOBase
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from mlbseg.data.formats.itk import open_itk
from mlbseg.data.formats.opened import Opened, fail

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


def open_nifti(path: Path, *, label: bool = False) -> Opened:
    """Open a NIfTI file.

    Raises:
        ReadError: If it is not readable.
    """
    verify(path)
    return open_itk(path, "NIfTI")


def verify(path: Path) -> None:
    """Raise if the file cannot be what its header says: all voxels must be there, so it is read to its end.

    Raises:
        ReadError: With the contradiction.
    """
    with path.open("rb") as file:
        compressed = file.read(2) == _GZIP
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
