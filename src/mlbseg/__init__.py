"""mlbseg: segment many medical scans from few labels (MLB-Seg, arXiv 2307.11604).

`train`, `predict` and `evaluate` are the commands of the same names.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mlbseg.account import name_user

if TYPE_CHECKING:
    from mlbseg.evaluation import evaluate
    from mlbseg.inference import predict
    from mlbseg.training import train

__version__ = "0.1.0"
__all__ = ["__version__", "evaluate", "predict", "train"]

_HOMES = {"train": "mlbseg.training", "predict": "mlbseg.inference", "evaluate": "mlbseg.evaluation"}

name_user()  # here, as any module of the package may be the first to import MONAI


def __getattr__(name: str) -> Any:
    # On first use: `import mlbseg` must not cost the seconds that torch takes.
    if name in _HOMES:
        from importlib import import_module

        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'mlbseg' has no attribute {name!r}")
