"""What all cells of a bench share: decided once, written down, and held to when the bench goes on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
import yaml
from pydantic import ConfigDict, TypeAdapter
from rich.console import Console

from mlbseg.bench.cells import FIXED, STAGE1, SUPERVISED, Cell, Row, cells_of, in_order
from mlbseg.config import Config, config_of, load_config, parse_override
from mlbseg.data.cache import Cache, default_cache_root
from mlbseg.data.cases import Dataset, find_cases
from mlbseg.data.check import CheckResult, check, unknown_values
from mlbseg.data.fingerprint import fingerprint
from mlbseg.data.plan import Plan, make_plan
from mlbseg.data.records import read_record, validate, write_record
from mlbseg.data.splits import Split, apply_split, make_split
from mlbseg.errors import FaultsError, UserError
from mlbseg.files import write_atomic
from mlbseg.methods import METHODS, find_method
from mlbseg.progress import StepProgress
from mlbseg.run import available_memory
from mlbseg.training import stage1_settings
from mlbseg.training.lock import locked
from mlbseg.training.prepare import require_cases, views_of
from mlbseg.types import Role

RECORD = "bench.json"
SETTINGS = "settings.yaml"
LOCK = ".lock"
INITIALISER = next(name for name, kind in METHODS.items() if kind.needs_initial_labels)
"""Of the runs that hold the shared stage 1: any method that begins with one and has initial labels."""


@dataclass(frozen=True)
class Setup:
    """The record of a bench.

    Attributes:
        data: The data set.
        cache: Where prepared scans are kept.
        split_seed: Of the shuffle by which the cases were divided.
        rule: How they were divided, in a sentence.
        clean: Cases whose label training may be given, in the order in which budgets count.
        test: Cases that are set apart.
        scored: Those of them that have a label.
        asked: The settings that were asked for, for all cells.
        plan: What was decided for all cells.
        rows: The rows by slug.
        cells: Row, budget and seed of each cell that was ever asked for, in the order to run them.
        commands: The commands that asked.
        labels: The label values that were named, none of them if none were; None if nobody wrote that down, as in
            folders of earlier versions. So too the next two.
        noisy: Cases whose label came with them and is not trusted.
        unlabelled: Cases without a label.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    data: str
    cache: str
    split_seed: int
    rule: str
    clean: tuple[str, ...]
    test: tuple[str, ...]
    scored: tuple[str, ...]
    asked: dict[str, Any]
    plan: dict[str, Any]
    rows: dict[str, Row] = field(default_factory=dict)
    cells: tuple[Cell, ...] = ()
    commands: tuple[str, ...] = ()
    labels: tuple[int, ...] | None = None
    noisy: tuple[str, ...] | None = None
    unlabelled: tuple[str, ...] | None = None

    @classmethod
    def read(cls, folder: Path) -> Setup:
        """Read the record of a bench's folder.

        Raises:
            UserError: if it is missing or damaged.
        """
        path = folder / RECORD
        return validate(TypeAdapter(cls), read_record(path, "the record of a bench"), str(path))

    def write(self, folder: Path) -> None:
        """Write the record, whole or not at all."""
        write_record(folder / RECORD, asdict(self))

    def config(self, folder: Path, cell: Cell) -> Config:
        """Return the settings of a cell: those of the bench, with the plan pinned, and those of its row."""
        if cell.row == STAGE1:
            row = Row(STAGE1, INITIALISER)
        elif cell.budget is None:
            # Nothing here has weights to decide: all labels are learnt from.
            row = Row(SUPERVISED, SUPERVISED, ("train.meta_cases=0",))
        else:
            row = self.rows[cell.row]
        return load_config(folder / SETTINGS, overrides=row.overrides, method=row.method, seed=cell.seed)

    def split(self, cell: Cell, dataset: Dataset) -> Split:
        """Return the split of a cell, which is that of `mlbseg train` with the same cases named."""
        return make_split(
            dataset.cases,
            order=dataset.order,
            labelled=self.clean[: cell.budget],
            test=self.test,
            seed=cell.seed,
        )

    def shares_stage1(self, row: Row) -> bool:
        """Return whether a row begins with the stage 1 that the rows share."""
        return _shares(row, config_of(self.asked))

    def needs_stage1(self, cell: Cell) -> bool:
        """Return whether a cell begins with the stage 1 of its budget and seed."""
        return cell.budget is not None and cell.row != STAGE1 and self.shares_stage1(self.rows[cell.row])


