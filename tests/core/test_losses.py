"""Losses against torch's own, naive loops, and the sum over pairs written out."""

from __future__ import annotations

import math
from itertools import combinations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mlbseg.core.losses import (
    IGNORE,
    cross_entropy_map,
    entropy_map,
    gated_crf,
    pairwise_consistency,
    prediction_distance,
    probability_distance,
    residual_map,
    resolved,
    soft_dice_loss,
    supervised_loss,
)
from mlbseg.types import EITHER, UNLABELLED

SHAPES = [(5, 4), (3, 4, 2)]
both_shapes = pytest.mark.parametrize("shape", SHAPES)


def random_pair(shape: tuple[int, ...], classes: int = 3) -> tuple[Tensor, Tensor]:
    torch.manual_seed(len(shape))
    logits = (3 * torch.randn(2, classes, *shape, dtype=torch.float64)).requires_grad_()
    return logits, torch.randint(-1, classes, (2, *shape))


@both_shapes
@pytest.mark.parametrize("classes", [2, 4])
def test_cross_entropy_is_that_of_torch(shape: tuple[int, ...], classes: int) -> None:
    logits, label = random_pair(shape, classes)
    found = cross_entropy_map(logits, label)
    expected = F.cross_entropy(logits, label, ignore_index=IGNORE, reduction="none")
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)
    assert (found[label < 0] == 0).all()
    weights = torch.rand_like(found)
    grads = [torch.autograd.grad((weights * cost).sum(), logits)[0] for cost in (found, expected)]
    torch.testing.assert_close(*grads, rtol=1e-12, atol=1e-14)
    assert (grads[0].movedim(1, -1)[label < 0] == 0).all()


def test_labels_of_any_integer_type_cost_the_same() -> None:
    logits, label = random_pair((5, 4))
    for kind in (torch.int8, torch.int32):
        assert torch.equal(cross_entropy_map(logits, label.to(kind)), cross_entropy_map(logits, label))
        assert torch.equal(soft_dice_loss(logits, label.to(kind)), soft_dice_loss(logits, label))


@both_shapes
def test_the_residual_is_what_the_label_lacks(shape: tuple[int, ...]) -> None:
    logits, label = random_pair(shape)
    residual = residual_map(logits, label).detach()
    probability = torch.softmax(logits, 1).detach()
    for index in torch.cartesian_prod(*(torch.arange(n) for n in label.shape)).tolist():
        b, *pixel = index
        k = int(label[tuple(index)])
        expected = 0.0 if k < 0 else 1 - float(probability[(b, k, *pixel)])
        assert float(residual[tuple(index)]) == pytest.approx(expected, abs=1e-12)


@both_shapes
def test_soft_dice_equals_a_loop_over_classes_and_pixels(shape: tuple[int, ...]) -> None:
    logits, label = random_pair(shape, 4)
    label[label == 3] = 0  # a class that the batch's label lacks counts as well
    probability = torch.softmax(logits.detach(), 1).movedim(1, -1).reshape(-1, 4).tolist()
    scores = []
    for k in (1, 2, 3):
        overlap = total = 0.0
        for p, y in zip(probability, label.flatten().tolist(), strict=True):
            if y >= 0:
                overlap += p[k] * (y == k)
                total += p[k] + (y == k)
        scores.append((2 * overlap + 1e-5) / (total + 1e-5))
    assert float(soft_dice_loss(logits.detach(), label)) == pytest.approx(1 - sum(scores) / 3, abs=1e-12)


def test_soft_dice_of_the_truth_is_zero_and_of_its_opposite_one() -> None:
    label = torch.tensor([[[0, 1], [1, 2]]])
    certain = 50 * F.one_hot(label, 3).movedim(-1, 1).double()
    assert float(soft_dice_loss(certain, label)) == pytest.approx(0, abs=1e-9)
    assert float(soft_dice_loss(certain.roll(1, 1), label)) == pytest.approx(1, abs=1e-4)


