"""What a step of MLB costs, beside a mean teacher's step and beside weights by the unrolled step.

Each variant runs in a process of its own, and the table gives ratios within this run, since machines differ and are
noisy. Times are the fastest of the repeats; memory is the peak of the process less what its imports hold; "work" is
the multiplications of all convolutions and matrix products, in forward passes of one image (a backward pass is 2, a
forward-mode pass 3, or 2 beside a forward pass).

    python benchmarks/meta_step.py                            # the paper's setting in 2D, float32 and bfloat16
    python benchmarks/meta_step.py --setting 3d               # V-Net, patches of 80x80x64
    python benchmarks/meta_step.py --sweep side --setting 2d  # one factor at a time: side, views, classes, cheaper
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from mlbseg.methods.mlb import MLB

# Nothing heavy is imported up here: on Linux a new process starts with its parent's peak as its own.

GIB = 2**30
LR = 1e-3
NOISE = 0.1
"""SD of the noise on the teacher's input."""
SETTINGS: dict[str, dict[str, Any]] = {
    # The public code's: UNet++, 144x144, one unlabelled image and two clean ones, five views of each.
    "2d": {"network": "unet++", "channels": [64, 128, 256, 512, 1024], "norm": "batch", "shape": [144, 144],
           "small": [48, 48], "views": ["zoom-in", "zoom-out", "zoom-out", "flip"], "unlabelled": 1, "clean": 2,
           "classes": 2},
    "3d": {"network": "vnet", "channels": [16], "norm": "instance", "shape": [80, 80, 64],
           "small": [32, 32, 32], "views": ["zoom-out"], "unlabelled": 1, "clean": 1, "classes": 2},
    "small": {"network": "unet++", "channels": [8, 8, 16, 16, 32], "norm": "batch", "shape": [32, 32],
              "small": [32, 32], "views": ["zoom-out", "flip"], "unlabelled": 1, "clean": 1, "classes": 2},
}  # fmt: skip
VARIANTS = ("mean teacher", "joint", "paper", "unrolled", "weights", "unrolled weights")
SWEEPS: dict[str, dict[str, list[dict[str, Any]]]] = {
    "side": {
        "2d": [{"shape": [s, s]} for s in (48, 96, 144, 192)],
        "3d": [
            {"shape": s} for s in ([48, 48, 32], [64, 64, 48], [80, 80, 64], [96, 96, 80], [112, 112, 80])
        ],
    },
    "views": {"*": [{"views": ["zoom-out"] * n} for n in (0, 1, 2, 4)]},
    "classes": {"*": [{"classes": n} for n in (2, 4, 8, 16)]},
    # What makes a step cheaper, and less exact.
    "cheaper": {
        "*": [{}, {"clean_views": False}, {"scope": "decoder"}, {"scope": "head"}, {"chunk": 5}, {"chunk": 1}]
    },
}


def peak() -> int:
    """Return this process's peak resident memory so far, bytes (Linux counts in KiB, macOS in bytes)."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def measure(
    variant: str, setting: dict[str, Any], precision: str, device: str, repeats: int, *, count: bool = False
) -> dict[str, float]:
    """Run one variant; return seconds and bytes of a step or, to count, the multiplications of one on small images."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    import mlbseg.methods.mlb
    import mlbseg.networks  # noqa: F401

    before = peak()
    cuda = device.startswith("cuda")
    method = _method(variant, setting, torch.device(device))
    # A step on small images first: it warms up, and a model that is seen for the first time is checked.
    small = _step(variant, method, {**setting, "shape": setting["small"]})
    small()
    if count:
        with FlopCounterMode(display=False) as counter:
            small()
        return {"work": counter.get_total_flops()}
    step = _step(variant, method, setting)
    if cuda:
        torch.cuda.reset_peak_memory_stats()

    def timed() -> float:
        if cuda:
            torch.cuda.synchronize()
        start = time.perf_counter()
        with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=precision == "bf16"):
            step()
        if cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - start

    seconds = min(timed() for _ in range(repeats))
    return {"seconds": seconds, "bytes": torch.cuda.max_memory_allocated() if cuda else peak() - before}


def _method(name: str, setting: dict[str, Any], device: torch.device) -> MLB:
    """Return MLB around the setting's network, with an optimiser; the networks are the same for every variant."""
    import torch

    from mlbseg.methods.mlb import MLB
    from mlbseg.networks import make_network

    torch.manual_seed(0)
    ndim = len(setting["shape"])
    student = make_network(
        setting["network"], ndim=ndim, in_channels=1, num_classes=setting["classes"], channels=setting["channels"],
        norm=setting["norm"],
    )  # fmt: skip
    if setting["channels_last"]:
        student = student.to(memory_format=torch.channels_last if ndim == 2 else torch.channels_last_3d)  # type: ignore[call-overload]
    method = MLB.make(
        student, mode="paper" if name == "paper" else "joint", views=setting["views"],
        clean_views=setting.get("clean_views", True), scope=setting.get("scope", "all"), chunk=setting.get("chunk"),
        sources=("initial", "pseudo"), weighting="share", decides="everywhere", mix=0.0, jitter=0.0,
        pseudo_dice=False, ple_weight=10.0, teacher_weight=10.0,
    ).to(device)  # fmt: skip
    method.optimiser = torch.optim.SGD(method.student.parameters(), lr=LR, momentum=0.9)
    return method.train()


