"""Deep supervision: every method has it, without a word of its own about it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mlbseg.core.losses import supervised_loss
from mlbseg.errors import UserError
from mlbseg.methods import METHODS, Method, find_method
from mlbseg.methods.supervised import Supervised
from mlbseg.networks import make_network
from mlbseg.types import Batch

CHANNELS = (4, 4, 6, 6)
HEADS = ("decoder.seg_layers.0.", "decoder.seg_layers.1.", "decoder.seg_layers.2.")
NEEDED: dict[str, dict[str, Any]] = {"fixmatch": {"threshold": 0.1}, "unimatch": {"threshold": 0.1}}


def network(name: str = "nnunet", *, ndim: int = 2, deep: bool = True) -> nn.Module:
    torch.manual_seed(0)
    return make_network(name, ndim=ndim, in_channels=1, num_classes=3, channels=CHANNELS, deep=deep)


def make_batch(ndim: int = 2) -> Batch:
    generator = torch.Generator().manual_seed(1)
    clean, image = torch.randn(2, 2, 1, *(16, 16, 16)[:ndim], generator=generator)
    label = (clean[:, 0] > 0).long() + (clean[:, 0] > 1)
    label[:, :3] = -1
    return Batch(clean, label, image, label.roll(1, -1).clamp(min=0), case_ids=tuple("abcd"), seed=3)


def expected(net: Any, image: Tensor, label: Tensor) -> Tensor:
    """The loss as nnU-Net has it, from what its own decoder answers."""
    net = copy.deepcopy(net)
    net.decoder.deep_supervision = True
    net.decoder.seg_layers[0] = nn.Identity()
    outputs = net.decoder(net.encoder(image))[:2]
    labels = [
        label,
        F.interpolate(label[:, None].float(), scale_factor=0.5, mode="nearest-exact")[:, 0].long(),
    ]
    losses = [supervised_loss(z, y) for z, y in zip(outputs, labels, strict=True)]
    return (losses[0] + losses[1] / 2) / 1.5


@pytest.mark.parametrize("name", ["nnunet", "resenc"])
@pytest.mark.parametrize("ndim", [2, 3])
def test_the_loss_is_that_of_every_resolution(name: str, ndim: int) -> None:
    net, batch = network(name, ndim=ndim), make_batch(ndim)
    (losses,) = Supervised(net).losses(batch, 0)
    torch.testing.assert_close(losses["clean"], expected(net, batch.clean_image, batch.clean_label))
    losses["clean"].backward()
    assert all(p.grad is not None for p in net.parameters())


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", METHODS.own)
def test_every_method_teaches_the_side_outputs(name: str, precision: torch.dtype) -> None:
    method: Method = find_method(name).make(network(), **NEEDED.get(name, {}))
    method.optimiser = torch.optim.SGD(method.trained(), lr=0.1)
    method.train()
    if method.relabel:
        pytest.skip("draws pseudo labels of whole scans")
    with torch.autocast("cpu", torch.bfloat16, enabled=precision is torch.bfloat16):
        for losses in method.losses(make_batch(), 0):
            torch.stack(list(losses.values())).sum().backward()
    heads = {n: p.grad for n, p in method.student.named_parameters() if n.startswith(HEADS)}
    assert len(heads) == 4  # weight and bias of two
    assert [n for n, grad in heads.items() if grad is None or not grad.abs().sum() > 0] == []


def test_only_logits_of_the_last_pass_have_side_outputs() -> None:
    net: Any = network()
    image = make_batch().clean_image
    first, last = net(image), net(image)
    assert net.sides.of(first) == []
    coarse = net.sides.of(last)
    assert [z.shape for z in coarse] == [(2, 3, 8, 8)]
    part = last.float().tensor_split([1])[1]
    assert torch.equal(net.sides.of(part)[0], coarse[0][1:])
    assert net.sides.of(last[:, :, :4]) == []
    assert net.sides.of(last.detach().requires_grad_()) == []
    assert copy.deepcopy(net).sides.of(last) == []


def test_a_network_in_use_has_none_and_the_same_logits() -> None:
    deep, plain = network().eval(), network(deep=False).eval()
    plain.load_state_dict({n: v for n, v in deep.state_dict().items() if n in plain.state_dict()})
    image = make_batch().clean_image
    assert torch.equal(deep(image), plain(image))
    assert set(deep.state_dict()) - set(plain.state_dict()) == {
        "decoder.seg_layers.1.weight",
        "decoder.seg_layers.1.bias",
    }


def test_a_network_without_side_outputs_is_refused() -> None:
    with pytest.raises(
        UserError, match="network unet, which has no side outputs \\(choose nnunet or resenc\\)"
    ):
        network("unet")
