"""Pseudo-label: who labels and when, and what has no label."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from methods.small import conv_net, make_batch, per_pixel
from mlbseg.core.losses import supervised_loss
from mlbseg.core.perturb import strongly_changed
from mlbseg.methods import pseudo_label
from mlbseg.methods.pseudo_label import PseudoLabel
from mlbseg.types import IGNORE

dimensions = pytest.mark.parametrize("ndim", [2, 3])


def take_step(method: PseudoLabel, step: int) -> dict[str, float]:
    batch = make_batch(2, seed=step)
    [losses] = method.losses(batch, step)
    method.student.zero_grad(set_to_none=True)
    torch.stack(list(losses.values())).sum().backward()
    with torch.no_grad():
        for p in method.student.parameters():
            p -= 0.1 * p.grad
    return {name: term.item() for name, term in losses.items()}


@dimensions
@pytest.mark.parametrize("strength", [0.0, 0.5])
def test_the_label_is_what_the_student_thinks_of_the_image_as_it_is(ndim: int, strength: float) -> None:
    method = PseudoLabel.make(conv_net(ndim), strength=strength, threshold=0.6, pseudo_weight=2.0)
    batch = make_batch(ndim)
    [losses] = method.losses(batch, 5)
    assert batch.image is not None
    probability = torch.softmax(method.student(batch.image), 1)
    label = torch.where(probability.amax(1) < 0.6, IGNORE, probability.argmax(1))
    assert 0.1 < (label >= 0).double().mean() < 0.9
    seen = batch.image
    if strength:
        seen = strongly_changed(method.seeds(3, batch.seed, 0), seen, strength)
    expected = 2 * supervised_loss(method.student(seen), label)
    torch.testing.assert_close(losses["pseudo"], expected, rtol=1e-9, atol=0)
    assert method.monitors["kept_pseudo"].item() == pytest.approx((label >= 0).double().mean().item())


@dimensions
def test_a_pixel_below_the_threshold_gets_no_gradient(ndim: int) -> None:
    student, batch = per_pixel(ndim)
    method = PseudoLabel.make(student, threshold=0.7)
    [losses] = method.losses(batch, 5)
    torch.stack(list(losses.values())).sum().backward()
    assert batch.image is not None
    assert student.others.grad is not None
    likely = torch.softmax(batch.image, 1).amax(1) >= 0.7
    grad = student.others.grad.abs().sum(1)
    assert 0 < likely.sum() < likely.numel()
    assert ((grad > 0) == likely).all()


@dimensions
def test_a_threshold_of_0_labels_all_and_of_1_nothing(ndim: int) -> None:
    student, batch = per_pixel(ndim)
    for threshold, kept in ((0.0, 1), (1.0, 0)):
        method = PseudoLabel.make(student, threshold=threshold)
        [losses] = method.losses(batch, 5)
        assert method.monitors["kept_pseudo"].item() == kept
        assert (losses["pseudo"].item() > 0) == bool(kept)


@pytest.mark.parametrize(
    ("length", "rounds", "begins"),
    [(10, 1, [0]), (10, 3, [0, 4, 7]), (9, 3, [0, 3, 6]), (4, 4, [0, 1, 2, 3]), (2, 5, [0, 1])],
)
def test_each_round_begins_with_the_student_of_the_moment(
    length: int, rounds: int, begins: list[int]
) -> None:
    method = PseudoLabel.make(conv_net(2), rounds=rounds, threshold=0.5).train()
    method.length = length
    labeller = method.labeller
    assert labeller is not None
    found = []
    for step in range(length):
        student, old = (copy.deepcopy(net.state_dict()) for net in (method.student, labeller))
        take_step(method, step)
        new = labeller.state_dict()
        if all(torch.equal(new[name], value) for name, value in student.items()):
            found.append(step)
        else:
            assert all(torch.equal(new[name], value) for name, value in old.items())
    assert found == begins


def test_within_a_round_the_labels_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    method = PseudoLabel.make(conv_net(2), rounds=1, threshold=0.0).train()
    method.length = 5
    first = copy.deepcopy(method.student)
    seen: list[Tensor] = []
    original = pseudo_label.confident_label

    def watched(logits: Tensor, threshold: float) -> Tensor:
        seen.append(original(logits, threshold))
        return seen[-1]

    monkeypatch.setattr(pseudo_label, "confident_label", watched)
    for step in range(5):
        take_step(method, step)
    image = make_batch(2).image
    assert image is not None
    assert not torch.equal(method.student(image).argmax(1), first(image).argmax(1))
    for label in seen:
        assert torch.equal(label, first(image).argmax(1))


def test_a_method_loaded_in_mid_round_goes_on_alike() -> None:
    settings: dict[str, Any] = {"rounds": 2, "threshold": 0.4, "strength": 0.3}
    method = PseudoLabel.make(conv_net(2), **settings).train()
    method.length = 10
    for step in range(7):
        take_step(method, step)
    loaded = PseudoLabel.make(copy.deepcopy(conv_net(2)), **settings).train()
    loaded.length = 10
    loaded.load_state_dict(method.state_dict())
    for step in range(7, 10):
        assert take_step(loaded, step) == take_step(method, step)


def test_the_labeller_predicts_as_it_would_a_new_scan() -> None:
    method = PseudoLabel.make(conv_net(2, dropout=0.5, batch_norm=True), rounds=1).train()
    labeller = method.labeller
    assert labeller is not None
    assert method.student.training
    assert not any(module.training for module in labeller.modules())
    method.eval().train()
    assert not labeller.training
    [losses] = method.losses(make_batch(2), 0)
    losses["pseudo"].backward()
    assert all(p.grad is None and not p.requires_grad for p in labeller.parameters())


def test_labelling_leaves_the_running_statistics_to_the_pass_that_learns() -> None:
    expected = conv_net(2, batch_norm=True).train()
    batch = make_batch(2)
    method = PseudoLabel.make(copy.deepcopy(expected), strength=0.3).train()
    [_] = method.losses(batch, 0)
    assert batch.image is not None
    seen = strongly_changed(method.seeds(3, batch.seed, 0), batch.image, 0.3)
    expected(torch.cat([batch.clean_image, seen]))
    for name, value in expected.named_buffers():
        torch.testing.assert_close(dict(method.student.named_buffers())[name], value)


def test_by_default_one_pass_labels_and_learns() -> None:
    method = PseudoLabel.make(conv_net(2))
    passes: list[int] = []
    method.student.register_forward_hook(lambda module, inputs, z: passes.append(len(z)))
    [_] = method.losses(make_batch(2), 0)
    assert passes == [5]
