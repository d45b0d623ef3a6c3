"""A datalist: a CSV or JSON file that names each case's files, for data in no known layout."""

from __future__ import annotations

import csv
import os.path
import re
from collections import Counter
from pathlib import Path
from typing import Any

from mlbseg.data.layouts import Found, declared_labels
from mlbseg.data.places import unusable
from mlbseg.data.readers import plain, stem
from mlbseg.data.records import parse_json, read_text
from mlbseg.errors import Fault, UserError, brief, nearest
from mlbseg.types import Case, Known, Role

CLASSES = "classes.csv"
"""Beside the folders of a data set: which classes were drawn in which case, if not all."""
_COLUMNS = ("id", "image", "label", "role", "patient", "empty", "ignore", "sparse", "outside", "classes")
_OF_LABELS = ("label", "role", "empty", "ignore", "sparse", "outside", "classes")
_ANSWERS = {"yes": True, "true": True, "1": True, "no": False, "false": False, "0": False}
"""In the columns `empty` (a label without any structure is meant), `sparse` and `outside` (see `Known`)."""
_OUTSIDE = {"unknown": True, "background": False}
_IMAGE = re.compile(r"image(_\d{1,4})?", re.ASCII)
_EXPECTED = (
    "columns id, image (or image_0, image_1, ...), label, role, patient, empty, ignore, sparse, outside, classes, of "
    "which image is needed"
)


def read_datalist(path: Path, *, labels: bool = True) -> Found:
    """Read a CSV with a header line, or a JSON list of objects (or ``{"cases": [...], "labels": {...}}``).

    Relative paths start at the list's folder and must stay inside it, so that a list that came from elsewhere
    reads nothing else by accident; an absolute path is taken as it is, since it was written on purpose.

    Args:
        path: The list.
        labels: Whether the columns label and role are looked at.

    Raises:
        UserError: If the list as a whole cannot be used. What is wrong with one case is in `Found.faults`.
    """
    found = Found("datalist")
    try:
        text = read_text(path)
        rows = _json_rows(path, text, found) if path.suffix.lower() == ".json" else _csv_rows(text)
    except OSError as error:
        raise UserError(f"{path}: cannot be opened ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not a valid datalist ({error.reason}); save it as UTF-8") from None
    except (ValueError, csv.Error) as error:
        raise UserError(f"{path}: not a valid datalist ({error}); expected {_EXPECTED}") from None
    if not rows:
        raise UserError(f"{path}: no cases in it; expected {_EXPECTED}")
    known = {key for _, row in rows for key in row}
    if not any(_IMAGE.fullmatch(key) for key in known):
        raise UserError(
            f"{path}: found columns {', '.join(key[:40] for key in sorted(known)[:8])}; expected {_EXPECTED}"
        )
    for key in sorted(known):
        if key not in _COLUMNS and not _IMAGE.fullmatch(key):
            found.warnings.append(
                Fault(
                    path.name, f"column {brief(key)} is ignored", "", nearest(key, _COLUMNS), kind="ignored"
                )
            )
    for where, row in rows:
        if not labels:
            row = {key: value for key, value in row.items() if key not in _OF_LABELS}
        _add(found, path.parent, f"{path.name}, {where}", row)
    return found


def folder_has_classes(folder: Path) -> bool:
    """Say whether there is something by the name of `CLASSES` in a folder."""
    return (folder / CLASSES).is_symlink() or (folder / CLASSES).exists()


def read_classes(folder: Path) -> tuple[dict[str, tuple[str, ...]], list[Fault]]:
    """Read `CLASSES`: the classes of each case as they are written, and the fault of a file that cannot be used."""
    path = folder / CLASSES
    try:
        if odd := unusable(path):
            raise ValueError(odd)
        rows = [row for _, row in _csv_rows(read_text(path))]
        if missing := [row for row in rows if "id" not in row]:
            raise ValueError(f"a line without an id: {brief(missing[0])}")
    except (OSError, ValueError, csv.Error) as error:
        fault = Fault(CLASSES, f"cannot be used ({error})", "columns id, classes", "mend or remove it")
        return {}, [fault]
    return {plain(row["id"]): _words(row["classes"]) for row in rows if "classes" in row}, []


def _words(cell: str) -> tuple[str, ...]:
    """Return the classes of a cell, which are parted by blanks, ``+``, ``;``, ``|`` or commas."""
    return tuple(word for word in re.split(r"[\s,;|+]+", cell) if word)


def _csv_rows(text: str) -> list[tuple[str, dict[str, Any]]]:
    lines = text.splitlines()
    # Spreadsheets of many countries separate cells by semicolons; some programs say so in a line of its own.
    stated = re.fullmatch(r'"?sep=([,;\t])"?', lines[0], re.IGNORECASE) if lines else None
    separator = stated[1] if stated else max(",;\t", key=lines[0].count) if lines else ","
    reader = csv.DictReader(
        lines[bool(stated) :], delimiter=separator, skipinitialspace=separator != "\t", strict=True
    )
    names = [name.strip().lower() for name in reader.fieldnames or ()]
    if twice := [name for name, count in Counter(names).items() if name and count > 1]:
        raise ValueError(f"two columns called {brief(twice[0])}")
    reader.fieldnames = names
    rows = []
    for row in reader:
        if None in row:
            raise ValueError(f"line {reader.line_num + bool(stated)} has more cells than the header")
        cells = {key: cell.strip() for key, cell in row.items() if cell and cell.strip()}
        rows.append((f"line {reader.line_num + bool(stated)}", cells))
    return rows