@dataclass(frozen=True)
class Request:
    """What a command asks of a bench.

    Attributes:
        data: The data set.
        rows: Methods and variants.
        budgets: Numbers of labels.
        seeds: The seeds.
        test: How many or which cases to set apart.
        split_seed: Of the shuffle of the cases.
        upper: Also train with all labels.
        labels: Label values that may occur.
        config: The settings of all cells.
        cache: Where prepared scans are kept.
        command: As typed.
    """

    data: Path
    rows: Sequence[Row]
    budgets: Sequence[int]
    seeds: Sequence[int]
    test: int | Sequence[str]
    split_seed: int
    upper: bool
    labels: Sequence[int] | None
    config: Config
    cache: Path | None
    command: str


def load_settings(path: Path | None, preset: str | None, overrides: Sequence[str]) -> Config:
    """Return the settings of all cells. A file may be a run's config.yaml: its method and seed do not count.

    Raises:
        UserError: for what `load_config` refuses, and for overrides of what the table's axes set.
    """
    for item in overrides:
        key, _ = parse_override(item)
        if key in FIXED:
            raise UserError(f"-o {item}: the table's cells have their own (use --{key}s)")
    config = load_config(path, preset=preset, overrides=overrides)
    return config.model_copy(update={name: Config.model_fields[name].default for name in FIXED})


def begin(folder: Path, request: Request, device: torch.device, console: Console | None) -> Setup:
    """Begin a bench in a new folder, or add to one what it lacks of what is asked.

    Args:
        folder: Of the bench.
        request: What is asked.
        device: That a step is planned for.
        console: Where progress is shown.

    Returns:
        The record, with all cells that were ever asked for.

    Raises:
        UserError: if the folder holds something else, or was begun with other data, cases or settings; if what is
            asked cannot be. Nothing is changed then.
    """
    existing = _existing(folder)
    dataset = find_cases(request.data)
    wide = make_split(dataset.cases, order=dataset.order, test=request.test, seed=request.split_seed)
    fresh = _facts(request, dataset, wide)
    if existing is not None:
        _require_same(folder, existing, fresh, names_cache=request.cache is not None)
        _require_planned(existing, request)
    for budget in request.budgets:
        if not 1 <= budget <= len(fresh.clean):
            raise UserError(
                f"--labelled: found {budget}, expected 1 to {len(fresh.clean)}, the cases with a careful label that "
                "are not set apart for testing"
            )
    added = {row.slug: row for row in request.rows}
    if existing is not None:
        for name in added.keys() & existing.rows.keys():
            if existing.rows[name] != added[name]:
                raise UserError(
                    f"{folder}: {added[name].label!r} was {_shown(existing.rows[name])}, found "
                    f"{_shown(added[name])} (give the new one another label)"
                )
    share = [row.slug for row in request.rows if _shares(row, request.config)]
    rows = {**({} if existing is None else existing.rows), **added}
    asked = cells_of(request.rows, request.budgets, request.seeds, upper=request.upper, share=share)
    cells = in_order(asked, list(rows))
    for cell in cells:
        if cell.seed == request.seeds[0] and cell.row != STAGE1 and cell.budget is not None:
            # Of all rows before anything is trained, and not of the last one after a week.
            row = rows[cell.row]
            config = _with_row(request.config, row)
            require_cases(request.data, config, fresh.split(cell, dataset))
    if existing is not None and _widest(existing.cells, wide) < _widest(cells, wide):
        _check(request, dataset, wide, Plan.from_dict(existing.plan).label_values, console)
    if existing is None:
        fresh = replace(fresh, plan=_decide(request, dataset, wide, device, console).as_dict())
    _make(folder)
    with locked(folder / LOCK, f"{folder}: another bench is just beginning there (start this one again)"):
        existing = Setup.read(folder) if (folder / RECORD).exists() else None
        if existing is None:
            settings = _pinned(request.config, Plan.from_dict(fresh.plan))
            text = yaml.safe_dump(settings.model_dump(mode="json"), sort_keys=False)
            write_atomic(folder / SETTINGS, text.encode())
        else:
            _require_same(folder, existing, fresh, names_cache=request.cache is not None)
            _require_planned(existing, request)
            fresh = existing
        record = replace(
            fresh,
            rows={**fresh.rows, **added},
            cells=tuple(in_order({*fresh.cells, *cells}, [*fresh.rows, *added])),
            commands=tuple(dict.fromkeys((*fresh.commands, request.command))),
        )
        if record != existing:
            record.write(folder)
    return record


