"""mlbseg: segment many medical scans from few labels (MLB-Seg, arXiv 2307.11604).

The functions here are the commands of the same names, and `load`, which gives a trained run as a model for arrays.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mlbseg.account import name_user

if TYPE_CHECKING:
    from mlbseg.apps.audit import audit
    from mlbseg.apps.bench import bench
    from mlbseg.apps.export import export
    from mlbseg.apps.report import report
    from mlbseg.apps.review import review
    from mlbseg.apps.suggest import suggest
    from mlbseg.checking import check
    from mlbseg.evaluation import evaluate
    from mlbseg.inference import load, predict
    from mlbseg.training import plan, train

__version__ = "0.1.0"
__all__ = [
    "__version__", "audit", "bench", "check", "evaluate", "export", "load", "plan", "predict", "report", "review",
    "suggest", "train",
]  # fmt: skip

_HOMES = {
    "audit": "mlbseg.apps.audit",
    "bench": "mlbseg.apps.bench",
    "check": "mlbseg.checking",
    "evaluate": "mlbseg.evaluation",
    "export": "mlbseg.apps.export",
    "load": "mlbseg.inference",
    "plan": "mlbseg.training",
    "predict": "mlbseg.inference",
    "report": "mlbseg.apps.report",
    "review": "mlbseg.apps.review",
    "suggest": "mlbseg.apps.suggest",
    "train": "mlbseg.training",
}

name_user()  # here, as any module of the package may be the first to import MONAI


def __getattr__(name: str) -> Any:
    # On first use: `import mlbseg` must not cost the seconds that torch takes.
    if name in _HOMES:
        from importlib import import_module

        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'mlbseg' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
