"""The table as Markdown and on a terminal, and the figure."""

from __future__ import annotations

import base64
import io
import re
from pathlib import Path
from typing import Any

import matplotlib as mpl
from markupsafe import Markup
from matplotlib.figure import Figure
from rich.box import SIMPLE_HEAD
from rich.table import Table

from mlbseg.apps.bench import statistics
from mlbseg.apps.bench.results import Results, parts, write_csvs
from mlbseg.apps.report.page import Cell, Section, paragraphs, render_page, table, write_page
from mlbseg.data.plan import Plan
from mlbseg.files import write_atomic
from mlbseg.terminal import plain

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
"""Of Okabe and Ito, told apart by people with the common colour-vision deficiencies; yellow is too pale for a line."""
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">")
SELECTION = "final weights (no validation set)"


EXPLAINED = (
    "Dice is the mean over test cases of each case's mean over classes; ± is the sample SD over runs (label sets and "
    "seeds). A difference is paired, case by case in each run that both rows have; its interval is that of a mixed "
    "model, over cases and label sets (over cases and seeds with one label set, over cases alone with one run). 95HD "
    "leaves out cases that have none (their number in brackets). Best other: the row with the highest Dice but for the "
    "line itself. Gap closed: of the gap between supervised with these and with all labels. Time per step is of the "
    "last stage (of semi-supervised methods the second), relative to supervised with the same labels; hours are of "
    "that stage as a whole. Memory is the peak of the last stage's process, or of the GPU."
)


def write_tables(folder: Path, results: Results) -> None:
    """Write cells.csv, cases.csv, table.md, the figure and report.html, each whole or not at all.

    Raises:
        UserError: if one cannot be written.
    """
    write_csvs(folder, results)
    write_atomic(folder / "table.md", markdown(results).encode(errors="backslashreplace"))
    figure = draw(results)
    pictures = {kind: _picture(figure, kind) for kind in ("png", "svg")}
    for kind, content in pictures.items():
        write_atomic(folder / f"figure.{kind}", content)
    write_page(folder / "report.html", page(results, pictures["svg"]))


def _picture(figure: Figure, kind: str) -> bytes:
    content = io.BytesIO()
    # No date and a fixed salt: the same figures, the same file.
    metadata = {"Date": None} if kind == "svg" else None
    with mpl.rc_context({"svg.hashsalt": "mlbseg"}):
        figure.savefig(content, format=kind, dpi=150, bbox_inches="tight", metadata=metadata)
    return content.getvalue()


def markdown(results: Results) -> str:
    """Return the tables of all budgets, with all that is needed to judge them."""
    lines = [
        "# Bench",
        "",
        *(f"    {command}" for command in results.setup.commands),
        "",
        *(f"* {name}: {text}" for name, text in conditions(results).items()),
        "",
    ]
    for budget in results.budgets:
        headings, rows = parts(results, budget)
        lines += [
            f"## {budget} labels",
            "",
            f"| {' | '.join(headings)} |",
            f"|{'---|' * len(headings)}",
            *(f"| {' | '.join(_cell(text) for text in row)} |" for row in rows),
            "",
        ]
    lines += [EXPLAINED, ""]
    if results.failed:
        lines += ["## Failed", ""]
        lines += [
            f"* {_cell(row['row'])}, {row['labelled']} labels, seed {row['seed']}: {_cell(row['reason'])}"
            for row in results.failed
        ]
        lines.append("")
    return "\n".join(lines)


def conditions(results: Results) -> dict[str, str]:
    """Return what all cells share and what is needed to judge them, by what it is about."""
    setup = results.setup
    plan = Plan.from_dict(setup.plan)
    done = [row for row in results.cells if row["status"] == "done"]
    hardware = sorted({f"{r['processor']} ({r['device']}, {r['threads']} thread(s))" for r in done})
    return {
        "Cases": f"{setup.rule} {len(setup.test)} test cases, {len(setup.scored)} of them scored; up to "
        f"{len(setup.clean)} labels. Test cases are the same in all cells; a label set is which scans are labelled; a "
        "seed changes the initial weights and all draws.",
        "All cells": f"{plan.ndim}D {plan.network} {list(plan.network_channels)}, patches of "
        f"{' × '.join(map(str, plan.patch_size))}, spacing {' × '.join(f'{s:.4g}' for s in plan.spacing)} mm, "
        f"{plan.steps} steps, {plan.batch_size} labelled and {plan.unlabelled_batch_size} unlabelled patches a step.",
        "Weights": f"{SELECTION}. Test labels were looked at for faults at the beginning, and scored when a "
        "cell was finished.",
        "Hardware": f"{'; '.join(hardware) or 'none yet'}.",
        "Seeds": f"{', '.join(map(str, sorted({cell.seed for cell in setup.cells})))}.",
        "Label sets": f"{', '.join(map(str, sorted({c.label_seed for c in setup.cells})))} (0: the first scans of the "
        "order; the plan rests on those of set 0).",
        "Cells": f"{len(done)} of {len(results.cells)} done.",
    }


def _cell(text: str) -> str:
    """Return text that no Markdown reads as a table's edge."""
    return text.replace("\\", "\\\\").replace("|", "\\|").replace("\n", " ")


