"""MLB against the unrolled double backward, with its views, teacher and consistency terms, in float64."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from mlbseg.core.losses import (
    cross_entropy_map,
    pairwise_consistency,
    prediction_distance,
    residual_map,
    supervised_loss,
)
from mlbseg.core.metaweights import normalise
from mlbseg.core.teacher import make_teacher
from mlbseg.core.views import ZOOM, Views, draw_views
from mlbseg.errors import UserError
from mlbseg.methods import Context
from mlbseg.methods.mlb import MLB, joint, paper, weighing
from mlbseg.types import IGNORE, UNLABELLED, Batch
from oracles.double_backward import normalised, unrolled_alignments

VIEWS = ("zoom-in", "zoom-out", "flip")
NOISE = 0.3
LR, MOMENTUM, DECAY = 0.2, 0.9, 1e-3
SHAPES = {2: (8, 10), 3: (6, 4, 5)}
EXPLICIT: dict[str, Any] = {
    "views": VIEWS, "teacher_noise": NOISE, "sources": ("initial", "pseudo"), "weighting": "share",
    "decides": "everywhere", "mix": 0.0, "jitter": 0.0, "pseudo_from": "student",
    "pseudo_weight": 1.0, "pseudo_dice": False, "ple_weight": 1.0, "teacher_weight": 1.0,
}  # fmt: skip

dimensions = pytest.mark.parametrize("ndim", [2, 3])
class_counts = pytest.mark.parametrize("classes", [2, 4])


@dataclass
class Spy:
    """What the method handed to `normalise`, and what came back: one map per label source."""

    alignments: list[list[Tensor]] = field(default_factory=list)
    weights: list[list[Tensor]] = field(default_factory=list)


@pytest.fixture
def spy(monkeypatch: pytest.MonkeyPatch) -> Spy:
    seen = Spy()

    def record(alignments: Sequence[Tensor], **options: Any) -> list[Tensor]:
        weights = normalise(alignments, **options)
        seen.alignments.append([g.detach().clone() for g in alignments])
        seen.weights.append([w.detach().clone() for w in weights])
        return weights

    monkeypatch.setattr(weighing, "normalise", record)
    return seen


def conv_net(ndim: int, classes: int) -> nn.Module:
    conv = nn.Conv2d if ndim == 2 else nn.Conv3d
    torch.manual_seed(ndim + classes)
    return nn.Sequential(
        conv(2, 6, 3, padding=1), nn.GroupNorm(2, 6), nn.SiLU(), conv(6, classes, 3, padding=1)
    ).double()


def make_batch(ndim: int, classes: int, dtype: torch.dtype = torch.float64) -> Batch:
    shape = SHAPES[ndim]
    torch.manual_seed(10 * ndim + classes)
    images = [torch.randn(b, 2, *shape, dtype=dtype) for b in (2, 3)]
    labels = [torch.randint(-1, classes, (b, *shape)) for b in (2, 3)]
    return Batch(images[0], labels[0], images[1], labels[1], seed=42, inside=labels[1] != IGNORE)


def make_mlb(ndim: int, classes: int, dtype: torch.dtype = torch.float64, **settings: Any) -> MLB:
    """Return a method in mid-training: the teacher is not the student, and the optimiser has momentum."""
    method = MLB.make(conv_net(ndim, classes).to(dtype), **{**EXPLICIT, **settings})
    with torch.no_grad():
        for p in method.teacher.parameters():
            p.add_(0.1 * torch.randn_like(p))
    method.optimiser = torch.optim.SGD(
        method.student.parameters(), lr=LR, momentum=MOMENTUM, weight_decay=DECAY
    )
    for p in method.student.parameters():
        p.grad = 0.1 * torch.randn_like(p)
    method.optimiser.step()
    method.optimiser.zero_grad()
    return method


def total(losses: dict[str, Tensor]) -> Tensor:
    return torch.stack(list(losses.values())).sum()


def by_name(model: nn.Module, grads: Sequence[Tensor]) -> dict[str, Tensor]:
    return dict(zip(dict(model.named_parameters()), grads, strict=True))


class Reference:
    """One step's ingredients, computed from the definition; draws come in the method's order from the seed."""

    def __init__(self, method: MLB, batch: Batch) -> None:
        assert batch.image is not None
        assert batch.initial_label is not None
        self.student, self.teacher = copy.deepcopy(method.student), copy.deepcopy(method.teacher)
        self.batch = batch
        self.views = self.draw(batch.image, 0)
        self.x = self.views.expand(batch.image)
        if batch.pseudo_label is not None:
            pseudo = batch.pseudo_label.clone()
        else:
            with torch.no_grad():
                pseudo = self.views.pseudo_label(torch.softmax(self.student(self.x), 1))
        pseudo[batch.initial_label < 0] = IGNORE
        self.labels = [self.views.expand_label(y) for y in (batch.initial_label, pseudo)]

    def seeds(self, count: int, stream: int) -> list[int]:
        sequences = [np.random.SeedSequence([self.batch.seed, stream, i]) for i in range(count)]
        return [int(s.generate_state(1)[0]) for s in sequences]

    def draw(self, image: Tensor, stream: int) -> Views:
        return draw_views(self.seeds(len(image), stream), image.ndim - 2, VIEWS, zoom=ZOOM)

    def taught(self, x: Tensor, stream: int) -> Tensor:
        """Return what the teacher says of the views (V * B, C, *S), every image in noise of its own."""
        views = x.unflatten(0, (1 + len(VIEWS), -1)).clone()
        for i, seed in enumerate(self.seeds(views.shape[1], stream)):
            generator = torch.Generator().manual_seed(seed)
            views[:, i] += NOISE * torch.randn(views[:, i].shape, generator=generator, dtype=x.dtype)
        with torch.no_grad():
            return self.teacher(views.flatten(0, 1))

    def costs(self, logits: Tensor) -> list[Tensor]:
        return [cross_entropy_map(logits, y) for y in self.labels]

    def consistency(self, logits: Tensor, views: Views, taught: Tensor, label: Tensor) -> Tensor:
        """Return L_mt and L_ple of images whose label is `IGNORE` beyond the scan."""
        valid = (views.expand_label(label) != IGNORE).unsqueeze(1).double()
        aligned, seen = views.align(torch.softmax(logits, 1))
        seen = torch.stack([each * (label != IGNORE).unsqueeze(1) for each in seen])
        return prediction_distance(logits, taught, valid) + pairwise_consistency(aligned, seen)

    def gradient(self, loss: Tensor) -> dict[str, Tensor]:
        return by_name(self.student, torch.autograd.grad(loss, list(self.student.parameters())))


def joint_reference(method: MLB, batch: Batch) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Return the weights of both sources and the total gradient: v plus that of the other terms."""
    reference = Reference(method, batch)

    def clean_loss(model: nn.Module, parameters: dict[str, Tensor]) -> Tensor:
        return supervised_loss(functional_call(model, parameters, (batch.clean_image,)), batch.clean_label)

    # Without other terms in it the virtual step at w = 0 stays where it is, which is joint mode's place.
    weights = normalised(
        unrolled_alignments(reference.student, reference.x, reference.costs, clean_loss, lr=1.0)
    )
    v = reference.gradient(supervised_loss(reference.student(batch.clean_image), batch.clean_label))
    logits = reference.student(reference.x)
    taught = reference.taught(reference.x, 1)
    others = reference.consistency(logits, reference.views, taught, batch.initial_label)
    others = others + sum((w * c).sum() for w, c in zip(weights, reference.costs(logits), strict=True))
    rest = reference.gradient(others)
    return weights, {n: v[n] + rest[n] for n in v}


