"""What a process has for all that runs in it, which a library must leave as it is."""

from __future__ import annotations

import locale
import logging
import multiprocessing
import os
import random
import signal
import sys
import warnings
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import SimpleITK as sitk  # noqa: N813 - as its documentation does
import torch


def global_state() -> dict[str, Any]:
    """Return what can be compared of it, by name."""
    kind, keys, *rest = np.random.get_state()
    return {
        "random": random.getstate(),
        "numpy's random": (kind, keys.tobytes(), *rest),
        "torch's random": torch.get_rng_state().numpy().tobytes(),
        "CUDA's random": [s.numpy().tobytes() for s in torch.cuda.get_rng_state_all()]
        if torch.cuda.is_available()
        else [],
        "threads": (torch.get_num_threads(), torch.get_num_interop_threads()),
        "types": (torch.get_default_dtype(), torch.get_float32_matmul_precision()),
        "gradients": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
        "deterministic": (
            torch.are_deterministic_algorithms_enabled(),
            torch.backends.cudnn.deterministic,
            torch.backends.cudnn.benchmark,
            torch.backends.cudnn.allow_tf32,
            torch.backends.cuda.matmul.allow_tf32,
        ),
        "autocast": (torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")),
        "warnings": [str(entry) for entry in warnings.filters],
        "hooks": (warnings.showwarning, sys.excepthook, sys.displayhook),
        "environment": dict(os.environ),
        "path": list(sys.path),
        "recursion": sys.getrecursionlimit(),
        "signals": [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGPIPE)],
        "loggers": {
            name: (logging.getLogger(name).level, len(logging.getLogger(name).handlers))
            for name in (
                "",
                "matplotlib",
                "monai",
                "torch.onnx",
            )
        },
        "numpy": (np.geterr(), str(np.get_printoptions())),
        "matplotlib": {name: str(mpl.rcParams[name]) for name in mpl.rcParams if name != "backend"},
        "ITK": (
            sitk.ProcessObject.GetGlobalWarningDisplay(),
            sitk.ProcessObject.GetGlobalDefaultNumberOfThreads(),
            sitk.ProcessObject.GetGlobalDefaultDebug(),
        ),
        "place": (Path.cwd(), locale.setlocale(locale.LC_ALL)),
        "processes": (
            multiprocessing.get_start_method(allow_none=True),
            torch.multiprocessing.get_sharing_strategy(),
        ),
    }


def differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Return the names of what differs."""
    return [name for name, value in before.items() if after[name] != value]
