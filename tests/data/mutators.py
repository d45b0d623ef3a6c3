"""How valid files are changed: a function for each kind of header, from bytes to bytes, drawn by a seeded `Random`."""

from __future__ import annotations

import gzip
import io
import json
import struct
import zlib
from collections.abc import Callable, Iterator
from functools import cache
from random import Random
from typing import Any

import h5py
import numpy as np

from data.seeds import CANARY

Mutator = Callable[[bytes, Random], bytes]

_TEXT = [
    "", "0", "-1", "1", "1.5", "nan", "inf", "-inf", "1e999", "9" * 30, "99999999", "2147483648", "4294967296",
    "-9223372036854775808", "65536 65536 65536", "x" * 5000, "text", "٣", "1 1 1 1 1", "%s%n%s%n",
    "slice%03d.raw 1 9 1", "LIST", "LIST 2", "LIST2", "LOCAL", "Local", "True",
    "{canary}", "../canary", "../canary.h5", "link", ".", "..",
    "./other.raw", "\0", "1 2 \0", "none", "(1,0,0) (0,1,0)", "(nan,0,0) (0,1,0) (0,0,1)", "()", "MET_OTHER", "block",
]  # fmt: skip
_WHOLE = [
    0,
    1,
    -1,
    2,
    3,
    7,
    8,
    16,
    255,
    256,
    32767,
    -32768,
    65535,
    65536,
    2**31 - 1,
    -(2**31),
    2**32 - 1,
    2**62,
]
_REAL = [0.0, -0.0, 1.0, -1.0, float("nan"), float("inf"), -float("inf"), 3e38, 1e-40, 352.0, 1e10]


def anywhere(content: bytes, random: Random) -> bytes:
    """Change bits, cut, insert, repeat or blank a piece, mostly near the beginning or the end."""
    data = bytearray(content)
    most = len(data)
    at = random.choice(
        (
            random.randrange(min(400, most) or 1),
            random.randrange(most or 1),
            max(0, most - 1 - random.randrange(300)),
        )
    )
    length = random.choice((1, 2, 4, 8, 50, 400))
    match random.randrange(7):
        case 0 | 1:
            for _ in range(random.randrange(1, 6)):
                place = min(at + random.randrange(length), most - 1)
                if place >= 0:
                    data[place] ^= 1 << random.randrange(8)
        case 2:
            return bytes(data[:at])
        case 3:
            data[at:at] = random.randbytes(length)
        case 4:
            del data[at : at + length]
        case 5:
            data[at : at + length] = bytes([random.choice((0, 255, 127, 128))]) * length
        case _:
            data[at:at] = data[at : at + length]
    return bytes(data)


def _number(code: str, random: Random) -> bytes:
    if code[-1] in "fd":
        return struct.pack(code, random.choice(_REAL))
    size = struct.calcsize(code)
    return (random.choice(_WHOLE) % (1 << 8 * size)).to_bytes(size, "big" if code[0] == ">" else "little")


@cache
def _bomb() -> bytes:
    return zlib.compress(bytes(1 << 28), 9)


# Headers of text.