@dimensions
@class_counts
def test_joint_mode_is_the_clean_gradient_plus_that_of_the_other_terms(
    ndim: int, classes: int, spy: Spy
) -> None:
    batch = make_batch(ndim, classes)
    method = make_mlb(ndim, classes, mode="joint")
    weights, expected = joint_reference(method, batch)
    (losses,) = method.losses(batch, 5)
    total(losses).backward()
    for found, slow in zip(spy.weights[0], weights, strict=True):
        torch.testing.assert_close(found, slow, rtol=1e-8, atol=1e-14)
    for name, p in method.student.named_parameters():
        torch.testing.assert_close(p.grad, expected[name], rtol=1e-8, atol=1e-12)
    clean = supervised_loss(method.student(batch.clean_image), batch.clean_label)
    torch.testing.assert_close(losses["clean"].detach(), clean.detach(), rtol=1e-12, atol=0)


@dimensions
@class_counts
def test_paper_mode_weighs_as_the_unrolled_virtual_step(ndim: int, classes: int, spy: Spy) -> None:
    batch = make_batch(ndim, classes)
    method = make_mlb(ndim, classes, mode="paper")
    reference = Reference(method, batch)
    taught = reference.taught(reference.x, 1)
    clean_views = reference.draw(batch.clean_image, 2)
    clean_x = clean_views.expand(batch.clean_image)
    clean_label = clean_views.expand_label(batch.clean_label)

    def clean_loss(model: nn.Module, parameters: dict[str, Tensor]) -> Tensor:
        return supervised_loss(functional_call(model, parameters, (clean_x,)), clean_label)

    assert method.optimiser is not None
    buffers = [method.optimiser.state[p]["momentum_buffer"] for p in method.student.parameters()]
    slow = unrolled_alignments(
        reference.student, reference.x, reference.costs, clean_loss,
        regulariser=lambda z: reference.consistency(z, reference.views, taught, batch.initial_label),
        lr=LR, momentum=MOMENTUM, weight_decay=DECAY, velocity=by_name(method.student, buffers),
    )  # fmt: skip
    weights = normalised(slow)

    steps = method.losses(batch, 5)
    first = next(steps)
    for found, expected in zip(spy.alignments[0], slow, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-12)
    for found, expected in zip(spy.weights[0], weights, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-14)
    total(first).backward()
    logits = reference.student(reference.x)
    loss = reference.consistency(logits, reference.views, taught, batch.initial_label)
    loss = loss + sum((w * c).sum() for w, c in zip(weights, reference.costs(logits), strict=True))
    for name, g in reference.gradient(loss).items():
        p = dict(method.student.named_parameters())[name]
        torch.testing.assert_close(p.grad, g, rtol=1e-8, atol=1e-12)

    # The second loss sees the student after the first step.
    method.optimiser.step()
    stepped = copy.deepcopy(method.student)
    second = next(steps)
    clean = supervised_loss(stepped(clean_x), clean_label)
    torch.testing.assert_close(second["clean"], clean, rtol=1e-10, atol=0)
    assert second["clean"] != clean_loss(reference.student, dict(reference.student.named_parameters()))
    clean_taught = reference.taught(clean_x, 3)
    consistency = reference.consistency(stepped(clean_x), clean_views, clean_taught, batch.clean_label)
    torch.testing.assert_close(total(second), clean + consistency, rtol=1e-10, atol=0)
    with pytest.raises(StopIteration):
        next(steps)


