"""NIfTI files: .nii, .nii.gz, and pairs of .hdr and .img, which Analyze 7.5 has too.

nibabel knows the headers' fields. What a header says is judged here, as libraries fill the missing part of a truncated
file with zeros, mend a spacing of zero without a word and turn NaN into 0: no such scan may enter training.
"""

from __future__ import annotations

import gzip
import math
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from io import BufferedIOBase
from pathlib import Path
from typing import Any, Literal

import nibabel
import numpy as np
import numpy.typing as npt

from mlbseg.data.formats.detached import of_header
from mlbseg.data.formats.opened import Opened, fail, refuse_shear, shear_notes
from mlbseg.data.geometry import HALF, orthogonalised, shown
from mlbseg.data.placement import Placement
from mlbseg.memory import require_memory
from mlbseg.types import Geometry

_GZIP = b"\x1f\x8b"
_CHUNK = 1 << 20
_BYTE_ORDERS: tuple[Literal["little", "big"], ...] = ("little", "big")

# nifti1.h; what nibabel's table lacks is read by no program that matters here.
_BITS = {2: 8, 4: 16, 8: 32, 16: 32, 32: 64, 64: 64, 128: 24, 256: 8, 512: 16, 768: 32}
_BITS |= {1024: 64, 1280: 64, 1536: 128, 1792: 128, 2048: 256, 2304: 32}
_COMPLEX = (32, 1792, 2048)
_COLOURS = (128, 2304)
_LONG = 1536

_SPACING_ERROR = 0.01  # relative, between sform and pixdim
_ROUNDED = 1e-5  # relative: the spacing in float32
_COARSE = 0.1  # a scale of labels above it says nothing about which values were meant
_SLOPE_ERROR = 1e-4  # relative: a scale that was meant to be 1


@dataclass(frozen=True)
class _Header:
    """A header that has been judged.

    Attributes:
        path: The file that the user named.
        data: The file with the voxels.
        shape: Voxels along x, y[, z], and the number of components.
        dtype: Of the voxels as they are stored.
        offset: Bytes before the first.
        scale: Factor and summand that turn stored numbers into values; None where they are values already.
    """

    path: Path
    data: Path
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    offset: int
    scale: tuple[np.float64, np.float64] | None

    @property
    def needed(self) -> int:
        """Bytes of all voxels."""
        return math.prod(self.shape) * self.dtype.itemsize


def open_nifti(path: Path, *, label: bool = False) -> Opened:
    """Open a NIfTI file, or the header of a pair.

    A fourth axis, or a fifth after a fourth of length 1, holds the channels. Other axes of length 1 are dropped.

    Raises:
        ReadError: If it is not readable.
    """
    data = pixel_file(path)
    with _stream(path) as file:
        fields = _parse(path, file)
    _judge(path, fields)
    size, components, notes = _axes(path, fields, label=label)
    geometry, more = _geometry(path, fields, size)
    dtype, colours = fields.get_data_dtype(), int(fields["datatype"]) in _COLOURS
    stored = (*size, components)
    if colours:
        components = len(dtype.names)
        dtype, stored = np.dtype("u1"), (components, *size)
    header = _Header(path, data, stored, dtype, _offset(path, data, fields), _scale(fields))
    copies = dtype.itemsize + (16 if header.scale else 4)  # as they are stored, and on their way to float32
    require_memory(path, math.prod(stored) * copies)

    def read() -> npt.NDArray[Any]:
        array = _scaled(header, _voxels(header), label=label).reshape(stored, order="F")
        return np.moveaxis(array, 0, -1).T if colours else array.T

    return Opened(geometry, components, read, (*notes, *more))


def pixel_file(path: Path) -> Path:
    """Return the file with the voxels of a header, which is itself or lies beside it under the same name."""
    if not path.name.lower().endswith(".hdr"):
        return path
    beside = {p.name.lower(): p for p in path.parent.iterdir()}
    names = [f"{path.name[:-4]}{ending}" for ending in (".img", ".img.gz")]
    found = next((beside[name.lower()] for name in names if name.lower() in beside), None)
    return of_header(path, found or path.with_name(names[0]))


@contextmanager
def _stream(path: Path) -> Iterator[BufferedIOBase]:
    """Open a file that may be compressed."""
    with path.open("rb") as file:
        compressed = file.read(2) == _GZIP
    if compressed and not path.name.lower().endswith(".gz"):
        fail(path, f"gzip data under a {path.suffix} name", remedy=f"rename it to {path.suffix}.gz")
    try:
        with gzip.open(path) if compressed else path.open("rb") as file:
            yield file
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        fail(path, "truncated or damaged gzip data", "a complete .gz file", f"copy it again; {error}")