def text_header(end: bytes) -> Mutator:
    def mutate(content: bytes, random: Random) -> bytes:
        at = content.find(end)
        stop = content.find(b"\n", at) + 1 if end.startswith(b"E") else at + 1
        header, rest = content[:stop].decode("latin-1"), content[stop:]
        lines = header.splitlines()
        if not lines:
            return anywhere(content, random)
        i = random.randrange(len(lines))
        separator = next((s for s in (" = ", ": ", "=") if s in lines[i]), " ")
        key, _, value = lines[i].partition(separator)
        words = value.split() or [""]
        words[random.randrange(len(words))] = random.choice(_TEXT)
        other = f"{key}{separator}{random.choice((' '.join(words), random.choice(_TEXT)))}"
        match random.randrange(12):
            case 0 | 1 | 2 | 3:
                lines[i] = other
            case 4:
                lines.insert(random.randrange(len(lines) + 1), other)
            case 5:
                lines.insert(i, lines[i])
            case 6:
                del lines[i]
            case 7:
                lines.insert(random.randrange(len(lines)), lines.pop(i))
            case 8:
                lines[i] = random.choice((lines[i].upper(), lines[i].lower(), lines[i].swapcase()))
            case 9:
                lines[i] = random.choice((" ", "\t", "\r", "\f", "\v", "\0", "#")) + random.choice(
                    (lines[i], other)
                )
            case 10:
                lines.insert(
                    i,
                    random.choice(
                        (
                            "# x\n" * 300_000,
                            "",
                            "x" * 70_000,
                            f"{key}:={value}",
                            "ElementDataFile = link",
                            "data file: link",
                            "data file: {canary}",
                            " ElementDataFile = {canary}",
                        )
                    ),
                )
            case _:
                header = "\n".join(lines).replace(
                    "raw", random.choice(("gzip", "bz2", "ascii", "hex", "zrl", "raw"))
                )
                lines = header.replace("CompressedData = False", "CompressedData = True").splitlines()
                if random.random() < 0.3:
                    rest = _bomb()
        return "\n".join(lines).encode("utf-8", "surrogateescape") + b"\n" + rest

    return mutate


# NIfTI (nifti1.h).

_NIFTI = [
    (0, "<i"), (38, "<b"), (39, "<b"), *((40 + 2 * i, "<h") for i in range(8)), *((56 + 4 * i, "<f") for i in range(3)),
    (68, "<h"), (70, "<h"), (72, "<h"), (74, "<h"), *((76 + 4 * i, "<f") for i in range(8)), (108, "<f"), (112, "<f"),
    (116, "<f"), (120, "<h"), (122, "<b"), (123, "<b"), (124, "<f"), (128, "<f"), (252, "<h"), (254, "<h"),
    *((256 + 4 * i, "<f") for i in range(18)), (344, "<i"), (348, "<i"), (352, "<i"), (356, "<i"),
]  # fmt: skip


def nifti(content: bytes, random: Random) -> bytes:
    if content[:2] == b"\x1f\x8b":
        if random.random() < 0.1:
            return content + gzip.compress(bytes(1 << 26))
        try:
            return gzip.compress(nifti(gzip.decompress(content), random), 1)
        except (OSError, EOFError, zlib.error):
            return anywhere(content, random)
    data = bytearray(content)
    offset, code = random.choice(_NIFTI)
    if random.random() < 0.15 and len(data) >= 48:  # as many voxels as a header can name
        struct.pack_into(
            "<4h", data, 40, 3, *random.choice(((1290, 1290, 1290), (32767, 32767, 2), (2, 2, 32767)))
        )
    data[offset : offset + struct.calcsize(code)] = _number(code, random)
    return bytes(data)


# PNG, TIFF, JPEG.


def png(content: bytes, random: Random) -> bytes:
    chunks = list(_png_chunks(content))
    if not chunks:
        return anywhere(content, random)
    i = random.randrange(len(chunks))
    name, body = chunks[i]
    match random.randrange(9):
        case 0 | 1 | 2:
            data = bytearray(chunks[0][1].ljust(13, b"\0"))
            offset, code = random.choice(
                ((0, ">I"), (4, ">I"), (8, ">B"), (9, ">B"), (10, ">B"), (11, ">B"), (12, ">B"))
            )
            data[offset : offset + struct.calcsize(code)] = _number(code, random)
            chunks[0] = (chunks[0][0], bytes(data))
        case 3:
            del chunks[i]
        case 4:
            chunks.insert(random.randrange(len(chunks) + 1), (name, body))
        case 5:
            chunks[i] = (
                random.choice(
                    (b"zTXt", b"iTXt", b"iCCP", b"PLTE", b"tRNS", b"IDAT", b"acTL", b"fdAT", b"xxxx")
                ),
                body,
            )
        case 6:
            head = random.choice((b"a\0\0", b"a\0\1\0\0\0"))
            chunks.insert(1, (random.choice((b"zTXt", b"iTXt", b"iCCP")), head + _bomb()))
        case 7:
            chunks[i] = (name, anywhere(body or b"\0", random))
        case _:
            chunks[i] = (name, _bomb() if name == b"IDAT" else body * 1000)
    whole = content[:8]
    for name, body in chunks:
        length = len(body) if random.random() < 0.98 else random.choice(_WHOLE) % 2**32
        whole += struct.pack(">I", length) + name + body + struct.pack(">I", zlib.crc32(name + body))
    return whole


