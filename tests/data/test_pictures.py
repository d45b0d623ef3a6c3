"""PNG, TIFF and JPEG files of every kind: read right, or refused in true words."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813
from PIL import Image

from data.broken import noise, save
from mlbseg.data.formats import pages
from mlbseg.data.geometry import geometry_difference
from mlbseg.data.readers import mask_suffix, read_label, read_scan, write_image, write_label
from mlbseg.errors import ReadError
from mlbseg.types import Geometry

GREY = noise(0, (20, 24)).astype(np.uint8)
COLOURS = np.stack([GREY, GREY // 2, GREY // 3], axis=-1)
CLASSES = (GREY % 4).astype(np.uint8)


def put(path: Path, array: np.ndarray | Image.Image, **options: Any) -> Path:
    image = array if isinstance(array, Image.Image) else Image.fromarray(array)
    image.save(path, **options)
    return path


def stack(path: Path, planes: np.ndarray, **options: Any) -> Path:
    first, *others = (Image.fromarray(plane) for plane in planes)
    first.save(path, save_all=True, append_images=others, **options)
    return path


def with_palette(classes: np.ndarray) -> Image.Image:
    """Return an image of indices, coloured as Pascal VOC's masks."""
    image = Image.fromarray(classes)
    image.putpalette([0, 0, 0, 128, 0, 0, 0, 128, 0, 128, 128, 0])
    return image


def read(path: Path) -> np.ndarray:
    return read_scan([path]).array


# Labels


@pytest.mark.parametrize("name", ["a.png", "a.tif"])
def test_a_palettes_indices_are_the_values_of_a_label_and_its_colours_those_of_an_image(
    name: str, tmp_path: Path
) -> None:
    path = put(tmp_path / name, with_palette(CLASSES))
    assert np.array_equal(read_label(path)[0], CLASSES)
    assert np.array_equal(read(path), np.moveaxis(np.asarray(with_palette(CLASSES).convert("RGB")), -1, 0))


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_palettes_of_few_bits(bits: int, tmp_path: Path) -> None:
    path = put(tmp_path / "a.png", with_palette(CLASSES % 2), bits=bits, transparency=0)
    assert np.array_equal(read_label(path)[0], CLASSES % 2)


@pytest.mark.parametrize("name", ["a.png", "a.tif"])
def test_a_mask_of_three_equal_channels_is_grey(name: str, tmp_path: Path) -> None:
    path = put(tmp_path / name, np.stack([CLASSES] * 3, -1))
    assert np.array_equal(read_label(path)[0], CLASSES)
    opaque = np.full_like(CLASSES, 255)
    path = put(tmp_path / name, np.stack([CLASSES, CLASSES, CLASSES, opaque], -1))
    assert np.array_equal(read_label(path)[0], CLASSES)


@pytest.mark.parametrize("name", ["a.png", "a.tif"])
def test_a_mask_in_colours_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(ReadError, match=r"a mask in colours \(RGB\), expected one label value per pixel"):
        read_label(put(tmp_path / name, COLOURS))


def test_a_mask_drawn_in_transparency_is_refused(tmp_path: Path) -> None:
    drawn = np.dstack([np.full_like(COLOURS, 255), CLASSES * 85])
    with pytest.raises(ReadError, match="drawn in its transparency, all of one colour"):
        read_label(put(tmp_path / "a.png", drawn))


@pytest.mark.parametrize("name", ["a.jpg", "a.jpeg", "a.png", "a.tif"])
def test_a_jpeg_label_is_refused_whatever_its_name(name: str, tmp_path: Path) -> None:
    path = put(tmp_path / name, CLASSES * 80, format="JPEG")
    with pytest.raises(ReadError, match="a JPEG file, whose compression changes label values") as caught:
        read_label(path)
    assert caught.value.fault.kind == "label"
    assert read(path).shape == (1, 20, 24)


def test_a_tiff_label_with_jpeg_compression_is_refused(tmp_path: Path) -> None:
    path = put(tmp_path / "a.tif", CLASSES * 80, compression="jpeg")
    with pytest.raises(ReadError, match="a TIFF file with JPEG compression, which changes label values"):
        read_label(path)
    assert read(path).shape == (1, 20, 24)


# Images, compared with what ITK makes of them where ITK is right