def page(results: Results, figure: bytes) -> str:
    """Return the tables, the figure and what failed as one HTML page.

    Args:
        results: All that is known.
        figure: `draw`, as SVG.
    """
    setup = results.setup
    sections = []
    for budget in results.budgets:
        headings, rows = parts(results, budget)
        caption = f"{len(setup.scored)} test cases, the best first; supervised with all labels last."
        cells = [[Cell(text, _leading(text) if i else None) for i, text in enumerate(row)] for row in rows]
        sections.append(Section(f"{budget} labels", table(headings, cells, caption=caption)))
    uri = f"data:image/svg+xml;base64,{base64.b64encode(figure).decode()}"
    alt = "Dice against the number of labels, a line for each row of the tables"
    picture = Markup('<div class="paper"><img src="{}" alt="{}"></div>').format(uri, alt)
    sections.append(Section("Dice by number of labels", picture))
    if results.failed:
        failed = [[r["row"], str(r["labelled"]), str(r["seed"]), r["reason"]] for r in results.failed]
        headings = ["row", "labels", "seed", "why"]
        sections.append(
            Section("Failed", table(headings, failed, caption="Cells without a result.", sortable=False))
        )
    about = [f"{name}: {text}" for name, text in conditions(results).items()]
    commands = Markup("<pre>{}</pre>").format("\n".join(setup.commands))
    sections.append(Section("How it was made", paragraphs(*about, EXPLAINED) + commands))
    done = sum(row["status"] == "done" for row in results.cells)
    facts = [
        ("cells done", f"{done} of {len(results.cells)}"),
        ("test cases scored", str(len(setup.scored))),
        ("rows", str(len(setup.rows))),
    ]
    return render_page(
        f"Bench on {Path(setup.data).name}", sections, subtitle=f"Weights: {SELECTION}.", facts=facts
    )


def _leading(text: str) -> float:
    """Return the number that a cell of the table begins with, to sort by; minus infinity of none."""
    found = re.match(r"[×+]?(-?\d+(?:\.\d+)?)", text)
    return float(found[1]) if found else float("-inf")


def tables(results: Results) -> list[Table]:
    """Return the table of each budget, for a terminal."""
    made = []
    for budget in results.budgets:
        headings, rows = parts(results, budget)
        # On two lines, and close together: nine columns are wide.
        table = Table(
            *(
                heading.replace(" [", "\n[")
                .replace(" (", "\n(")
                .replace("time ", "time\n")
                .replace("gap ", "gap\n")
                for heading in headings
            ),
            title=f"{budget} labels, {len(results.setup.scored)} test cases",
            title_justify="left",
            box=SIMPLE_HEAD,
            padding=0,
            show_edge=False,
        )
        for column in table.columns:
            column.no_wrap = True
        for column in table.columns[1:]:
            column.justify = "right"
        for row in rows:
            table.add_row(*map(plain, row))
        made.append(table)
    return made


def draw(results: Results) -> Figure:
    """Draw Dice against the number of labels, a line for each row, SD over runs as bars, the upper bound dashed."""
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axis = figure.subplots()
    rows = list(results.setup.rows)
    drawn: list[Any] = []
    for slug in results.slugs():
        points = [
            (budget, dice)
            for budget in results.budgets
            if (group := results.groups.get((slug, budget))) and (dice := statistics.of_runs(group.dice))
        ]
        if not points:
            continue
        number = rows.index(slug)  # a row keeps its colour when others overtake it
        # A little beside each other, so that bars at one budget do not hide one another.
        shift = 1 + 0.012 * (number - (len(rows) - 1) / 2)
        drawn.append(
            axis.errorbar(
                [budget * shift for budget, _ in points],
                [dice.mean for _, dice in points],
                yerr=[dice.sd or 0.0 for _, dice in points] if any(dice.sd for _, dice in points) else None,
                color=COLOURS[number % len(COLOURS)],
                marker=MARKERS[number % len(MARKERS)],
                linestyle="-" if number < len(COLOURS) else "-.",
                capsize=3,
                linewidth=1.5,
                label=results.setup.rows[slug].label,
            )
        )
    upper = statistics.of_runs(results.upper.dice) if results.upper else None
    if upper is not None:
        label = f"supervised, all {len(results.setup.clean)} labels"
        drawn.append(axis.axhline(upper.mean, color="#555555", linestyle="--", label=label))
        low, high = upper.mean - (upper.sd or 0.0), upper.mean + (upper.sd or 0.0)
        axis.axhspan(low, high, color="#555555", alpha=0.12, linewidth=0)
    axis.set_xscale("log")
    if results.budgets:
        axis.set_xlim(results.budgets[0] / 1.25, results.budgets[-1] * 1.25)
    axis.set_xticks(results.budgets, [str(budget) for budget in results.budgets])
    axis.set_xticks([], minor=True)
    axis.set_xlabel("labelled scans")
    axis.set_ylabel("Dice, mean over test cases (± SD over runs)")
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis="y", color="#dddddd", linewidth=0.6)
    if drawn:
        legend = figure.legend(handles=drawn, loc="outside right upper", frameon=False, fontsize=8)
        for text in legend.get_texts():
            text.set_parse_math(False)  # a label is anyone's text
    return figure
