"""`mlbseg check`."""

from __future__ import annotations

from typing import Any

from rich.table import Table

from mlbseg.cli.arguments import (
    AllowEmpty,
    Cache,
    Data,
    Ignore,
    Json,
    Labels,
    OutsideUnknown,
    Patient,
    Processes,
    Quiet,
    Sparse,
    label_values,
)
from mlbseg.cli.ending import finish
from mlbseg.cli.printing import progress_console
from mlbseg.terminal import plain


def check(
    data: Data,
    labels: Labels = None,
    patient: Patient = None,
    allow_empty: AllowEmpty = False,
    ignore: Ignore = None,
    sparse: Sparse = False,
    outside_unknown: OutsideUnknown = False,
    cache: Cache = None,
    processes: Processes = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Read every scan and label once and report all faults together."""
    from mlbseg.checking import check as run_check
    from mlbseg.progress import StepProgress

    with StepProgress(progress_console(quiet or as_json), "reading", 0) as progress:
        result = run_check(
            data, labels=label_values(labels), patient=patient, allow_empty=allow_empty, ignore=ignore, sparse=sparse,
            outside_unknown=outside_unknown, cache=cache,
            processes=processes, progress=lambda done, total: progress.update(done, total=total),
        )  # fmt: skip
    cases = any(fault.case_id is not None for fault in result.faults)
    finish(
        result.as_dict(), as_json=as_json, tables=[_table(result.summary, str(data))], notes=result.warnings,
        lines=[] if result.faults else ["no faults"], faults=result.faults, where=str(data),
        advice="correct them, or pass --skip-bad to train without these cases" if cases else "correct them",
    )  # fmt: skip


def _table(summary: dict[str, Any], title: str) -> Table:
    table = Table("", "", title=plain(title), show_header=False, title_justify="left")
    rows = {
        "layout": summary["layout"],
        "scans": f"{summary['cases']} ({_counts(summary['roles'])})",
        "patients": (summary["patients"] or {}).get("words"),
        "channels": ", ".join(map(str, summary["channels"])),
        "label values": ", ".join(f"{value} in {n} scans" for value, n in summary["labels"].items()),
        "unknown": _unknown(summary),
        "not all classes": f"{summary['partly_labelled']} labels" if summary["partly_labelled"] else "",
        "class names": ", ".join(f"{value}: {name}" for value, name in summary["class_names"].items()),
        "size (x, y, z)": _ranges(summary.get("size", {})),
        "spacing in mm": _ranges(summary.get("spacing", {})),
    }
    for name, value in rows.items():
        if value:
            table.add_row(name, plain(value))
    return table


def _unknown(summary: dict[str, Any]) -> str:
    """Say how many labels leave voxels open, and how many known voxels they have of each value."""
    if not summary["unknown"]:
        return ""
    known: dict[str, int] = {}
    for entry in summary["per_case"]:
        if entry["unknown"]:
            for value, count in entry["labels"].items():
                known[value] = known.get(value, 0) + count
    listed = ", ".join(f"{value}: {known[value]}" for value in sorted(known, key=int))
    share = f"{1 - summary['known_share']:.3g} of the voxels of {summary['unknown']} labels"
    return f"{share} (known voxels by label value: {listed})"


def _counts(numbers: dict[str, int]) -> str:
    return ", ".join(f"{n} {name}" for name, n in numbers.items() if n)


def _ranges(by_dimension: dict[str, dict[str, list[float]]]) -> str:
    def shown(values: list[float]) -> str:
        return " × ".join(f"{value:.4g}" for value in values)

    return "; ".join(
        f"{name} {shown(r['median'])}"
        + (f" ({shown(r['min'])} to {shown(r['max'])})" if r["min"] != r["max"] else "")
        for name, r in by_dimension.items()
    )