@pytest.mark.parametrize("kind", ["raw", "tiff_lzw", "tiff_adobe_deflate", "packbits"])
@pytest.mark.parametrize("array", [GREY, COLOURS, GREY.astype(np.uint16) * 200, GREY.astype(np.float32) / 7])
def test_compressed_tiff(kind: str, array: np.ndarray, tmp_path: Path) -> None:
    path = put(tmp_path / "a.tif", array, compression=kind)
    expected = np.moveaxis(array, -1, 0) if array.ndim == 3 else array[None]
    assert np.array_equal(read(path), expected.astype(np.float32))


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_sixteen_bits(suffix: str, tmp_path: Path) -> None:
    deep = GREY.astype(np.uint16) * 257
    path = put(tmp_path / f"a{suffix}", deep)
    assert np.array_equal(read(path)[0], deep)
    assert np.array_equal(read_label(path)[0], deep)
    colours = COLOURS.astype(np.uint16) * 200
    path = tmp_path / f"c{suffix}"
    sitk.WriteImage(sitk.GetImageFromArray(colours, isVector=True), str(path))
    assert np.array_equal(read(path), np.moveaxis(colours, -1, 0))


@pytest.mark.parametrize("kind", [np.int8, np.int16, np.int32, np.uint32])
def test_signed_and_long_numbers(kind: type, tmp_path: Path) -> None:
    array = (noise(1, (20, 24)) * (1000 if kind is not np.int8 else 0.2)).astype(kind)
    array[0, 0] = np.iinfo(kind).max
    path = tmp_path / "a.tif"
    sitk.WriteImage(sitk.GetImageFromArray(array), str(path))
    assert np.array_equal(read(path)[0], array.astype(np.float32))


@pytest.mark.parametrize(
    ("name", "options"), [("a.png", {}), ("a.tif", {}), ("a.tif", {"compression": "group4"})]
)
def test_one_bit_is_0_and_255(name: str, options: dict[str, str], tmp_path: Path) -> None:
    path = put(tmp_path / name, GREY > 60, **options)
    assert np.array_equal(read(path)[0], (GREY > 60) * 255)
    assert np.array_equal(read_label(path)[0], (GREY > 60) * 255)


@pytest.mark.parametrize("name", ["a.png", "a.tif"])
@pytest.mark.parametrize("alpha", [255, 7, None])
def test_transparency_is_left_out_and_said(name: str, alpha: int | None, tmp_path: Path) -> None:
    last = GREY if alpha is None else np.full_like(GREY, alpha)
    path = put(tmp_path / name, np.dstack([COLOURS, last]))
    scan = read_scan([path])
    assert np.array_equal(scan.array, np.moveaxis(COLOURS, -1, 0))
    assert scan.notes == ("its transparency (alpha) is left out",)
    if name == "a.png":
        path = put(tmp_path / name, np.dstack([GREY, last]))
        assert np.array_equal(read(path), GREY[None])


def test_a_picture_without_transparency_has_no_note(tmp_path: Path) -> None:
    assert read_scan([put(tmp_path / "a.png", COLOURS)]).notes == ()


@pytest.mark.parametrize("name", ["a.jpg", "a.tif"])
def test_cmyk_is_refused(name: str, tmp_path: Path) -> None:
    path = put(tmp_path / name, Image.fromarray(COLOURS).convert("CMYK"))
    with pytest.raises(ReadError, match="CMYK colours, expected grey or RGB"):
        read_scan([path])


def test_exif_orientation_is_not_applied_and_said(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[274] = 6
    path = put(tmp_path / "a.jpg", GREY, exif=exif)
    scan = read_scan([path])
    assert scan.geometry.size == (24, 20)
    assert "EXIF orientation is not applied" in scan.notes[0]


def test_tiff_orientation_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ReadError, match="TIFF orientation 6"):
        read_scan([put(tmp_path / "a.tif", GREY, tiffinfo={274: 6})])


@pytest.mark.parametrize(
    ("tag", "kind", "value", "found"),
    [
        (258, 3, 64, "64-bit unsigned samples"),
        (339, 3, 3, "8-bit floating-point samples"),
        (277, 3, 5, "5 samples of 8 bits"),
        (262, 3, 8, "Lab colours"),
    ],
)
def test_tiff_of_kinds_that_are_not_read(tag: int, kind: int, value: int, found: str, tmp_path: Path) -> None:
    with pytest.raises(ReadError, match=found):
        read_scan([hand_made(tmp_path / "a.tif", {tag: (kind, 1, value)})])


