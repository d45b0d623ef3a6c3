"""Importing the package changes nothing of the process that imports it, and needs no account of the user."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from test_architecture import SOURCE

MODULES = sorted(
    ".".join(("mlbseg", *path.relative_to(SOURCE).with_suffix("").parts)).removesuffix(".__init__")
    for path in SOURCE.rglob("*.py")
    if path.name != "__main__.py"  # is the command
)

# What other packages change when they are imported is theirs: they are imported before the first look.
WATCHED = """
import importlib, json, logging, os, random, signal, sys, warnings
import numpy, torch, matplotlib, SimpleITK

def state():
    flags = torch.backends
    return {
        "environment": dict(os.environ),
        "warnings": [str(entry) for entry in warnings.filters],
        "showwarning": repr(warnings.showwarning),
        "levels": {
            name: (logger.level, logger.disabled, logger.propagate, len(logger.handlers))
            for name, logger in [("", logging.root), *sorted(logging.root.manager.loggerDict.items())]
            if isinstance(logger, logging.Logger)
        },
        "logging": logging.root.manager.disable,
        "signals": {number: repr(signal.getsignal(number)) for number in signal.valid_signals()},
        "folder": os.getcwd(), "path": list(sys.path),
        "hooks": [repr(hook) for hook in (sys.excepthook, sys.displayhook, sys.meta_path)],
        "recursion": sys.getrecursionlimit(),
        "random": str(random.getstate()),
        "numpy": [str(part) for part in numpy.random.get_state()],
        "numpy errors": numpy.geterr(), "numpy printing": str(numpy.get_printoptions()),
        "torch": torch.random.get_rng_state().tolist(),
        "torch flags": [
            torch.get_num_threads(), torch.get_num_interop_threads(), str(torch.get_default_dtype()),
            str(torch.get_default_device()), torch.is_grad_enabled(), torch.is_anomaly_enabled(),
            torch.get_float32_matmul_precision(), torch.are_deterministic_algorithms_enabled(),
            flags.cudnn.enabled, flags.cudnn.benchmark, flags.cudnn.deterministic, flags.cudnn.allow_tf32,
            flags.cuda.matmul.allow_tf32, flags.mkldnn.enabled,
        ],
        "matplotlib": {key: str(value) for key, value in matplotlib.rcParams.copy().items() if key != "backend"},
        "backend": matplotlib.get_backend(auto_select=False),
        "ITK": SimpleITK.ProcessObject.GetGlobalWarningDisplay(),
    }

modules, others = json.loads(sys.argv[1])
for name in others:
    try:
        importlib.import_module(name)
    except ImportError:  # of an extra that is not installed
        assert name.split(".")[0] not in ("torch", "monai"), name
before = state()
for name in modules:
    importlib.import_module(name)
after = state()
json.dump({key: [before[key], after[key]] for key in before if before[key] != after[key]}, sys.stdout)
"""

NAMELESS = """
import os, pwd, sys
def unknown(_):
    raise KeyError("getpwuid(): uid not found")
pwd.getpwuid = unknown
before = dict(os.environ)
import mlbseg.networks
from mlbseg.data.cache_root import default_cache_root
print(default_cache_root())
print(sorted(os.environ.items() ^ before.items()))
"""


def others() -> list[str]:
    """Return the modules of other packages that ours import."""
    found = set()
    for path in SOURCE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
                found.add(node.module)
    return sorted(name for name in found if name.split(".")[0] not in ("mlbseg", "__future__"))


@pytest.mark.slow
def test_importing_every_module_changes_nothing_of_the_process() -> None:
    asked = json.dumps([MODULES, others()])
    done = subprocess.run(
        [sys.executable, "-c", WATCHED, asked], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {}


@pytest.mark.slow
def test_a_user_without_name_and_home_can_import_everything(tmp_path: Path) -> None:
    gone = ("LOGNAME", "USER", "LNAME", "USERNAME", "HOME", "MLBSEG_CACHE", "XDG_CACHE_HOME")
    environment = {key: value for key, value in os.environ.items() if key not in gone}
    done = subprocess.run(
        [sys.executable, "-c", NAMELESS],
        env={**environment, "TMPDIR": str(tmp_path), "MPLCONFIGDIR": str(tmp_path)},
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    root, changed = done.stdout.splitlines()
    assert root == str(tmp_path / f"mlbseg-{os.getuid()}")
    assert changed == f"[('LOGNAME', 'uid{os.getuid()}')]"
