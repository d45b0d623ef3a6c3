"""Sums over ranks, and losses whose batch several ranks share, against one rank with the whole of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from mlbseg.core.losses import pairwise_consistency, prediction_distance, soft_dice_loss, supervised_loss
from mlbseg.core.ranks import ALONE, Ranks
from ranks import together


def test_alone_nothing_is_exchanged() -> None:
    x = torch.tensor([1.0, 2.0])
    assert Ranks.current() is ALONE
    assert ALONE.sum(x) is x
    assert ALONE.sum_each(x, x) == (x, x)
    assert ALONE.sum_all({"x": x}) == {"x": x}
    assert torch.equal(ALONE.max(x), x)


def sums(ranks: Ranks) -> dict[str, Any]:
    x = torch.tensor([1.0, 2.0]).double().mul(ranks.index + 1).requires_grad_()
    total = ranks.sum(x)
    (total**2).sum().backward()
    count, matrix = ranks.sum_each(torch.tensor(3), torch.full((2, 2), ranks.index + 0.5))
    return {
        "total": total.detach(),
        "gradient": x.grad,
        "most": ranks.max(x),
        "count": count,
        "matrix": matrix,
        "all": ranks.sum_all({"a": x, "b": torch.eye(2).double()}),
    }


@pytest.mark.slow
def test_sums_are_over_all_ranks_and_gradients_of_the_own_part() -> None:
    for found in together(3, sums):
        assert torch.equal(found["total"], torch.tensor([6.0, 12.0]).double())
        assert torch.equal(found["gradient"], torch.tensor([12.0, 24.0]).double())
        assert torch.equal(found["most"], torch.tensor([3.0, 6.0]).double())
        assert int(found["count"]) == 9
        assert torch.equal(found["matrix"], torch.full((2, 2), 4.5))
        assert torch.equal(found["all"]["a"], found["total"])
        assert torch.equal(found["all"]["b"], 3 * torch.eye(2).double())


BATCH = 4
SHAPES = ((6, 4), (4, 3, 2))


def batch_of(shape: tuple[int, ...]) -> dict[str, Tensor]:
    """Return tensors of a batch of 4, unevenly known and seen, each (..., B, ..., *S) with B first or second."""
    torch.manual_seed(len(shape))
    label = torch.randint(0, 3, (BATCH, *shape))
    label[0] = -1  # the first rank knows less than the others
    label[1, :2] = -1
    return {
        "logits": torch.randn(BATCH, 3, *shape, dtype=torch.float64),
        "other": torch.randn(BATCH, 3, *shape, dtype=torch.float64),
        "label": label,
        "valid": (torch.rand(BATCH, 1, *shape) < 0.6).double(),
        "weight": torch.rand(BATCH, *shape, dtype=torch.float64),
        "views": torch.randn(3, BATCH, 3, *shape, dtype=torch.float64),
        "seen": (torch.rand(3, BATCH, 1, *shape) < 0.7).double(),
    }


def losses(ranks: Ranks, shape: tuple[int, ...]) -> dict[str, tuple[Tensor, Tensor]]:
    """Return each loss with its gradient with respect to this rank's part of the batch."""
    share = BATCH // ranks.count
    own = slice(ranks.index * share, (ranks.index + 1) * share)
    part = {k: v[:, own] if k in ("views", "seen") else v[own] for k, v in batch_of(shape).items()}
    x, views = part["logits"].requires_grad_(), part["views"].requires_grad_()
    values = {
        "dice": (soft_dice_loss(x, part["label"], ranks=ranks), x),
        "supervised": (supervised_loss(x, part["label"], ranks=ranks), x),
        "weighted": (supervised_loss(x, part["label"], weight=part["weight"], ranks=ranks), x),
        "distance": (prediction_distance(x, part["other"], part["valid"], ranks=ranks), x),
        "pairs": (pairwise_consistency(torch.softmax(views, 2), part["seen"], ranks=ranks), views),
    }
    return {
        name: (value.detach(), torch.autograd.grad(value, source)[0])
        for name, (value, source) in values.items()
    }


def all_losses(ranks: Ranks) -> dict[str, tuple[Tensor, Tensor]]:
    return {
        f"{name} {len(shape)}D": found for shape in SHAPES for name, found in losses(ranks, shape).items()
    }


@pytest.mark.slow
def test_losses_of_a_shared_batch_are_those_of_the_whole() -> None:
    whole = all_losses(ALONE)
    parts = together(2, all_losses)
    for name, (value, gradient) in whole.items():
        for part in parts:
            torch.testing.assert_close(part[name][0], value, rtol=1e-13, atol=0)
        joined = torch.cat([part[name][1] for part in parts], dim=1 if name.startswith("pairs") else 0)
        torch.testing.assert_close(joined, gradient, rtol=1e-12, atol=1e-15)
