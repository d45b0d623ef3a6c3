"""The table as Markdown and on a terminal, and the figure."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure
from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from mlbseg.bench import statistics
from mlbseg.bench.results import Results, parts, write_csvs
from mlbseg.data.plan import Plan
from mlbseg.files import write_atomic

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
"""Of Okabe and Ito, told apart by people with the common colour-vision deficiencies; yellow is too pale for a line."""
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">")
SELECTION = "the weights of the last step; no case chose anything"


def write_tables(folder: Path, results: Results) -> None:
    """Write cells.csv, cases.csv, table.md and the figure, each whole or not at all.

    Raises:
        UserError: if one cannot be written.
    """
    write_csvs(folder, results)
    write_atomic(folder / "table.md", markdown(results).encode())
    figure = draw(results)
    for kind in ("png", "svg"):
        content = io.BytesIO()
        # No date and a fixed salt: the same figures, the same file.
        with mpl.rc_context({"svg.hashsalt": "mlbseg"}):
            figure.savefig(
                content,
                format=kind,
                dpi=150,
                bbox_inches="tight",
                metadata={"Date": None} if kind == "svg" else None,
            )
        write_atomic(folder / f"figure.{kind}", content.getvalue())


def markdown(results: Results) -> str:
    """Return the tables of all budgets, with all that is needed to judge them."""
    setup = results.setup
    plan = Plan.from_dict(setup.plan)
    done = [row for row in results.cells if row["status"] == "done"]
    hardware = sorted({f"{r['processor']} ({r['device']}, {r['threads']} thread(s))" for r in done})
    lines = [
        "# Bench",
        "",
        *(f"    {command}" for command in setup.commands),
        "",
        f"* Cases: {setup.rule} {len(setup.test)} test cases, {len(setup.scored)} of them scored; up to "
        f"{len(setup.clean)} labels. Test cases and the first labels are the same in all cells; a seed changes the "
        "initial weights and all draws.",
        f"* All cells: {plan.ndim}D {plan.network} {list(plan.network_channels)}, patches of "
        f"{' × '.join(map(str, plan.patch_size))}, spacing {' × '.join(f'{s:.4g}' for s in plan.spacing)} mm, "
        f"{plan.steps} steps, {plan.batch_size} labelled and {plan.unlabelled_batch_size} unlabelled patches a step.",
        f"* Weights: {SELECTION}. Test labels were looked at for faults at the beginning, and scored when a "
        "cell was finished.",
        f"* Hardware: {'; '.join(hardware) or 'none yet'}.",
        f"* Seeds: {', '.join(map(str, sorted({cell.seed for cell in setup.cells})))}.",
        f"* Cells: {len(done)} of {len(results.cells)} done.",
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
    lines += [
        "Dice is the mean over test cases of each case's mean over classes; ± is the sample SD over seeds. A "
        "difference is paired: each case's Dice averaged over the seeds that both rows have; its interval is the "
        f"bootstrap's over cases ({statistics.RESAMPLES:,} resamples), which says nothing about other seeds. 95HD "
        "leaves out cases that have none (their number in brackets). Gap closed: of the gap between supervised with "
        "these and with all labels. Time per step is of the last stage (of semi-supervised methods the second), "
        "relative to supervised with the same labels. Memory is the peak of the last stage's process, or of the GPU.",
        "",
    ]
    if results.failed:
        lines += ["## Failed", ""]
        lines += [
            f"* {_cell(row['row'])}, {row['labelled']} labels, seed {row['seed']}: {_cell(row['reason'])}"
            for row in results.failed
        ]
        lines.append("")
    return "\n".join(lines)


def _cell(text: str) -> str:
    """Return text that no Markdown reads as a table's edge."""
    return text.replace("\\", "\\\\").replace("|", "\\|").replace("\n", " ")


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
            table.add_row(*map(escape, row))
        made.append(table)
    return made


def draw(results: Results) -> Figure:
    """Draw Dice against the number of labels, a line for each row, SD over seeds as bars, the upper bound dashed."""
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axis = figure.subplots()
    rows = list(results.setup.rows)
    drawn: list[Any] = []
    for slug in results.slugs():
        points = [
            (budget, dice)
            for budget in results.budgets
            if (group := results.groups.get((slug, budget))) and (dice := statistics.of_seeds(group.dice))
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
    upper = statistics.of_seeds(results.upper.dice) if results.upper else None
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
    axis.set_ylabel("Dice, mean over test cases (± SD over seeds)")
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis="y", color="#dddddd", linewidth=0.6)
    if drawn:
        legend = figure.legend(handles=drawn, loc="outside right upper", frameon=False, fontsize=8)
        for text in legend.get_texts():
            text.set_parse_math(False)  # a label is anyone's text
    return figure