@both_shapes
def test_the_supervised_loss_is_mean_cross_entropy_plus_dice(shape: tuple[int, ...]) -> None:
    logits, label = random_pair(shape)
    expected = F.cross_entropy(logits, label, ignore_index=IGNORE) + soft_dice_loss(logits, label)
    torch.testing.assert_close(supervised_loss(logits, label), expected, rtol=1e-12, atol=0)


@both_shapes
def test_where_nothing_is_known_the_cost_is_zero_and_finite(shape: tuple[int, ...]) -> None:
    logits, label = random_pair(shape)
    nothing = torch.full_like(label, IGNORE)
    cost = supervised_loss(logits, nothing)
    cost.backward()
    assert cost.item() == 0
    assert cross_entropy_map(logits, nothing).sum().item() == 0
    assert residual_map(logits, nothing).sum().item() == 0
    assert (logits.grad == 0).all()


def test_what_lies_under_an_unknown_label_changes_nothing() -> None:
    logits, label = random_pair((5, 4))
    other = torch.where((label < 0).unsqueeze(1), 100.0 * torch.randn_like(logits), logits)
    torch.testing.assert_close(
        supervised_loss(other, label), supervised_loss(logits, label), rtol=1e-12, atol=0
    )


def over_pairs(aligned: Tensor, seen: Tensor) -> Tensor:
    """Return the mean squared difference over pairs of views, pixels that both saw, and classes: O(V²)."""
    total, count = torch.zeros((), dtype=aligned.dtype), torch.zeros((), dtype=aligned.dtype)
    for i, j in combinations(range(len(aligned)), 2):
        both = seen[i] * seen[j]
        total = total + (both * (aligned[i] - aligned[j]).square()).sum()
        count = count + both.sum() * aligned.shape[2]
    return total / count


@both_shapes
@pytest.mark.parametrize("views", [2, 3, 5])
def test_consistency_equals_the_sum_over_pairs(shape: tuple[int, ...], views: int) -> None:
    torch.manual_seed(views)
    logits = torch.randn(views, 2, 3, *shape, dtype=torch.float64, requires_grad=True)
    seen = (torch.rand(views, 2, 1, *shape) < 0.7).double()
    found, slow = (f(torch.softmax(logits, 2), seen) for f in (pairwise_consistency, over_pairs))
    torch.testing.assert_close(found, slow, rtol=1e-12, atol=1e-14)
    grads = [torch.autograd.grad(value, logits)[0] for value in (found, slow)]
    torch.testing.assert_close(*grads, rtol=1e-12, atol=1e-14)
    assert (grads[0].flatten(1).abs().sum(1) > 0).all()  # into every view
    assert (grads[0].movedim(2, -1)[seen.squeeze(2) == 0] == 0).all()  # never from what was not seen


def test_consistency_of_one_view_or_of_views_that_share_nothing_is_zero() -> None:
    aligned = torch.rand(2, 1, 2, 4, 4, dtype=torch.float64)
    seen = torch.zeros(2, 1, 1, 4, 4, dtype=torch.float64)
    seen[0, ..., :2], seen[1, ..., 2:] = 1, 1
    assert float(pairwise_consistency(aligned, seen)) == 0
    assert float(pairwise_consistency(aligned[:1], torch.ones(1, 1, 1, 4, 4))) == 0


