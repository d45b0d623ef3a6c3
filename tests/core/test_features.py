"""Changed features: the deepest layer of every network, and what is done to its output."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from core.small import WIDTHS, conv_net, real_data, real_net
from mlbseg.core.features import (
    active_dropped,
    changed_features,
    channels_dropped,
    deepest_layer,
    features_with_noise,
)
from mlbseg.networks import NETWORKS, required_multiple

every_network = pytest.mark.parametrize("name", NETWORKS)
dimensions = pytest.mark.parametrize("ndim", [2, 3])
shapes = pytest.mark.parametrize("shape", [(5, 7), (3, 4, 5)])


@pytest.mark.parametrize(
    ("name", "ndim"),
    [
        pytest.param(name, ndim, marks=pytest.mark.slow if (name, ndim) == ("swin-unetr", 3) else ())
        for name in NETWORKS
        for ndim in (2, 3)
    ],
)
@torch.no_grad()
def test_the_deepest_features_of_the_networks_change_what_follows(name: str, ndim: int) -> None:
    torch.manual_seed(0)
    model = real_net(name, ndim, 3).float().train()
    x = real_data(name, ndim, 3, batch=2)[0].float()
    state = torch.get_rng_state()
    layer = deepest_layer(model, x)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(m.training for m in model.modules())
    seen: list[Tensor] = []

    def change(features: Tensor) -> Tensor:
        seen.append(features)
        return features * 0

    plain = model(x)
    with changed_features(model, layer, change, first=1):
        logits = model(x)
    assert not any(m._forward_hooks for m in model.modules())
    (features,) = seen
    multiple = required_multiple(name, WIDTHS[name])
    assert features.shape[0] == 1
    assert features.shape[2:] == tuple(side // multiple for side in x.shape[2:])
    torch.testing.assert_close(logits[:1], plain[:1], rtol=0, atol=1e-5)
    assert (logits[1] - plain[1]).abs().max() > 1e-4


class SkipsNothing(nn.Module):
    """All that the last layer knows comes through the coarse block, which is a sum."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(1, 2, 3, padding=1), nn.Conv2d(2, 3, 1)
        self.block = nn.Sequential(nn.Conv2d(2, 2, 1), nn.ReLU())
        self.outer = Sum(self.block)
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        deep = self.act(self.outer(nn.functional.max_pool2d(self.act(self.first(x)), 2)))
        return self.last(nn.functional.interpolate(deep, scale_factor=2.0))


class Sum(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x)


def test_a_block_counts_as_a_whole_and_a_module_that_runs_twice_not_at_all() -> None:
    model, x = SkipsNothing(), torch.randn(2, 1, 8, 8)
    assert deepest_layer(model, x) == "outer"
    with changed_features(model, "outer", lambda z: z * 0):
        assert (model(x) == model.last.bias.reshape(1, -1, 1, 1)).all()


@dimensions
def test_a_network_that_is_nowhere_coarser_has_a_middle(ndim: int) -> None:
    model = conv_net(ndim, 3)
    x = torch.randn(1, 2, *(6,) * ndim, dtype=torch.float64)
    assert deepest_layer(model, x) == "2"  # of convolution, norm, activation, dropout; then the last layer


def test_a_network_of_one_layer_is_refused() -> None:
    with pytest.raises(ValueError, match="no features"):
        deepest_layer(nn.Sequential(nn.Conv2d(1, 2, 1)), torch.randn(1, 1, 4, 4))


def test_an_error_within_leaves_no_hook() -> None:
    model = conv_net(2, 2)
    with pytest.raises(KeyError), changed_features(model, "1", lambda z: z):
        raise KeyError
    assert not any(m._forward_hooks for m in model.modules())


@every_network
def test_bfloat16_autocast_draws_the_same_changes(name: str) -> None:
    torch.manual_seed(0)
    model = real_net(name, 2, 3).float()
    x = real_data(name, 2, 3, batch=2)[0].float()
    layer = deepest_layer(model, x)
    masks = []

    def change(features: Tensor) -> Tensor:
        changed = channels_dropped([1, 2], features)
        masks.append((changed == 0).flatten(2).all(2))
        return changed

    with torch.no_grad(), changed_features(model, layer, change):
        exact = model(x)
        with torch.autocast("cpu", torch.bfloat16):
            found = model(x)
    assert masks[0].any()
    assert (masks[0] & ~masks[1]).sum() == 0  # small numbers may become 0, no channel comes back
    assert torch.cosine_similarity(found.float().flatten(), exact.flatten(), dim=0) > 0.98


@shapes
def test_channels_are_dropped_whole(shape: tuple[int, ...]) -> None:
    features = torch.rand(3, 64, *shape, dtype=torch.float64) + 0.1
    changed = channels_dropped([4, 5, 4], features, 0.25)
    ratio = (changed / features).flatten(2)
    torch.testing.assert_close(ratio, ratio[..., :1].expand_as(ratio))
    assert {round(v, 6) for v in ratio.flatten().tolist()} == {0, round(1 / 0.75, 6)}
    assert 0.1 < (ratio[:2, :, 0] == 0).double().mean() < 0.4
    assert torch.equal(ratio[0] == 0, ratio[2] == 0)
    assert not torch.equal(ratio[0] == 0, ratio[1] == 0)


@shapes
def test_noise_is_in_proportion_and_of_every_place(shape: tuple[int, ...]) -> None:
    features = torch.randn(2, 8, *shape, dtype=torch.float64)
    noise = features_with_noise([1, 2], features) / features - 1
    assert 0.25 < noise.abs().max() < 0.3
    assert abs(noise.mean()) < 0.05
    assert noise.flatten().unique().numel() == noise.numel()


@shapes
def test_the_most_active_places_are_dropped(shape: tuple[int, ...]) -> None:
    features = torch.randn(4, 3, *shape, dtype=torch.float64)
    changed = active_dropped([1, 2, 3, 4], features)
    begins = []
    for before, after in zip(features, changed, strict=True):
        activity = before.abs().sum(0) / before.abs().sum(0).max()
        dropped = (after == 0).all(0)
        assert torch.equal(after, before * ~dropped)
        least, most = activity[dropped].min(), activity[~dropped].max()
        assert most < least
        assert float(least) >= 0.6
        assert float(most) < 0.9 or math.isclose(float(most), 0.9)
        begins.append(float(least))
    assert len(set(begins)) == 4


@pytest.mark.parametrize("change", [channels_dropped, features_with_noise, active_dropped])
def test_what_an_image_sees_does_not_depend_on_the_others(change: object) -> None:
    assert callable(change)
    features = torch.randn(3, 6, 4, 5)
    state = torch.get_rng_state()
    together = change([7, 8, 9], features)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(together[1:2], change([8], features[1:2]))
    assert torch.equal(together, change([7, 8, 9], features))