def _json_rows(path: Path, text: str, found: Found) -> list[tuple[str, dict[str, Any]]]:
    data = parse_json(text)
    if isinstance(data, dict):
        labels = data.get("labels", {})
        if not isinstance(labels, dict):
            raise ValueError("labels is not an object")
        found.class_names, found.unknown = declared_labels(labels)
        data = data.get("cases")
    if not isinstance(data, list) or not all(isinstance(row, dict) for row in data):
        raise ValueError("it holds no list of objects")
    return [(f"entry {n}", row) for n, row in enumerate(data, 1)]


def _add(found: Found, folder: Path, where: str, row: dict[str, Any]) -> None:
    values = _images(row)
    label = row.get("label")
    fault: Fault | None = None
    for key in ("id", "label", "role", "patient"):
        if not isinstance(row.get(key, ""), str | int | None):
            found.faults.append(Fault(where, f"{key} is {brief(row[key])}", "text", case_id=where))
            return
    if not values or not all(isinstance(v, str) for v in [*values, label or ""]):
        found.faults.append(
            Fault(where, "no image", "the path of an image", case_id=str(row.get("id", where)))
        )
        return
    values, label = [_local(folder, v) for v in values], _local(folder, label) if label else label
    name = plain(str(row.get("id") or stem(Path(values[0]))))
    paths = []
    for value in [*values, *([label] if label else [])]:
        resolved = folder / value
        if not Path(value).is_absolute() and Path(os.path.normpath(value)).parts[:1] == ("..",):
            expected, remedy = (
                "a path inside the list's folder",
                "move the list up, or write an absolute path",
            )
            fault = Fault(where, f"{brief(value)} leaves the folder", expected, remedy, name, "path")
        elif not _exists(resolved):
            fault = Fault(
                where, f"no file {brief(value)}", "an existing file", "correct the path", name, "missing"
            )
        elif odd := unusable(resolved):
            fault = Fault(where, f"{brief(value)} is {odd}", "a file", "correct the path", name, "missing")
        paths.append(resolved)
    role = str(row.get("role") or (Role.CLEAN if label else Role.UNLABELLED)).lower()
    if role not in set(Role):
        fault = Fault(
            where, f"unknown role {brief(role)}", "", nearest(role, [r.value for r in Role]), name, "role"
        )
    elif not label and role in (Role.CLEAN, Role.NOISY):
        fault = Fault(
            where, f"role {role} without a label", "a label", "add it, or say unlabelled", name, "role"
        )
    says = {key: str(row.get(key) or "no").lower() for key in ("empty", "sparse", "outside")}
    if wrong := [
        key for key in says if says[key] not in (*_ANSWERS, *(_OUTSIDE if key == "outside" else ()))
    ]:
        expected = "unknown or background" if wrong[0] == "outside" else "yes or no"
        fault = Fault(where, f"{wrong[0]} = {brief(says[wrong[0]])}", expected, "", name, wrong[0])
    ignore = str(row["ignore"]) if row.get("ignore") not in (None, "") else ""
    if not re.fullmatch(r"(-?\d{1,9})?", ignore, re.ASCII):
        fault = Fault(where, f"ignore = {brief(ignore)}", "a whole number", "", name, "ignore")
    if fault:
        found.faults.append(fault)
        return
    if row.get("patient"):
        found.patients[name] = str(row["patient"])
    if classes := row.get("classes"):
        words = classes if isinstance(classes, list) else [classes]
        found.classes[name] = tuple(part for word in words for part in _words(str(word)))
    label_path = paths.pop() if label else None
    patient = str(row.get("patient") or "")
    known = Known(
        int(ignore) if ignore else None, _ANSWERS[says["sparse"]], {**_ANSWERS, **_OUTSIDE}[says["outside"]]
    )
    found.add(
        Case(name, tuple(paths), label_path, Role(role), patient, known, may_be_empty=_ANSWERS[says["empty"]])
    )


def _local(folder: Path, value: str) -> str:
    """Return a path with the slashes of this system: a list may have been made on Windows."""
    return value if _exists(folder / value) else value.replace("\\", "/")


def _exists(path: Path) -> bool:
    """Say whether something is there; what no file can be called is not."""
    try:
        return path.exists()
    except (OSError, ValueError):  # too long a name, or one with a null character
        return False


def _images(row: dict[str, Any]) -> list[Any]:
    """Return the channels' paths: `image` (a string or a list), or `image_0`, `image_1`, ... in order."""
    if image := row.get("image"):
        return image if isinstance(image, list) else [image]
    keys = [key for key in row if _IMAGE.fullmatch(key) and key != "image" and row[key]]
    return [row[key] for key in sorted(keys, key=lambda key: int(key.removeprefix("image_")))]
