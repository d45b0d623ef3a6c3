"""Which networks can be exported to ONNX, and how far onnxruntime is from torch.

    python benchmarks/onnx_networks.py [NETWORK ...]

It prints, for each network in 2D and 3D with drawn weights: whether windows of any size are exported, and the largest
difference of a logit over batches of 1 and 3, of the patch's size and, where it may be, of another.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Literal

import numpy as np
import onnxruntime
import torch

from mlbseg.apps.export.onnx import FIXED_SIZE, to_onnx
from mlbseg.data.plan import Plan
from mlbseg.networks import NORMS, make_network, required_multiple

DIMENSIONS: tuple[Literal[2], Literal[3]] = (2, 3)
CHANNELS = {
    "unet": (4, 8, 8),
    "unet++": (4, 4, 8, 8, 8),
    "nested-unet": (4, 4, 8, 8, 8),
    "vnet": (4,),
    "vnet3": (4,),
    "dynunet": (4, 8, 8),
    "swin-unetr": (12,),
}


def largest_difference(name: str, ndim: Literal[2, 3], norm: str) -> float:
    """Return the largest difference of a logit in onnxruntime to the same in torch."""
    channels = CHANNELS[name]
    multiple = required_multiple(name, channels)
    patch = (max(multiple, 16),) * (ndim - 1) + (max(2 * multiple, 16),)
    plan = Plan(
        ndim=ndim, scan_ndim=ndim, channels=1, label_values=(0, 1, 2), class_names=("background", "a", "b"),
        spacing=(1.0,) * ndim, patch_size=patch, normalisation=("zscore",), intensity=(), crop=False, network=name,
        network_channels=channels, batch_size=1, unlabelled_batch_size=0, steps=1, flip_axes=(),
    )  # fmt: skip
    torch.manual_seed(0)
    network = make_network(
        name, ndim=ndim, in_channels=1, num_classes=3, channels=channels, patch_size=patch, norm=norm
    ).eval()
    runtime = onnxruntime.InferenceSession(to_onnx(network, plan), providers=["CPUExecutionProvider"])
    other = tuple(multiple * (2 + axis) for axis in range(ndim))
    worst = 0.0
    for size in (patch,) if name in FIXED_SIZE else (patch, other):
        for batch in (1, 3):
            image = torch.randn(batch, 1, *size)
            with torch.no_grad():
                expected = network(image).numpy()
            (found,) = runtime.run(None, {"image": image.numpy()})
            worst = max(worst, float(np.abs(found - expected).max()))
    return worst


def main(arguments: Sequence[str] | None = None) -> None:
    """Export, run and print a line for each network."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("networks", nargs="*", metavar="NETWORK", help=", ".join(CHANNELS))
    asked = parser.parse_args(arguments)
    if unknown := set(asked.networks) - set(CHANNELS):
        parser.error(f"unknown network {', '.join(sorted(unknown))}, expected {', '.join(CHANNELS)}")
    for name in asked.networks or CHANNELS:
        size = "patch" if name in FIXED_SIZE else "any"
        for ndim in DIMENSIONS:
            for norm in NORMS if name == "unet" else NORMS[:1]:
                worst = largest_difference(name, ndim, norm)
                print(f"{name} {ndim}D {norm}: size {size}, difference {worst:.1e}", flush=True)


if __name__ == "__main__":
    main()