def _step(name: str, method: MLB, setting: dict[str, Any]) -> Callable[[], object]:
    """Return a function that takes one step on random images."""
    import torch
    from torch.func import functional_call

    sys.path.append(str(Path(__file__).parents[1] / "tests"))
    from mlbseg.core import alignment, cross_entropy_map, directional_derivative, normalise, supervised_loss
    from mlbseg.core.losses import pairwise_consistency, prediction_distance, widened
    from mlbseg.core.teacher import prediction
    from mlbseg.core.views import Views, draw_views
    from mlbseg.types import Batch
    from oracles.double_backward import unrolled_alignments

    shape, classes = setting["shape"], setting["classes"]
    student, teacher, optimiser = method.student, method.teacher, method.optimiser
    assert optimiser is not None
    clean, image = (torch.randn(setting[k], 1, *shape) for k in ("clean", "unlabelled"))
    labels = [torch.randint(0, classes, (setting[k], *shape)) for k in ("clean", "unlabelled")]
    batch = Batch(clean, labels[0], image, labels[1], seed=1).to(next(method.parameters()).device)
    assert batch.image is not None
    assert batch.initial_label is not None

    clean_views, views = (
        draw_views(range(len(x)), x.ndim - 2, setting["views"], device=x.device)
        for x in (batch.clean_image, batch.image)
    )
    clean_x, clean_y = clean_views.expand(batch.clean_image), clean_views.expand_label(batch.clean_label)
    x, y = views.expand(batch.image), views.expand_label(batch.initial_label)
    # Given: the pass that it costs is the clean step's.
    direction = {n: torch.randn_like(p) for n, p in student.named_parameters()} if name == "weights" else {}

    def follow(losses: Mapping[str, torch.Tensor]) -> None:
        optimiser.zero_grad(set_to_none=True)
        torch.stack(list(losses.values())).sum().backward()
        optimiser.step()

    def taught(seen: torch.Tensor) -> torch.Tensor:
        return prediction(teacher, seen + NOISE * torch.randn_like(seen))

    def mlb() -> None:
        for losses in method.losses(batch, 0):
            follow(losses)
        method.after_step(1)

    def mean_teacher() -> None:
        """Take a step of supervised and consistency loss on as many images as MLB sees."""
        target = taught(x)
        both = widened(student(torch.cat([clean_x, x])))
        mine, theirs = both[: len(clean_x)], both[len(clean_x) :]
        follow(
            {
                "clean": supervised_loss(mine, clean_y),
                "teacher": prediction_distance(theirs, target, views.valid(shape)),
            }
        )
        method.after_step(1)

    def costs(z: torch.Tensor) -> list[torch.Tensor]:
        pseudo = views.expand_label(views.pseudo_label(torch.softmax(widened(z.detach()), 1)))
        return [cross_entropy_map(widened(z), label) for label in (y, pseudo)]

    def clean_loss(model: torch.nn.Module, ahead: dict[str, torch.Tensor]) -> torch.Tensor:
        return supervised_loss(widened(functional_call(model, ahead, (clean_x,))), clean_y)

    def consistency(z: torch.Tensor, target: torch.Tensor, drawn: Views) -> torch.Tensor:
        pairs = pairwise_consistency(*drawn.align(torch.softmax(z, 1)))
        return 10 * pairs + 10 * prediction_distance(z, target, drawn.valid(shape))

    def unrolled_weights(
        regulariser: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ) -> list[torch.Tensor]:
        """Return weights through the graph of the gradient."""
        return normalise(unrolled_alignments(student, x, costs, clean_loss, regulariser=regulariser, lr=LR))

    def unrolled() -> None:
        """Take paper mode's iteration with unrolled weights, as the public code does."""
        target, clean_target = taught(x), taught(clean_x)
        weights = unrolled_weights(lambda z: consistency(widened(z), target, views))
        logits = widened(student(x))
        weighted = sum((w * c).sum() for w, c in zip(weights, costs(logits), strict=True))
        follow({"weighted": weighted + consistency(logits, target, views)})
        del logits, weighted
        logits = widened(student(clean_x))
        clean = supervised_loss(logits, clean_y)
        follow({"clean": clean + consistency(logits, clean_target, clean_views)})
        method.after_step(1)

    def weights() -> object:
        logits, tangent = directional_derivative(student, direction, x, chunk=setting.get("chunk"))
        logits, tangent = widened(logits), widened(tangent)
        pseudo = views.expand_label(views.pseudo_label(torch.softmax(logits, 1)))
        costs = [partial(cross_entropy_map, label=label) for label in (y, pseudo)]
        return normalise([alignment(cost, logits, tangent) for cost in costs])

    if name == "forward":  # of one image: the unit of work
        return lambda: prediction(student, batch.clean_image[:1])
    return {
        "mean teacher": mean_teacher,
        "joint": mlb,
        "paper": mlb,
        "unrolled": unrolled,
        "weights": weights,
        "unrolled weights": unrolled_weights,
    }[name]