def _existing(folder: Path) -> Setup | None:
    """Return the record of a folder that holds a bench; None of one that is free."""
    if (folder / RECORD).is_file():
        return Setup.read(folder)
    try:
        names = {path.name for path in folder.iterdir()}
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(f"{folder}: cannot be looked into: {error.strerror}") from None
    # Of a bench that was killed at its beginning. The lock is made first: without it, the settings are the user's.
    parts = (SETTINGS, f".{SETTINGS}.", f".{RECORD}.")  # and what writing them leaves behind
    ours = {name for name in names if name == LOCK or (LOCK in names and name.startswith(parts))}
    if others := names - ours:
        raise UserError(
            f"{folder}: holds something else than a bench, such as {sorted(others)[0]} (choose another --out)"
        )
    return None


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"{folder}: cannot be made a folder for the bench: {error.strerror or error}"
        ) from None


def _facts(request: Request, dataset: Dataset, wide: Split) -> Setup:
    """Return the record of what is asked, with no plan yet."""
    by_id = {case.id: case for case in dataset.cases}
    scored = tuple(name for name in wide.test if by_id[name].label is not None)
    if not scored:
        raise UserError(
            "no test case has a label, so nothing could be scored (set cases apart with --test, such as --test 10)"
        )
    cache = request.cache if request.cache is not None else default_cache_root()
    return Setup(
        data=str(request.data.resolve()),
        cache=str(Path(cache).resolve()),
        split_seed=request.split_seed,
        rule=wide.rule,
        clean=wide.clean,
        test=wide.test,
        scored=scored,
        asked=request.config.model_dump(mode="json"),
        plan={},
        labels=tuple(sorted(set(request.labels or ()))),
        noisy=wide.noisy,
        unlabelled=wide.unlabelled,
    )


def _require_same(folder: Path, begun: Setup, asked: Setup, *, names_cache: bool) -> None:
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
    if begun.labels is not None and begun.labels != asked.labels:
        found, expected = (
            " ".join(map(str, values)) if values else "none" for values in (asked.labels, begun.labels)
        )
        lines.append(f"--labels: found {found}, expected {expected}")
    if names_cache and begun.cache != asked.cache:
        lines.append(f"--cache: found {asked.cache}, expected {begun.cache}")
    before, now = (dict(_flat(config_of(record.asked).model_dump(mode="json"))) for record in (begun, asked))
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


def _require_planned(begun: Setup, request: Request) -> None:
    """Refuse a budget below those that the plan was made for: it rests on facts of labels that the budget lacks.

    Raises:
        UserError: naming both.
    """
    planned = min(cell.budget for cell in begun.cells if cell.budget is not None)
    if min(request.budgets) < planned:
        raise UserError(
            f"--labelled: found {min(request.budgets)}, but this bench was planned from {planned} labels "
            "(choose another --out, and name the smallest budget first)"
        )


