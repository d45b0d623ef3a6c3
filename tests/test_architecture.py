"""Imports only point down: the floors of the house, kept by reading every module's syntax tree."""

from __future__ import annotations

import ast
import functools
import re
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
SOURCE = REPOSITORY / "src" / "mlbseg"

# A room is a top-level module or package of mlbseg, and each package of `apps`. `__init__` is the public face:
# `import mlbseg`. A room uses rooms on lower floors alone, never its neighbours.
FLOORS = {
    "types": 0,
    "errors": 0,
    "settings": 0,
    "temporaries": 0,
    "account": 0,
    "components": 0,
    "metrics": 0,
    "pictures": 0,
    "core": 1,
    "registry": 1,
    "files": 1,
    "memory": 1,
    "staging": 1,
    "tables": 1,
    "terminal": 1,
    "methods": 2,
    "networks": 2,
    "device": 2,
    "launch": 2,
    "progress": 2,
    "data": 3,
    "processes": 3,
    "config": 4,
    "evaluation": 4,
    "checking": 4,
    "windows": 4,
    "runs": 5,
    "reference": 5,
    "training": 6,
    "inference": 6,
    "apps": 7,
    "apps/demo": 7,
    "apps/export": 7,
    "apps/nnunet_plan": 7,
    "apps/report": 7,
    "apps/suggest": 7,
    "apps/audit": 8,
    "apps/bench": 8,
    "apps/review": 9,
    "__init__": 10,
    "cli": 11,
    "__main__": 12,
}
CORE_MAY_USE = {"numpy", "torch"} | set(sys.stdlib_module_names)