def _parse(path: Path, file: BufferedIOBase) -> Any:
    """Return the fields of a header in nibabel's words: of NIfTI-1 or -2, or of Analyze for what it has."""
    kinds = {348: nibabel.Nifti1Header, 540: nibabel.Nifti2Header}
    raw = file.read(max(kinds))
    for order in _BYTE_ORDERS:
        length = int.from_bytes(raw[:4], order)
        if length not in kinds or len(raw) < length:
            continue
        header = kinds[length](raw[:length], "<" if order == "little" else ">", check=False)
        pair = path.name.lower().endswith(".hdr")
        magic = bytes(header["magic"])[:3]
        if magic in (b"n+1", b"n+2") and not pair:
            return header
        if magic in (b"ni1", b"ni2") and pair:
            return header
        if pair and length == 348 and not magic.startswith(b"n"):
            return _without_place(raw[:length], header)
    return fail(path, "not a NIfTI file", "a NIfTI header", "replace it, or give it the suffix of its format")


def _without_place(raw: bytes, header: Any) -> Any:
    """Return an Analyze header as a NIfTI header without a place: the two have sizes and types at the same bytes."""
    analyze = nibabel.Spm2AnalyzeHeader(raw, header.endianness, check=False)
    plain = nibabel.Nifti1Header(endianness=header.endianness)
    for name in ("dim", "datatype", "bitpix", "pixdim", "vox_offset"):
        plain[name] = analyze[name]
    plain["pixdim"][0] = 1
    slope, inter = analyze.get_slope_inter()
    plain["scl_slope"], plain["scl_inter"] = slope or 0, inter or 0
    plain["qform_code"] = plain["sform_code"] = 0
    return plain


def _judge(path: Path, header: Any) -> None:
    """Refuse a header that contradicts itself or the format."""
    ndim = int(header["dim"][0])
    size = [int(n) for n in header["dim"][1 : 1 + max(ndim, 0)]]
    if not 1 <= ndim <= 7 or min(size) < 1:
        fail(path, f"size {size}", "at least one voxel along each of 1 to 7 axes", "write the file again")
    kind = int(header["datatype"])
    if kind not in _BITS or header["bitpix"] not in (0, _BITS[kind]):  # other programs look at the type alone
        found = f"voxel type {kind} of {header['bitpix']} bits"
        fail(path, found, "one that NIfTI defines", "write the file again")
    if kind in _COMPLEX:
        fail(path, "complex values", "real values", "save the magnitude", "complex")
    if kind == _LONG:
        fail(path, "128-bit numbers", "numbers of at most 64 bits", "save them as 32-bit numbers")
    if ndim < 2:
        fail(path, f"{ndim} axis", "2 or 3 axes")
    spacing = header["pixdim"][1 : 1 + min(ndim, 3)].astype(float)
    if not (np.isfinite(spacing).all() and (spacing > 0).all()):
        words = " × ".join(f"{s:g}" for s in spacing)
        fail(path, f"spacing {words} mm", "finite spacing above 0", "correct pixdim in the header", "spacing")


def _axes(path: Path, header: Any, *, label: bool) -> tuple[tuple[int, ...], int, tuple[str, ...]]:
    """Return the size in space, the number of components, and what the user should know of them."""
    dim = [int(n) for n in header["dim"][1 : 1 + int(header["dim"][0])]]
    size, more = tuple(dim[:3]), dim[3:]
    counts = [n for n in more if n > 1]
    colours = int(header["datatype"]) in _COLOURS
    if len(counts) > 1 or (counts and colours):
        found, remedy = f"{len(dim)}D image of {shown(dim)}", "split it into channels or time points"
        fail(path, found, "2D or 3D, and one axis of channels", remedy, "4d")
    if label and counts:
        found = f"a label of {shown(dim)}: {counts[0]} maps in one file"
        fail(path, found, "one label map, with one value for each class", "save one map", "4d")
    if len(dim) == 5 and size[2:] == (1,) and more[0] == 1:
        size = size[:2]  # so ITK writes 2D images of several components
    if not counts:
        return size, 1, ()
    note = f"{counts[0]} volumes in one file are read as {counts[0]} channels; if they are a time series, split them"
    return size, counts[0], (note,)


def _offset(path: Path, data: Path, header: Any) -> int:
    offset = float(header["vox_offset"])
    if not 0 <= offset < 2**31:
        fail(path, f"voxels at byte {offset:g}", "a place after the header", "write the file again")
    least = header.structarr.dtype.itemsize if data == path else 0
    if offset < least:  # some programs read them there, some behind the header
        fail(
            path, f"voxels at byte {offset:g}, inside the header", "a place after it", "write the file again"
        )
    return int(offset)


def _scale(header: Any) -> tuple[np.float64, np.float64] | None:
    slope, inter = np.float64(header["scl_slope"]), np.float64(header["scl_inter"])
    if not np.isfinite(slope) or slope == 0 or int(header["datatype"]) in _COLOURS:
        return None  # nifti1.h: then the numbers are not scaled
    inter = inter if np.isfinite(inter) else np.float64(0)
    return None if (slope, inter) == (1, 0) else (slope, inter)


