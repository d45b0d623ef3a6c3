"""Draw the pictures of docs/method.md: `python docs/tools/diagrams.py` writes them to docs/images/.

They have a background of their own, so that they can be read on light and on dark pages.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch
from torch import Tensor, nn
from torch.func import functional_call

from mlbseg.core import cross_entropy_map, gradient, pixel_weights, supervised_loss

IMAGES = Path(__file__).resolve().parents[1] / "images"
PAPER, INK, CAREFUL, OWN, DECIDED = "#fbfbf8", "#22252b", "#1f6f8b", "#b3541e", "#6a4c93"


def main() -> None:
    """Write both pictures; the same ones each time, byte for byte, on one machine."""
    mpl.rcParams |= {"svg.hashsalt": "mlbseg", "font.size": 9, "text.color": INK, "axes.edgecolor": INK}
    for name, figure in (("method-step", step()), ("method-direction", direction())):
        figure.savefig(IMAGES / f"{name}.svg", facecolor=PAPER, metadata={"Date": None})


def step() -> Figure:
    """Return what happens in one step of the second stage, by default (joint mode)."""
    figure = Figure(figsize=(8.6, 4.5))
    axis = figure.add_axes((0, 0, 1, 1), xlim=(0, 100), ylim=(0, 54))
    axis.axis("off")
    boxes = {
        "clean": ((3, 42), "careful scans\nand labels", CAREFUL),
        "student": ((28, 42), "student", INK),
        "loss": ((53, 42), "clean loss", CAREFUL),
        "v": ((78, 42), "v: its gradient", CAREFUL),
        "scan": ((3, 22), "scan without\na careful label", OWN),
        "views": ((28, 22), "views of it:\nas it is, zoomed", OWN),
        "mixed": ((53, 22), "careful patches\npasted in", CAREFUL),
        "cost": ((78, 22), "student:\ncost of every pixel", INK),
        "teacher": ((28, 4), "teacher: mean of its\nanswers, mapped back", OWN),
        "pseudo": ((53, 4), "pseudo label", OWN),
        "weight": ((78, 4), "g: does following this\npixel lower the clean loss?", DECIDED),
    }
    for place, text, colour in boxes.values():
        _box(axis, place, text, colour)
    right, down = ((19, 4), (0, 4)), ((9.5, 0), (9.5, 8))
    for start, end in (("clean", "student"), ("student", "loss"), ("loss", "v"), ("scan", "views"),
                       ("views", "mixed"), ("mixed", "cost"), ("teacher", "pseudo")):  # fmt: skip
        _arrow(axis, boxes[start][0], boxes[end][0], right)
    _arrow(axis, boxes["views"][0], boxes["teacher"][0], down)
    _arrow(axis, boxes["cost"][0], boxes["weight"][0], down)
    _arrow(axis, boxes["pseudo"][0], boxes["cost"][0], ((19, 6), (2, 0)))
    _arrow(axis, boxes["clean"][0], boxes["mixed"][0], ((15, 0), (3, 8)))
    _arrow(axis, boxes["v"][0], boxes["cost"][0], down, DECIDED)
    axis.text(86, 36, "derivative of the costs along v,\nonly where a scan has\ntwo labels that differ", fontsize=7.5,
              color=DECIDED, va="center", ha="right")  # fmt: skip
    return figure


def _box(axis: Axes, place: tuple[float, float], text: str, colour: str) -> None:
    axis.add_patch(
        FancyBboxPatch(
            place, 19, 8, boxstyle="round,pad=0.2,rounding_size=1.2", fc="white", ec=colour, lw=1.6
        )
    )
    axis.text(place[0] + 9.5, place[1] + 4, text, ha="center", va="center", fontsize=8)


def _arrow(
    axis: Axes,
    start: tuple[float, float],
    end: tuple[float, float],
    offsets: tuple[tuple[float, float], tuple[float, float]],
    colour: str = INK,
) -> None:
    ends = [(place[0] + dx, place[1] + dy) for place, (dx, dy) in zip((start, end), offsets, strict=True)]
    style = {"arrowstyle": "-|>", "color": colour, "lw": 1.2, "shrinkA": 2, "shrinkB": 2}
    axis.annotate("", xy=ends[1], xytext=ends[0], arrowprops=style)


def direction() -> Figure:
    """Return which pixels count, in a model of two parameters, and that one pass finds what unrolling finds."""
    figure = Figure(figsize=(8.6, 4.0), layout="constrained")
    plane, agreement = figure.subplots(1, 2)
    steps, clean = _two_parameters()
    helps = steps @ clean > 0
    for part, colour, text in (
        (helps, CAREFUL, "lowers the clean loss: counts"),
        (~helps, OWN, "raises it: weight 0"),
    ):
        plane.quiver(*torch.zeros(2, int(part.sum())), *steps[part].T, angles="xy", scale_units="xy", scale=1,
                     width=0.005, color=colour, label=f"a pixel's step, {text}")  # fmt: skip
    plane.quiver(0, 0, *clean, angles="xy", scale_units="xy", scale=1, width=0.014, color=DECIDED,
                 label="the clean loss's step, $-v$")  # fmt: skip
    across = torch.stack([-clean[1], clean[0]]) / clean.norm() * 2
    plane.plot(*torch.stack([-across, across]).T, color=INK, lw=0.8, ls="--")
    plane.set(xlim=(-1.3, 1.3), ylim=(-1.3, 1.3), aspect="equal", xticks=[], yticks=[],
              xlabel="first parameter", ylabel="second parameter",
              title="A model of two parameters, 24 pixels")  # fmt: skip
    plane.legend(fontsize=7, loc="lower left", facecolor=PAPER)
    fast, unrolled = _both_ways()
    error = float((fast - unrolled).abs().max() / unrolled.abs().max())
    agreement.axline((0, 0), slope=1, color=INK, lw=0.8, ls="--")
    agreement.scatter(unrolled, fast, s=6, color=DECIDED)
    title = (
        f"A small network, {len(fast)} pixels in float64\nlargest difference: {error:.0e} of the largest $g$"
    )
    agreement.set(xlabel="$g$ by unrolling a step, twice backwards", ylabel="$g$ by one forward-mode pass",
                  title=title, xticks=[0], yticks=[0])  # fmt: skip
    for axis in (plane, agreement):
        axis.set_facecolor(PAPER)
    return figure


def _two_parameters() -> tuple[Tensor, Tensor]:
    """Return each pixel's step (24, 2) and the clean loss's (2,), of a logistic model of brightness."""
    torch.manual_seed(3)
    weights = torch.tensor([0.6, -0.2])

    def steps(labels: Tensor, values: Tensor) -> Tensor:
        inputs = torch.stack([values, torch.ones_like(values)], 1)
        return (labels - torch.sigmoid(inputs @ weights))[:, None] * inputs

    careful, doubtful = torch.randn(40), torch.randn(24)
    wrong = torch.rand(24) < 0.3
    clean = steps((careful > 0.4).float(), careful).mean(0)
    return steps(((doubtful > 0.4) ^ wrong).float(), doubtful), clean / clean.norm()


def _both_ways() -> tuple[Tensor, Tensor]:
    """Return g of every pixel, by `pixel_weights` and by an unrolled step, on a convolutional network."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 6, 3, padding=1), nn.SiLU(), nn.Conv2d(6, 3, 3, padding=1)).double()
    clean, image = torch.randn(2, 1, 1, 16, 16, dtype=torch.float64)
    careful, doubtful = torch.randint(0, 3, (2, 1, 16, 16))
    lr = 0.1
    v = gradient(supervised_loss(model(clean), careful), model)
    fast = pixel_weights(model, image, {"label": lambda z: cross_entropy_map(z, doubtful)}, v).alignments[
        "label"
    ]

    parameters = {name: p.detach().requires_grad_() for name, p in model.named_parameters()}
    w = torch.zeros(1, 16, 16, dtype=torch.float64, requires_grad=True)
    followed = (w * cross_entropy_map(functional_call(model, parameters, (image,)), doubtful)).sum()
    grads = torch.autograd.grad(followed, list(parameters.values()), create_graph=True)
    ahead = {name: p - lr * g for (name, p), g in zip(parameters.items(), grads, strict=True)}
    (slope,) = torch.autograd.grad(supervised_loss(functional_call(model, ahead, (clean,)), careful), w)
    return lr * fast.flatten().detach(), -slope.flatten()


if __name__ == "__main__":
    main()