def test_white_is_zero_as_stored(tmp_path: Path) -> None:
    path = hand_made(tmp_path / "a.tif", {262: (3, 1, 0)})
    assert np.array_equal(read(path)[0], np.arange(16).reshape(4, 4))


# Stacks


def test_pages_are_slices(tmp_path: Path) -> None:
    planes = noise(0, (5, 20, 24)).astype(np.uint8)
    scan = read_scan([stack(tmp_path / "a.tif", planes)])
    assert np.array_equal(scan.array, planes[None])
    assert scan.geometry == Geometry.identity((24, 20, 5))
    coloured = np.stack([planes, planes // 2, planes // 3], -1)
    assert np.array_equal(read(stack(tmp_path / "c.tif", coloured)), np.moveaxis(coloured, -1, 0))
    for kind in (np.uint16, np.float32):
        other = planes.astype(kind) * 3
        assert np.array_equal(read(stack(tmp_path / "k.tif", other, compression="tiff_lzw"))[0], other)


def imagej(path: Path, planes: np.ndarray, text: str, resolution: float = 4.0) -> Path:
    return stack(
        path, planes, tiffinfo={270: f"ImageJ=1.54f\n{text}", 282: resolution, 283: resolution, 296: 1}
    )


@pytest.mark.parametrize(
    ("text", "spacing"),
    [
        ("images=6\nslices=6\nunit=mm\nspacing=3.0\n", (0.25, 0.25, 3.0)),
        ("images=6\nslices=6\nunit=\\u00B5m\nspacing=-2\n", (0.00025, 0.00025, 0.002)),
        ("images=6\nslices=6\nunit=cm\nspacing=0.5\n", (2.5, 2.5, 5.0)),
        ("images=6\nslices=6\nunit=pixel\nspacing=3.0\n", (1, 1, 1)),
        ("images=6\nslices=6\nspacing=3.0\n", (1, 1, 1)),
        ("images=6\nslices=6\nunit=mm\n", (1, 1, 1)),
        ("images=6\nslices=6\nunit=mm\nspacing=nan\n", (1, 1, 1)),
        ("images=6\nunit=mm\nspacing=3.0\n", (0.25, 0.25, 3.0)),
        ("images=6\nframes=6\nunit=mm\nspacing=3.0\n", (0.25, 0.25, 3.0)),
    ],
)
def test_spacing_as_imagej_writes_it(text: str, spacing: tuple[float, ...], tmp_path: Path) -> None:
    path = imagej(tmp_path / "a.tif", noise(0, (6, 20, 24)).astype(np.uint8), text)
    geometry = read_scan([path]).geometry
    assert (geometry.size, geometry.spacing) == ((24, 20, 6), pytest.approx(spacing))


def test_imagejs_channels_and_time(tmp_path: Path) -> None:
    planes = noise(0, (6, 20, 24)).astype(np.uint8)
    path = imagej(tmp_path / "a.tif", planes, "images=6\nchannels=2\nslices=3\n")
    assert np.array_equal(read(path), np.stack([planes[::2], planes[1::2]]))
    assert np.array_equal(read(imagej(path, planes, "images=6\nchannels=6\n")), planes)
    with pytest.raises(ReadError, match="2 time points of 3 slices"):
        read_scan([imagej(path, planes, "images=6\nslices=3\nframes=2\n")])
    with pytest.raises(ReadError, match="6 pages, though its description says 40"):
        read_scan([imagej(path, planes, "images=40\nslices=40\n")])
    with pytest.raises(ReadError, match="2 components per pixel"):
        read_label(imagej(path, planes, "images=6\nchannels=2\nslices=3\n"))


def test_spacing_and_channels_as_ome_has_them(tmp_path: Path) -> None:
    planes = noise(0, (6, 20, 24)).astype(np.uint8)
    pixels = 'DimensionOrder="{}" SizeC="2" SizeT="1" SizeX="24" SizeY="20" SizeZ="3" PhysicalSizeX="500" {}'
    sizes = 'PhysicalSizeY="500" PhysicalSizeZ="2" PhysicalSizeZUnit="mm"'
    for order, expected in (("XYCZT", (planes[::2], planes[1::2])), ("XYZCT", (planes[:3], planes[3:]))):
        text = (
            f"<?xml version='1.0'?><OME><Image><Pixels {pixels.format(order, sizes)}></Pixels></Image></OME>"
        )
        scan = read_scan([stack(tmp_path / "a.ome.tif", planes, tiffinfo={270: text})])
        assert np.array_equal(scan.array, np.stack(expected))
        assert scan.geometry.spacing == pytest.approx((0.5, 0.5, 2.0))


def test_pages_of_different_size_or_kind_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    put(path, GREY, save_all=True, append_images=[Image.fromarray(GREY[:10])])
    with pytest.raises(ReadError, match="pages of 24×20 and of 24×10 pixels"):
        read_scan([path])
    put(path, GREY, save_all=True, append_images=[Image.fromarray(COLOURS)])
    with pytest.raises(ReadError, match="pages of different kinds"):
        read_scan([path])


def test_thumbnails_are_no_slices(tmp_path: Path) -> None:
    raw = hand_made(tmp_path / "a.tif", {}).read_bytes()
    small = entries({256: (3, 1, 2), 257: (3, 1, 2), 254: (4, 1, 1)})
    place = len(raw) + len(raw) % 2
    raw = raw.ljust(place, b"\0") + small
    first = struct.unpack("<L", raw[4:8])[0]
    after = first + 2 + 12 * struct.unpack("<H", raw[first : first + 2])[0]
    (tmp_path / "a.tif").write_bytes(raw[:after] + struct.pack("<L", place) + raw[after + 4 :])
    assert read(tmp_path / "a.tif").shape == (1, 4, 4)


@pytest.mark.parametrize("top", [1, 300, 70_000])
def test_masks_of_stacks_are_stacks_with_their_spacing(top: int, tmp_path: Path) -> None:
    path = imagej(
        tmp_path / "a.tif", noise(0, (6, 20, 24)).astype(np.uint8), "slices=6\nunit=mm\nspacing=3.0\n"
    )
    geometry = read_scan([path]).geometry
    assert mask_suffix([path]) == ".tif"
    assert mask_suffix([put(tmp_path / "flat.tif", GREY)]) == ".png"
    label = (noise(1, (6, 20, 24)) > 0).astype(np.int64) * top
    write_label(tmp_path / "m.tif", label, geometry)
    back, place = read_label(tmp_path / "m.tif")
    assert np.array_equal(back, label)
    assert geometry_difference(place, geometry) is None
    assert place.spacing == pytest.approx((0.25, 0.25, 3.0))
    assert np.array_equal(sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / "m.tif"))), label)
    shares = noise(2, (6, 20, 24)).astype(np.float32)
    write_image(tmp_path / "p.tif", shares, geometry)
    assert np.array_equal(read(tmp_path / "p.tif")[0], shares)


