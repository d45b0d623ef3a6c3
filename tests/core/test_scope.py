"""Scopes found by when layers run and how fine their output is."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from core.small import real_data, real_net
from mlbseg.core.scope import parameters_in_scope, redraw

# What a decoder's first and a head's only parameters are called, by network.
DECODERS = {
    "unet": ("model.1.submodule.2", "model.2.1.conv.unit0.conv."),
    "unet++": ("upcat_3_1.", "final_conv_0_4."),
    "nested-unet": ("nodes.3_1.", "head."),
    "vnet": ("up_tr256.", "out_tr.conv2."),
    "vnet3": ("up_tr256.", "out_tr.conv2."),
    "dynunet": ("skip_layers.next_layer.upsample.", "output_block.conv.conv."),
    "swin-unetr": ("decoder5.", "out.conv.conv."),
}


@pytest.mark.parametrize("name", DECODERS)
def test_scopes_of_the_networks(name: str) -> None:
    model = real_net(name, 2, 3).train()
    x = real_data(name, 2, 3)[0]
    first, head_prefix = DECODERS[name]
    whole, decoder, head = (parameters_in_scope(model, x, s) for s in ("all", "decoder", "head"))
    assert whole == {n for n, _ in model.named_parameters()}
    assert head < decoder < whole
    assert any(n.startswith(first) for n in decoder)
    assert {n.rpartition(".")[0] + "." for n in head} == {head_prefix}
    assert all(m.training for m in model.modules())  # as it was
    assert not any(m._forward_hooks for m in model.modules())


def test_the_decoder_holds_all_that_runs_after_the_bottleneck_and_no_more() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.last, self.up, self.deep, self.first = (nn.Conv2d(2, 2, 3, padding=1) for _ in range(4))

        def forward(self, x: Tensor) -> Tensor:
            deep = self.deep(nn.functional.max_pool2d(self.first(x), 2))
            return self.last(self.up(nn.functional.interpolate(deep, scale_factor=2.0)))

    model, x = Net(), torch.randn(1, 2, 8, 8)
    assert {n.split(".")[0] for n in parameters_in_scope(model, x, "decoder")} == {"up", "last"}
    assert {n.split(".")[0] for n in parameters_in_scope(model, x, "head")} == {"last"}


def test_a_predicate_chooses_by_name_and_frozen_parameters_stay_out() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.Conv2d(2, 2, 1))
    model[1].bias.requires_grad_(requires_grad=False)
    x = torch.randn(1, 1, 4, 4)
    assert parameters_in_scope(model, x, lambda n: n.endswith("bias")) == {"0.bias"}
    assert parameters_in_scope(model, x, "head") == {"1.weight"}


def test_what_cannot_be_a_scope_is_refused() -> None:
    model, x = nn.Sequential(nn.Conv2d(1, 2, 1)), torch.randn(1, 1, 4, 4)
    with pytest.raises(ValueError, match="unknown scope 'tail'"):
        parameters_in_scope(model, x, "tail")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no trainable parameter"):
        parameters_in_scope(model, x, "decoder")  # it has no coarser layer that others follow
    with pytest.raises(ValueError, match="no layer"):
        parameters_in_scope(nn.Identity(), x, "head")


@pytest.mark.parametrize("name", DECODERS)
def test_what_is_drawn_anew_is_what_was_asked_for(name: str) -> None:
    model, other = real_net(name, 2, 3), real_net(name, 2, 3)
    other.load_state_dict(model.state_dict())
    names = parameters_in_scope(model, real_data(name, 2, 3)[0], "decoder")
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    state = torch.get_rng_state()
    redraw(model, names, 5)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(1)
    redraw(other, names, 5)
    for n, p in model.named_parameters():
        assert torch.equal(p, other.get_parameter(n)), n
        assert p.requires_grad
        if n not in names:
            assert torch.equal(p, before[n]), n
        elif p.ndim > 2:
            assert (p != before[n]).any(), n
            assert 0.2 < p.std() / before[n].std() < 5, n


def test_a_parameter_without_a_layer_stays() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.conv = nn.Parameter(torch.ones(2)), nn.Conv2d(1, 2, 1)

    model = Net()
    before = model.conv.weight.detach().clone()
    redraw(model, {"table", "conv.weight"}, 123)
    assert (model.table == 1).all()
    assert (model.conv.weight != before).all()
