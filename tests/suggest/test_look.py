"""What a look at a scan gives: a promise of Dice and a descriptor."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from blocks import blocks, save
from mlbseg.apps.suggest.look import Looker, expected_dice
from mlbseg.data.plan import Plan
from mlbseg.data.preprocess import prepare_scan
from mlbseg.data.readers import read_scan
from mlbseg.errors import UserError
from mlbseg.networks import NETWORKS, make_network, required_multiple
from mlbseg.types import Case

CPU = torch.device("cpu")
CHANNELS = {
    "nnunet": (4, 4, 4, 4),
    "resenc": (4, 4, 4, 4),
    "unet": (4, 8, 8),
    "unet++": (4, 4, 4, 4, 4),
    "nested-unet": (4, 4, 4, 4, 4),
    "vnet": (3,),
    "vnet3": (3,),
    "dynunet": (4, 5, 6),
    "swin-unetr": (12,),
}


def plan(name: str = "unet", ndim: int = 3, scan_ndim: int = 3) -> Plan:
    least = required_multiple(name, CHANNELS[name])
    return Plan(
        ndim=ndim, scan_ndim=scan_ndim, channels=1, label_values=(0, 1, 2), class_names=("a", "b", "c"),  # type: ignore[arg-type]
        spacing=(1.0,) * scan_ndim, patch_size=(2 * least, least, least)[:ndim], normalisation=("zscore",),
        intensity=({},), crop=False, network=name, network_channels=CHANNELS[name], batch_size=1,
        unlabelled_batch_size=1, steps=1, flip_axes=(),
    )  # fmt: skip


def network(of: Plan) -> nn.Module:
    torch.manual_seed(0)
    return make_network(
        of.network, ndim=of.ndim, in_channels=1, num_classes=3, channels=of.network_channels,
        patch_size=of.patch_size,
    ).eval()  # fmt: skip


# --- the expected Dice ------------------------------------------------------------------------------------


def test_a_sure_network_promises_one_and_a_torn_one_less() -> None:
    mask = np.zeros((8, 8), bool)
    mask[2:6, 2:6] = True
    sure = np.stack([~mask, mask]).astype(np.float32)
    assert expected_dice(sure) == 1
    promises = [
        expected_dice(np.stack([np.where(mask, 1 - p, p), np.where(mask, p, 1 - p)])) for p in (0.9, 0.7)
    ]
    assert 1 > promises[0] > promises[1] > 0
    # 16 voxels of 0.9 inside, 48 of 0.1 outside.
    assert promises[0] == pytest.approx((2 * 14.4 + 1) / (14.4 + 4.8 + 16 + 1))


def test_it_is_near_the_mean_dice_of_drawn_labels() -> None:
    rng = np.random.default_rng(0)
    foreground = rng.beta(0.3, 0.3, (20, 20)).astype(np.float32)
    mask = foreground > 0.5
    drawn = [rng.uniform(size=mask.shape) < foreground for _ in range(500)]
    dice = np.mean([2 * (label & mask).sum() / (label.sum() + mask.sum()) for label in drawn])
    assert expected_dice(np.stack([1 - foreground, foreground])) == pytest.approx(dice, abs=0.005)


def test_a_class_that_is_absent_for_sure_counts_as_right_and_one_that_may_be_there_does_not() -> None:
    maps = np.zeros((3, 10, 10), np.float32)
    maps[0] = 1
    assert expected_dice(maps) == 1
    maps[1] = 0.2
    maps[0] = 0.8
    assert expected_dice(maps) == pytest.approx((1 / 21 + 1) / 2)


# --- the descriptor ---------------------------------------------------------------------------------------


class Seen(nn.Module):
    """A network whose deepest features are known: means over blocks of 4; foreground where the image is above 0."""

    def __init__(self) -> None:
        super().__init__()
        self.deep = nn.AvgPool2d(4)
        self.head = nn.Conv2d(1, 2, 1)
        with torch.no_grad():
            self.head.weight.copy_(torch.tensor([-50.0, 50]).reshape(2, 1, 1, 1))
            self.head.bias.zero_()

    def forward(self, x: Tensor) -> Tensor:
        deep = self.deep(x)
        logits: Tensor = self.head(x)
        return logits + 0 * deep.mean()


def test_the_descriptor_is_the_mean_of_deep_features_where_there_is_foreground(tmp_path: Path) -> None:
    of = plan(ndim=2, scan_ndim=2)
    image = np.random.default_rng(0).integers(0, 255, of.patch_size).astype(np.uint8)
    image[:4, :3] = 200
    path = save(tmp_path / "a.png", image)
    looker = Looker(Seen(), of, CPU)
    assert looker.layer == "deep"
    look = looker.look(Case("a", (path,)))
    seen = prepare_scan(read_scan((path,)), of)[0][0].astype(float).reshape(2, 4, 1, 4)
    foreground = (1 / (1 + np.exp(-100 * seen))).mean((1, 3))
    assert abs(foreground[0] - foreground[1]) > 0.1  # else a mean without weights would do
    expected = (seen.mean((1, 3)) * foreground).sum() / foreground.sum()
    np.testing.assert_allclose(look.descriptor, [expected], rtol=1e-4)
    assert 0 <= look.uncertainty < 0.05


def test_a_scan_without_foreground_is_described_by_all_of_it(tmp_path: Path) -> None:
    of = plan(ndim=2, scan_ndim=2)
    model = Seen()
    with torch.no_grad():
        model.head.weight.zero_()
        model.head.bias.copy_(torch.tensor([900.0, -900]))
    image = np.random.default_rng(0).integers(0, 255, of.patch_size).astype(np.uint8)
    path = save(tmp_path / "a.png", image)
    look = Looker(model, of, CPU).look(Case("a", (path,)))
    np.testing.assert_allclose(look.descriptor, [prepare_scan(read_scan((path,)), of)[0].mean()], atol=1e-6)
    assert look.uncertainty == 0


def test_hooks_are_gone_after_a_look(tmp_path: Path) -> None:
    looker = Looker(network(plan()), plan(), CPU)
    looker.look(Case("a", (save(tmp_path / "a.nii.gz", blocks(0)[0]),)))
    with pytest.raises(UserError, match="expected 3D with 1 as in training"):
        looker.look(Case("b", (save(tmp_path / "b.png", np.zeros((16, 16), np.uint8)),)))
    assert not any(module._forward_hooks for module in looker.network.modules())


KINDS = {"3D": (3, 3), "slices": (2, 3), "2D": (2, 2)}
"""Of scans: dimensions of the network, and of the scan."""
# Every network, and every kind of scan.
PAIRS = [
    *((name, "2D") for name in NETWORKS),
    ("unet", "3D"),
    ("unet", "slices"),
    ("swin-unetr", "slices"),
    ("vnet", "3D"),
]


@pytest.mark.parametrize(("name", "ndim", "scan_ndim"), [(name, *KINDS[kind]) for name, kind in PAIRS])
def test_every_network_describes_scans(name: str, ndim: int, scan_ndim: int, tmp_path: Path) -> None:
    if name == "swin-unetr":
        pytest.importorskip("einops")
    of = plan(name, ndim, scan_ndim)
    looker = Looker(network(of), of, CPU)
    shape = (20, 24, 18)[:scan_ndim]
    cases = []
    for i, seed in enumerate((0, 0, 1)):
        image = blocks(seed, shape)[0]
        image = image.clip(0, 255).astype(np.uint8) if scan_ndim == 2 else image
        cases.append(Case(f"{i}", (save(tmp_path / f"{i}{'.png' if scan_ndim == 2 else '.nii.gz'}", image),)))
    first, copy, other = (looker.look(case) for case in cases)
    assert first.descriptor.ndim == 1
    assert len(first.descriptor) > 2
    assert np.isfinite(first.descriptor).all()
    np.testing.assert_array_equal(first.descriptor, copy.descriptor)
    assert not np.allclose(first.descriptor, other.descriptor, rtol=1e-6)
    assert 0 < first.uncertainty < 1
    assert first.uncertainty == copy.uncertainty
