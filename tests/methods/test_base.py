"""What methods share: the ramp of a factor, seeds of images, masks of dropout."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from mlbseg.core.ranks import Ranks
from mlbseg.methods.supervised import Supervised
from mlbseg.types import Batch


def any_method() -> Supervised:
    return Supervised.make(nn.Conv2d(1, 2, 1))


def test_a_factor_rises_over_its_share_of_the_stage_to_its_weight() -> None:
    method = any_method()
    method.length = 200
    assert method.ramped(3.0, 0.4, 0) == pytest.approx(3 * math.exp(-5))
    assert method.ramped(3.0, 0.4, 40) == pytest.approx(3 * math.exp(-5 / 4))
    assert method.ramped(3.0, 0.4, 79) < 3
    assert method.ramped(3.0, 0.4, 80) == method.ramped(3.0, 0.4, 199) == 3


def test_ranks_give_an_image_the_seed_that_one_rank_gives_it() -> None:
    method = any_method()
    whole = method.seeds(6, 5, 1)
    assert len(set(whole)) == 6
    assert whole != method.seeds(6, 5, 2)
    assert whole != method.seeds(6, 6, 1)
    parts = []
    for index in range(3):
        method.ranks = Ranks(index, 3)
        parts += method.seeds(2, 5, 1)
    assert parts == whole


def test_dropout_is_that_of_the_batch_and_the_global_stream_goes_on() -> None:
    method, image = any_method(), torch.ones(2, 1, 8, 8)

    def masks(seed: int) -> torch.Tensor:
        with method.same_dropout(Batch(image, image[:, 0].long(), seed=seed)):
            return nn.functional.dropout(image)

    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    first = masks(4)
    assert torch.equal(torch.rand(3), expected)
    assert torch.equal(masks(4), first)
    assert not torch.equal(masks(5), first)
