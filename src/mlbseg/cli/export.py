"""``mlbseg export``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from mlbseg.cli.arguments import Device, Json, Quiet, Threads, names, set_threads
from mlbseg.cli.printing import print_line, progress_console


def export(
    run: Annotated[Path, typer.Argument(help="Run folder of `mlbseg train`.")],
    out: Annotated[Path, typer.Argument(help="Folder to write into.")],
    format: Annotated[str, typer.Option("--format", help="bundle, onnx, nnunet, itksnap or dicom-seg.")],
    network: Annotated[
        str | None, typer.Option(help="student, teacher ... (default: the method's choice).")
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(help="nnunet: where the run's scans are now (default: where training found them)."),
    ] = None,
    dataset: Annotated[str | None, typer.Option(help="nnunet: name, such as Dataset501_Heart.")] = None,
    trust: Annotated[
        float | None,
        typer.Option(help="nnunet: ignore voxels of pseudo labels with less trust (default: 0.8)."),
    ] = None,
    trust_maps: Annotated[
        Path | None, typer.Option(help="nnunet: folder of trust maps, in place of the predicted probability.")
    ] = None,
    also: Annotated[
        list[str] | None, typer.Option(help="nnunet: further parts of the split: noisy, validation, test.")
    ] = None,
    scans: Annotated[
        Path | None, typer.Option(help="dicom-seg: a DICOM series, or a folder of series (a folder each).")
    ] = None,
    masks: Annotated[
        Path | None, typer.Option(help="dicom-seg: masks of `mlbseg predict` (default: predict now).")
    ] = None,
    codes: Annotated[
        Path | None, typer.Option(help="dicom-seg: JSON file: class name -> [code, scheme, meaning].")
    ] = None,
    fractional: Annotated[
        bool, typer.Option("--fractional", help="dicom-seg: probabilities in place of masks.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace files that are there.")] = False,
    device: Device = "auto",
    threads: Threads = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Hand a run over: MONAI bundle, ONNX, nnU-Net dataset, ITK-SNAP and Slicer labels, DICOM segmentations."""
    from mlbseg.apps.export import export as run_export
    from mlbseg.errors import FaultsError
    from mlbseg.progress import StepProgress

    set_threads(threads)
    console = progress_console(quiet or as_json)
    with StepProgress(console, "exporting", 0) as progress:
        result = run_export(
            run, out, format, network=network, data=data, dataset=dataset, trust=trust, trust_maps=trust_maps,
            also=names(also) or None, scans=scans, masks=masks, codes=codes, fractional=fractional or None,
            overwrite=overwrite, device=device,
            progress=None if console is None else lambda done, total, case: progress.update(
                done, {"case": case}, total=total
            ),
        )  # fmt: skip
    if as_json:
        print(json.dumps({"files": [str(path) for path in result.files], "next": result.next,
                          "faults": [f.as_dict() for f in result.faults]}))  # fmt: skip
        if result.faults:
            raise typer.Exit(2)
        return
    for path in result.files:
        print_line(f"wrote {path}")
    if result.next and result.files:
        print_line(f"next: {result.next}")
    if result.faults:
        raise FaultsError(result.faults, str(out), "the others were exported" if result.files else "")
