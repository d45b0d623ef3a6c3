"""Two ranks with half of each batch compute what one computes with the whole of it, in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mlbseg.core.ranks import ALONE, Ranks
from mlbseg.methods import find_method
from mlbseg.methods.mlb import MLB
from mlbseg.types import Batch
from ranks import together

pytestmark = pytest.mark.slow

STEPS = 6
CLEAN, OTHERS = 2, 4  # images of a batch
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "supervised": ("supervised", {}),
    "joint": (
        "mlb",
        {
            "mode": "joint",
            "views": ("zoom-in", "zoom-out", "flip"),
            "sources": ("initial", "pseudo"),
            "decides": "everywhere",
            "mix": 0.0,
            "ple_weight": 1.0,
        },
    ),
    "joint, share": (
        "mlb",
        {
            "mode": "joint",
            "weighting": "share",
            "decides": "everywhere",
            "pseudo_from": "student",
            "chunk": 1,
        },
    ),
    "joint, set apart": (
        "mlb",
        {
            "mode": "joint",
            "clean_views": True,
            "sources": ("initial", "pseudo"),
            "weighting": "softmax",
            "decides": "everywhere",
        },
    ),
    "joint, mixed": ("mlb", {"mode": "joint", "sources": ("initial", "pseudo"), "mix": 0.7}),
    "entropy": ("entropy", {}),
    "ict": ("ict", {}),
    "mean-teacher": ("mean-teacher", {}),
    "pseudo-label": ("pseudo-label", {"threshold": 0.5}),
    "pseudo-label, rounds": ("pseudo-label", {"rounds": 3, "threshold": 0.5, "strength": 0.6}),
    "ua-mt": ("ua-mt", {"threshold": 0.5}),
    "paper": (
        "mlb",
        {
            "mode": "paper",
            "sources": ("initial", "pseudo"),
            "weighting": "share",
            "decides": "everywhere",
            "jitter": 0.0,
        },
    ),
    "bcp": ("bcp", {}),
    "cct": ("cct", {}),
    "cps": ("cps", {}),
    "fixmatch": ("fixmatch", {"threshold": 0.6}),
    "unimatch": ("unimatch", {"threshold": 0.6}),
}


def conv_net(ndim: int) -> nn.Module:
    conv = nn.Conv2d if ndim == 2 else nn.Conv3d
    torch.manual_seed(ndim)
    return nn.Sequential(
        conv(1, 6, 3, padding=1), nn.GroupNorm(2, 6), nn.SiLU(), conv(6, 3, 3, padding=1)
    ).double()


def batch_of(step: int, ndim: int, ranks: Ranks, *, apart: bool) -> Batch:
    """Return this rank's slice of the batch of a step; ranks know different numbers of pixels."""
    generator = torch.Generator().manual_seed(step)
    shape = (8, 10) if ndim == 2 else (6, 8, 5)

    def images(count: int) -> tuple[Tensor, Tensor]:
        image = torch.randn(count, 1, *shape, generator=generator, dtype=torch.float64)
        label = ((image[:, 0] + 0.3 * torch.randn(count, *shape, generator=generator)) > 0.2).long()
        label += (image[:, 0] > 1.0).long()
        label[0, :2] = -1
        return image, label

    def own(x: Tensor) -> Tensor:
        return x.tensor_split(ranks.count)[ranks.index]

    clean, others = images(CLEAN), images(OTHERS)
    batch = Batch(*map(own, clean), *map(own, others), seed=1000 + step)
    if apart:
        batch.meta_image, batch.meta_label = map(own, images(CLEAN))
    return batch


def trained(ranks: Ranks, variant: str, ndim: int) -> dict[str, Any]:
    """Train for some steps; return the parameters, the last values and every step's weights of this rank."""
    name, settings = VARIANTS[variant]
    seen: list[Tensor] = []
    original = MLB._weigh

    def weigh(self: MLB, *arguments: Any, **named: Any) -> Any:
        found = original(self, *arguments, **named)
        per_view = [w.unflatten(0, (-1, OTHERS // ranks.count)) for w in found[1].values()]
        seen.append(torch.stack(per_view).detach().clone())  # (sources, views, images, *S)
        return found

    MLB._weigh = weigh  # type: ignore[method-assign]
    try:
        method = find_method(name).make(conv_net(ndim), **settings).train()
        method.ranks = ranks
        method.length = STEPS
        method.optimiser = torch.optim.SGD(method.trained(), lr=0.05, momentum=0.9)
        values: dict[str, Tensor] = {}
        for step in range(STEPS):
            for losses in method.losses(batch_of(step, ndim, ranks, apart="apart" in variant), step):
                method.optimiser.zero_grad(set_to_none=True)
                torch.stack(list(losses.values())).sum().backward()
                named = dict(method.named_parameters())
                grads = ranks.sum_all({k: p.grad for k, p in named.items() if p.grad is not None})
                for key, grad in grads.items():
                    named[key].grad = grad
                method.optimiser.step()
                values |= {key: term.detach() for key, term in losses.items()}
            method.after_step(step)
    finally:
        MLB._weigh = original  # type: ignore[method-assign]
    return {
        "state": dict(method.state_dict()),
        "values": values | method.monitors,
        "weights": seen,
    }


CASES = [(variant, ndim) for variant in VARIANTS for ndim in (2, 3)]


def all_trained(ranks: Ranks) -> list[dict[str, Any]]:
    return [trained(ranks, *case) for case in CASES]


@pytest.fixture(scope="module")
def two_ranks() -> list[list[dict[str, Any]]]:
    """What each of two ranks has trained: starting them takes longer than all their steps."""
    return together(2, all_trained)


@pytest.mark.parametrize(("variant", "ndim"), CASES)
def test_two_ranks_train_as_one_does(variant: str, ndim: int, two_ranks: list[list[dict[str, Any]]]) -> None:
    one = trained(ALONE, variant, ndim)
    two = [rank[CASES.index((variant, ndim))] for rank in two_ranks]
    assert all(value.dtype == torch.float64 for value in one["state"].values())
    for rank in two:
        for key, value in one["state"].items():
            torch.testing.assert_close(rank["state"][key], value, rtol=0, atol=1e-9)
        for key, value in one["values"].items():
            found = rank["values"][key].to(value)
            torch.testing.assert_close(found, value, rtol=1e-6, atol=1e-9)
    assert len(one["weights"]) == (STEPS if VARIANTS[variant][0] == "mlb" else 0)
    for step, whole in enumerate(one["weights"]):
        joined = torch.cat([rank["weights"][step] for rank in two], dim=2)
        torch.testing.assert_close(joined, whole, rtol=1e-6, atol=1e-12)
        assert float(whole.sum()) == pytest.approx(1)
