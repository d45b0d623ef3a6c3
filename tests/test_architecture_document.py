"""ARCHITECTURE.md names files and functions that exist."""

from __future__ import annotations

import ast
import re
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
SOURCE = REPOSITORY / "src" / "mlbseg"
TEXT = (REPOSITORY / "ARCHITECTURE.md").read_text(encoding="utf-8")
QUOTED = set(re.findall(r"`([^`\n]+)`", TEXT))
PLACEHOLDER = "NAME"  # in the paths of what a reader is to write


def defined_names() -> set[str]:
    """Return every class, function, method, argument, field and constant of the package and its tests."""
    names = set()
    for path in (*SOURCE.rglob("*.py"), *(REPOSITORY / "tests").rglob("*.py")):
        names.add(path.stem)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef):
                members = [m.name for m in node.body if isinstance(m, ast.FunctionDef)]
                names |= {node.name, *(f"{node.name}.{m}" for m in members)}
            elif isinstance(node, ast.FunctionDef):
                names.add(node.name)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                names.add(node.id)
    return names


def test_every_file_named_is_there() -> None:
    paths = {q for q in QUOTED if "/" in q and q[-1] != "/" and q.endswith(".py") and PLACEHOLDER not in q}
    paths = {q.removeprefix("python ") for q in paths}
    assert len(paths) > 10
    assert [p for p in sorted(paths) if not any((root / p).is_file() for root in (REPOSITORY, SOURCE))] == []


def test_every_room_has_its_row() -> None:
    table = TEXT.split("## The floors")[1].split("\n\n")[1]
    rooms = {
        p.name if p.suffix else f"{p.name}/" for p in SOURCE.iterdir() if p.suffix == ".py" or p.is_dir()
    }
    assert set(re.findall(r"`([\w/.]+)`", "\n".join(r.split("|")[2] for r in table.splitlines()[2:]))) == (
        rooms - {"__pycache__/"}
    )


def test_every_name_in_the_text_is_defined() -> None:
    names = {q for q in QUOTED if re.fullmatch(r"[A-Za-z_][\w.]*", q) and not q.endswith((".py", ".md"))}
    files = {
        "config.yaml",
        "plan.json",
        "split.json",
        "env.json",
        "data.json",
        "inputs.json",
        "fingerprint.json",
        "init.json",
        "log.csv",
        "result.json",
    }
    files |= {"bench.json", "settings.yaml", "report.html", "page.js"}
    others = {
        "mlbseg",
        "mlbseg.methods",
        "data",
        "core",
        "methods",
        "batch.seed",
        "model.safetensors",
        "init.safetensors",
    }
    assert sorted(names - files - others - defined_names()) == []
    assert len(names) > 50


def test_run_folder_files_are_written_by_the_source() -> None:
    source = "\n".join(p.read_text(encoding="utf-8") for p in SOURCE.rglob("*.py"))
    row = next(line for line in TEXT.splitlines() if line.startswith("| What is in a run folder?"))
    found = re.findall(r"`([\w.]+)/?`", row)
    assert len(found) > 8
    assert [name for name in found if f'"{name}"' not in source] == []
