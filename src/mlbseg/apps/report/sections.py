"""The parts of a run's page that come from its folder alone: data, plan, time, settings, audit."""

from __future__ import annotations

import csv
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from markupsafe import Markup

from mlbseg.apps.report.page import Cell, Section, number, paragraphs, table, terms
from mlbseg.apps.report.weights import snapshots, strips
from mlbseg.data.records import read_record
from mlbseg.errors import UserError
from mlbseg.methods import find_method
from mlbseg.runs import ENVIRONMENT, Run
from mlbseg.runs.starting import StartRecord

PARTS = {
    "clean": "trained on with a careful label",
    "noisy": "trained on with an unverified label",
    "unlabelled": "trained on without a label",
    "validation": "chose the checkpoint",
    "test": "never seen by training",
}
MOST_AUDITED = 10
"""Rows of the audit's table that are shown; the audit's own page has all."""

WORDS = ("case", "role")
"""Columns of the audit's table that are no numbers, even where they look like one: a case may be called 001."""


def data_section(run: Run) -> Section:
    """Return what was trained on what."""
    record = run.data
    parts: Mapping[str, Any] = run.split.as_dict()
    rows: list[list[Cell | str | Markup]] = [
        [part, words, Cell(str(len(parts[part])), len(parts[part])), _ids(parts[part])]
        for part, words in PARTS.items()
    ]  # fmt: skip
    facts = {"folder": Path(record.root).name, "seed of the split": run.split.seed}
    if record.skipped:
        facts["left out for their faults"] = ", ".join(record.skipped)
    headings = ["part", "what it is for", "cases", "which"]
    return Section(
        "Data",
        table(headings, rows, caption="The split of the cases.", sortable=False) + terms(facts),
        run.split.rule,
    )


def plan_section(run: Run) -> Section:
    """Return every decision with its reason."""
    plan = run.plan.as_dict()
    rows = [
        [name.replace("_", " "), _value(value), plan["reasons"].get(name, "")]
        for name, value in plan.items()
        if name != "reasons"
    ]
    headings = ["what", "decided", "why"]
    caption = "Axes are in array order; spacings in mm."
    return Section("Plan", table(headings, rows, caption=caption, sortable=False))


def start_section(run: Run) -> Section | None:
    """Return where the first weights came from, and what became of them; None for a run that drew them."""
    record = StartRecord.read(run.root)
    if record is None:
        return None
    facts = {"from": record.source, "kind": record.kind, "file": record.file, "sha256": record.sha256}
    rows: list[list[Cell | str | Markup]] = [
        [word, Cell(str(count), count), which] for word, count, which in record.fitted.rows()
    ]
    body = terms(facts) + table(
        ["weights", "tensors", "which"], rows, caption="What became of them.", sortable=False
    )
    return Section("Starting weights", body + paragraphs(*record.notes) if record.notes else body)


def machine_section(run: Run) -> Section:
    """Return time, memory, environment and settings."""
    environment = read_record(run.root / ENVIRONMENT, "the environment of a run")
    result = run.result
    pace, peak = result.seconds_per_step, result.peak_memory_bytes
    versions = environment.get("versions")
    facts = {
        "seconds per step of the last stage": "–" if pace is None else f"{pace:.3g}",
        "peak memory": "–" if peak is None else f"{peak / 2**30:.2f} GiB",
        "steps": result.steps,
        "device": environment.get("device"),
        "GPU": environment.get("gpu") or "none",
        "processor": environment.get("processor"),
        "threads": environment.get("threads"),
        "bfloat16": "yes" if environment.get("bf16") else "no",
        **(versions if isinstance(versions, dict) else {}),
    }
    record = run.config.as_record()
    if record["train"]["init"] is not None:
        record["train"]["init"] = _bare(record["train"]["init"])
    settings = yaml.safe_dump(record, sort_keys=False)
    body = terms(facts) + Markup(
        "<p>Command: <code>{}</code></p><details><summary>All settings (config.yaml)</summary><pre>{}</pre></details>"
    ).format(_command(environment.get("command")), settings)
    return Section("Time, memory and environment", body)


def weights_section(run: Run) -> Section | None:
    """Return how the weight maps changed, or why there are none; None for a method without weights."""
    files = snapshots(run.root / "weights")
    if not files:
        name = run.config.method
        why = find_method(name).why_no_weights(run.config.of(name), noisy=bool(run.split.noisy))
        return None if why is None else Section("Weight maps", paragraphs(why))
    try:
        body = strips(files)
    except UserError as error:
        body = paragraphs(str(error))
    return Section(
        "Weight maps",
        body,
        "How far each pixel of one patch was followed: bright where its label counts for more.",
    )


def audit_section(run: Run) -> Section | None:
    """Return the top of the audit's table; None for a run that was not audited."""
    path = run.root / "audit" / "cases.csv"
    if not path.is_file():
        return None
    try:
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            names, rows = (
                list(reader.fieldnames or ()),
                [row for _, row in zip(range(MOST_AUDITED), reader, strict=False)],
            )
        if "case" not in names or any(None in row or None in row.values() for row in rows):
            raise ValueError
    except (OSError, ValueError, csv.Error):
        text = f"{path.name} of the audit is damaged, expected a line for each case (run mlbseg audit again)."
        return Section("Audit", paragraphs(text))
    names.sort(key=lambda name: name != "case")
    cells = [[Cell(row[name]) if name in WORDS else _audited(row[name]) for name in names] for row in rows]
    return Section(
        "Audit", table(names, cells, caption=f"The first {len(rows)} rows of audit/cases.csv."),
        "Labels that mlbseg audit trusts least.",
    )  # fmt: skip


def _audited(text: str) -> Cell:
    try:
        return number(float(text), 0 if text.lstrip("-").isdecimal() else 3)
    except ValueError:
        return Cell(text)


def _ids(names: Any) -> Markup:
    listed = ", ".join(names)
    if len(names) <= 6:
        return Markup("{}").format(listed or "–")
    return Markup("<details><summary>show</summary>{}</details>").format(listed)


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple):
        return ", ".join(_value(v) for v in value) or "–"
    if isinstance(value, dict):
        return ", ".join(f"{k} {_value(v)}" for k, v in value.items())
    return f"{value:.5g}" if isinstance(value, float) else str(value)


def _command(command: Any) -> str:
    """Return what was typed, without the folders of this machine."""
    return " ".join(_bare(str(word)) for word in command) if isinstance(command, list) else ""


def _bare(word: str) -> str:
    """Return a word of which a path, or the path in ``name=path``, is cut to its last component."""
    name, equals, value = word.partition("=")
    if not equals or "/" in name or "\\" in name:
        name, equals, value = "", "", word
    if re.fullmatch(r"\d+/\d+", value):  # a share such as 1/4
        return word
    return name + equals + re.split(r"[/\\]", value.rstrip("/\\"))[-1]
