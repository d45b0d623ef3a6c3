"""BCP's mixed images, labels and losses against loops over pixels."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mlbseg.components import largest_components
from mlbseg.core.losses import supervised_loss
from mlbseg.core.perturb import boxes
from mlbseg.methods.bcp import BCP, Pasted
from mlbseg.types import Batch

SHAPES = {2: (9, 12), 3: (6, 9, 4)}
CLASSES = 3

dimensions = pytest.mark.parametrize("ndim", [2, 3])
counts = pytest.mark.parametrize(("clean", "others"), [(2, 2), (1, 3), (2, 4), (3, 2)])


class Seen(nn.Module):
    """A convolution that remembers its input."""

    def __init__(self, ndim: int) -> None:
        super().__init__()
        self.conv = (nn.Conv2d if ndim == 2 else nn.Conv3d)(1, CLASSES, 3, padding=1).double()
        self.last = torch.zeros(0)

    def forward(self, x: Tensor) -> Tensor:
        self.last = x.detach().clone()
        return self.conv(x)


def make_batch(ndim: int, clean: int, others: int) -> Batch:
    generator = torch.Generator().manual_seed(ndim)
    shape = SHAPES[ndim]

    def images(count: int) -> Tensor:
        return torch.randn(count, 1, *shape, generator=generator, dtype=torch.float64)

    label = torch.randint(-1, CLASSES, (clean, *shape), generator=generator)
    return Batch(images(clean), label, images(others), seed=5)


def naive_loss(logits: Tensor, label: Tensor, counted: Tensor) -> Tensor:
    """Return cross-entropy plus Dice over the pixels that count, taken out one by one."""
    places = [i for i in np.ndindex(*label.shape) if counted[i] and label[i] >= 0]
    rows = torch.stack([logits[(i[0], slice(None), *i[1:])] for i in places])
    # As one image whose pixels are these.
    return supervised_loss(rows.T.unsqueeze(0), torch.stack([label[i] for i in places]).unsqueeze(0))


@dimensions
@counts
@pytest.mark.parametrize("largest", [True, False])
def test_mixed_images_and_losses_are_those_of_the_loops(
    ndim: int, clean: int, others: int, largest: bool
) -> None:
    torch.manual_seed(0)
    batch = make_batch(ndim, clean, others)
    assert batch.image is not None
    method = BCP.make(Seen(ndim), largest=largest)
    losses = next(method.losses(batch, 0))
    with torch.no_grad():
        pseudo = method.teacher(batch.image).argmax(1)
        if largest:
            pseudo = torch.stack([torch.from_numpy(largest_components(p.numpy())) for p in pseudo])

    pairs = max(clean, others)
    box = boxes(method.seeds(pairs, 5, 0), batch.image.new_zeros(pairs, 1, *SHAPES[ndim]), (2 / 3) ** ndim)
    assert (box.flatten(1).sum(1) == np.prod([round(2 / 3 * side) for side in SHAPES[ndim]])).all()
    image, label = (
        torch.zeros(2 * pairs, *SHAPES[ndim]).double(),
        torch.zeros(2 * pairs, *SHAPES[ndim]).long(),
    )
    ours = torch.zeros(2 * pairs, *SHAPES[ndim], dtype=torch.bool)
    for pair in range(pairs):
        one, two = pair * clean // pairs, pair * others // pairs
        for i in np.ndindex(*SHAPES[ndim]):
            for at, inside in ((pair, False), (pairs + pair, True)):
                mine = bool(box[(pair, 0, *i)]) == inside
                image[(at, *i)] = batch.clean_image[(one, 0, *i)] if mine else batch.image[(two, 0, *i)]
                label[(at, *i)] = batch.clean_label[(one, *i)] if mine else pseudo[(two, *i)]
                ours[(at, *i)] = mine
    assert torch.equal(method.student.last[:, 0], image)
    logits = method.student(image.unsqueeze(1))
    torch.testing.assert_close(losses["clean"], naive_loss(logits, label, ours))
    torch.testing.assert_close(losses["pseudo"], 0.5 * naive_loss(logits, label, ~ours))


@dimensions
@pytest.mark.parametrize("count", [2, 3])
def test_its_own_stage_1_pastes_clean_images_into_each_other(ndim: int, count: int) -> None:
    batch = make_batch(ndim, count, 1)
    assert BCP.stage1(BCP.Settings()) is None
    kind = BCP.stage1(BCP.Settings(pretrain=True))
    assert kind is Pasted
    method = Pasted(Seen(ndim), BCP.Settings(pretrain=True))
    losses = next(method.losses(batch, 0))
    box = boxes(method.seeds(count, 5, 0), batch.clean_image, (2 / 3) ** ndim)
    image, label = batch.clean_image.clone(), batch.clean_label.clone()
    for i in np.ndindex(count, *SHAPES[ndim]):
        if box[(i[0], 0, *i[1:])]:
            other = (min(i[0] ^ 1, count - 1), *i[1:])
            image[(i[0], 0, *i[1:])] = batch.clean_image[(other[0], 0, *other[1:])]
            label[i] = batch.clean_label[other]
    assert torch.equal(method.student.last, image)
    torch.testing.assert_close(losses["clean"], supervised_loss(method.student(image), label))


def test_the_teacher_keeps_its_share_from_the_first_step_on() -> None:
    method = BCP.make(Seen(2), teacher_decay=0.9)
    with torch.no_grad():
        for p in method.student.parameters():
            p.add_(1)
    before = [p.clone() for p in method.teacher.parameters()]
    method.after_step(0)
    for was, now in zip(before, method.teacher.parameters(), strict=True):
        torch.testing.assert_close(now, was + 0.1)


def test_every_image_is_used() -> None:
    for clean, others in ((2, 3), (4, 1)):
        batch = make_batch(2, clean, others)
        method = BCP.make(Seen(2))
        next(method.losses(batch, 0))
        seen = method.student.last
        for image in (*batch.clean_image, *batch.image):  # type: ignore[misc]
            assert any(bool((image == other).any()) for other in seen)
