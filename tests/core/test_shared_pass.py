"""One pass gives what two passes give, bit for bit, with the graph of one."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from core.small import real_data, real_net
from mlbseg.core import shared_pass
from mlbseg.core.directional import directional_derivative
from mlbseg.core.shared_pass import output_and_tangent


def randn_like(model: nn.Module) -> dict[str, Tensor]:
    return {n: torch.randn_like(p) for n, p in model.named_parameters()}


def shared(model: nn.Module) -> bool:
    return shared_pass._SHAREABLE[model]


@pytest.mark.parametrize(
    ("name", "ndim", "norm"),
    [
        *(("unet", 2, norm) for norm in ("instance", "group", "batch")),
        ("unet++", 2, "batch"), ("vnet", 3, "instance"), ("dynunet", 3, "group"), ("nnunet", 3, "instance"),
        ("resenc", 3, "batch"), ("swin-unetr", 2, "instance"),
    ],
)  # fmt: skip
def test_one_pass_gives_what_two_give(name: str, ndim: int, norm: str) -> None:
    torch.manual_seed(0)
    model = real_net(name, ndim, 3, norm=norm, dropout=0.3).train()
    x, v = real_data(name, ndim, 3, batch=2)[0], randn_like(model)
    torch.manual_seed(1)
    expected_tangent = directional_derivative(model, v, x)[1]
    plain = copy.deepcopy(model)
    torch.manual_seed(1)
    output, tangent = output_and_tangent(model, v, x)
    assert shared(model)
    assert not tangent.requires_grad
    largest = float(expected_tangent.abs().max())
    torch.testing.assert_close(tangent, expected_tangent, rtol=1e-9, atol=1e-9 * largest)
    torch.manual_seed(1)
    expected = plain(x)
    assert torch.equal(output, expected)
    # Running statistics moved once.
    assert all(torch.equal(*pair) for pair in zip(model.buffers(), plain.buffers(), strict=True))
    cotangent = torch.randn_like(output)
    found = torch.autograd.grad(output, list(model.parameters()), cotangent)
    slow = torch.autograd.grad(expected, list(plain.parameters()), cotangent)
    assert all(torch.equal(*pair) for pair in zip(found, slow, strict=True))


def test_no_graph_of_the_derivative_is_kept() -> None:
    model = real_net("unet", 2, 3)
    x, v = real_data("unet", 2, 3)[0], randn_like(model)

    def nodes(output: Tensor) -> int:
        seen, todo = set(), [output.grad_fn]
        while todo:
            node = todo.pop()
            if node is not None and node not in seen:
                seen.add(node)
                todo += [following for following, _ in node.next_functions]
        return len(seen)

    assert nodes(output_and_tangent(model, v, x)[0]) == nodes(model(x))


def test_bfloat16_is_shared_too() -> None:
    torch.manual_seed(2)
    model = real_net("unet", 3, 2).float()
    x, v = torch.randn(1, 1, 16, 16, 16), randn_like(model)
    with torch.autocast("cpu", torch.bfloat16):
        output, tangent = output_and_tangent(model, v, x)
        expected = directional_derivative(model, v, x)[1]
    assert shared(model)
    assert output.dtype == tangent.dtype == torch.bfloat16
    torch.testing.assert_close(tangent, expected)


def test_part_of_the_parameters_and_frozen_ones() -> None:
    torch.manual_seed(3)
    model = real_net("unet", 2, 2)
    x, v = real_data("unet", 2, 2)[0], randn_like(model)
    next(model.parameters()).requires_grad_(requires_grad=False)
    biases = {n: t for n, t in v.items() if n.endswith("bias")}
    output, tangent = output_and_tangent(model, biases, x)
    assert shared(model)
    torch.testing.assert_close(tangent, directional_derivative(model, biases, x)[1])
    assert output.requires_grad


@pytest.mark.parametrize("activation", [nn.ReLU, nn.ELU, nn.SiLU, nn.LeakyReLU])
def test_functions_that_work_in_place(activation: type[nn.Module]) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Conv2d(1, 4, 3), nn.Conv2d(4, 2, 3)
            self.act = activation(inplace=True)

        def forward(self, x: Tensor) -> Tensor:
            h = self.act(self.first(x))
            h = h * 2
            h += torch.sin(h)
            h[:, :2] = h[:, 2:] ** 2
            return self.last(h).mul_(0.5)

    torch.manual_seed(4)
    model = Net().double()
    x, v = torch.randn(2, 1, 9, 9, dtype=torch.float64), randn_like(model)
    expected = directional_derivative(model, v, x)
    output, tangent = output_and_tangent(model, v, x)
    torch.testing.assert_close((output.detach(), tangent), expected, rtol=1e-12, atol=1e-12)


def test_hooks_of_other_tools_are_registered_once() -> None:
    class Hooked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(1, 2, 3)

        def forward(self, x: Tensor) -> Tensor:
            h = self.conv(x)
            if h.requires_grad:
                h.register_hook(lambda g: calls.append(tuple(g.shape)))
            return h.sin()

    calls: list[Any] = []
    model = Hooked()
    output, tangent = output_and_tangent(model, randn_like(model), torch.randn(1, 1, 5, 5))
    assert shared(model)
    output.sum().backward()
    assert calls == [(1, 2, 3, 3)]
    assert tangent.shape == (1, 2, 3, 3)


class Opaque(torch.autograd.Function):
    """A function that torch's overrides do not see, with forward mode."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        ctx.save_for_forward(x)
        return x**2

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return 2 * ctx.saved_tensors[0] * g

    @staticmethod
    def jvp(ctx: Any, t: Tensor) -> Tensor:
        return 2 * ctx.saved_tensors[0] * t