def test_a_label_stack_that_states_no_spacing_fits_its_image(tmp_path: Path) -> None:
    planes = noise(0, (6, 20, 24)).astype(np.uint8)
    image = imagej(tmp_path / "a.tif", planes, "slices=6\nunit=mm\nspacing=3.0\n")
    _, place = read_label(stack(tmp_path / "l.tif", planes % 2))
    assert geometry_difference(place, read_scan([image]).geometry) is None
    stated = imagej(tmp_path / "s.tif", planes % 2, "slices=6\nunit=mm\nspacing=2.0\n")
    found = geometry_difference(read_label(stated)[1], read_scan([image]).geometry)
    assert found == ("spacing 0.25×0.25×2 mm", "0.25×0.25×3")


# Hostile


def entries(tags: dict[int, tuple[int, int, int]], following: int = 0) -> bytes:
    """Return a directory: tag -> (type, count, value or offset)."""
    rows = b"".join(
        struct.pack("<HHL", tag, kind, count)
        + (struct.pack("<HH", value, 0) if kind == 3 and count == 1 else struct.pack("<L", value))
        for tag, (kind, count, value) in sorted(tags.items())
    )
    return struct.pack("<H", len(tags)) + rows + struct.pack("<L", following)


def hand_made(path: Path, changed: dict[int, tuple[int, int, int]], following: int = 0) -> Path:
    """Write a picture of 4×4 bytes with some tags changed."""
    tags = {
        256: (3, 1, 4), 257: (3, 1, 4), 258: (3, 1, 8), 259: (3, 1, 1), 262: (3, 1, 1),
        273: (4, 1, 8), 277: (3, 1, 1), 278: (3, 1, 4), 279: (4, 1, 16), 339: (3, 1, 1),
    }  # fmt: skip
    pixels = bytes(range(16))
    path.write_bytes(b"II*\0" + struct.pack("<L", 24) + pixels + entries({**tags, **changed}, following))
    return path


