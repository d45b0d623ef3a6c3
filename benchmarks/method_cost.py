"""What a training step of each method costs, as a ratio to supervised training within one run.

Methods take turns, so that what else the machine does meets all of them; the fastest of the repeats counts.

    python benchmarks/method_cost.py                      # the U-Net and patch of docs/benchmarks.md's tables
    python benchmarks/method_cost.py --methods supervised bcp mlb --patch 32 32 32 --repeats 10
    python benchmarks/method_cost.py --device cuda --network vnet --channels 16 --patch 80 112 112 --repeats 20
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence

import torch

from mlbseg.device import autocast
from mlbseg.methods import METHODS, Method, find_method
from mlbseg.networks import make_network
from mlbseg.types import Batch


def step(method: Method, batch: Batch, index: int, precision: str) -> float:
    """Take one training step; return its seconds, to the end of the device's work."""
    optimiser = method.optimiser
    assert optimiser is not None
    device = batch.clean_image.device
    _wait(device)
    begin = time.perf_counter()
    losses = method.losses(batch, index)
    while True:
        with autocast(precision, device):
            terms = next(losses, None)
        if terms is None:
            break
        optimiser.zero_grad(set_to_none=True)
        torch.stack(list(terms.values())).sum().backward()
        optimiser.step()
    method.after_step(index)
    _wait(device)
    return time.perf_counter() - begin


def held(method: Method) -> int:
    """Return what a method holds between steps: networks, gradients and momentum, bytes."""
    assert method.optimiser is not None
    tensors = [*method.parameters(), *method.buffers()]
    tensors += [p.grad for p in method.parameters() if p.grad is not None]
    tensors += [t for state in method.optimiser.state.values() for t in state.values() if torch.is_tensor(t)]
    return sum(t.numel() * t.element_size() for t in tensors)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--methods", nargs="+", default=["supervised", *sorted(set(METHODS) - {"supervised"})]
    )
    parser.add_argument("--patch", nargs=3, type=int, default=[40, 56, 56])
    parser.add_argument("--network", default="unet")
    parser.add_argument("--channels", nargs="+", type=int, default=[16, 32, 64, 128])
    parser.add_argument("--repeats", type=int, default=4)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", default="auto", choices=["auto", "32", "bf16"])
    asked = parser.parse_args(arguments)
    torch.set_num_threads(asked.threads)
    device = torch.device(asked.device)
    generator = torch.Generator().manual_seed(0)

    def images() -> tuple[torch.Tensor, torch.Tensor]:
        image = torch.randn(2, 1, *asked.patch, generator=generator)
        return image, (image[:, 0] > 0.5).long()

    batch = Batch(*images(), *images(), case_ids=tuple("abcd"), seed=1).to(device)
    methods = {}
    for name in asked.methods:
        torch.manual_seed(0)
        network = make_network(
            asked.network,
            ndim=3,
            in_channels=1,
            num_classes=2,
            channels=asked.channels,
            patch_size=asked.patch,
        )
        methods[name] = find_method(name)(network).train().to(device)
        methods[name].length = 100
        methods[name].optimiser = torch.optim.SGD(methods[name].trained(), lr=0.01, momentum=0.9)
    gpu, others = device.type == "cuda", 0
    best = dict.fromkeys(methods, float("inf"))
    memory = dict.fromkeys(methods, 0)
    for turn in range(asked.repeats + 1):  # the first warms up
        for name, method in methods.items():
            if gpu:
                torch.cuda.reset_peak_memory_stats()
                others = torch.cuda.memory_allocated() - held(method)
            seconds = step(method, batch, 1 + turn, asked.precision)
            if turn:
                best[name] = min(best[name], seconds)
                memory[name] = torch.cuda.max_memory_allocated() - others if gpu else 0
    first = best[asked.methods[0]]
    print(f"| method | seconds per step | to {asked.methods[0]} |{' GiB |' if gpu else ''}")
    print("|---|---|---|" + "---|" * gpu)
    for name, seconds in best.items():
        end = f" {memory[name] / 2**30:.1f} |" if gpu else ""
        print(f"| {name} | {seconds:.3f} | {seconds / first:.2f} |{end}")


if __name__ == "__main__":
    main()