def imported_names(tree: ast.Module, package: str) -> Iterator[tuple[int, str]]:
    """Yield (line, absolute dotted name) of all that is imported, wherever in the module it stands.

    Args:
        tree: The module.
        package: The package that its relative imports start from, such as ``mlbseg.data``.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            origin = ".".join([*start, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{origin}.{alias.name}") for alias in node.names)


def room_of(name: str) -> str:
    """Return the room that an absolute name under mlbseg belongs to."""
    _, first, second, *_ = [*name.split("."), "", ""]
    if f"{first}/{second}" in FLOORS:
        return f"{first}/{second}"
    is_room = first in FLOORS or (first and (SOURCE / first).is_dir()) or (SOURCE / f"{first}.py").exists()
    return first if is_room else "__init__"


def violations(path: str, source: str) -> list[str]:
    """Return what is wrong with the imports of one module.

    Args:
        path: The module's path inside the package, such as ``data/check.py``.
        source: Its text.
    """
    parts = Path(path).with_suffix("").parts
    room = room_of(".".join(["mlbseg", *parts])) if parts[0] in FLOORS else parts[0]
    if room not in FLOORS:
        return [f"{path}: unknown room {room!r}: add it to FLOORS, on the lowest floor it can have"]
    package = ".".join(["mlbseg", *parts[:-1]])
    found = []
    for line, name in imported_names(ast.parse(source), package):
        top = name.partition(".")[0]
        if top != "mlbseg":
            if room == "core" and top not in CORE_MAY_USE:
                found.append(f"{path}:{line}: core imports {top}, but may use numpy and torch only")
            continue
        target = room_of(name)
        if target not in FLOORS or target == room:
            continue  # an unknown room is reported where it stands
        here, there = FLOORS[room], FLOORS[target]
        if there > here:
            found.append(
                f"{path}:{line}: {room} (floor {here}) imports {target} (floor {there}), which is upward"
            )
        elif there == here:
            found.append(f"{path}:{line}: {room} imports {target}, its neighbour on floor {here}")
    return found


def test_every_import_points_down() -> None:
    modules = sorted(SOURCE.rglob("*.py"))
    assert modules
    found = [
        v for m in modules for v in violations(str(m.relative_to(SOURCE)), m.read_text(encoding="utf-8"))
    ]
    assert found == [], "\n".join(found)


@pytest.mark.parametrize(
    ("path", "source", "complaint"),
    [
        (
            "core/views.py",
            "from mlbseg.networks import make_network",
            "core (floor 1) imports networks (floor 2)",
        ),
        ("memory.py", "import mlbseg.training", "memory.py:1: memory (floor 1) imports training (floor 6)"),
        (
            "data/check.py",
            "x = 1\nfrom mlbseg import training",
            "data/check.py:2: data (floor 3) imports training (floor 6)",
        ),
        (
            "methods/bcp.py",
            "from ..networks import NETWORKS",
            "methods imports networks, its neighbour on floor 2",
        ),
        ("data/readers/nifti.py", "from ... import cli", "data (floor 3) imports cli (floor 11)"),
        ("methods/mlb.py", "from mlbseg.config import Config", "methods (floor 2) imports config (floor 4)"),
        (
            "types.py",
            "def f():\n    from .errors import Fault",
            "types imports errors, its neighbour on floor 0",
        ),
        ("training/loop.py", "import mlbseg", "training (floor 6) imports __init__ (floor 10)"),
        ("inference.py", "from mlbseg import __version__", "inference (floor 6) imports __init__ (floor 10)"),
        ("core/losses.py", "import tensorboard", "core imports tensorboard"),
        ("core/losses.py", "from monai.losses import DiceLoss", "core imports monai"),
        ("utils.py", "", "unknown room 'utils'"),
        (
            "apps/report/page.py",
            "from mlbseg.apps.bench import bench",
            "apps/report (floor 7) imports apps/bench",
        ),
        ("apps/report/page.py", "from mlbseg.apps.export import export", "its neighbour on floor 7"),
        (
            "errors.py",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from mlbseg.cli import main",
            "errors.py:3: errors (floor 0) imports cli (floor 11)",
        ),
    ],
)
def test_the_walker_sees_a_wrong_import(path: str, source: str, complaint: str) -> None:
    found = violations(path, source)
    assert len(found) == 1
    assert complaint in found[0]


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("cli/__init__.py", "from mlbseg import __version__, training\nimport mlbseg.data.check"),
        ("__init__.py", "from mlbseg.training import train\nfrom .inference import predict"),
        ("apps/demo.py", "from mlbseg.training import fit\nfrom mlbseg.config import Config"),
        ("data/check.py", "from .cases import find\nfrom ..types import Case\nimport SimpleITK as sitk"),
        ("data/__init__.py", "from .cases import find\nfrom . import check"),
        (
            "core/teacher.py",
            "import math\nimport torch.nn.functional as F\nfrom mlbseg.core.views import View",
        ),
    ],
)
def test_the_walker_lets_a_right_import_pass(path: str, source: str) -> None:
    assert violations(path, source) == []


def canonical(requirement: str) -> str:
    """Return the normalised name of a distribution, of ``Foo_Bar>=1`` as of ``foo-bar`` (PEP 503)."""
    return re.sub(r"[-_.]+", "-", re.split(r"[^\w.-]", requirement, maxsplit=1)[0]).lower()


def declared_dependencies() -> set[str]:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    wanted = [
        *project["dependencies"],
        *extras["export"],
        *extras["nnunet"],
        *extras["pandas"],
        *extras["jobs"],
    ]
    return {canonical(requirement) for requirement in wanted}


installed = functools.cache(packages_distributions)
"""Which distributions bring each top-level name; looking takes a second."""


def undeclared(path: str, source: str, declared: set[str]) -> list[str]:
    """Return the imports of one module that only work because something else happens to install them."""
    distributions = installed()
    found = []
    for line, name in imported_names(ast.parse(source), "mlbseg"):
        top = name.partition(".")[0]
        if top == "mlbseg" or top in sys.stdlib_module_names:
            continue
        if not declared & {canonical(d) for d in distributions.get(top, [top])}:
            found.append(f"{path}:{line}: imports {top}, which pyproject.toml does not declare")
    return found


def test_what_is_imported_is_declared() -> None:
    declared = declared_dependencies()
    found = [
        complaint
        for module in sorted(SOURCE.rglob("*.py"))
        for complaint in undeclared(
            str(module.relative_to(SOURCE)), module.read_text(encoding="utf-8"), declared
        )
    ]
    assert found == [], "\n".join(found)


def test_an_undeclared_import_is_seen() -> None:
    assert undeclared("a.py", "import os\nimport yaml\nfrom mlbseg import nets", {"pyyaml"}) == []
    assert undeclared("a.py", "import os\nimport yaml", {"torch"}) == [
        "a.py:2: imports yaml, which pyproject.toml does not declare"
    ]
    assert len(undeclared("a.py", "from nowhere_installed import x", {"torch"})) == 1


UNIX = {"fcntl", "grp", "posix", "pty", "pwd", "resource", "syslog", "termios", "tty"}
"""Modules that Python does not have on Windows."""


def imported_at_once(source: str) -> set[str]:
    """Return the packages that a module imports when it is imported itself: not those of its functions, nor guarded."""
    body = ast.parse(source).body
    statements = [node for node in body if isinstance(node, ast.Import | ast.ImportFrom)]
    return {
        name.partition(".")[0]
        for node in statements
        for _, name in imported_names(ast.Module([node], []), "")
    }


def test_every_module_can_be_imported_on_windows() -> None:
    found = {
        str(path.relative_to(SOURCE)): names
        for path in SOURCE.rglob("*.py")
        if (names := imported_at_once(path.read_text(encoding="utf-8")) & UNIX)
    }
    assert found == {}


def test_an_import_that_windows_lacks_is_seen() -> None:
    assert imported_at_once("import os, resource\nfrom fcntl import flock") == {"os", "resource", "fcntl"}
    assert imported_at_once("def f():\n    import resource") == set()


def test_every_dependency_is_explained_and_pinned() -> None:
    explained = (REPOSITORY / "docs" / "dependencies.md").read_text(encoding="utf-8")
    rows = {canonical(row) for row in re.findall(r"^\| (\S+) \|", explained, flags=re.MULTILINE)} - {
        "package"
    }
    assert rows == declared_dependencies()
    constraints = (REPOSITORY / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = {canonical(line) for line in constraints if re.fullmatch(r"[\w.-]+==\S+", line)}
    assert declared_dependencies() <= pinned