def test_hand_made_tiff_is_sound(tmp_path: Path) -> None:
    assert np.array_equal(read(hand_made(tmp_path / "a.tif", {}))[0], np.arange(16).reshape(4, 4))


@pytest.mark.parametrize("following", [24, 1_000_000, 26])
def test_pages_that_never_end_are_refused(following: int, tmp_path: Path) -> None:
    path = hand_made(tmp_path / "a.tif", {}, following)
    for look in (lambda: read_scan([path]), lambda: read_label(path)):
        with pytest.raises(ReadError, match=r"form a circle|beyond the file's end"):
            look()
    assert mask_suffix([path]) == ".png"


def test_more_pages_than_anyone_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages, "MOST_PAGES", 3)
    with pytest.raises(ReadError, match="more than 3 pages"):
        read_scan([stack(tmp_path / "a.tif", np.stack([GREY] * 4))])


@pytest.mark.parametrize(
    ("changed", "found"),
    [
        ({256: (4, 1, 60_000), 257: (4, 1, 60_000), 259: (3, 1, 5)}, "60000×60000 pixels, expected at most"),
        ({256: (4, 1, 10_000), 257: (4, 1, 10_000)}, "announces more pixels than it holds"),
        ({256: (4, 1, 0)}, "0×4 pixels"),
        ({273: (4, 1 << 28, 24)}, "beyond the file's end"),
        ({65_000: (1, 200, 8), 65_001: (1, 200, 8)}, "beyond the file's end"),
    ],
)
def test_announced_sizes_are_not_believed(
    changed: dict[int, tuple[int, int, int]], found: str, tmp_path: Path
) -> None:
    with pytest.raises(ReadError, match=found):
        read_scan([hand_made(tmp_path / "a.tif", changed)])


@pytest.mark.parametrize("name", ["a.png", "a.tif"])
def test_announced_sizes_are_compared_with_memory(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = put(
        tmp_path / name,
        np.zeros((400, 400), np.uint8),
        **({} if name == "a.png" else {"compression": "tiff_lzw"}),
    )
    monkeypatch.setattr("mlbseg.memory.free_memory", lambda: 500_000)
    with pytest.raises(ReadError, match="of memory that are free"):
        read_scan([path])


@pytest.mark.parametrize(
    ("size", "right", "found"),
    [
        ((16_000, 16_000), True, "announces more pixels than it can hold"),
        ((60_000, 60_000), True, "announces more pixels than it can hold"),
        ((24, 21), False, "a damaged header"),
    ],
)
def test_png_headers_are_not_believed(size: tuple[int, int], right: bool, found: str, tmp_path: Path) -> None:
    path = put(tmp_path / "a.png", GREY)
    raw = bytearray(path.read_bytes())
    raw[16:24] = struct.pack(">LL", *size)
    raw[29:33] = struct.pack(">L", zlib.crc32(raw[12:29]) + (not right))
    path.write_bytes(raw)
    with pytest.raises(ReadError, match=found):
        read_scan([path])


@pytest.mark.parametrize("cut", [10, 30, 60])
@pytest.mark.parametrize("name", ["a.png", "a.tif", "a.jpg"])
def test_truncated_pictures_are_refused(name: str, cut: int, tmp_path: Path) -> None:
    path = put(tmp_path / name, COLOURS)
    path.write_bytes(path.read_bytes()[:-cut] if cut > 10 else path.read_bytes()[:cut])
    with pytest.raises(ReadError):
        read_scan([path])


def test_other_files_with_a_pictures_name(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"<html>not found</html>" * 9)
    with pytest.raises(ReadError, match="neither PNG nor TIFF nor JPEG"):
        read_scan([tmp_path / "a.png"])
    path = put(tmp_path / "b.jpg", GREY, format="PNG")  # a PNG file in truth is read as what it is
    assert np.array_equal(read_label(path)[0], GREY)


def test_saved_by_itk_and_read_alike(tmp_path: Path) -> None:
    for name in ("a.png", "a.tif"):
        path = save(tmp_path / name, GREY)
        assert np.array_equal(read(path)[0], sitk.GetArrayFromImage(sitk.ReadImage(str(path))))