@pytest.mark.parametrize("clean_views", [False, True])
@pytest.mark.parametrize("mode", ["joint", "paper"])
def test_images_set_apart_decide_the_weights_and_nothing_else(mode: str, clean_views: bool, spy: Spy) -> None:
    batch = make_batch(2, 3)
    torch.manual_seed(0)
    meta_image, meta_label = torch.randn_like(batch.clean_image), torch.randint(0, 3, batch.clean_label.shape)
    apart = replace(batch, meta_image=meta_image, meta_label=meta_label)
    swapped = replace(batch, clean_image=meta_image, clean_label=meta_label)
    settings = {"mode": mode, "clean_views": clean_views, "views": (), "teacher_noise": 0.0}
    first = [next(make_mlb(2, 3, **settings).losses(b, 5)) for b in (batch, apart, swapped)]
    plain, guided, as_clean = spy.weights
    torch.testing.assert_close(guided, as_clean, rtol=1e-10, atol=1e-15)
    assert not torch.allclose(guided[0], plain[0])
    if mode == "joint":
        assert first[1]["clean"] == first[0]["clean"]


@pytest.mark.parametrize("mode", ["joint", "paper"])
@dimensions
def test_weights_sum_to_one_and_vanish_where_a_pixel_pushes_against_the_clean_data(
    mode: str, ndim: int, spy: Spy
) -> None:
    batch = make_batch(ndim, 3, torch.float32)
    method = make_mlb(ndim, 3, torch.float32, mode=mode)
    next(iter(method.losses(batch, 5)))
    weights, alignments = spy.weights[0], spy.alignments[0]
    assert sum(float(w.sum(dtype=torch.float64)) for w in weights) == pytest.approx(1, abs=1e-5)
    for w, g in zip(weights, alignments, strict=True):
        assert (w[g <= 0] == 0).all()
        assert (w[g > 0] > 0).any()
        assert (g < 0).any()
    # Where both sources name the same class they push the same way.
    reference = Reference(method, batch)
    same = reference.labels[0] == reference.labels[1]
    assert torch.equal(weights[0][same], weights[1][same])
    assert not torch.equal(weights[0], weights[1])


