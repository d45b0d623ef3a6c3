"""`--preset paper` against the slow transcription of the public code's step, views included."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from mlbseg.config import PRESETS, load_config
from mlbseg.core.padded_views import PaddedViews, draw_padded_views
from mlbseg.core.perturb import normal
from mlbseg.errors import UserError
from mlbseg.methods.base import Context
from mlbseg.methods.losses import LOSSES
from mlbseg.methods.mlb import MLB
from mlbseg.methods.mlb.sight import CLEAN_SIGHT, CLEAN_VIEWS, SIGHT, VIEWS
from mlbseg.types import IGNORE, UNLABELLED, Batch
from oracles.public_step import Step, View

SIDE = 72  # the public code's pads, 4 to 30 of 144 pixels, are whole ones
EPOCH = 2


@pytest.fixture(autouse=True)
def double() -> Iterator[None]:
    """Views are drawn in the default type."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


class Net(nn.Module):
    """Log-odds z as logits (0, z), as the preset's network has them."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.SiLU(), nn.Conv2d(4, 1, 3, padding=1)
        )

    def forward(self, x: Tensor) -> Tensor:
        z = self.parts(x)
        return torch.cat([torch.zeros_like(z), z], 1)


def images(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return smooth images (N, H, W), 0 nowhere in particular, and what is bright in them."""
    rough = torch.randn(count, 1, SIDE // 6, SIDE // 6, generator=generator)
    image = nn.functional.interpolate(rough, SIDE, mode="bicubic")[:, 0] + 0.7
    return image, (image > 1).long()


@pytest.mark.parametrize("detached", [True, False])
def test_a_step_is_the_public_codes(detached: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    settings: dict[str, Any] = {**PRESETS["paper"]["mlb"], "ple_detached": detached}
    train = load_config(preset="paper").train
    net = Net()
    with torch.no_grad():  # sure of some pixels, and wrong in others
        net.parts[-1].weight *= 8
    context = Context(flip_axes=(0, 1), loss=LOSSES.own[train.loss])
    method = MLB.make(net, context, **settings).train()
    method.epoch = EPOCH
    method.optimiser = torch.optim.SGD(
        net.parameters(), lr=train.lr, momentum=train.momentum, weight_decay=train.weight_decay
    )
    weighed: list[dict[str, Tensor]] = []
    original = MLB._weigh

    def weigh(self: MLB, *arguments: Any, **named: Any) -> Any:
        found = original(self, *arguments, **named)
        weighed.append(found[1])
        return found

    monkeypatch.setattr(MLB, "_weigh", weigh)

    blank = copy.deepcopy(net)

    def network(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        buffers = {name: b.clone() for name, b in blank.named_buffers()}
        return functional_call(blank, {**parameters, **buffers}, (x,))[:, 1]

    start = {name: p.detach().clone() for name, p in net.named_parameters()}
    slow = Step(
        network, {n: p.clone().requires_grad_() for n, p in start.items()}, start, {}, lr=train.lr,
        momentum=train.momentum, decay=train.weight_decay, clip=train.clip,
        teacher_decay=settings.get("teacher_decay", 0.99), detached=detached,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(1)
    for step in range(3 if detached else 1):
        (clean, label), (image, initial) = images(2, generator), images(1, generator)
        initial = initial.roll(3, 1)
        batch = Batch(clean[:, None], label, image[:, None], initial, seed=50 + step)
        for losses in method.losses(batch, step):
            method.optimiser.zero_grad()
            torch.stack(list(losses.values())).sum().backward()
            for group in method.clipped():
                torch.nn.utils.clip_grad_norm_(group, train.clip)
            method.optimiser.step()
        method.after_step(step)

        def drawn(count: int, stream: int, batch: Batch = batch) -> list[list[View]]:
            views = draw_padded_views(
                method.seeds(count, batch.seed, stream), 2, settings["views"], flip_axes=(0, 1)
            )
            return [[View.of(matrix, SIDE) for matrix in views.matrix[:, b]] for b in range(count)]

        def noise(count: int, stream: int, batch: Batch = batch) -> Tensor:
            seeds = method.seeds(count, batch.seed, stream)
            return settings["teacher_noise"] * normal(seeds, (5, 1, SIDE, SIDE), batch.clean_image)[:, :, 0]

        found = slow.take(
            image, initial.double(), drawn(1, VIEWS), noise(1, SIGHT), clean, label.double(),
            drawn(2, CLEAN_VIEWS), noise(2, CLEAN_SIGHT), step % EPOCH,
        )  # fmt: skip
        weights = torch.stack([weighed[-1]["initial"], weighed[-1]["pseudo"]]).reshape(2, 1, 5, SIDE, SIDE)
        assert 0.05 < (found > 0).double().mean() < 0.95
        assert float((weights - found).abs().max()) < 1e-6 * float(found.max())
        for mine, other in ((method.student, slow.student), (method.teacher, slow.teacher)):
            for name, p in mine.named_parameters():
                moved = (other[name].detach() - start[name]).abs().max()
                assert float((p - other[name]).detach().abs().max()) < 1e-6 * float(moved), name


def test_what_lies_beyond_the_image_is_background() -> None:
    views = draw_padded_views([1, 2], 2, ("zoom-in", "zoom-out", "flip"))
    image = torch.full((2, 1, SIDE, SIDE), 3.0)
    seen = views.expand(image).unflatten(0, (4, 2))
    assert ((seen == 0) | (seen - 3).abs().lt(1e-12)).all()
    assert (seen[2] == 0).any(-1).any(-1).all()
    assert (seen[[0, 1, 3]] > 0).all()
    label = torch.full((2, SIDE, SIDE), 2)
    label[:, :10], label[0, -10:] = IGNORE, UNLABELLED
    moved = views.expand_label(label).unflatten(0, (4, 2))
    assert torch.equal(moved[0], label)
    assert torch.equal(moved[2] == 0, seen[2, :, 0] == 0)
    assert moved[2, 0].unique().tolist() == [UNLABELLED, IGNORE, 0, 2]
    assert (moved[1] != 0).all()
    turned = [axis for axis in (0, 1) if views.matrix[3, 0, 1 - axis, 1 - axis] < 0]
    assert torch.equal(moved[3, 0], label[0].flip(turned))


def test_several_classes_are_told_from_background_by_the_mean_over_all_views() -> None:
    views = PaddedViews(draw_padded_views([4], 2, ("zoom-in",)).matrix)
    sure = torch.zeros(2, 3, SIDE, SIDE)
    sure[:, 2] = 0.6
    sure[:, 0] = 0.4
    label = views.pseudo_labels(sure).unflatten(0, (2, 1))
    assert label[0, 0, SIDE // 2, SIDE // 2] == 2
    assert label[0, 0, 0, 0] == 0  # (0.6 + 0) / 2: the zoomed-in view did not see the corner
    assert not torch.equal(label[0, 0], label[1, 0])
    assert (label[1, 0] == 2).all()  # the zoomed-in view sees no such corner


def test_pasting_is_refused_with_it() -> None:
    with pytest.raises(UserError, match=r"mlb\.mix: found 0\.667, but with mlb\.padding=background"):
        MLB.make(Net(), padding="background")
