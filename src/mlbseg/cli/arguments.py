"""The options that commands share, and what their texts mean: numbers, label values, case ids."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Annotated

import typer

from mlbseg.errors import UserError, brief

Data = Annotated[Path, typer.Argument(help="Folder of scans, or a CSV/JSON list of them.")]
Run = Annotated[Path, typer.Argument(help="Run folder of `mlbseg train`.")]

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress.")]

Device = Annotated[str, typer.Option(help="Device: auto, cpu, cuda, cuda:1 ...")]
Devices = Annotated[
    int, typer.Option(help="Number of devices of this machine to use together, one process each.", min=1)
]
Accelerator = Annotated[
    str | None, typer.Option(help="Kind of device, instead of --device: auto, cpu or gpu.")
]
Timeout = Annotated[
    float, typer.Option(help="Minutes that a process waits for another before it gives up.", min=0.01)
]
Processes = Annotated[
    int | None,
    typer.Option(
        help="Processes that read scans (default: one per core). Fewer are used when memory is short.", min=1
    ),
]
Threads = Annotated[int | None, typer.Option(help="Number of CPU threads.", min=1)]
SharedThreads = Annotated[
    int | None, typer.Option("--threads", help="Total CPU threads, shared by all --devices.", min=1)
]

Labels = Annotated[str | None, typer.Option(help="Label values to expect, such as 0,1,2.")]
Patient = Annotated[
    str | None,
    typer.Option(
        help="Regular expression whose first group is the patient's name within a case id, such as "
        "'(patient[0-9]+)_' (default: recognised; '(.*)': every case is a patient of its own)."
    ),
]
AllowEmpty = Annotated[
    bool,
    typer.Option(
        "--allow-empty", help="Accept labels without any structure: these scans have nothing to find."
    ),
]
Ignore = Annotated[
    int | None,
    typer.Option(help="Label value of voxels whose class is not known, such as 4 or 255 in scribbles."),
]
Sparse = Annotated[
    bool,
    typer.Option(
        "--sparse",
        help="Labels were drawn on some slices: slices without a drawn voxel are unknown, not background.",
    ),
]
OutsideUnknown = Annotated[
    bool,
    typer.Option(
        "--outside-unknown",
        help="What a cropped segmentation of 3D Slicer does not cover is unknown, not background.",
    ),
]
SkipBad = Annotated[bool, typer.Option("--skip-bad", help="Leave out faulty cases.")]

Preset = Annotated[
    str | None,
    typer.Option(
        help="paper: the settings of the public MLB-Seg code, on 2D slices of 144x144 pixels, without its 120 epochs "
        "(see -o steps=N) and without resizing images (see -o plan.spacing=MM)."
    ),
]
ConfigFile = Annotated[Path | None, typer.Option("--config", help="YAML file of settings.")]
Override = Annotated[
    list[str] | None,
    typer.Option(
        "-o", "--override", help="A setting as key=value, such as -o plan.spacing=1.25; repeatable."
    ),
]
Cache = Annotated[
    Path | None, typer.Option(help="Folder for preprocessed scans and for facts about files that were read.")
]
Init = Annotated[
    str | None,
    typer.Option(
        help="Weights to start from: a run folder (RUN:teacher for its teacher), a file of weights (safetensors or "
        "torch), a checkpoint of nnU-Net, or a MONAI bundle."
    ),
]
StepCount = Annotated[
    int | None, typer.Option("--steps", help="Training steps (default: decided from the data).", min=1)
]
Minutes = Annotated[
    float | None,
    typer.Option(help="Train for about so many minutes, instead of --steps: the rate is measured first."),
]
Network = Annotated[
    str | None, typer.Option(help="Network to use: student, teacher ... (default: the method's choice).")
]


def set_threads(threads: int | None) -> None:
    """Let torch use so many CPU threads; as many as it chooses when None."""
    if threads is not None:
        import torch

        torch.set_num_threads(threads)


def label_values(text: str | None) -> list[int] | None:
    """Return the label values of a comma-separated list.

    Raises:
        UserError: if one is no whole number.
    """
    if text is None:
        return None
    try:
        values = [int(part) for part in text.split(",")]
    except ValueError:
        raise UserError(f"--labels {brief(text)}: expected whole numbers, such as 0,1,2") from None
    if outside := [value for value in values if not -1 < value < 2**31]:
        raise UserError(f"--labels: found {brief(outside[0])}, expected values from 0 to {2**31 - 1}")
    return values


def part_of(text: str | None) -> tuple[int, int] | None:
    """Return k and n of ``k/n``.

    Raises:
        UserError: if the text is anything else.
    """
    if text is None:
        return None
    k, _, n = text.partition("/")
    if not (_is_count(k) and _is_count(n) and 1 <= int(k) <= int(n)):
        raise UserError(f"--part {brief(text)}: expected K/N with K from 1 to N, such as 3/16")
    return int(k), int(n)


def join_lists(arguments: Sequence[str], options: Collection[str]) -> list[str]:
    """Return the arguments with the values after each of the options joined by commas.

    ``--seeds 0 1 2`` is what people type, which the parser does not take: values go up to the next option.
    """
    joined: list[str] = []
    taking = False
    for argument in arguments:
        if argument.startswith("-"):
            taking = argument in options
            joined.append(argument)
        elif taking and joined[-1] not in options:
            joined[-1] += f",{argument}"
        else:
            joined.append(argument)
    return joined


def names(texts: Sequence[str] | None) -> list[str]:
    """Return the parts of comma-separated lists."""
    return [part.strip() for text in texts or () for part in text.split(",") if part.strip()]


def numbers(option: str, texts: Sequence[str] | None) -> list[int]:
    """Return the numbers of comma-separated lists.

    Raises:
        UserError: if one is no whole number.
    """
    try:
        return [int(part) for part in names(texts)]
    except ValueError:
        found = ",".join(texts or ())
        raise UserError(f"{option} {brief(found)}: expected whole numbers, such as {option} 0,1,2") from None


def key_values(option: str, texts: Sequence[str] | None) -> dict[str, int | str]:
    """Return what ``key=value`` texts say; digits are a number.

    Raises:
        UserError: if one has no key.
    """
    found: dict[str, int | str] = {}
    for text in texts or ():
        key, separator, value = text.partition("=")
        if not (separator and key.isidentifier()):
            raise UserError(f"{option} {brief(text)}: expected key=value, such as {option} timeout_min=600")
        found[key] = int(value) if _is_count(value) else value
    return found


def count_or_ids(text: str | None) -> int | list[str] | None:
    """Return a number, or the case ids of a file or of a comma-separated list."""
    if text is None:
        return None
    return int(text) if _is_count(text) else case_ids(text)


def _is_count(text: str) -> bool:
    """Say whether a text is a number that something could be counted by."""
    return text.isdecimal() and len(text) <= 18


MOST_NAME = 4096
"""Bytes of a path; what is longer is none."""


def case_ids(text: str) -> list[str]:
    """Return the case ids of a file (one a line) or of a comma-separated list.

    Raises:
        UserError: if the file is no text.
    """
    path = Path(text)
    if "," not in text and len(text) < MOST_NAME and path.is_file():
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError):
            raise UserError(f"{path}: cannot be read as a list of case ids, one a line") from None
        return [line.strip() for line in lines if line.strip()]
    return [part.strip() for part in text.split(",") if part.strip()]