@pytest.mark.parametrize("mode", ["joint", "paper"])
@dimensions
def test_pixels_of_no_known_label_get_no_weight_from_either_source(mode: str, ndim: int, spy: Spy) -> None:
    batch = make_batch(ndim, 3, torch.float32)
    assert batch.initial_label is not None
    batch.initial_label[..., :3] = IGNORE
    method = make_mlb(ndim, 3, torch.float32, mode=mode)
    next(iter(method.losses(batch, 5)))
    unknown = Reference(method, batch).labels[0] < 0
    assert unknown.any()
    for weights in spy.weights[0]:
        assert (weights[unknown] == 0).all()
        assert (weights[~unknown] > 0).any()


@dimensions
def test_monitors_say_what_keeps_weight_and_who_has_it(ndim: int, spy: Spy) -> None:
    batch = make_batch(ndim, 3, torch.float32)
    method = make_mlb(ndim, 3, torch.float32)
    next(iter(method.losses(batch, 5)))
    labels = Reference(method, batch).labels
    for name, weights, label in zip(("initial", "pseudo"), spy.weights[0], labels, strict=True):
        known = int((label >= 0).sum())
        assert float(method.monitors[f"kept_{name}"]) == pytest.approx(int((weights > 0).sum()) / known)
        assert float(method.monitors[f"mass_{name}"]) == pytest.approx(float(weights.sum()))
    assert float(method.monitors["mass_initial"] + method.monitors["mass_pseudo"]) == pytest.approx(
        1, abs=1e-5
    )


@dimensions
def test_residual_weighting_divides_each_alignment_by_what_the_label_lacks(ndim: int, spy: Spy) -> None:
    batch = make_batch(ndim, 3)
    for weighting in ("share", "residual"):
        next(iter(make_mlb(ndim, 3, weighting=weighting).losses(batch, 5)))
    method = make_mlb(ndim, 3)
    reference = Reference(method, batch)
    logits = reference.student(reference.x).detach()
    plain, divided = spy.alignments
    for g, h, label in zip(plain, divided, reference.labels, strict=True):
        residual = residual_map(logits, label)
        certain = residual > 1e-3
        torch.testing.assert_close(h[certain] * residual[certain], g[certain], rtol=1e-10, atol=1e-14)
        assert torch.isfinite(h).all()
        assert torch.equal(h.sign(), g.sign())
    assert not torch.allclose(spy.weights[0][0], spy.weights[1][0])


@pytest.mark.parametrize("mode", ["joint", "paper"])
def test_chunks_change_nothing(mode: str, spy: Spy) -> None:
    batch = make_batch(2, 3)
    losses = [next(iter(make_mlb(2, 3, mode=mode, chunk=chunk).losses(batch, 5))) for chunk in (None, 5)]
    for one, other in zip(*spy.weights, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-16)
    for key, term in losses[0].items():
        torch.testing.assert_close(term, losses[1][key], rtol=1e-10, atol=0)


def test_factors_scale_their_terms_and_no_others() -> None:
    batch = make_batch(2, 2)
    plain = next(iter(make_mlb(2, 2).losses(batch, 5)))
    scaled = next(
        iter(make_mlb(2, 2, pseudo_weight=3.0, ple_weight=0.5, teacher_weight=0.5).losses(batch, 5))
    )
    factors = {"clean": 1.0, "initial": 3.0, "pseudo": 3.0, "teacher": 0.5, "views": 0.5}
    assert plain.keys() == factors.keys()
    for key, factor in factors.items():
        torch.testing.assert_close(scaled[key], factor * plain[key], rtol=1e-10, atol=0)


@dimensions
def test_clean_images_cover_the_views_in_a_box_or_around_it_in_turn(ndim: int) -> None:
    batch = make_batch(ndim, 3)
    assert batch.image is not None
    method = make_mlb(ndim, 3, mix=0.5)
    views = method._draw(batch.image, batch.seed, 0)
    plain, taught, nothing = method._see(views, batch.image, batch, 1)
    mixed, same, pasted = method._see(views, batch.image, batch, 1, mix=0.5)
    assert nothing is None
    assert pasted is not None
    torch.testing.assert_close(taught, same, rtol=0, atol=0)  # the teacher sees no mixture
    shares = []
    for view, image in np.ndindex(1 + len(VIEWS), len(batch.image)):
        entry = view * len(batch.image) + image
        partner = image * 2 // 3  # three images share two clean ones
        covered = pasted.covered[entry]
        torch.testing.assert_close(
            mixed[entry][:, covered], batch.clean_image[partner][:, covered], rtol=0, atol=0
        )
        torch.testing.assert_close(mixed[entry][:, ~covered], plain[entry][:, ~covered], rtol=0, atol=0)
        assert torch.equal(pasted.label[entry][covered], batch.clean_label[partner][covered])
        assert (pasted.label[entry][~covered] == IGNORE).all()
        box = covered if (view + image) % 2 == 0 else ~covered
        sides = [int(box.any(dim=[d for d in range(ndim) if d != axis]).sum()) for axis in range(ndim)]
        assert sides == [round(0.5 * n) for n in SHAPES[ndim]]
        assert int(box.sum()) == np.prod(sides)
        shares.append(float(covered.double().mean()))
    assert min(shares) < 0.5 < max(shares)