def _png_chunks(content: bytes) -> Iterator[tuple[bytes, bytes]]:
    at = 8
    while at + 8 <= len(content):
        length = int.from_bytes(content[at : at + 4], "big")
        yield content[at + 4 : at + 8], content[at + 8 : at + 8 + length]
        at += length + 12


def tiff(content: bytes, random: Random) -> bytes:
    data = bytearray(content)
    order = "little" if content[:2] == b"II" else "big"
    at = int.from_bytes(content[4:8], order)
    folders = []
    while 8 <= at < len(data) - 2 and at not in folders and len(folders) < 20:
        folders.append(at)
        count = int.from_bytes(data[at : at + 2], order)
        at = int.from_bytes(data[at + 2 + 12 * count : at + 6 + 12 * count], order)
    if not folders:
        return anywhere(content, random)
    at = random.choice(folders)
    count = int.from_bytes(data[at : at + 2], order)
    entry = at + 2 + 12 * random.randrange(max(1, count))
    code = ("<" if order == "little" else ">") + "I"
    match random.randrange(6):
        case 0:  # the next page is an earlier one, or anywhere
            place = at + 2 + 12 * count
            data[place : place + 4] = random.choice(
                (folders[0], at, folders[-1], random.randrange(len(data)))
            ).to_bytes(4, order)
        case 1:
            data[entry : entry + 2] = random.choice(
                (256, 257, 258, 259, 262, 273, 277, 278, 279, 320, 322, 323, 330, 34665, 700)
            ).to_bytes(2, order)
        case 2:
            data[entry + 2 : entry + 4] = random.randrange(20).to_bytes(2, order)
        case 3:
            data[entry + 4 : entry + 8] = _number(code, random)
        case 4 | _:
            data[entry + 8 : entry + 12] = _number(code, random)
    return bytes(data)


def jpeg(content: bytes, random: Random) -> bytes:
    at, segments = 2, []
    while at + 4 <= len(content) and content[at] == 0xFF and content[at + 1] != 0xDA:
        length = int.from_bytes(content[at + 2 : at + 4], "big") + 2
        segments.append(content[at : at + length])
        at += length
    rest = content[at:]
    if not segments:
        return anywhere(content, random)
    i = random.randrange(len(segments))
    match random.randrange(7):
        case 0:
            del segments[i]
        case 1:
            segments.insert(random.randrange(len(segments)), segments[i])
        case 2:
            segments.insert(0, segments.pop(i))
        case 3:
            segments[i] = segments[i][:2] + _number(">H", random) + segments[i][4:]
        case 4:
            frames = [k for k, s in enumerate(segments) if 0xC0 <= s[1] <= 0xC2]
            for k in frames:
                offset, code = random.choice(
                    ((4, ">B"), (5, ">H"), (7, ">H"), (9, ">B"), (10, ">B"), (11, ">B"))
                )
                data = bytearray(segments[k])
                data[offset : offset + struct.calcsize(code)] = _number(code, random)
                segments[k] = bytes(data)
        case 5:
            segments[i] = segments[i][:2] + anywhere(segments[i][2:], random)
        case _:
            segments.append(b"\xff\xdd\0\4" + _number(">H", random))
            rest = rest[:20] + rest * random.choice((1, 20))
    return content[:2] + b"".join(segments) + rest


