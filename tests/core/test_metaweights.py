"""The fast weights against the unrolled step, finite differences, and the properties they must have."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call

from core.small import conv_net, data, real_data, real_net
from mlbseg.core import pixel_weights, soft_dice_loss
from mlbseg.core.directional import directional_derivative, gradient
from mlbseg.core.losses import cross_entropy_map, supervised_loss
from mlbseg.core.metaweights import Rule, alignment, normalise
from mlbseg.core.optimisers import virtual_step
from mlbseg.core.scope import parameters_in_scope
from mlbseg.networks import make_network
from oracles.double_backward import finite_difference, normalised, unrolled_alignments

RULES: tuple[Rule, ...] = ("share", "sign", "softmax", "sigmoid")


@pytest.mark.parametrize("ndim", [2, 3])
@pytest.mark.parametrize("classes", [2, 4])
@pytest.mark.parametrize("norm", ["batch", "instance", "group"])
def test_joint_weights_equal_double_backward(ndim: int, classes: int, norm: str) -> None:
    torch.manual_seed(0)
    model = conv_net(ndim, classes, norm)
    x, clean, clean_label, first, second = data(ndim, classes)
    sources = (first, second)

    def clean_loss(net: nn.Module, parameters: dict[str, torch.Tensor]) -> torch.Tensor:
        return supervised_loss(functional_call(net, parameters, (clean,)), clean_label)

    slow = unrolled_alignments(
        model, x, lambda z: [cross_entropy_map(z, y) for y in sources], clean_loss, lr=1.0
    )
    v = gradient(supervised_loss(model(clean), clean_label), model)
    logits, tangent = directional_derivative(model, v, x)
    # The unrolled step ends at θ̂(0) = θ here: without other terms the virtual step at w = 0 moves nothing.
    fast = [alignment(lambda z, y=y: cross_entropy_map(z, y), logits, tangent) for y in sources]
    for f, s in zip(fast, slow, strict=True):
        torch.testing.assert_close(f, s, rtol=1e-10, atol=1e-12)
    for f, s in zip(normalise(fast), normalised(slow), strict=True):
        torch.testing.assert_close(f, s, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_paper_weights_equal_double_backward_through_the_virtual_step(momentum: float) -> None:
    torch.manual_seed(1)
    model = conv_net(2, 3, "instance")
    x, clean, clean_label, first, second = data(2, 3)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.3, momentum=momentum, weight_decay=5e-4)
    # One step first, so that there is a momentum buffer to honour.
    supervised_loss(model(clean), clean_label).backward()
    optimiser.step()
    optimiser.zero_grad()
    velocity = {n: optimiser.state[p].get("momentum_buffer") for n, p in model.named_parameters()}

    def regulariser(z: torch.Tensor) -> torch.Tensor:
        return torch.softmax(z, 1).square().mean()

    def clean_loss(net: nn.Module, parameters: dict[str, torch.Tensor]) -> torch.Tensor:
        return supervised_loss(functional_call(net, parameters, (clean,)), clean_label)

    slow = unrolled_alignments(
        model, x, lambda z: [cross_entropy_map(z, first), cross_entropy_map(z, second)], clean_loss,
        regulariser=regulariser, lr=0.3, momentum=momentum, weight_decay=5e-4,
        velocity=velocity if momentum else None,
    )  # fmt: skip
    ahead = virtual_step(model, gradient(regulariser(model(x)), model), optimiser)
    leaves = {n: p.requires_grad_() for n, p in ahead.items()}
    grads = torch.autograd.grad(clean_loss(model, leaves), list(leaves.values()))
    v = dict(zip(leaves, grads, strict=True))
    logits, tangent = directional_derivative(model, v, x)
    fast = [alignment(lambda z, y=y: cross_entropy_map(z, y), logits, tangent) for y in (first, second)]
    for f, s in zip(fast, slow, strict=True):
        # The unrolled step carries the learning rate, ours leaves it out.
        torch.testing.assert_close(0.3 * f, s, rtol=1e-10, atol=1e-12)


# Real networks, both norms' kinds of coupling, dropout on, three classes. Swin-UNETR in 2D: the operators are the same.
REAL = [("unet++", 2), ("vnet", 3), ("dynunet", 3), ("swin-unetr", 2), ("unet", 2)]


@pytest.mark.parametrize(
    ("name", "ndim", "norm"),
    [
        *((name, ndim, ("batch", "instance", "group")[place % 3]) for place, (name, ndim) in enumerate(REAL)),
        ("unet", 2, "instance"),
        ("unet", 2, "group"),
    ],
)
def test_weights_of_real_networks_equal_double_backward(name: str, ndim: int, norm: str) -> None:
    torch.manual_seed(3)
    model = real_net(name, ndim, 3, norm=norm, dropout=0.2).train()
    x, clean, clean_label, first, second = real_data(name, ndim, 3)
    costs = {"first": lambda z: cross_entropy_map(z, first), "second": lambda z: cross_entropy_map(z, second)}

    def clean_loss(net: nn.Module, parameters: dict[str, Tensor]) -> Tensor:
        torch.manual_seed(6)
        return supervised_loss(functional_call(net, parameters, (clean,)), clean_label)

    torch.manual_seed(5)
    slow = unrolled_alignments(model, x, lambda z: [c(z) for c in costs.values()], clean_loss, lr=1.0)
    v = gradient(clean_loss(model, dict(model.named_parameters())), model)
    torch.manual_seed(5)
    fast = pixel_weights(model, x, costs, v)
    for found, expected in zip(fast.alignments.values(), slow, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-9 * float(expected.abs().max()))
    for found, expected in zip(fast.weights.values(), normalised(slow), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-9 * float(expected.max()))


@pytest.mark.parametrize(("name", "ndim"), REAL)
def test_weights_of_real_networks_equal_finite_differences(name: str, ndim: int) -> None:
    torch.manual_seed(3)
    model = real_net(name, ndim, 3, norm="group")
    x, clean, clean_label, label, _ = real_data(name, ndim, 3)
    v = gradient(supervised_loss(model(clean), clean_label), model)
    logits, tangent = directional_derivative(model, v, x)
    fast = alignment(lambda z: cross_entropy_map(z, label), logits, tangent)
    slow = finite_difference(model, x, lambda z: cross_entropy_map(z, label), v, eps=1e-6)
    # Corners of activations that a step crosses leave a few pixels off.
    torch.testing.assert_close(fast, slow, rtol=1e-3, atol=1e-4 * float(slow.abs().max()))


def focal(z: Tensor, label: Tensor, gamma: float = 2.0) -> Tensor:
    """Return the focal loss (Lin et al. 2017) of every pixel."""
    cost = cross_entropy_map(z, label)
    return (1 - torch.exp(-cost)) ** gamma * cost


def brier(z: Tensor, label: Tensor) -> Tensor:
    target = F.one_hot(label.clamp(min=0), z.shape[1]).movedim(-1, 1)
    return (torch.softmax(z, 1) - target).square().sum(1)


@pytest.mark.parametrize("cost", [focal, brier, lambda z, y: F.binary_cross_entropy_with_logits(
    z[:, 1], (y > 0).to(z.dtype), reduction="none")], ids=["focal", "brier", "binary"])  # fmt: skip
def test_any_cost_of_pixels_will_do(cost: Any) -> None:
    torch.manual_seed(8)
    model = conv_net(2, 3)
    x, clean, clean_label, label, _ = data(2, 3)

    def clean_loss(net: nn.Module, parameters: dict[str, Tensor]) -> Tensor:
        return supervised_loss(functional_call(net, parameters, (clean,)), clean_label)

    (slow,) = unrolled_alignments(model, x, lambda z: [cost(z, label)], clean_loss, lr=1.0)
    v = gradient(supervised_loss(model(clean), clean_label), model)
    found = pixel_weights(model, x, {"only": lambda z: cost(z, label)}, v)
    torch.testing.assert_close(found.alignments["only"], slow, rtol=1e-9, atol=1e-12)
    assert float(found.weights["only"].sum()) == pytest.approx(1)


@pytest.mark.parametrize("ndim", [1, 2, 3])
def test_a_plain_module_of_any_dimension(ndim: int) -> None:
    """A direction that is the cost's own gradient: then a pixel's alignment is its share of |∇C|²."""
    torch.manual_seed(9)
    model = nn.Sequential({1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[ndim](1, 2, 3, padding=1)).double()
    x = torch.randn(2, 1, *(6,) * ndim, dtype=torch.float64)
    label = torch.randint(0, 2, (2, *(6,) * ndim))
    v = gradient(cross_entropy_map(model(x), label).sum(), model)
    found = pixel_weights(model, x, {"y": lambda z: cross_entropy_map(z, label)}, v)
    torch.testing.assert_close(found.alignments["y"].sum(), sum(t.square().sum() for t in v.values()))
    torch.testing.assert_close(found.logits, model(x).detach())


@pytest.mark.parametrize("scope", ["decoder", "head", lambda name: name.endswith("bias")])
def test_a_scope_is_a_direction_that_is_zero_elsewhere(scope: Any) -> None:
    torch.manual_seed(10)
    model = real_net("unet", 2, 2)
    x, clean, clean_label, label, _ = real_data("unet", 2, 2)
    v = gradient(supervised_loss(model(clean), clean_label), model)
    inside = parameters_in_scope(model, x, scope)
    masked = {n: t if n in inside else torch.zeros_like(t) for n, t in v.items()}
    costs = {"y": lambda z: cross_entropy_map(z, label)}
    expected, found = pixel_weights(model, x, costs, masked), pixel_weights(model, x, costs, v, scope=scope)
    torch.testing.assert_close(found.weights, expected.weights)
    whole = pixel_weights(model, x, costs, v)
    assert torch.cosine_similarity(found.weights["y"].flatten(), whole.weights["y"].flatten(), 0) < 0.999


@pytest.mark.parametrize("name", ["unet", "vnet"])
def test_chunks_leave_the_weights_as_they_are(name: str) -> None:
    torch.manual_seed(11)
    model = real_net(name, 2, 3)
    x, clean, clean_label, first, second = real_data(name, 2, 3, batch=5)
    costs = {"first": lambda z: cross_entropy_map(z, first), "second": lambda z: focal(z, second)}
    v = gradient(supervised_loss(model(clean), clean_label), model)
    whole, parts = (pixel_weights(model, x, costs, v, chunk=chunk) for chunk in (None, 2))
    torch.testing.assert_close(parts.weights, whole.weights, rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize(("name", "ndim", "channels"), [("unet++", 2, (16, 16, 32, 32, 64)), ("vnet", 3, (8,)),
                                                        ("unet", 3, (16, 32, 64))])  # fmt: skip
def test_bfloat16_weights_are_near_those_of_float32(name: str, ndim: int, channels: tuple[int, ...]) -> None:
    torch.manual_seed(12)
    model = make_network(name, ndim=ndim, in_channels=1, num_classes=3, channels=channels)
    # Maps of a voxel or two at the lowest level would make the norm, not the arithmetic, decide: larger images here.
    x, clean = (
        F.interpolate(torch.randn(2, 1, *(4,) * ndim), size=(128 // 2 ** (ndim - 1),) * ndim)
        for _ in range(2)
    )
    label, clean_label = ((y[:, 0] > 0.2).long() + (y[:, 0] > 0.8) for y in (x, clean))
    costs = {"y": lambda z: cross_entropy_map(z, label)}
    found = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            v = gradient(supervised_loss(model(clean).float(), clean_label), model)
            found.append(pixel_weights(model, x, costs, v).alignments["y"])
    assert found[1].dtype == torch.float32
    assert torch.cosine_similarity(found[0].flatten(), found[1].flatten(), dim=0) > 0.99


def test_a_pseudo_label_is_a_cost_too() -> None:
    torch.manual_seed(13)
    model = conv_net(2, 3)
    x, clean, clean_label, *_ = data(2, 3)
    v = gradient(supervised_loss(model(clean), clean_label), model)
    pseudo = model(x).argmax(1)
    found = pixel_weights(model, x, {"own": lambda z: cross_entropy_map(z, z.argmax(1))}, v)
    expected = pixel_weights(model, x, {"own": lambda z: cross_entropy_map(z, pseudo)}, v)
    torch.testing.assert_close(found.weights, expected.weights)


@pytest.mark.parametrize("cost", [lambda z: z.mean(), lambda z: soft_dice_loss(z, torch.zeros(2, 4, 4).long()),
                                  lambda z: z.square()], ids=["mean", "dice", "per class"])  # fmt: skip
def test_a_cost_that_is_not_one_number_per_pixel_is_refused(cost: Any) -> None:
    z = torch.randn(2, 3, 4, 4)
    with pytest.raises(ValueError, match="one number per pixel"):
        alignment(cost, z, z)


numbers = st.floats(-1e6, 1e6, allow_nan=False, width=32).filter(lambda v: v == 0 or abs(v) > 1e-20)
pairs = st.lists(st.tuples(numbers, numbers), min_size=4, max_size=24)


def as_maps(values: list[tuple[float, float]]) -> list[Tensor]:
    """Return two sources of two images each; the pixels of both images are the same in another order."""
    columns = torch.tensor(values, dtype=torch.float64).T
    return [torch.stack([c, c.flip(0)]) for c in columns]


@settings(deadline=None, max_examples=60)
@given(values=pairs, scale=st.floats(1e-8, 1e8), rule=st.sampled_from(RULES))
def test_properties_of_the_weights(values: list[tuple[float, float]], scale: float, rule: Rule) -> None:
    gs = as_maps(values)
    ws = normalise(gs, rule=rule)
    total = sum(float(w.sum()) for w in ws)
    some = any((g > 0).any() for g in gs) or rule in ("softmax", "sigmoid")
    assert all((w >= 0).all() for w in ws)
    assert total == pytest.approx(1 if some else 0, abs=1e-9)
    if rule in ("share", "sign"):
        assert all((w[g <= 0] == 0).all() for w, g in zip(ws, gs, strict=True))
    # The learning rate scales every alignment alike and changes no weight.
    for w, s in zip(ws, normalise([scale * g for g in gs], rule=rule), strict=True):
        torch.testing.assert_close(w, s, rtol=1e-7, atol=1e-12)
    order = torch.randperm(len(values))
    moved = normalise([g[:, order] for g in gs], rule=rule)
    for w, m in zip(ws, moved, strict=True):
        torch.testing.assert_close(m, w[:, order], rtol=1e-9, atol=1e-15)
    # A pixel that agrees more never gets less.
    flat_g, flat_w = torch.cat(gs).flatten(), torch.cat(ws).flatten()
    sorted_w = flat_w[flat_g.argsort(stable=True)]
    assert (sorted_w.diff() >= -1e-12).all()


@settings(deadline=None, max_examples=30)
@given(values=pairs, rule=st.sampled_from(RULES))
def test_every_source_and_every_image_may_get_the_same(values: list[tuple[float, float]], rule: Rule) -> None:
    first, second = as_maps(values)
    gs = [1e3 * first, second]
    gs[1][1] *= 1e-3
    for per_source in (False, True):
        for per_image in (False, True):
            w = torch.stack(normalise(gs, rule=rule, per_source=per_source, per_image=per_image))
            dims = [0] * (not per_source) + [1] * (not per_image) + [2]
            sums = w.sum(dims)
            parts = 2 ** (per_source + per_image)
            # Where no pixel of a part agrees, the part gets nothing.
            assert all(float(s) == pytest.approx(1 / parts, abs=1e-9) or s == 0 for s in sums.flatten())
            if rule in ("softmax", "sigmoid"):
                assert float(w.sum()) == pytest.approx(1, abs=1e-9)


@pytest.mark.parametrize("rule", RULES)
def test_a_source_or_an_image_without_labels_takes_no_share(rule: Rule) -> None:
    torch.manual_seed(15)
    gs = list(torch.rand(2, 3, 8, dtype=torch.float64) + 0.1)
    known = [torch.ones(3, 8, dtype=torch.bool), torch.zeros(3, 8, dtype=torch.bool)]
    known[0][2] = False
    alone, none = normalise(gs, rule=rule, known=known, per_source=True)
    assert float(alone.sum()) == pytest.approx(1)
    assert (none == 0).all()
    known[1][0] = True
    for per_source, expected in ((False, [1 / 2, 1 / 2, 0]), (True, [2 / 3, 1 / 3, 0])):
        w = torch.stack(normalise(gs, rule=rule, known=known, per_source=per_source, per_image=True))
        assert w.sum((0, 2)).tolist() == pytest.approx(expected)


def test_softmax_and_sigmoid_are_what_they_say() -> None:
    g = torch.tensor([[[3.0, -1.0, 0.0, 2.0]]], dtype=torch.float64)[0]
    rms = math.sqrt((9 + 1 + 0 + 4) / 4)
    for rule, f in (("softmax", torch.exp), ("sigmoid", torch.sigmoid)):
        expected = f(g / rms)
        torch.testing.assert_close(normalise([g], rule=rule)[0], expected / expected.sum())  # type: ignore[arg-type]


@pytest.mark.parametrize("rule", RULES)
def test_pixels_without_a_label_get_nothing(rule: Rule) -> None:
    torch.manual_seed(14)
    g, known = torch.randn(2, 2, 9), torch.rand(2, 2, 9) > 0.3
    masked = normalise(list(g * known), rule=rule, known=list(known))
    garbage = normalise(list(torch.where(known, g, 1e3)), rule=rule, known=list(known))
    for w, other, k in zip(masked, garbage, known, strict=True):
        assert (w[~k] == 0).all()
        torch.testing.assert_close(w, other)
    assert sum(float(w.sum()) for w in masked) == pytest.approx(1)


def test_an_unknown_rule_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown rule 'square'"):
        normalise([torch.ones(1, 2)], rule="square")  # type: ignore[arg-type]


def test_weights_of_many_pixels_sum_to_one() -> None:
    w = normalise([torch.rand(2, 64, 64, 64)])
    assert float(w[0].sum(dtype=torch.float64)) == pytest.approx(1, abs=1e-6)
