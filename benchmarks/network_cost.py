"""What a supervised training step costs with each network, as a ratio to the first, in time of one CPU thread.

Networks take turns; the least time of the repeats counts. It is the time that the process computes, so that other work
of the machine is not counted as such.

    python benchmarks/network_cost.py
    python benchmarks/network_cost.py --networks unet vnet3 resenc --patch 32 32 32 --precision 32
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence

import torch

from mlbseg.device import autocast
from mlbseg.methods.supervised import Supervised
from mlbseg.networks import make_network
from mlbseg.types import Batch


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--networks", nargs="+", default=["unet", "dynunet", "nnunet", "resenc"])
    parser.add_argument("--patch", nargs=3, type=int, default=[40, 56, 56])
    parser.add_argument("--channels", nargs="+", type=int, default=[16, 32, 64, 128])
    parser.add_argument("--repeats", type=int, default=4)
    parser.add_argument("--precision", default="bf16", choices=["auto", "32", "bf16"])
    asked = parser.parse_args(arguments)
    torch.set_num_threads(1)
    image = torch.randn(2, 1, *asked.patch, generator=torch.Generator().manual_seed(0))
    batch = Batch(image, (image[:, 0] > 0.5).long(), case_ids=("a", "b"), seed=1)
    methods = {}
    for name in asked.networks:
        torch.manual_seed(0)
        network = make_network(name, ndim=3, in_channels=1, num_classes=2, channels=asked.channels)
        methods[name] = Supervised(network).train()
    optimisers = {n: torch.optim.SGD(m.parameters(), lr=0.01, momentum=0.9) for n, m in methods.items()}
    best = dict.fromkeys(methods, float("inf"))
    for turn in range(asked.repeats + 1):  # the first warms up
        for name, method in methods.items():
            begun = time.process_time()
            with autocast(asked.precision, torch.device("cpu")):
                (terms,) = method.losses(batch, turn)
            optimisers[name].zero_grad(set_to_none=True)
            terms["clean"].backward()
            optimisers[name].step()
            if turn:
                best[name] = min(best[name], time.process_time() - begun)
    first = best[asked.networks[0]]
    print(f"| network | million weights | seconds per step | to {asked.networks[0]} |")
    print("|---|---|---|---|")
    for name, seconds in best.items():
        weights = sum(p.numel() for p in methods[name].parameters())
        print(f"| {name} | {weights / 1e6:.2f} | {seconds:.3f} | {seconds / first:.2f} |")


if __name__ == "__main__":
    main()
