"""Entropy minimisation against a loop, and where its gradient leads."""

from __future__ import annotations

import math

import pytest
import torch

from methods.small import conv_net, make_batch, per_pixel
from mlbseg.core.losses import supervised_loss
from mlbseg.methods.entropy import Entropy


@pytest.mark.parametrize("ndim", [2, 3])
def test_the_terms_are_the_clean_loss_and_the_mean_entropy_of_unlabelled_pixels(ndim: int) -> None:
    method, batch = Entropy.make(conv_net(ndim), entropy_weight=0.3), make_batch(ndim)
    [losses] = method.losses(batch, 5)
    assert batch.image is not None
    probability = torch.softmax(method.student(batch.image), 1).movedim(1, -1).reshape(-1, 3).tolist()
    entropy = [-sum(q * math.log(q) for q in p) / math.log(3) for p in probability]
    assert losses["entropy"].item() == pytest.approx(0.3 * sum(entropy) / len(entropy))
    clean = supervised_loss(method.student(batch.clean_image), batch.clean_label)
    torch.testing.assert_close(losses["clean"], clean)


def test_a_step_down_makes_the_likeliest_class_likelier() -> None:
    student, batch = per_pixel(2)
    [losses] = Entropy.make(student).losses(batch, 5)
    losses["entropy"].backward()
    assert batch.image is not None
    assert student.others.grad is not None
    likeliest = batch.image.argmax(1, keepdim=True)
    assert (student.others.grad.gather(1, likeliest) < 0).all()