def test_covered_pixels_are_left_to_their_own_label(spy: Spy) -> None:
    batch = make_batch(2, 3)
    method = make_mlb(2, 3, mix=0.6, weighting="sign")
    losses = next(iter(method.losses(batch, 5)))
    assert batch.image is not None
    views = method._draw(batch.image, batch.seed, 0)
    x, taught, pasted = method._see(views, batch.image, batch, 1, mix=0.6)
    assert pasted is not None
    covered = pasted.covered
    # Where a clean image has no label, it has not the other's either.
    assert (pasted.label[covered] == IGNORE).any()
    assert all((w[covered] == 0).all() for w in spy.weights[0])
    assert any((w[~covered] > 0).any() for w in spy.weights[0])
    logits = method.student(x)
    torch.testing.assert_close(losses["mixed"], supervised_loss(logits, pasted.label))
    distance = (torch.softmax(logits, 1) - torch.softmax(taught, 1)).square().mean(1)
    seen = (views.expand_label(batch.initial_label) != IGNORE) & ~covered
    torch.testing.assert_close(losses["teacher"], distance[seen].mean())


def test_the_students_own_pseudo_labels_are_of_the_images_that_nothing_covers() -> None:
    batch = make_batch(2, 3)
    assert batch.image is not None
    method = make_mlb(2, 3, mix=0.6, jitter=0.0, pseudo_from="student")
    views = method._draw(batch.image, batch.seed, 0)
    x, taught, pasted = method._see(views, batch.image, batch, 1, mix=0.6)
    labels, _ = method._weigh(
        method.student(x), torch.randn(len(x), 3, *x.shape[2:]), taught, views, batch, pasted
    )
    assert pasted is not None
    whole = views.pseudo_label(torch.softmax(method.student(views.expand(batch.image)), 1))
    expected = views.expand_label(torch.where(batch.initial_label == IGNORE, IGNORE, whole))
    assert torch.equal(labels["pseudo"], torch.where(pasted.covered, IGNORE, expected))
    of_mixtures = views.pseudo_label(torch.softmax(method.student(x), 1))
    assert not torch.equal(of_mixtures, whole)


def test_the_dice_of_weighted_labels_counts_pixels_by_their_weight(spy: Spy) -> None:
    batch = make_batch(2, 3)
    plain = next(iter(make_mlb(2, 3).losses(batch, 5)))
    method = make_mlb(2, 3, pseudo_dice=True)
    losses = next(iter(method.losses(batch, 5)))
    reference = Reference(method, batch)
    probability = torch.softmax(method.student(reference.x), 1)
    for name, label, weight in zip(("initial", "pseudo"), reference.labels, spy.weights[-1], strict=True):
        w = weight * (label >= 0).sum()
        dice = []
        for k in (1, 2):
            p, y = probability[:, k], (label == k).double()
            dice.append((2 * (w * p * y).sum() + 1e-5) / ((w * (p + y)).sum() + 1e-5))
        expected = plain[name] + weight.sum() * (1 - torch.stack(dice).mean())
        torch.testing.assert_close(losses[name], expected)


@pytest.mark.parametrize("mode", ["joint", "paper"])
def test_uniform_weights_ask_no_direction(mode: str, monkeypatch: pytest.MonkeyPatch, spy: Spy) -> None:
    def never(*arguments: Any, **options: Any) -> None:
        raise AssertionError("a derivative was taken")

    for module in (joint, paper):
        monkeypatch.setattr(module, "directional_derivative", never)
    monkeypatch.setattr(joint, "output_and_tangent", never)
    batch = make_batch(2, 3)
    next(iter(make_mlb(2, 3, mode=mode, weighting="uniform").losses(batch, 5)))
    for weight in spy.weights[0]:
        assert len(weight[weight > 0].unique()) == 1
    known = sum(int((y >= 0).sum()) for y in Reference(make_mlb(2, 3), batch).labels)
    assert sum(int((w > 0).sum()) for w in spy.weights[0]) == known