@pytest.mark.parametrize("hidden", [Opaque.apply, lambda h: checkpoint(torch.square, h, use_reentrant=False)])
def test_work_that_is_hidden_is_noticed(hidden: Any) -> None:
    """Half of the network is visible, so that a tangent comes out of the shared pass, a wrong one."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Conv2d(1, 4, 3), nn.Conv2d(4, 2, 3)

        def forward(self, x: Tensor) -> Tensor:
            h = self.first(x)
            return self.last(hidden(h) + F.silu(h))

    torch.manual_seed(5)
    model = Net().double()
    x, v = torch.randn(2, 1, 9, 9, dtype=torch.float64), randn_like(model)
    output, tangent = output_and_tangent(model, v, x)
    assert torch.equal(output, model(x))
    step = 1e-6
    with torch.no_grad():
        ends = []
        for sign in (1, -1):
            for n, p in model.named_parameters():
                p += sign * step * v[n]
            ends.append(model(x))
            for n, p in model.named_parameters():
                p -= sign * step * v[n]
    torch.testing.assert_close(tangent, (ends[0] - ends[1]) / (2 * step), rtol=1e-5, atol=1e-5)


def test_derivatives_that_are_no_longer_needed_are_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    """The graph keeps features for the backward pass; their derivatives must not be kept with them."""
    model = nn.Sequential(*(layer for _ in range(6) for layer in (nn.Conv2d(3, 3, 3, padding=1), nn.SiLU())))
    x, v = torch.randn(1, 3, 8, 8), randn_like(model)
    most = 0
    plain = shared_pass._Tangents.__torch_function__

    def counted(mode: Any, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        nonlocal most
        result = plain(mode, func, types, args, kwargs)
        most = max(most, sum(1 for t in mode.of if t.ndim == 4 and t.shape[-1] == 8))
        return result

    output_and_tangent(model, v, x)
    monkeypatch.setattr(shared_pass._Tangents, "__torch_function__", counted)
    output, _ = output_and_tangent(model, v, x)
    assert output.requires_grad
    assert most <= 3  # of 12 features