# DICOM: elements of explicit little endian, those inside sequences too.

_LONG = (b"OB", b"OW", b"OF", b"SQ", b"UT", b"UN", b"UC", b"UR", b"OD", b"OL")


def _elements(content: bytes) -> Iterator[tuple[int, int, int, bytes]]:
    """Yield offset, header length, value length and type of each element."""
    at = 132
    while at + 8 <= len(content):
        kind = content[at + 4 : at + 6]
        if content[at : at + 2] == b"\xfe\xff":
            at += 8
            continue
        wide = kind in _LONG
        head = 12 if wide else 8
        length = int.from_bytes(content[at + 8 : at + 12] if wide else content[at + 6 : at + 8], "little")
        yield at, head, length, kind
        at += head + (0 if kind == b"SQ" or length == 0xFFFFFFFF else length)


def dicom(content: bytes, random: Random) -> bytes:
    elements = list(_elements(content))
    if not elements:
        return anywhere(content, random)
    at, head, length, kind = random.choice(elements)
    value = content[at + head : at + head + length] if kind != b"SQ" else b""
    whole, before, after = content[at : at + head], content[:at], content[at + head + len(value) :]
    match random.randrange(8):
        case 0 | 1 | 2 | 3:
            if kind in (b"US", b"SS", b"UL", b"SL", b"FL", b"FD"):
                code = {b"US": "<H", b"SS": "<h", b"UL": "<I", b"SL": "<i", b"FL": "<f", b"FD": "<d"}[kind]
                value = _number(code, random) * random.choice((1, 1, 1, 3))
            else:
                text = random.choice(_TEXT).replace(" ", "\\").encode()
                parts = value.split(b"\\")
                parts[random.randrange(len(parts))] = text
                value = random.choice((b"\\".join(parts), text))
            value = value[:60_000] + b" " * (len(value) % 2)
            size = len(value).to_bytes(4 if head == 12 else 2, "little")
            return before + whole[: head - len(size)] + size + value + after
        case 4:
            return before + after
        case 5:
            return before + (whole + value) * 2 + after
        case 6:
            size = 4 if head == 12 else 2
            return (
                before
                + whole[:-size]
                + (random.choice(_WHOLE) % (1 << 8 * size)).to_bytes(size, "little")
                + value
                + after
            )
        case _:
            return (
                before
                + whole[:4]
                + random.choice((b"SQ", b"UN", b"OB", b"DS", b"US", b"XX"))
                + whole[6:]
                + value
                + after
            )


# HDF5: odd files that the library itself writes, and bytes.


def hdf5(content: bytes, random: Random) -> bytes:
    if random.random() < 0.6:
        return anywhere(content, random)
    buffer = io.BytesIO()
    with h5py.File(buffer, "w") as file:
        for name in ("image", "label"):
            try:
                _odd_dataset(file, name, random)
            except (
                AttributeError,
                ValueError,
                TypeError,
                OSError,
            ):  # h5py itself refuses: then this name is missing
                continue
        if random.random() < 0.4:
            where = random.choice(
                (
                    file,
                    file.get("image") if isinstance(file.get("image", getlink=True), h5py.HardLink) else file,
                )
            )
            where.attrs["spacing"] = random.choice(
                (
                    0,
                    -1,
                    "1 1 1",
                    np.nan,
                    np.ones(8000),
                    (1, 2, 3),
                    (1, 1e300, 1),
                    b"x",
                    np.zeros((0,)),
                    h5py.Empty("f"),
                )
            )
    return buffer.getvalue()