@both_shapes
def test_prediction_distance_is_the_mean_square_where_valid(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    mine, theirs = (torch.randn(2, 3, *shape, dtype=torch.float64, requires_grad=True) for _ in range(2))
    valid = (torch.rand(2, 1, *shape) < 0.6).double()
    found = prediction_distance(mine, theirs, valid)
    chosen = valid.squeeze(1) > 0
    p, q = (torch.softmax(z, 1).movedim(1, -1)[chosen] for z in (mine, theirs))
    torch.testing.assert_close(found, F.mse_loss(p, q), rtol=1e-12, atol=0)
    grads = torch.autograd.grad(found, [mine, theirs])
    assert all((g.movedim(1, -1)[~chosen] == 0).all() and (g != 0).any() for g in grads)
    assert prediction_distance(mine, theirs, torch.zeros_like(valid)).item() == 0
    assert prediction_distance(mine, mine, valid).item() == 0
    p, q = (torch.softmax(z, 1) for z in (mine, theirs))
    assert torch.equal(probability_distance(p, q, valid), found)


@both_shapes
@pytest.mark.parametrize("classes", [2, 4])
def test_entropy_equals_a_loop_over_pixels_and_classes(shape: tuple[int, ...], classes: int) -> None:
    logits, _ = random_pair(shape, classes)
    found = entropy_map(logits)
    assert found.shape == (2, *shape)
    probability = torch.softmax(logits.detach(), 1).movedim(1, -1).reshape(-1, classes).tolist()
    expected = [-sum(q * math.log(q) for q in p) / math.log(classes) for p in probability]
    assert found.flatten().tolist() == pytest.approx(expected, abs=1e-12)
    # The logarithm of probabilities will do as well.
    torch.testing.assert_close(entropy_map(torch.log_softmax(logits, 1)), found, rtol=1e-12, atol=1e-14)
    assert torch.autograd.gradcheck(entropy_map, logits[:, :, :2])


def test_entropy_is_1_where_nothing_is_known_and_0_where_all_is() -> None:
    logits = torch.tensor([[0.0, 300.0], [0.0, -300.0], [0.0, -200.0]]).T.reshape(2, 3, 1).requires_grad_()
    entropy = entropy_map(logits)
    assert entropy.flatten().tolist() == pytest.approx([1, 0])
    (grad,) = torch.autograd.grad(entropy.sum(), logits)
    assert torch.isfinite(grad).all()
    assert grad.abs().max() < 1e-6  # both are where it does not change


# --- weights of pixels ------------------------------------------------------------------------------------


@both_shapes
def test_weights_of_one_change_nothing(shape: tuple[int, ...]) -> None:
    logits, label = random_pair(shape)
    plain = supervised_loss(logits, label)
    weighted = supervised_loss(logits, label, weight=torch.ones(label.shape, dtype=torch.float64))
    torch.testing.assert_close(weighted, plain, rtol=1e-12, atol=0)
    grads = [torch.autograd.grad(value, logits)[0] for value in (weighted, plain)]
    torch.testing.assert_close(*grads, rtol=1e-12, atol=1e-14)


@both_shapes
def test_a_pixel_without_weight_is_one_without_a_label(shape: tuple[int, ...]) -> None:
    logits, label = random_pair(shape)
    chosen = torch.rand(label.shape) < 0.6
    weighted = supervised_loss(logits, label, weight=chosen.double())
    masked = supervised_loss(logits, torch.where(chosen, label, IGNORE))
    torch.testing.assert_close(weighted, masked, rtol=1e-12, atol=0)
    grads = [torch.autograd.grad(value, logits)[0] for value in (weighted, masked)]
    torch.testing.assert_close(*grads, rtol=1e-12, atol=1e-14)
    assert (grads[0].movedim(1, -1)[~chosen] == 0).all()


@both_shapes
def test_the_weighted_loss_equals_a_loop_over_pixels(shape: tuple[int, ...]) -> None:
    logits, label = random_pair(shape)
    weight = 2 * torch.rand(label.shape, dtype=torch.float64)
    probability = torch.softmax(logits.detach(), 1).movedim(1, -1).reshape(-1, 3).tolist()
    cost = total = 0.0
    overlap, both = [0.0] * 3, [0.0] * 3
    for p, y, w in zip(probability, label.flatten().tolist(), weight.flatten().tolist(), strict=True):
        if y < 0:
            continue
        cost -= w * math.log(p[y])
        total += w
        for k in range(3):
            overlap[k] += w * p[k] * (y == k)
            both[k] += w * (p[k] + (y == k))
    dice = [(2 * o + 1e-5) / (b + 1e-5) for o, b in zip(overlap, both, strict=True)]
    found = supervised_loss(logits.detach(), label, weight=weight)
    assert float(found) == pytest.approx(cost / total + 1 - sum(dice[1:]) / 2, abs=1e-12)


@both_shapes
def test_without_any_weight_the_cost_is_zero_and_finite(shape: tuple[int, ...]) -> None:
    logits, label = random_pair(shape)
    cost = supervised_loss(logits, label, weight=torch.zeros(label.shape, dtype=torch.float64))
    cost.backward()
    assert cost.item() == 0
    assert (logits.grad == 0).all()


SETS = torch.tensor([[True, False, True, False], [True, True, False, True]])


def slow_loss(logits: Tensor, label: Tensor, sets: Tensor) -> tuple[float, float]:
    """Return cross-entropy and soft Dice loss, voxel by voxel, of labels that may name a set of classes."""
    probability = torch.softmax(logits, 1).movedim(1, -1).reshape(-1, logits.shape[1]).tolist()
    costs, overlap, total = [], [0.0] * logits.shape[1], [0.0] * logits.shape[1]
    for p, value in zip(probability, label.flatten().tolist(), strict=True):
        if value in (IGNORE, UNLABELLED):
            continue
        hidden = sets[EITHER - value].nonzero().flatten().tolist() if value <= EITHER else []
        costs.append(-math.log(sum(p[k] for k in hidden) if hidden else p[value]))
        for k in range(1, len(p)):
            if k in hidden:
                continue  # nobody knows whether it is there
            overlap[k] += p[k] * (value == k)
            total[k] += p[k] + (value == k)
    dice = [(2 * o + 1e-5) / (t + 1e-5) for o, t in zip(overlap, total, strict=True)]
    return sum(costs) / max(1, len(costs)), 1 - sum(dice[1:]) / len(dice[1:])


@both_shapes
@pytest.mark.parametrize("lowest", [IGNORE, UNLABELLED, EITHER - 1])
def test_partly_known_labels_cost_what_a_slow_loop_says(shape: tuple[int, ...], lowest: int) -> None:
    torch.manual_seed(0)
    logits = (3 * torch.randn(2, 4, *shape, dtype=torch.float64)).requires_grad_()
    label = torch.randint(lowest, 4, (2, *shape))
    entropy, dice = slow_loss(logits.detach(), label, SETS)
    taken = resolved(logits, label, SETS)
    found = supervised_loss(*taken)
    assert float(found.detach()) == pytest.approx(entropy + dice, rel=1e-12)
    assert float(soft_dice_loss(*taken).detach()) == pytest.approx(dice, rel=1e-12)
    found.backward()
    assert torch.isfinite(logits.grad).all()  # type: ignore[union-attr]
    unknown = (label == IGNORE) | (label == UNLABELLED)
    assert (logits.grad.movedim(1, -1)[unknown] == 0).all()  # type: ignore[union-attr]


@both_shapes
def test_the_gradient_of_a_set_of_classes_is_that_of_differences(shape: tuple[int, ...]) -> None:
    torch.manual_seed(1)
    logits = torch.randn(1, 4, *shape, dtype=torch.float64, requires_grad=True)
    label = torch.randint(EITHER - 1, 4, (1, *shape))
    assert torch.autograd.gradcheck(lambda z: supervised_loss(*resolved(z, label, SETS)), (logits,))


def test_without_sets_nothing_is_changed() -> None:
    logits, label = random_pair((5, 4))
    assert resolved(logits, label, None) == (logits, label)


@both_shapes
def test_the_crf_is_the_sum_over_pairs(shape: tuple[int, ...]) -> None:
    torch.manual_seed(2)
    logits, image = (torch.randn(2, count, *shape, dtype=torch.float64) for count in (3, 2))
    p = torch.softmax(logits, 1)
    energy, pairs = 0.0, 0
    places = [tuple(place) for place in torch.cartesian_prod(*map(torch.arange, shape)).tolist()]
    for b in range(2):
        for one, other in combinations(places, 2):
            step = [abs(x - y) for x, y in zip(one, other, strict=True)]
            if not any(set(step) <= {0, distance} for distance in (1, 2)):
                continue
            i, j = (b, slice(None), *one), (b, slice(None), *other)
            alike = math.exp(-float((image[i] - image[j]).square().sum()) / (2 * 0.5**2))
            energy += alike * (1 - float((p[i] * p[j]).sum()))
            pairs += 1
    found = gated_crf(logits, image, contrast=0.5, distances=(1, 2))
    assert float(found) == pytest.approx(energy / pairs, rel=1e-12)
