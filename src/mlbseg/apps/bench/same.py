"""What a bench was begun with is held to when it goes on: cells that would not compare are not mixed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mlbseg.apps.bench.cells import Row
from mlbseg.apps.bench.record import Setup
from mlbseg.config import Config, config_of
from mlbseg.errors import UserError


def require_same(folder: Path, begun: Setup, asked: Setup, *, names_cache: bool) -> None:
    """Refuse to mix cells that would not compare.

    Args:
        folder: Of the bench.
        begun: Its record.
        asked: The record that the command would begin.
        names_cache: Whether the command says where prepared scans are kept. The user's cache folder, which it means
            otherwise, may be another on each machine that shares the bench, and none of them is asked for.

    Raises:
        UserError: naming what differs.
    """
    lines = []
    if begun.data != asked.data:
        lines.append(f"data: found {asked.data}, expected {begun.data}")
    if begun.split_seed != asked.split_seed:
        lines.append(f"--split-seed: found {asked.split_seed}, expected {begun.split_seed}")
    if set(begun.test) != set(asked.test):
        lines.append(f"test cases: found {_names(asked.test)}, expected {_names(begun.test)}")
    if not lines:
        if begun.clean != asked.clean:
            lines.append(
                f"labelled cases in their order: found {_names(asked.clean)}, expected {_names(begun.clean)}: "
                "the data have changed"
            )
        for name, before_ids, ids in (
            ("cases with a rough label", begun.noisy, asked.noisy),
            ("unlabelled cases", begun.unlabelled, asked.unlabelled),
        ):
            if before_ids is not None and ids is not None and set(before_ids) != set(ids):
                lines.append(f"{name}: {_changes(before_ids, ids)}: the data have changed")
    if begun.patients and asked.patients and begun.patients.groups != asked.patients.groups:
        lines.append(f"patients: found {asked.patients}, expected {begun.patients}")
    if begun.labels is not None and begun.labels != asked.labels:
        found, expected = (
            " ".join(map(str, values)) if values else "none" for values in (asked.labels, begun.labels)
        )
        lines.append(f"--labels: found {found}, expected {expected}")
    if begun.label_options != asked.label_options:
        found, expected = (", ".join(record.label_options.given()) or "none" for record in (asked, begun))
        lines.append(f"what is said of all labels: found {found}, expected {expected}")
    if names_cache and begun.cache != asked.cache:
        lines.append(f"--cache: found {asked.cache}, expected {begun.cache}")
    before, now = (_flat(_decided(config_of(record.asked))) for record in (begun, asked))
    lines += [f"{key}: found {now[key]}, expected {before[key]}" for key in before if before[key] != now[key]]
    if lines:
        raise UserError(
            "\n".join(
                [
                    f"{folder}: a bench that was begun otherwise",
                    *(f"  {line}" for line in lines),
                    "repeat what it was begun with (bench.json has the command), use --variant for a setting of one "
                    "row, or choose another --out",
                ]
            )
        )


def require_planned(begun: Setup, smallest: int) -> None:
    """Refuse a budget below those that the plan was made for: it rests on facts of labels that the budget lacks.

    Raises:
        UserError: naming both.
    """
    planned = min(cell.budget for cell in begun.cells if cell.budget is not None)
    if smallest < planned:
        raise UserError(
            f"--labelled: found {smallest}, but this bench was planned from {planned} labels "
            "(choose another --out, and name the smallest budget first)"
        )


def _decided(config: Config) -> dict[str, Any]:
    """Return the settings that results depend on."""
    return {**config.model_dump(mode="json"), "train": config.train.decided()}


def _flat(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return what sections hold beside what stands in none, each by its dotted name."""
    return {
        f"{key}.{name}" if name else key: found
        for key, value in record.items()
        for name, found in (value if isinstance(value, Mapping) else {"": value}).items()
    }


def _names(ids: Sequence[str]) -> str:
    return f"{len(ids)} ({', '.join(ids[:3])}{', ...' if len(ids) > 3 else ''})"


def _changes(before: Sequence[str], now: Sequence[str]) -> str:
    changes = {"new": sorted(set(now) - set(before)), "missing": sorted(set(before) - set(now))}
    return ", ".join(f"{word} {_names(ids)}" for word, ids in changes.items() if ids)


def shown(row: Row) -> str:
    """Return what a row is, as `--variant` has it."""
    return " ".join((row.method, *row.overrides))