@pytest.mark.parametrize("mode", ["joint", "paper"])
@pytest.mark.parametrize("pseudo_from", ["student", "teacher"])
def test_pseudo_labels_of_whole_scans_take_the_place_of_those_of_views(
    mode: str, pseudo_from: str, spy: Spy
) -> None:
    batch = make_batch(2, 3)
    batch.pseudo_label = torch.randint(-1, 3, batch.initial_label.shape)
    settings = {"pseudo_from": pseudo_from, "weighting": "uniform", "teacher_weight": 0.0}
    method = make_mlb(2, 3, mode=mode, relabel=2, **settings)
    asked: list[int] = []
    method.teacher.register_forward_hook(lambda *_: asked.append(1))
    losses = next(iter(method.losses(batch, 5)))
    assert asked == []  # a pass that nothing would be learnt from
    reference = Reference(method, batch)
    logits = reference.student(reference.x)
    known = [label >= 0 for label in reference.labels]
    for name, cost, mask, weight in zip(
        ("initial", "pseudo"), reference.costs(logits), known, spy.weights[0], strict=True
    ):
        assert torch.equal(weight > 0, mask)
        torch.testing.assert_close(losses[name], cost[mask].sum() / sum(m.sum() for m in known))


@pytest.mark.parametrize(("pseudo_from", "labeller"), [("student", "student"), ("teacher", "teacher")])
def test_whole_scans_are_labelled_by_the_network_that_labels_views(pseudo_from: str, labeller: str) -> None:
    method = make_mlb(2, 3, pseudo_from=pseudo_from, relabel=3)
    assert method.relabel == 3
    assert method.scan_labeller() is method.networks()[labeller]
    with pytest.raises(UserError, match=r"mlb\.relabel: found 3, but pseudo labels are not learnt"):
        make_mlb(2, 3, sources=("initial",), relabel=3)


@pytest.mark.parametrize("ndim", [2, 3])
def test_where_the_labels_agree_no_direction_decides(ndim: int, spy: Spy) -> None:
    batch = make_batch(ndim, 3)
    for settings in ({}, {"decides": "disputes"}):
        next(iter(make_mlb(ndim, 3, weighting="sign", **settings).losses(batch, 5)))
    (initial, pseudo), labels = spy.weights[1], Reference(make_mlb(ndim, 3), batch).labels
    agreed = labels[0] == labels[1]
    known = labels[0] >= 0
    each = initial.max()
    assert (initial[agreed & known] == each).all()
    assert (pseudo[agreed & known] == each).all()
    assert 0 < int((~agreed).sum()) < agreed.numel()
    for everywhere, disputes in zip(*spy.weights, strict=True):
        assert torch.equal(everywhere[~agreed] > 0, disputes[~agreed] > 0)


def test_an_image_without_a_label_of_its_own_disputes_nothing(spy: Spy) -> None:
    batch = make_batch(3, 3)
    batch.initial_label = batch.initial_label.clone()
    batch.initial_label[1] = torch.where(batch.initial_label[1] == IGNORE, IGNORE, UNLABELLED)
    method = make_mlb(3, 3, weighting="sign", decides="disputes", views=(), mix=0.0, per_source=False)
    next(iter(method.losses(batch, 5)))
    initial, pseudo = spy.weights[0]
    inside = batch.initial_label[1] == UNLABELLED
    assert 0 < int(inside.sum()) < inside.numel()
    assert not initial[1].any()
    assert (pseudo[1][inside] == pseudo.max()).all()  # believed as where two labels agree
    assert not pseudo[1][~inside].any()
    assert initial[0].any()


@pytest.mark.parametrize("weighting", ["softmax", "sigmoid"])
def test_disputes_are_too_few_for_a_weighting_that_compares_all_pixels(weighting: str) -> None:
    with pytest.raises(UserError, match=r"mlb\.decides=everywhere"):
        make_mlb(2, 2, weighting=weighting, decides="disputes")


@pytest.mark.parametrize("settings", [{"mode": "paper"}, {"chunk": 2, "mix": 0.0}, {"mix": 0.0}], ids=str)
def test_a_step_between_that_has_no_terms_leaves_the_others_alone(settings: dict[str, Any]) -> None:
    quiet = {"every": 2, "ple_weight": 0.0, "teacher_weight": 0.0}
    method = make_mlb(2, 2, **{**quiet, **settings})
    found: set[str] = set()
    for losses in method.losses(make_batch(2, 2), 1):
        total(losses).backward()
        found |= losses.keys()
    assert found == {"clean"}