def _geometry(path: Path, header: Any, size: tuple[int, ...]) -> tuple[Geometry, tuple[str, ...]]:
    """Return where the voxels lie, and what the user should know of it."""
    place = Placement.of_header(header)
    volume = (*size, 1)[:3]
    if len(size) == 3:
        _require_one_place(path, place, volume)
    found = [orthogonalised(volume, affine[:, :3], affine[:, 3]) for affine in place.affines(volume)]
    near = [np.allclose(lattice.spacing, place.spacing, rtol=_SPACING_ERROR) for lattice, _ in found]
    sound = [one for one, fits in zip(found, near, strict=True) if fits and one[1] < HALF]
    if len(size) == 2:
        return _flat(sound[0][0] if sound else None, place, size), ()
    if not sound:
        _refuse_place(path, place, *found[0])
    lattice, moved = sound[0]
    if np.allclose(lattice.spacing, place.spacing, rtol=_ROUNDED):
        lattice = replace(lattice, spacing=tuple(place.spacing.tolist()))
    notes = shear_notes(moved)
    if not place.is_known:
        notes = (
            "its header states no place and no orientation: x is taken to run to the left, y to the back",
        )
    return replace(lattice, stored=place.numbers), notes


def _flat(lattice: Geometry | None, place: Placement, size: tuple[int, ...]) -> Geometry:
    """Return the 2D lattice of a file; of a plane that is not axial only the pixels' size counts."""
    spacing = tuple(place.spacing[:2].tolist())
    flat = Geometry.identity(size, spacing)
    if lattice is not None:
        direction = np.reshape(lattice.direction, (3, 3))[:2, :2]
        if np.allclose(direction @ direction.T, np.eye(2), atol=1e-3):
            flat = Geometry(size, spacing, lattice.origin[:2], tuple(direction.ravel().tolist()))
    return replace(flat, stored=place.numbers)


def _require_one_place(path: Path, place: Placement, size: tuple[int, ...]) -> None:
    """Refuse a header that states two different places, since whichever is believed may be the wrong one.

    A qform and an sform of different codes are two coordinate systems (scanner and template) and may differ.
    """
    remedy = "correct qform and sform in the header"
    qform, sform = place.qform, place.sform
    if (place.has_sform and not np.isfinite(sform).all()) or (
        place.has_qform and not np.isfinite(qform).all()
    ):
        fail(path, "position or direction is not a number", "finite numbers", remedy, "geometry")
    if place.has_sform and place.codes[0] == place.codes[1]:
        edge = np.array(size) - 1
        corners = np.array([[x, y, z, 1] for x in (0, edge[0]) for y in (0, edge[1]) for z in (0, edge[2])])
        apart = np.linalg.norm(corners @ (sform - qform).T, axis=1).max()
        if apart > place.spacing.min() / 2:
            found = f"qform and sform lie {apart:.3g} mm apart and both have code {place.codes[0]:g}"
            fail(path, found, "one place", remedy, "geometry")


def _refuse_place(path: Path, place: Placement, lattice: Geometry, moved: float) -> None:
    """Say why the sform is none that a scan has; a qform is always at right angles."""
    if not np.isfinite(moved):
        fail(
            path,
            "sheared or missing axes in sform",
            "axes at right angles",
            "correct sform in the header",
            "geometry",
        )
    if not np.allclose(lattice.spacing, place.spacing, rtol=_SPACING_ERROR):
        found = f"sform spacing {' × '.join(f'{s:g}' for s in lattice.spacing)} mm"
        expected = f"pixdim's {' × '.join(f'{s:g}' for s in place.spacing)}"
        fail(path, found, expected, "correct qform and sform in the header", "geometry")
    refuse_shear(path, "sheared axes in sform", moved)


def _voxels(header: _Header) -> npt.NDArray[Any]:
    """Read all voxels, and the file to its end, where gzip's checksum lies."""
    values = np.empty(math.prod(header.shape), header.dtype)
    buffer = memoryview(values.view(np.uint8))  # type: ignore[arg-type]
    held = 0
    with _stream(header.data) as file:
        file.seek(header.offset)
        while held < len(buffer) and (count := file.readinto(buffer[held : held + _CHUNK])):
            held += count
        while file.read(_CHUNK):
            pass
    if held < len(buffer):
        expected = f"the {len(buffer)} that its header announces"
        fail(header.data, f"holds {held} bytes of voxels", expected, "copy it again")
    if header.dtype.kind == "f" and (bad := values.size - int(np.isfinite(values).sum())):
        found = f"{bad} values are NaN or infinite"
        fail(header.path, found, "finite values", "export it again", "nan")
    return values


def _scaled(header: _Header, stored: npt.NDArray[Any], *, label: bool) -> npt.NDArray[Any]:
    """Return the values behind the stored numbers."""
    values = stored
    if header.scale is not None:
        slope, inter = header.scale
        values = stored * slope + inter
        if label and stored.dtype.kind in "ui":
            values = _whole(values, abs(slope))
    return values


def _whole(values: npt.NDArray[Any], slope: np.float64) -> npt.NDArray[Any]:
    """Return the whole numbers that were meant, where all values are as near to one as their storage allows.

    A writer that fits a label into integers by a scale rounds each value to a multiple of it.
    """
    nearest = np.rint(values)
    step = slope / 2 if slope < _COARSE else 0.0
    within = np.maximum(np.minimum(_SLOPE_ERROR * np.abs(nearest), _COARSE), step * (1 + _SLOPE_ERROR))
    return nearest if (np.abs(values - nearest) <= within).all() else values