def _flat(record: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    pairs: list[tuple[str, Any]] = []
    for key, value in record.items():
        nested = isinstance(value, Mapping) and prefix == ""
        pairs += _flat(value, f"{key}.") if nested else [(f"{prefix}{key}", value)]
    return pairs


def _names(ids: Sequence[str]) -> str:
    return f"{len(ids)} ({', '.join(ids[:3])}{', ...' if len(ids) > 3 else ''})"


def _changes(before: Sequence[str], now: Sequence[str]) -> str:
    changes = {"new": sorted(set(now) - set(before)), "missing": sorted(set(before) - set(now))}
    return ", ".join(f"{word} {_names(ids)}" for word, ids in changes.items() if ids)


def _shown(row: Row) -> str:
    return " ".join((row.method, *row.overrides))


def _with_row(config: Config, row: Row) -> Config:
    """Return the settings of a row from those of all rows."""
    data = config.model_dump(mode="json")
    for item in row.overrides:
        key, value = parse_override(item)
        section, _, name = key.partition(".")
        data[section][name] = value
    return load_config(**{**data, "method": row.method})


def _shares(row: Row, config: Config) -> bool:
    """Return whether a row has a stage 1, and nothing of its own in it."""
    own = _with_row(config, row)
    return find_method(row.method).uses_unlabelled and stage1_settings(own) == stage1_settings(config)


def _widest(cells: Sequence[Cell], wide: Split) -> int:
    """Return how many labels are given to the cell that is given most."""
    return max(len(wide.clean) if cell.budget is None else cell.budget for cell in cells)


def _check(
    request: Request, dataset: Dataset, wide: Split, labels: Sequence[int] | None, console: Console | None
) -> tuple[CheckResult, Split]:
    """Check all that any cell will read, and return what was found and the split of the largest budget.

    Raises:
        FaultsError: for faults of the data.
    """
    most = len(wide.clean) if request.upper else max(request.budgets)
    widest = make_split(
        dataset.cases,
        order=dataset.order,
        labelled=wide.clean[:most],
        test=wide.test,
        seed=request.split_seed,
    )
    by_id = {case.id: case for case in dataset.cases}
    # Test labels are looked at for faults, which had better be known before training than after it, and for no more.
    seen = [
        replace(case, label=by_id[case.id].label) if case.role is Role.TEST else case
        for case in apply_split(dataset.cases, widest)
    ]
    kept = replace(dataset, cases=tuple(seen))
    with StepProgress(console, "checking the scans", len(kept.cases)) as progress:
        result = check(kept, labels=labels, progress=lambda done, _: progress.update(done))
    if result.faults:
        raise FaultsError(result.faults, str(request.data), "fix them, or take these cases out of the data")
    return result, widest


def _decide(
    request: Request, dataset: Dataset, wide: Split, device: torch.device, console: Console | None
) -> Plan:
    """Check all that any cell will read, decide what all cells share, and prepare the scans.

    The facts are those of the smallest budget: nothing that all cells share may rest on labels that some of them
    must not see. Only which values stand for classes is read from all labels: that is the task.

    Raises:
        UserError: for faults of the data, and settings that contradict each other.
    """
    labels = request.labels if request.config.plan.label_values is None else request.config.plan.label_values
    result, widest = _check(request, dataset, wide, labels, console)
    names = dataset.class_names
    if labels is None and not names:
        found = [entry["labels"] for entry in result.summary["per_case"] if entry["id"] in widest.clean]
        labels = sorted({int(value) for values in found for value in values})
        # The other labels cannot add a class.
        if faults := unknown_values(result, widest.clean):
            raise FaultsError(faults, str(request.data), "correct them, or name all values with --labels")
    if labels is not None:
        names = {value: names.get(value, f"label {value}") for value in labels if value or value in names}
    narrow = make_split(
        dataset.cases,
        order=dataset.order,
        labelled=wide.clean[: min(request.budgets)],
        test=wide.test,
        seed=request.split_seed,
    )
    cases = {case.id: case for case in apply_split(dataset.cases, narrow)}
    training = [cases[i] for i in (*narrow.clean, *narrow.noisy, *narrow.unlabelled)]
    with StepProgress(console, "measuring the scans", len(training)) as progress:
        facts = fingerprint(training, progress=lambda done, _: progress.update(done))
    plan = make_plan(
        facts,
        class_names=names,
        memory_bytes=available_memory(device),
        device=device.type,
        views=max(views_of(_with_row(request.config, row)) for row in request.rows),
        overrides=request.config.plan.model_dump(exclude_none=True),
    )
    root = request.cache if request.cache is not None else default_cache_root()
    cache = Cache(Path(root), plan)
    used = [case for case in result.dataset.cases if case.role is not Role.TEST]
    # Here and not in the cells: the first of them would pay for all, in time and in memory.
    with StepProgress(console, "preprocessing", len(used)) as progress:
        for number, case in enumerate(used, start=1):
            cache.image(case)
            if case.role in (Role.CLEAN, Role.NOISY):
                cache.label(case)
            progress.update(number, {"case": case.id})
    return plan


def _pinned(config: Config, plan: Plan) -> Config:
    """Return the settings with every decision of the plan in them."""
    data = config.model_dump(mode="json")
    decided = TypeAdapter(Plan).dump_python(plan, mode="json")
    data["plan"] = {
        # A plan may do without these, which no setting says.
        name: decided[name] or None if name in ("unlabelled_batch_size", "intensity") else decided[name]
        for name in data["plan"]
    }
    return load_config(**data)