def _odd_dataset(file: h5py.File, name: str, random: Random) -> None:
    shape = random.choice(
        [
            (0, 4, 4),
            (4, 4),
            (4,),
            (),
            (4, 4, 4),
            (2000, 2000, 2000),
            (2**40, 2, 2),
            (4, 4, 4, 4),
            (2**20, 2**20),
        ]
    )
    kind: Any = random.choice(
        [
            "f4",
            "f8",
            "u1",
            "i8",
            "c8",
            "S5",
            "f2",
            ">i4",
            "?",
            h5py.string_dtype(),
            h5py.ref_dtype,
            [("a", "f4")],
            np.dtype(("f4", (3,))),
            h5py.enum_dtype({"A": 1}),
            h5py.vlen_dtype("i4"),
        ]
    )
    chunk = tuple(min(n, 64) or 1 for n in shape)
    match random.randrange(9):
        case 0:
            file[name] = h5py.SoftLink(random.choice(("/image", "/label", "/nothing", "/")))
        case 1:
            file[name] = h5py.ExternalLink("../canary.h5", "image")
        case 2:
            file.create_group(name)
        case 3:
            file.create_dataset(name, (64, 32, 32), "u1", external=[("../canary", 0, len(CANARY))])
        case 4:
            layout = h5py.VirtualLayout((4, 4, 4), "f4")
            layout[...] = h5py.VirtualSource("../canary.h5", "image", (4, 4, 4))
            file.create_virtual_dataset(name, layout)
        case 5:
            data = np.zeros((64, 64, 64), "u1")
            made = file.create_dataset(name, data.shape, "u1", chunks=(64, 64, 64), compression="gzip")
            made.id.write_direct_chunk((0, 0, 0), _bomb())
        case 6:
            many = random.choice([(512, 512, 512), (900, 900, 900), (1, 1, 1)])
            file.create_dataset(name, (4, 4, 4), "f4", maxshape=(None,) * 3, chunks=many, fillvalue=7)
        case _:
            filters = random.choice(
                [
                    {},
                    {"compression": "gzip"},
                    {"compression": "lzf"},
                    {"shuffle": True},
                    {"fletcher32": True},
                    {"scaleoffset": 2},
                ]
            )
            file.create_dataset(
                name, shape, kind, chunks=chunk or None, fillvalue=random.choice((None, 0, 7)), **filters
            )


# Lists.

_JSON: list[Any] = [
    None, 0, -1, 1e300, 10**400, True, "", "x" * 5000, "../canary", "{canary}", "\ud800", "\0", "a\nb", "\x1b[31m",
    [], {}, [[]], {"a": "b"}, ["images/a.nii.gz"] * 3, "images", ".", "..", "CON",
]  # fmt: skip


def json_tree(content: bytes, random: Random) -> bytes:
    try:
        tree = json.loads(content)
    except (ValueError, RecursionError):
        return anywhere(content, random)
    if random.random() < 0.05:
        return b'{"a":' * 50_000 + b"1" + b"}" * 50_000
    places: list[tuple[Any, Any]] = []

    def walk(node: Any) -> None:
        for key, value in list(node.items() if isinstance(node, dict) else enumerate(node)):
            places.append((node, key))
            if isinstance(value, dict | list):
                walk(value)

    walk(tree)
    if not places:
        return anywhere(content, random)
    node, key = random.choice(places)
    if random.random() < 0.7:
        node[key] = random.choice(_JSON)
    elif isinstance(node, dict):
        node[random.choice((str(key).upper(), "x" * 5000, "\x1b[31m", "5" * 5000))] = node.pop(key)
    else:
        node.append(node[key])
    text = json.dumps(tree)
    if random.random() < 0.1:
        text = text.replace("{", '{"image": 3, "image": "x", ', 1)
    return text.encode()


def csv_rows(content: bytes, random: Random) -> bytes:
    rows = [line.split(",") for line in content.decode("utf-8", "replace").splitlines()] or [[""]]
    row = random.choice(rows)
    i = random.randrange(len(row))
    match random.randrange(5):
        case 0 | 1:
            row[i] = random.choice([str(v) for v in _JSON[:14]] + _TEXT)
        case 2:
            row.insert(i, random.choice(_TEXT))
        case 3:
            del row[i]
        case _:
            rows.append(random.choice(rows))
    return "\n".join(",".join(row) for row in rows).encode("utf-8", "surrogatepass")