def in_fresh_process(**arguments: Any) -> dict[str, float]:
    """Measure one variant by itself."""
    command = [sys.executable, __file__, "--measure", json.dumps(arguments)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)  # noqa: S603
    if done.returncode:
        raise SystemExit(f"{arguments['variant']}: failed (its message stands above)")
    figures: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return figures


def header(device: str) -> str:
    """Return what the figures depend on besides this file."""
    import torch

    name = torch.cuda.get_device_name() if device.startswith("cuda") else platform.processor() or "CPU"
    processor = torch.cpu.get_capabilities().get("cpu_name", name)
    return (
        f"torch {torch.__version__}, {name if device != 'cpu' else processor}, {torch.get_num_threads()} threads, "
        f"{platform.system()}"
    )


def compare(setting: dict[str, Any], asked: argparse.Namespace) -> None:
    """Print the table of all variants; ratios are to the mean teacher's step and to the unrolled step in float32."""
    work = {
        name: in_fresh_process(
            variant=name, setting=setting, precision="float32", device="cpu", repeats=0, count=True
        )
        for name in ("forward", *asked.variants)
    }
    found: dict[tuple[str, str], dict[str, float]] = {}
    for precision in asked.precision:
        for variant in asked.variants:
            figures = in_fresh_process(
                variant=variant,
                setting=setting,
                precision=precision,
                device=asked.device,
                repeats=asked.repeats,
            )
            found[variant, precision] = figures
            print(f"{variant}, {precision}: {figures}", file=sys.stderr, flush=True)
    print("| variant | precision | s | GiB | work | time / MT | memory / MT | time / unrolled float32 "
          "| memory / unrolled float32 |\n|---|---|---|---|---|---|---|---|---|")  # fmt: skip
    for (variant, precision), figures in found.items():
        whole = "unrolled weights" if variant.endswith("weights") else "unrolled"
        cells = [f"{figures['seconds']:.3g}", f"{figures['bytes'] / GIB:.3g}"]
        cells.append(f"{work[variant]['work'] / work['forward']['work']:.0f}")
        for base in (("mean teacher", precision), (whole, "float32")):
            for key in ("seconds", "bytes"):
                ratio = figures[key] / found[base][key] if base in found else math.nan
                cells.append("" if math.isnan(ratio) else f"{ratio:.2f}")
        print(f"| {variant} | {precision} | {' | '.join(cells)} |", flush=True)


def sweep(setting: dict[str, Any], asked: argparse.Namespace) -> None:
    """Print time and memory of a variant while one factor of the setting grows."""
    changes = SWEEPS[asked.sweep].get(asked.setting) or SWEEPS[asked.sweep]["*"]
    print("| setting | variant | precision | s | GiB | pixels in all views | s per million |\n"
          "|---|---|---|---|---|---|---|")  # fmt: skip
    for change in changes:
        now = {**setting, **change}
        pixels = math.prod(now["shape"]) * (now["unlabelled"] + now["clean"]) * (1 + len(now["views"]))
        text = ", ".join(f"{k} {v if not isinstance(v, list) or k == 'shape' else len(v) + 1}"
                         for k, v in change.items()) or "as it is"  # fmt: skip
        for precision in asked.precision:
            for variant in asked.variants:
                figures = in_fresh_process(variant=variant, setting=now, precision=precision, device=asked.device,
                                           repeats=asked.repeats)  # fmt: skip
                print(
                    f"| {text} | {variant} | {precision} | {figures['seconds']:.3g} | {figures['bytes'] / GIB:.3g} "
                    f"| {pixels} | {1e6 * figures['seconds'] / pixels:.3g} |",
                    flush=True,
                )


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--setting", choices=SETTINGS, default="2d")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--precision", nargs="+", choices=("float32", "bf16"), default=["float32", "bf16"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--repeats", type=int, default=2, help="timed steps (default: 2)")
    parser.add_argument("--channels-last", action="store_true")
    parser.add_argument("--sweep", choices=SWEEPS, help="grow one factor instead of comparing all variants")
    parser.add_argument("--measure", type=json.loads, help=argparse.SUPPRESS)
    asked = parser.parse_args(arguments)
    if asked.measure:
        print(json.dumps(measure(**asked.measure)))
        return
    os.environ["OMP_NUM_THREADS"] = str(asked.threads)
    setting = {**SETTINGS[asked.setting], "channels_last": asked.channels_last}
    print(f"{asked.setting}: {setting}\n{header(asked.device)}\n", flush=True)
    (sweep if asked.sweep else compare)(setting, asked)


if __name__ == "__main__":
    main()
