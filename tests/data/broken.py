"""Broken inputs by name: each builder writes below a folder and returns what a user passes to `mlbseg check`.

Every builder starts from a healthy data set and breaks one thing, so that a fault can only be that one.
"""

from __future__ import annotations

import gzip
import json
import locale
import struct
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import h5py
import nibabel
import numpy as np
import SimpleITK as sitk  # noqa: N813 - as its documentation does

SIZE = (6, 8, 10)  # z, y, x
Builder = Callable[[Path], Path]
BROKEN: dict[str, Builder] = {}


def broken(builder: Builder) -> Builder:
    BROKEN[builder.__name__] = builder
    return builder


def noise(seed: int, size: Sequence[int] = SIZE) -> np.ndarray:
    return np.random.default_rng(seed).normal(100, 20, size).astype(np.float32)


def mask(size: Sequence[int] = SIZE, value: int = 1) -> np.ndarray:
    array = np.zeros(size, np.uint8)
    array[tuple(slice(1, n // 2) for n in size)] = value
    return array


def save(path: Path, array: np.ndarray, *, vector: bool = False, **geometry: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = sitk.GetImageFromArray(array, isVector=vector)
    for name, value in geometry.items():
        getattr(image, f"Set{name.capitalize()}")(value)
    sitk.WriteImage(image, str(path))
    return path


def nifti(path: Path, array: np.ndarray, *, bent: float = 0.0) -> Path:
    """Write ([..., ]z, y, x) with an sform alone, whose y axis leans to x by so much."""
    affine = np.diag([-1.0, -1, 1, 1])
    affine[0, 1] = bent
    image = nibabel.Nifti1Image(array.T, None)
    image.header.set_zooms((1, np.hypot(1, bent), 1, *array.shape[-4::-1]))
    image.set_sform(affine, 1)
    kind = nibabel.Nifti1Pair if path.suffix == ".hdr" else nibabel.Nifti1Image
    nibabel.save(kind(image.dataobj, None, image.header), path)
    return path


def healthy(root: Path, suffix: str = ".nii.gz", names: Sequence[str] = ("a", "b", "c", "d")) -> Path:
    """Four scans under images/, the first three labelled."""
    for seed, name in enumerate(names):
        save(root / "images" / f"{name}{suffix}", noise(seed))
        if seed < 3:
            save(root / "labels" / f"{name}{suffix}", mask())
    return root


def pictures(root: Path) -> Path:
    for seed, name in enumerate("abcd"):
        save(root / "images" / f"{name}.png", noise(seed, (20, 24)).astype(np.uint8))
        if seed < 3:
            save(root / "labels" / f"{name}.png", mask((20, 24), 255))
    return root


def dicom_series(folder: Path, count: int = 6, **changes: Any) -> Path:
    """Write a series; `changes`: tags and spacing as functions of the slice number, skip, shift, names."""
    folder.mkdir(parents=True, exist_ok=True)
    skip, shift = changes.pop("skip", ()), changes.pop("shift", 0.0)
    names = changes.pop("names", [f"{i:03d}.dcm" for i in range(count)])
    spacing = changes.pop("spacing", lambda _: 0.8)
    rng = np.random.default_rng(zlib.crc32(folder.name.encode()))
    pixels = rng.integers(0, 1000, (count, 12, 14)).astype(np.int16)
    writer = sitk.ImageFileWriter()
    writer.KeepOriginalImageUIDOn()
    writer.SetImageIO("GDCMImageIO")
    ctype = locale.setlocale(locale.LC_CTYPE)
    for i in range(count):
        if i in skip:
            continue
        image = sitk.GetImageFromArray(pixels[i])
        image.SetSpacing((spacing(i), spacing(i)))
        tags = {
            "0008|0060": "MR",
            "0008|0018": f"1.2.826.0.1.3680043.2.1125.{i + 1}.{len(folder.name)}",
            "0020|000d": "1.2.826.0.1.3680043.2.1125.1",
            "0020|000e": "1.2.826.0.1.3680043.2.1125.2",
            "0020|0013": str(i),
            "0020|0037": "1\\0\\0\\0\\1\\0",
            "0020|0032": f"5\\{7 + shift * i}\\{2.5 * i}",
            "0018|0050": "2.5",
        }
        tags.update({tag.replace("_", "|"): str(change(i)) for tag, change in changes.items()})
        for tag, value in tags.items():
            image.SetMetaData(tag, value)
        writer.SetFileName(str(folder / names[i]))
        writer.Execute(image)
    locale.setlocale(
        locale.LC_CTYPE, ctype
    )  # GDCM leaves "C" behind when it writes, and text would become ASCII
    return folder


def series(root: Path, **changes: Any) -> Path:
    """Three healthy DICOM cases, of which the last gets `changes`."""
    for name in ("p1", "patient2"):
        dicom_series(root / "images" / name)
        reference = sitk.ImageSeriesReader()
        reference.SetFileNames([str(p) for p in sorted((root / "images" / name).iterdir())])
        label = sitk.GetImageFromArray(mask((6, 12, 14)))
        label.CopyInformation(reference.Execute())
        (root / "labels").mkdir(exist_ok=True)
        sitk.WriteImage(label, str(root / "labels" / f"{name}.nii.gz"))
    dicom_series(root / "images" / "bad_case", **changes)
    return root


def patch(path: Path, *edits: tuple[int, str, Sequence[float]]) -> None:
    """Overwrite fields of a NIfTI header; a gzip file stays one."""
    raw = path.read_bytes()
    plain = bytearray(gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw)
    for offset, kind, values in edits:
        struct.pack_into(kind, plain, offset, *values)
    path.write_bytes(gzip.compress(bytes(plain)) if raw[:2] == b"\x1f\x8b" else bytes(plain))


def cut(path: Path, share: float = 0.5) -> None:
    raw = path.read_bytes()
    path.write_bytes(raw[: int(len(raw) * share)])


def _breaks(name: str, change: Callable[[Path], object], base: Builder = healthy) -> None:
    def builder(root: Path) -> Path:
        base(root)
        change(root)
        return root

    BROKEN[name] = builder


def _header(name: str, *edits: tuple[int, str, Sequence[float]]) -> None:
    _breaks(name, lambda root: patch(root / "images" / "b.nii.gz", *edits))


# Files that are not what they seem.
_breaks("truncated_gzip", lambda r: cut(r / "images/b.nii.gz"))
_breaks("truncated_gzip_label", lambda r: cut(r / "labels/b.nii.gz"))
_breaks("gzip_without_its_checksum", lambda r: cut(r / "images/b.nii.gz", 0.999))
_breaks("text_named_nii_gz", lambda r: (r / "images/b.nii.gz").write_text("not a scan\n"))
_breaks("text_in_gzip", lambda r: (r / "images/b.nii.gz").write_bytes(gzip.compress(b"not a scan" * 100)))
_breaks("zero_bytes_image", lambda r: (r / "images/b.nii.gz").write_bytes(b""))
_breaks("zero_bytes_label", lambda r: (r / "labels/b.nii.gz").write_bytes(b""))
_breaks("truncated_nii", lambda r: cut(r / "images/b.nii"), lambda r: healthy(r, ".nii"))
_breaks("truncated_nrrd", lambda r: cut(r / "images/b.nrrd"), lambda r: healthy(r, ".nrrd"))
_breaks("truncated_mha", lambda r: cut(r / "images/b.mha"), lambda r: healthy(r, ".mha"))
_breaks("mhd_without_pixels", lambda r: (r / "images/b.raw").unlink(), lambda r: healthy(r, ".mhd"))
_breaks("truncated_png", lambda r: cut(r / "images/b.png"), pictures)
_breaks("broken_link", lambda r: (r / "images/e.nii.gz").symlink_to("nowhere.nii.gz"))
_breaks("link_loop_file", lambda r: (r / "images/e.nii.gz").symlink_to("e.nii.gz"))
_breaks("gzip_named_nii", lambda r: (r / "images/b.nii.gz").rename(r / "images/b.nii"))

# NIfTI headers that lie (offsets: nifti1.h).
_header("header_more_voxels_than_file", (42, "<h", [4000]))
_header("header_of_half_the_universe", (42, "<3h", [32000, 32000, 32000]))
_header("header_zero_size", (42, "<h", [0]))
_header("header_negative_size", (42, "<h", [-8]))
_header("header_nine_axes", (40, "<h", [9]))
_header("header_unknown_voxel_type", (70, "<h", [9999]))
_header("header_spacing_zero", (80, "<f", [0.0]))
_header("header_spacing_negative", (80, "<f", [-1.0]))
_header("header_spacing_nan", (84, "<f", [float("nan")]))
_header("header_spacing_infinite", (88, "<f", [float("inf")]))
_header("header_qform_and_sform_disagree", (280, "<4f", [0, 1, 0, 40]))
_header("header_sform_nan", (280, "<f", [float("nan")]))
_header("header_sform_of_other_spacing", (252, "<h", [0]), (280, "<4f", [3, 0, 0, 0]))
_header("header_sheared", (252, "<h", [0]), (280, "<8f", [0.8, 0.6, 0, 0, 0.6, 0.8, 0, 0]))
_header("header_complex_voxels", (70, "<2h", [32, 64]), (42, "<h", [5]))

# Pixels.
_breaks("nan_pixel", lambda r: save(r / "images/b.nii.gz", np.where(mask() > 0, np.nan, noise(1))))
_breaks(
    "nan_pixel_nrrd",
    lambda r: save(r / "images/b.nrrd", np.where(mask() > 0, np.nan, noise(1))),
    lambda r: healthy(r, ".nrrd"),
)
_breaks("infinite_pixel", lambda r: save(r / "images/b.nii.gz", np.where(mask() > 0, np.inf, noise(1))))
_breaks("constant_image", lambda r: save(r / "images/b.nii.gz", np.full(SIZE, 7, np.int16)))
_breaks("four_axes_among_three", lambda r: save(r / "images/b.nii.gz", noise(1, (3, *SIZE))))
_breaks("channels_and_times", lambda r: nifti(r / "images/b.nii.gz", noise(1, (3, 2, *SIZE))))
_breaks("label_of_four_axes", lambda r: nifti(r / "labels/b.nii.gz", np.stack([mask()] * 2)))
_breaks("nifti_bent", lambda r: nifti(r / "images/b.nii.gz", noise(1), bent=0.4))
_breaks(
    "label_without_a_place",
    lambda r: (
        save(r / "images/b.nii.gz", noise(1), origin=(5, 0, 0)),
        patch(r / "labels/b.nii.gz", (252, "<2h", [0, 0])),
    ),
)
_breaks("pair_without_pixels", lambda r: nifti(r / "images/e.hdr", noise(1)).with_suffix(".img").unlink())
_breaks(
    "pair_without_magic",
    lambda r: [(r / f"images/e{suffix}").write_bytes(b"ENVI") for suffix in (".hdr", ".img")],
)
_breaks("identical_images", lambda r: save(r / "images/d.nii.gz", noise(0)))

# Geometry.
_breaks("label_of_other_size", lambda r: save(r / "labels/b.nii.gz", mask((5, 8, 10))))
_breaks("label_of_other_spacing", lambda r: save(r / "labels/b.nii.gz", mask(), spacing=(1, 1, 2)))
_breaks("label_of_other_origin", lambda r: save(r / "labels/b.nii.gz", mask(), origin=(0, 5, 0)))
_breaks(
    "label_of_other_direction",
    lambda r: save(r / "labels/b.nii.gz", mask(), direction=(-1, 0, 0, 0, -1, 0, 0, 0, 1)),
)
_breaks("far_off_spacing", lambda r: save(r / "images/d.nii.gz", noise(3), spacing=(1, 1, 9)))
_breaks("flat_scan_among_volumes", lambda r: save(r / "images/e.nii.gz", noise(5, (8, 10))))
_breaks("two_channels_among_one", lambda r: save(r / "images/e.nii.gz", noise(5, (*SIZE, 2)), vector=True))

# Labels.
_breaks("label_not_whole", lambda r: save(r / "labels/b.nii.gz", mask() * np.float32(0.5)))
_breaks("label_nan", lambda r: save(r / "labels/b.nii.gz", np.where(mask() > 0, np.nan, 0.0)))
_breaks("label_unexpected_value", lambda r: save(r / "labels/b.nii.gz", mask(value=7)))
_breaks("label_beyond_int32", lambda r: save(r / "labels/b.nii.gz", mask().astype(np.uint32) * 4_000_000_000))
_breaks("label_negative", lambda r: save(r / "labels/b.nii.gz", -mask().astype(np.int16)))
_breaks(
    "label_wrapped_around",
    lambda r: save(r / "labels/b.nii.gz", (mask().astype(np.int16) * 257 - 1).astype(np.uint8)),
)
_breaks("label_only_background", lambda r: save(r / "labels/b.nii.gz", np.zeros(SIZE, np.uint8)))
_breaks("label_without_image", lambda r: save(r / "labels/z.nii.gz", mask()))
_breaks(
    "label_in_colour",
    lambda r: save(r / "labels/b.png", np.stack([mask((20, 24), v) for v in (9, 5, 1)], -1), vector=True),
    pictures,
)
_breaks("no_labels_at_all", lambda r: [p.unlink() for p in (r / "labels").iterdir()])

# Names.
_breaks("one_name_twice", lambda r: save(r / "images/a.nrrd", noise(9)))
_breaks("one_label_twice", lambda r: save(r / "labels/a.nrrd", mask()))
_breaks("name_with_newline", lambda r: save(r / "images/e\nrm -rf.nii.gz", noise(9)))
_breaks("name_with_backslash", lambda r: save(r / "images/e\\f.nii.gz", noise(9)))
_breaks("name_too_long", lambda r: save(r / f"images/{'e' * 238}.nii.gz", noise(9)))
_breaks("list_of_unknown_case", lambda r: (r / "train.list").write_text("a\nnobody\n"))
_breaks("list_not_text", lambda r: (r / "test.list").write_bytes(b"\xc3\xfe\x00\x81"))


@broken
def names_with_spaces_unicode_and_html(root: Path) -> Path:
    """Such names are fine in themselves (a test says so); here one of them has a fault to be named."""
    healthy(root, names=("left atrium", "Herz_größe_心臓", "<b>&amp;<script>", "d"))
    cut(root / "images" / "<b>&amp;<script>.nii.gz")
    return root


# Folders.
@broken
def empty_folder(root: Path) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    return root


@broken
def missing_folder(root: Path) -> Path:
    return root / "no" / "such" / "folder"


@broken
def file_instead_of_folder(root: Path) -> Path:
    path = root / "notes.txt"
    path.write_text("hello")
    return path


@broken
def images_is_a_file(root: Path) -> Path:
    (root / "images").write_text("hello")
    return root


@broken
def images_is_empty(root: Path) -> Path:
    (root / "images").mkdir()
    return root


@broken
def link_loop(root: Path) -> Path:
    (root / "images").symlink_to("images")
    return root


@broken
def link_loop_of_labels(root: Path) -> Path:
    healthy(root)
    for path in (root / "labels").iterdir():
        path.unlink()
    (root / "labels").rmdir()
    (root / "labels").symlink_to("labels")
    return root


@broken
def link_to_the_folder_itself(root: Path) -> Path:
    healthy(root)
    (root / "images" / "again").symlink_to("..")
    return root


@broken
def unknown_layout(root: Path) -> Path:
    save(root / "stuff" / "a.nii.gz", noise(0))
    return root


@broken
def dataset_json_broken(root: Path) -> Path:
    for seed, name in enumerate("abc"):
        save(root / "imagesTr" / f"{name}.nii.gz", noise(seed))
        save(root / "labelsTr" / f"{name}.nii.gz", mask())
    (root / "dataset.json").write_text('{"labels": ')
    return root


@broken
def nnunet_channel_missing(root: Path) -> Path:
    for seed, name in enumerate("abc"):
        for channel in (0, 1):
            save(root / "imagesTr" / f"{name}_{channel:04d}.nii.gz", noise(seed + 10 * channel))
        save(root / "labelsTr" / f"{name}.nii.gz", mask())
    (root / "imagesTr" / "b_0000.nii.gz").unlink()
    return root


@broken
def nnunet_channels_of_other_geometry(root: Path) -> Path:
    for seed, name in enumerate("abc"):
        save(root / "imagesTr" / f"{name}_0000.nii.gz", noise(seed))
        save(root / "imagesTr" / f"{name}_0001.nii.gz", noise(seed + 9), spacing=(1, 1, 1 + (name == "c")))
        save(root / "labelsTr" / f"{name}.nii.gz", mask())
    return root


# Datalists.
def _datalist(name: str, text: str, suffix: str = ".csv") -> None:
    def builder(root: Path) -> Path:
        healthy(root)
        path = root / f"cases{suffix}"
        path.write_text(text, encoding="utf-8")
        return path

    BROKEN[name] = builder


_ROW = "a,images/a.nii.gz,labels/a.nii.gz\n"
_datalist("csv_empty", "")
_datalist("csv_only_a_header", "id,image,label\n")
_datalist("csv_without_image_column", "id,picture,label\n" + _ROW)
_datalist("csv_row_without_image", "id,image,label\n" + _ROW + "b,,labels/b.nii.gz\n")
_datalist("csv_too_many_cells", "id,image,label\n" + _ROW.strip() + ",x,y\n")
_datalist("csv_leaves_its_folder", "id,image,label\n" + _ROW + "b,../../etc/passwd.nii.gz,\n")
_datalist("csv_id_leaves_its_folder", "id,image,label\n" + _ROW + "../b,images/b.nii.gz,\n")
_datalist("csv_missing_file", "id,image,label\n" + _ROW + "b,images/nobody.nii.gz,\n")
_datalist("csv_unknown_role", "id,image,label,role\n" + _ROW + "b,images/b.nii.gz,,teest\n")
_datalist("csv_clean_without_label", "id,image,label,role\n" + _ROW + "b,images/b.nii.gz,,clean\n")
_datalist("csv_one_id_twice", "id,image,label\n" + _ROW + "a,images/b.nii.gz,\n")
_datalist("json_broken", '[{"id": "a", "image": ', ".json")
_datalist("json_no_list", '{"training": 3}', ".json")
_datalist("json_image_is_a_number", json.dumps([{"id": "a", "image": 3}, {"id": "b"}]), ".json")


@broken
def csv_not_utf8(root: Path) -> Path:
    path = root / "cases.csv"
    path.write_bytes(b"id,image\n\xff\xfe,\x81.nii.gz\n")
    return path


# Pixels kept in another folder: never followed.
@broken
def mhd_points_elsewhere(root: Path) -> Path:
    healthy(root, ".mhd")
    header = root / "images" / "b.mhd"
    header.write_text(header.read_text().replace("= b.raw", "= ../labels/b.raw"))
    return root


@broken
def nrrd_points_elsewhere(root: Path) -> Path:
    healthy(root, ".nhdr")
    header = root / "images" / "b.nhdr"
    header.write_text(header.read_text().replace("data file: b.raw", "data file: /etc/passwd"))
    return root


# HDF5.
def left_atrium(root: Path, names: Sequence[str] = ("n1", "n2", "n3")) -> Path:
    for seed, name in enumerate(names):
        (root / name).mkdir(parents=True)
        with h5py.File(root / name / "mri_norm2.h5", "w") as file:
            file["image"] = noise(seed).T
            if seed < 2:
                file["label"] = mask().T
    return root


_breaks("hdf5_truncated", lambda r: cut(r / "n1/mri_norm2.h5"), left_atrium)
_breaks("hdf5_not_hdf5", lambda r: (r / "n1/mri_norm2.h5").write_text("hello"), left_atrium)


@broken
def hdf5_without_image(root: Path) -> Path:
    left_atrium(root)
    with h5py.File(root / "n1" / "mri_norm2.h5", "a") as file:
        del file["image"]
    return root


@broken
def hdf5_links_elsewhere(root: Path) -> Path:
    left_atrium(root)
    with h5py.File(root / "n1" / "mri_norm2.h5", "a") as file:
        del file["image"]
        file["image"] = h5py.ExternalLink(str(root / "n2" / "mri_norm2.h5"), "image")
    return root


# DICOM.
_DICOM: dict[str, dict[str, Any]] = {
    "dicom_missing_slice": {"skip": (2,)},
    "dicom_gantry_tilt": {"shift": 0.7},
    "dicom_slice_twice": {"0020_0032": lambda i: f"5\\7\\{2.5 * min(i, 4)}"},
    "dicom_two_series": {"0020_000e": lambda i: f"1.2.826.0.1.3680043.2.1125.{2 + i % 2}"},
    "dicom_two_orientations": {"0020_0037": lambda i: "1\\0\\0\\0\\1\\0" if i else "0\\1\\0\\0\\0\\1"},
    "dicom_two_pixel_sizes": {"spacing": lambda i: 0.8 if i else 0.4},
}
for _name, _changes in _DICOM.items():
    _breaks(_name, lambda _root: None, lambda root, changes=_changes: series(root, **changes))  # type: ignore[misc]
_breaks("dicom_truncated_slice", lambda r: cut(r / "images/bad_case/003.dcm", 0.1), series)
_breaks("dicom_slice_cut_in_half", lambda r: cut(r / "images/bad_case/003.dcm", 0.7), series)
_breaks("folder_without_slices", lambda r: (r / "images/empty").mkdir(), series)
