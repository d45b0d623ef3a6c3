"""Small valid files of every format, and of lists of cases: what `mutate.py` damages."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import SimpleITK as sitk  # noqa: N813 - as its documentation does
from PIL import Image
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.sequence import Sequence
from pydicom.uid import ExplicitVRLittleEndian

from data.broken import dicom_series, mask, noise, save

CANARY = b"K" * (1 << 16)
"""What lies beside the folder, where none may look: as numbers of any type, one value that no other pixel has."""


@dataclass(frozen=True)
class Seed:
    """Valid files by name, which of them is changed, and what is read ("" for the folder)."""

    files: dict[str, bytes]
    target: str
    read: str


Builder = Callable[[Path], list[tuple[str, str]]]
"""Writes below a folder and returns (what is to be changed, what is to be read) of each seed."""


def seeds_of(build: Builder) -> Callable[[], list[Seed]]:
    """Turn a builder, which writes below a folder and names (target, read), into seeds."""

    @cache
    def make() -> list[Seed]:
        with tempfile.TemporaryDirectory() as name:
            root = Path(name)
            chosen = build(root)
            files = {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}
        seeds = []
        for target, read in chosen:
            stem = target.split(".")[0]
            whole = target.endswith((".csv", ".json"))
            own = {
                n: c for n, c in files.items() if whole or n.split(".")[0] == stem or n.startswith(f"{read}/")
            }
            seeds.append(Seed(own, target, read))
        return seeds

    return make


def volumes(suffix: str) -> Builder:
    def build(root: Path) -> list[tuple[str, str]]:
        turned = {
            "spacing": (0.5, 0.75, 3.0),
            "origin": (-12.0, 30.5, 7.25),
            "direction": (0.8, -0.6, 0, 0.6, 0.8, 0, 0, 0, 1),
        }
        save(root / f"a{suffix}", noise(0), **turned)
        save(root / f"b{suffix}", mask())
        save(root / f"c{suffix}", noise(0, (8, 10)))
        save(root / f"d{suffix}", noise(0, (4, 5, 6, 2)).astype(np.int16), vector=True)
        image = sitk.GetImageFromArray(noise(0).astype(np.uint16))
        sitk.WriteImage(image, str(root / f"e{suffix}"), useCompression=True)
        return [(f"{n}{suffix}", f"{n}{suffix}") for n in "abcde"]

    return build


def pictures(suffix: str) -> Builder:
    def build(root: Path) -> list[tuple[str, str]]:
        grey = noise(0, (20, 24)).astype(np.uint8)
        colour = noise(1, (20, 24, 3)).astype(np.uint8)
        images = {"a": Image.fromarray(grey), "b": Image.fromarray(colour)}
        options: dict[str, dict[str, Any]] = {"a": {}, "b": {}}
        if suffix == ".jpg":
            images["c"], options["c"] = Image.fromarray(colour), {"progressive": True}
        else:
            images["c"] = Image.fromarray(mask((20, 24), 3), mode=None).convert("P")
            images["d"] = Image.fromarray(grey.astype(np.uint16) * 200)
            images["e"] = Image.fromarray(np.dstack([colour, grey]))
            options |= {name: {} for name in "cde"}
        if suffix == ".tif":
            images["f"], options["f"] = (
                Image.fromarray(grey),
                {"save_all": True, "append_images": [Image.fromarray(grey)] * 3},
            )
            images["g"], options["g"] = Image.fromarray(colour), {"compression": "tiff_lzw"}
            images["h"], options["h"] = (
                Image.fromarray(noise(0, (20, 24))),
                {"compression": "tiff_adobe_deflate"},
            )
        for name, image in images.items():
            image.save(root / f"{name}{suffix}", **options[name])
        return [(f"{name}{suffix}", f"{name}{suffix}") for name in images]

    return build


def left_atrium(root: Path) -> list[tuple[str, str]]:
    for name, options in (
        ("a", {}),
        ("b", {"compression": "gzip", "chunks": (4, 4, 4)}),
        ("c", {"compression": "lzf", "fletcher32": True}),
    ):
        with h5py.File(root / f"{name}.h5", "w") as file:
            file.create_dataset("image", data=noise(0).T, **options).attrs["spacing"] = (0.5, 0.75, 3.0)
            file.create_dataset("label", data=mask().T, **options)
    return [(f"{name}.h5", f"{name}.h5") for name in "abc"]


@cache
def canary_hdf5() -> Path:
    path = Path(tempfile.mkdtemp()) / "canary.h5"
    with h5py.File(path, "w") as file:
        file["image"] = file["label"] = np.frombuffer(CANARY[:256], "f4").reshape(4, 4, 4)
    return path


def series(root: Path) -> list[tuple[str, str]]:
    dicom_series(root / "s", 4)
    return [(f"s/{i:03d}.dcm", "s") for i in range(4)]


def frames(root: Path) -> list[tuple[str, str]]:
    """An enhanced MR file with functional groups for each frame."""
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = "1.2.840.10008.5.1.4.1.1.4.1", "1.2.3.4"
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    made = FileDataset(str(root / "x"), {}, file_meta=meta, preamble=b"\0" * 128)
    made.SOPClassUID, made.SOPInstanceUID = meta.MediaStorageSOPClassUID, "1.2.3.4"
    made.StudyInstanceUID, made.SeriesInstanceUID, made.Modality, made.PatientID = (
        "1.2.3.1",
        "1.2.3.2",
        "MR",
        "p",
    )
    pixels = noise(0, (4, 12, 14)).astype(np.uint16)
    made.NumberOfFrames, made.Rows, made.Columns = pixels.shape
    made.SamplesPerPixel, made.PhotometricInterpretation = 1, "MONOCHROME2"
    made.BitsAllocated = made.BitsStored = 16
    made.HighBit, made.PixelRepresentation = 15, 0

    def group(**items: Any) -> Any:
        item = Dataset()
        for key, value in items.items():
            setattr(item, key, value)
        return Sequence([item])

    made.SharedFunctionalGroupsSequence = group(
        PlaneOrientationSequence=group(ImageOrientationPatient=[1, 0, 0, 0, 1, 0]),
        PixelMeasuresSequence=group(PixelSpacing=[0.8, 0.8], SliceThickness=2.5, SpacingBetweenSlices=2.5),
    )
    made.PerFrameFunctionalGroupsSequence = Sequence(
        [group(PlanePositionSequence=group(ImagePositionPatient=[0, 0, 2.5 * i]))[0] for i in range(4)]
    )
    made.PixelData = pixels.tobytes()
    (root / "s").mkdir()
    made.save_as(root / "s" / "frames.dcm", enforce_file_format=True)
    return [("s/frames.dcm", "s")]


def listed(name: str, read: str, text: str, images: str = "images", ending: str = "") -> Builder:
    def build(root: Path) -> list[tuple[str, str]]:
        for seed, case in enumerate("ab"):
            save(root / images / f"{case}{ending}.nii.gz", noise(seed))
            save(root / images.replace("images", "labels") / f"{case}.nii.gz", mask())
        (root / name).write_text(text)
        return [(name, read)]

    return build


ROWS = [
    {"id": c, "image": f"images/{c}.nii.gz", "label": f"labels/{c}.nii.gz", "role": "clean", "patient": c}
    for c in "ab"
]
DECATHLON = {
    "name": "x", "labels": {"0": "background", "1": "organ"}, "modality": {"0": "MRI"}, "numTraining": 2,
    "training": [{"image": f"./imagesTr/{c}.nii.gz", "label": f"./labelsTr/{c}.nii.gz"} for c in "ab"], "test": [],
}  # fmt: skip
NNUNET = {
    "channel_names": {"0": "MRI"},
    "labels": {"background": 0, "organ": 1},
    "numTraining": 2,
    "file_ending": ".nii.gz",
}
CSV = "id,image,label,role,patient\n" + "".join(",".join(row.values()) + "\n" for row in ROWS)
