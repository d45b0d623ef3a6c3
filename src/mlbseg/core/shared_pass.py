"""One forward pass for two purposes: an output with its graph, and the output's derivative along a direction.

Weights and weighted loss look at the same images with the same parameters. Forward mode by itself recomputes the
output, and forward mode with gradients switched on would record a graph of the derivative as well. Here each function
that the network calls is computed once, with its graph, and its derivative beside it, without one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.weak import WeakTensorKeyDictionary

from mlbseg.core.directional import Direction, copied_buffers, directional_derivative

_LINEAR_IN_BOTH = {
    F.conv1d, F.conv2d, F.conv3d, F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d, F.linear,
}  # fmt: skip
"""Functions of (input, weight, bias, ...) whose derivative is two of their kind, with nothing to recompute."""

_SHAREABLE: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()
"""Whether a model was found to call only functions that `_Tangents` sees."""


def output_and_tangent(model: nn.Module, direction: Direction, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the model's output, with its graph, and its derivative along a direction, without one.

    Saves a forward pass over `directional_derivative` and a call of the model. The first time that a model is seen,
    the result is compared with `directional_derivative`; a model that hides work from torch's function overrides
    (a custom `autograd.Function`, checkpointing) takes the two passes from then on.

    Args:
        model: A network, called as in training: BatchNorm's running statistics move once.
        direction: The tangent of each parameter; see `directional_derivative`.
        x: (B, C, *S).

    Returns:
        output: (B, K, *S), with gradient.
        tangent: (B, K, *S), without.

    Raises:
        ValueError, TypeError: as for `directional_derivative`.
    """
    if model not in _SHAREABLE:
        _SHAREABLE[model] = _agrees(model, direction, x)
    if _SHAREABLE[model]:
        output, tangent = _one_pass(model, direction, x)
        if tangent is not None:
            return output, tangent
    with torch.random.fork_rng([x.device] if x.device.type == "cuda" else []):
        _, tangent = directional_derivative(model, direction, x)
    return model(x), tangent


def _one_pass(
    model: nn.Module, direction: Direction, x: Tensor, buffers: Mapping[str, Tensor] | None = None
) -> tuple[Tensor, Tensor | None]:
    named = dict(model.named_parameters())
    with _Tangents({named[name]: t for name, t in direction.items()}) as tangents:
        output: Tensor = functional_call(model, dict(buffers), (x,)) if buffers else model(x)
    return output, tangents.of.get(output)


def _agrees(model: nn.Module, direction: Direction, x: Tensor) -> bool:
    """Return whether the shared pass gives what forward mode does, to half of the digits of the output's type."""
    devices = [x.device] if x.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        _, expected = directional_derivative(model, direction, x)
    with torch.random.fork_rng(devices), torch.no_grad():
        _, found = _one_pass(model, direction, x, copied_buffers(model))
    if found is None:
        return False
    error = torch.linalg.vector_norm((found - expected).float())
    return bool(error <= torch.finfo(found.dtype).eps ** 0.5 * torch.linalg.vector_norm(expected.float()))


class _Tangents(TorchFunctionMode):
    """While active, computes the derivative of every function of a tensor that has one.

    Attributes:
        of: The derivative of each tensor that depends on the direction, as long as the tensor lives.
    """

    def __init__(self, tangents: Mapping[Tensor, Tensor]) -> None:
        super().__init__()
        self.of = WeakTensorKeyDictionary()
        for tensor, tangent in tangents.items():
            self.of[tensor] = tangent.to(tensor.dtype)

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if not any(isinstance(a, Tensor) and a in self.of for a in tree_leaves((args, kwargs))):
            return func(*args, **kwargs)
        rule = self._product if func in _LINEAR_IN_BOTH else self._any
        with torch.no_grad():
            tangents = rule(func, args, kwargs)  # first: a function that works in place changes its argument
        output = func(*args, **kwargs)
        for tensor, tangent in zip(tree_leaves(output), tangents, strict=True):
            if tangent is not None:
                self.of[tensor] = tangent
        return output

    def _product(
        self, func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> list[Tensor | None]:
        """D f(x, w, b) = f(dx, w, 0) + f(x, dw, db)."""
        others = dict(kwargs)
        x, w = args[:2]
        bias = args[2] if len(args) > 2 else others.pop("bias", None)
        moved_bias = None if bias is None else self.of.get(bias)
        tangent: Tensor | None = None
        if w in self.of:
            tangent = func(x, self.of[w], moved_bias, *args[3:], **others)
        elif moved_bias is not None:
            tangent = func(x, torch.zeros_like(w), moved_bias, *args[3:], **others)
        if x in self.of:
            part = func(self.of[x], w, None, *args[3:], **others)
            tangent = part if tangent is None else tangent.add_(part)
        return [tangent]

    def _any(
        self, func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> list[Tensor | None]:
        """Let torch's own forward mode do it, on copies of whatever the function may change."""
        name = getattr(func, "__name__", "")
        changes = (
            name.endswith("_")
            or name.startswith("__i")
            or any(a is True for a in tree_leaves((args, kwargs)))
        )

        def lift(a: Any) -> Any:
            if not isinstance(a, Tensor):
                return a
            if a not in self.of:
                return a.detach().clone()  # running statistics
            value = a.detach().clone() if changes else a.detach()
            return forward_ad.make_dual(value, self.of[a])

        devices = sorted(
            {a.device for a in tree_leaves(args) if isinstance(a, Tensor) and a.is_cuda}, key=str
        )
        draws = torch.random.fork_rng(
            devices, enabled="dropout" in name
        )  # the function itself draws the same mask
        with draws, forward_ad.dual_level():
            duals = tree_leaves(func(*tree_map(lift, args), **tree_map(lift, kwargs)))
            return [
                forward_ad.unpack_dual(d).tangent if isinstance(d, Tensor) and d.is_floating_point() else None
                for d in duals
            ]