def test_an_agreed_label_counts_as_much_as_the_most_aligned_disputed_one(spy: Spy) -> None:
    batch = make_batch(2, 3)
    next(iter(make_mlb(2, 3, weighting="share", decides="disputes").losses(batch, 5)))
    initial, pseudo = Reference(make_mlb(2, 3), batch).labels
    agreed, weights = initial == pseudo, torch.stack(spy.weights[0])
    assert float(weights[:, agreed & (initial >= 0)].min()) == pytest.approx(float(weights[:, ~agreed].max()))


def test_a_source_alone_has_all_the_weight(spy: Spy) -> None:
    losses = next(iter(make_mlb(2, 3, sources=("pseudo",)).losses(make_batch(2, 3), 5)))
    assert "pseudo" in losses
    assert "initial" not in losses
    assert float(sum(w.sum() for w in spy.weights[0])) == pytest.approx(1)


def test_a_random_direction_is_as_long_as_the_clean_one_and_drawn_from_the_batch() -> None:
    method = make_mlb(2, 3, direction="random")
    v = {name: torch.randn_like(p) for name, p in method.student.named_parameters()}
    x = torch.zeros(1, 2, 8, 10, dtype=torch.float64)
    one, again, other = (method._towards(v, x, seed) for seed in (3, 3, 1000))
    for name, t in v.items():
        torch.testing.assert_close(one[name].norm(), t.norm())
        assert torch.equal(one[name], again[name])
        assert not torch.equal(one[name], other[name])


def test_the_teacher_starts_as_the_student_which_predicts() -> None:
    student = conv_net(2, 2)
    method = MLB.make(student, teacher_decay=0.9)
    assert set(method.networks()) == {"teacher", "student"}
    assert method.predictor() is method.student
    expected = make_teacher(student).state_dict()
    assert all(torch.equal(expected[k], v) for k, v in method.teacher.state_dict().items())
    with torch.no_grad():
        for p in student.parameters():
            p.add_(1)
    before = copy.deepcopy(method.teacher.state_dict())
    method.after_step(1000)
    for key, value in method.teacher.state_dict().items():
        torch.testing.assert_close(value, before[key] + 0.1, rtol=1e-10, atol=1e-12)


def test_paper_mode_asks_for_the_optimiser_it_looks_ahead_with() -> None:
    method = MLB.make(conv_net(2, 2), mode="paper")
    with pytest.raises(ValueError, match="set `optimiser` first"):
        next(iter(method.losses(make_batch(2, 2), 0)))


@pytest.mark.parametrize("mode", ["joint", "paper"])
def test_frozen_parameters_are_left_out(mode: str, spy: Spy) -> None:
    batch = make_batch(2, 3)
    method = make_mlb(2, 3, mode=mode)
    frozen = method.student[0].requires_grad_(requires_grad=False)
    for losses in method.losses(batch, 5):
        total(losses).backward()
    assert all(p.grad is None for p in frozen.parameters())
    assert all((p.grad != 0).any() for p in method.student.parameters() if p.requires_grad)
    # Their part of v is missing, which is another direction than that of the whole network.
    next(iter(make_mlb(2, 3, mode=mode).losses(batch, 5)))
    part, whole = spy.weights[0][0], spy.weights[-1][0]
    assert 0 < torch.cosine_similarity(part.flatten(), whole.flatten(), dim=0) < 0.999


