"""Uncertainty-aware mean teacher against loops over pixels, and what its many passes leave alone."""

from __future__ import annotations

import copy
import math

import pytest
import torch

from methods.small import conv_net, make_batch
from mlbseg.core.perturb import noisy
from mlbseg.methods.mean_teacher import _NOISE, _TEACHER_NOISE, STREAMS
from mlbseg.methods.ua_mt import UAMT

dimensions = pytest.mark.parametrize("ndim", [2, 3])


def make_method(ndim: int, **settings: float) -> UAMT:
    method = UAMT.make(conv_net(ndim), consistency_weight=2.0, dropout=0.0, **settings)  # type: ignore[arg-type]
    with torch.no_grad():
        for p in method.teacher.parameters():
            p.add_(0.2 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
    method.length = 10
    return method.train()


@dimensions
@pytest.mark.parametrize("step", [0, 4, 9])
def test_mask_and_distance_equal_loops(ndim: int, step: int) -> None:
    method = make_method(ndim, noise=0.8, passes=4, threshold=0.5)
    batch = make_batch(ndim)
    [losses] = method.losses(batch, step)
    image = batch.image
    assert image is not None

    def shown(stream: int) -> torch.Tensor:
        return noisy(method.seeds(len(image), batch.seed, stream), image, 0.8)

    def pixels(logits: torch.Tensor) -> list[list[float]]:
        return torch.softmax(logits, 1).movedim(1, -1).reshape(-1, 3).tolist()

    passes = [pixels(method.teacher(shown(STREAMS + i))) for i in range(4)]
    taught, learnt = pixels(method.teacher(shown(_TEACHER_NOISE))), pixels(method.student(shown(_NOISE)))
    ramp = math.exp(-5 * (1 - step / 10) ** 2)
    most = (0.5 + 0.5 * ramp) * math.log(3)
    total, kept = 0.0, 0
    for *predicted, q, p in zip(*passes, taught, learnt, strict=True):
        mean = [sum(one[k] for one in predicted) / 4 for k in range(3)]
        if -sum(m * math.log(m) for m in mean) < most:
            kept += 1
            total += sum((a - b) ** 2 for a, b in zip(p, q, strict=True))
    assert 0 < kept < len(taught)
    factor = 2 * math.exp(-5 * (1 - min(step / 4, 1)) ** 2)
    assert losses["teacher"].item() == pytest.approx(factor * total / (3 * kept), rel=1e-9)
    assert method.monitors["kept_teacher"].item() == pytest.approx(kept / len(taught))


@dimensions
def test_more_pixels_count_as_the_stage_goes_on_and_in_the_end_all(ndim: int) -> None:
    method, batch, kept = make_method(ndim, threshold=0.2), make_batch(ndim), []
    for step in (0, 5, 7, 10):
        [_] = method.losses(batch, step)
        kept.append(method.monitors["kept_teacher"].item())
    assert kept == sorted(kept)
    assert kept[0] < kept[1] < kept[-1] == 1


@dimensions
def test_where_nothing_is_certain_the_distance_is_zero_and_finite(ndim: int) -> None:
    method = make_method(ndim, threshold=0.0)
    method.length = 10**6
    with torch.no_grad():
        for p in method.teacher.parameters():
            p.zero_()
    [losses] = method.losses(make_batch(ndim), 0)
    losses["teacher"].backward()
    assert losses["teacher"].item() == method.monitors["kept_teacher"].item() == 0
    assert all(torch.isfinite(p.grad).all() for p in method.student.parameters() if p.grad is not None)


def test_the_passes_leave_the_teacher_as_it_is() -> None:
    method = UAMT.make(conv_net(2, batch_norm=True, dropout=0.3)).train()
    before = copy.deepcopy(method.teacher.state_dict())
    [losses] = method.losses(make_batch(2), 1)
    losses["teacher"].backward()
    assert all(torch.equal(before[k], v) for k, v in method.teacher.state_dict().items())
    assert all(p.grad is None for p in method.teacher.parameters())


@pytest.mark.parametrize(("own", "dropped"), [(0.5, 0.0), (0.0, 0.5)])
def test_dropout_differs_between_passes_and_follows_the_batch_alone(own: float, dropped: float) -> None:
    method = UAMT.make(conv_net(2, dropout=own), noise=0.0, passes=3, dropout=dropped).train()
    outputs: list[torch.Tensor] = []
    method.teacher.register_forward_hook(lambda module, inputs, z: outputs.append(z))

    def term(seed: int) -> float:
        outputs.clear()
        [losses] = method.losses(make_batch(2, seed=seed), 1)
        return losses["teacher"].item()

    torch.manual_seed(0)
    first = term(3)
    assert len(outputs) == 4
    assert not any(torch.equal(one, outputs[0]) for one in outputs[1:])
    torch.manual_seed(1)
    assert term(3) == first
    assert term(4) != first
