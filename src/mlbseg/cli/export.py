"""`mlbseg export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mlbseg.cli.arguments import Device, Json, Network, Quiet, Run, Threads, names, set_threads
from mlbseg.cli.ending import finish
from mlbseg.cli.printing import case_progress


def export(
    run: Run,
    out: Annotated[Path, typer.Argument(help="Folder to write into.")],
    format: Annotated[str, typer.Option("--format", help="bundle, onnx, nnunet, itksnap or dicom-seg.")],
    network: Network = None,
    data: Annotated[
        Path | None,
        typer.Option(help="nnunet: folder of the run's scans, if they have moved since training."),
    ] = None,
    dataset: Annotated[
        str | None, typer.Option(help="nnunet: name of the dataset, such as Dataset501_Heart.")
    ] = None,
    trust: Annotated[
        float | None,
        typer.Option(help="nnunet: ignore voxels of pseudo labels with a lower trust (default: 0.8)."),
    ] = None,
    trust_maps: Annotated[
        Path | None,
        typer.Option(help="nnunet: folder of trust maps, instead of the predicted probability."),
    ] = None,
    also: Annotated[
        list[str] | None,
        typer.Option(help="nnunet: further parts of the split to export: noisy, validation, test."),
    ] = None,
    scans: Annotated[
        Path | None, typer.Option(help="dicom-seg: a DICOM series, or a folder with one folder per series.")
    ] = None,
    masks: Annotated[
        Path | None, typer.Option(help="dicom-seg: masks of `mlbseg predict` (default: predict them now).")
    ] = None,
    codes: Annotated[
        Path | None, typer.Option(help="dicom-seg: JSON file: class name -> [code, scheme, meaning].")
    ] = None,
    fractional: Annotated[
        bool, typer.Option("--fractional", help="dicom-seg: write probabilities instead of masks.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace existing files.")] = False,
    device: Device = "auto",
    threads: Threads = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Export a run to other programs. MONAI bundle, ONNX, nnU-Net dataset, ITK-SNAP and Slicer labels, DICOM SEG."""
    from mlbseg.apps.export import export as run_export

    set_threads(threads)
    with case_progress(quiet or as_json, "exporting") as progress:
        result = run_export(
            run, out, format, network=network, data=data, dataset=dataset, trust=trust, trust_maps=trust_maps,
            also=names(also) or None, scans=scans, masks=masks, codes=codes, fractional=fractional or None,
            overwrite=overwrite, device=device, progress=progress,
        )  # fmt: skip
    lines = [f"wrote {path}" for path in result.files]
    if result.next and lines:
        lines.append(f"next: {result.next}")
    finish(
        result.as_dict(), as_json=as_json, lines=lines, faults=result.faults, where=str(out),
        advice="the others were exported" if result.files else "",
    )  # fmt: skip