@pytest.mark.parametrize("settings", [{}, {"chunk": 2}, {"mode": "paper"}], ids=str)
def test_weights_and_loss_see_the_same_dropout_masks(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    net = nn.Sequential(nn.Conv2d(2, 8, 3, padding=1), nn.Dropout(0.5), nn.Conv2d(8, 2, 3, padding=1))
    method = MLB.make(net, views=("flip",), jitter=0.0, **settings).train()
    method.optimiser = torch.optim.SGD(net.parameters(), lr=0.1)
    passes: list[Tensor] = []
    net.register_forward_hook(lambda module, args, z: passes.append(forward_ad_value(z)))
    image = torch.randn(2, 2, 6, 6)
    label = torch.randint(0, 2, (2, 6, 6))
    next(method.losses(Batch(image, label, image, label, seed=5), 0))
    # The unlabelled images in two views: seen as one batch, or as two chunks of two.
    if "chunk" in settings:
        (measured, followed) = (torch.cat(passes[-4:-2]), torch.cat(passes[-2:]))
    else:
        whole = [z for z in passes if len(z) == 4]
        measured, followed = whole[0], whole[-1]
    torch.testing.assert_close(measured, followed)
    method.eval()
    assert not torch.allclose(net(torch.cat([image, image.flip(2)])), followed)


def forward_ad_value(z: Tensor) -> Tensor:
    return torch.autograd.forward_ad.unpack_dual(z).primal.detach() if z.is_floating_point() else z


def test_a_flip_view_needs_an_axis_to_flip() -> None:
    with pytest.raises(UserError, match=r"plan\.flip_axes"):
        MLB.make(nn.Conv2d(1, 2, 1), Context(flip_axes=()), views=("flip",))


@pytest.mark.gpu
def test_a_gpu_gives_the_losses_of_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    batch = make_batch(3, 3)
    # Without what is drawn on the device, whose random numbers are its own.
    method = make_mlb(3, 3, jitter=0.0, teacher_noise=0.0).float()
    image, clean = batch.image.float(), batch.clean_image.float()
    batch = replace(batch, image=image, clean_image=clean)
    on_cpu = next(iter(method.losses(batch, 5)))
    on_gpu = next(iter(method.to("cuda").losses(batch.to(torch.device("cuda")), 5)))
    for name, value in on_cpu.items():
        torch.testing.assert_close(on_gpu[name].cpu(), value, rtol=1e-3, atol=1e-5)


@dimensions
def test_weight_maps_are_those_of_a_joint_step_and_change_nothing(ndim: int, spy: Spy) -> None:
    batch = make_batch(ndim, 3)
    for settings in ({}, {"decides": "disputes", "weighting": "sign"}):
        method = make_mlb(ndim, 3, **settings)
        method.monitors = {"kept_initial": torch.tensor(7.0)}
        before = copy.deepcopy(method.state_dict())
        torch.manual_seed(5)
        drawn = torch.rand(2)
        torch.manual_seed(5)
        maps = method.weight_maps(batch)
        assert torch.equal(torch.rand(2), drawn)
        assert method.monitors == {"kept_initial": torch.tensor(7.0)}
        assert all(torch.equal(t, before[name]) for name, t in method.state_dict().items())
        assert batch.image is not None
        count = len(batch.image)
        spy.weights.clear()
        list(method.losses(batch, 0))
        for (name, (label, weight)), expected in zip(maps.items(), spy.weights[0], strict=True):
            assert label.shape == weight.shape == batch.image[:, 0].shape
            torch.testing.assert_close(weight, expected[:count])
            if name == "initial":
                assert torch.equal(label, batch.initial_label)


def test_where_nothing_is_decided_there_are_no_weight_maps() -> None:
    for settings in (
        {"weighting": "uniform"},
        {"decides": "disputes", "sources": ("pseudo",), "weighting": "sign"},
    ):
        assert make_mlb(2, 3, **settings).weight_maps(make_batch(2, 3)) == {}


@pytest.mark.parametrize("decides", ["everywhere", "disputes"])
def test_confidence_weighs_by_the_teachers_probability_and_asks_no_direction(
    decides: str, spy: Spy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(joint, "output_and_tangent", lambda *_: pytest.fail("a direction was asked for"))
    batch = make_batch(2, 3)
    method = make_mlb(2, 3, weighting="confidence", decides=decides, teacher_noise=0.0, pseudo_from="teacher")
    maps = method.weight_maps(batch)
    list(method.losses(batch, 0))
    assert batch.image is not None
    assert batch.initial_label is not None
    with torch.no_grad():
        views = method._draw(batch.image, batch.seed, 0)
        p = torch.softmax(method.teacher(views.expand(batch.image)), 1)
    pseudo = torch.where(batch.initial_label < 0, batch.initial_label, views.pseudo_label(p))
    labels = [views.expand_label(label) for label in (batch.initial_label, pseudo)]
    raw = [p.gather(1, y.clamp(min=0).unsqueeze(1)).squeeze(1) for y in labels]
    if decides == "disputes":
        agreed = labels[0] == labels[1]
        most = max(float(r[~agreed & (y >= 0)].max()) for r, y in zip(raw, labels, strict=True))
        raw = [torch.where(agreed, most, r) for r in raw]
    raw = [r * (y >= 0) for r, y in zip(raw, labels, strict=True)]
    total = sum(float(r.sum()) for r in raw)
    for found, expected in zip(spy.weights[-1], raw, strict=True):
        torch.testing.assert_close(found, expected / total)
    for (_, weight), expected in zip(maps.values(), raw, strict=True):
        torch.testing.assert_close(weight, expected[: len(batch.image)] / total)
