"""One forward pass for two purposes: an output with its graph, and the output's derivative along a direction.

Weights and weighted loss look at the same images with the same parameters. Forward mode by itself recomputes the
output, and forward mode with gradients switched on would record a graph of the derivative as well. Here each function
that the network calls is computed once, with its graph, and its derivative beside it, without one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
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

from mlbseg.core.directional import Direction, copied_buffers, directional_derivative, forked_random

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
    with forked_random(x.device):
        _, tangent = directional_derivative(model, direction, x)
    return model(x), tangent


def _one_pass(
    model: nn.Module, direction: Direction, x: Tensor, buffers: Mapping[str, Tensor] | None = None
) -> tuple[Tensor, Tensor | None]:
    named = dict(model.named_parameters())
    # The graph keeps aliases of what it needs, else it would keep each tensor itself alive, and with it its derivative.
    aliases = torch.autograd.graph.saved_tensors_hooks(Tensor.detach, lambda alias: alias)
    with aliases, _Tangents({named[name]: t for name, t in direction.items()}) as tangents:
        output: Tensor = functional_call(model, dict(buffers), (x,)) if buffers else model(x)
    return output, tangents.of.get(output)


def _agrees(model: nn.Module, direction: Direction, x: Tensor) -> bool:
    """Return whether the shared pass gives what forward mode does, to half of the digits of the output's type."""
    with forked_random(x.device):
        _, expected = directional_derivative(model, direction, x)
    with forked_random(x.device), torch.no_grad():
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
        before = _arguments_kept(func, args, kwargs)
        random = _RandomState(args) if "dropout" in getattr(func, "__name__", "") else None
        output = func(*args, **kwargs)
        results = tree_leaves(output)
        if not any(isinstance(r, Tensor) and r.is_floating_point() for r in results):
            return output  # a shape, a hook ...
        with torch.no_grad():
            if func in _LINEAR_IN_BOTH:
                tangents = [self._product(func, args, kwargs)]
            elif random is not None:
                with random.again():  # the derivative is of the mask that was drawn
                    tangents = self._any(func, before)
            else:
                tangents = self._any(func, before)
        for tensor, tangent in zip(results, tangents, strict=True):
            if tangent is not None:
                self.of[tensor] = tangent
        return output

    def _product(
        self, func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> Tensor | None:
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
        return tangent

    def _any(self, func: Callable[..., Any], kept: Any) -> list[Tensor | None]:
        """Let torch's own forward mode do it, on arguments as they were before the call."""

        def lift(a: Any) -> Any:
            if not isinstance(a, _Kept):
                return a
            return forward_ad.make_dual(a.value, self.of[a.original]) if a.original in self.of else a.value

        with forward_ad.dual_level():
            args, kwargs = tree_map(lift, kept)
            duals = tree_leaves(func(*args, **kwargs))
            return [
                forward_ad.unpack_dual(d).tangent if isinstance(d, Tensor) and d.is_floating_point() else None
                for d in duals
            ]


@dataclass(frozen=True)
class _Kept:
    """A tensor and the value that it had before a call."""

    original: Tensor
    value: Tensor


def _arguments_kept(func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Return (args, kwargs) with each tensor's value as it is now, a copy where the function may work in place."""
    name = getattr(func, "__name__", "")
    leaves = tree_leaves((args, kwargs))
    # Flags such as `inplace` and `training` are given by position or by name.
    changes = name.endswith("_") or name.startswith("__i") or any(a is True for a in leaves)

    def keep(a: Any) -> Any:
        if not isinstance(a, Tensor):
            return a
        return _Kept(a, a.detach().clone() if changes else a.detach())

    return tree_map(keep, (tuple(args), dict(kwargs)))


class _RandomState:
    """The state of the generators from which a function is going to draw."""

    def __init__(self, args: Sequence[Any]) -> None:
        self.devices = sorted(
            {a.device for a in tree_leaves(args) if isinstance(a, Tensor) and a.is_cuda}, key=str
        )
        self.host = torch.get_rng_state()
        self.states = [torch.cuda.get_rng_state(device) for device in self.devices]

    @contextmanager
    def again(self) -> Iterator[None]:
        """Draw the same once more, and go on afterwards as if nothing had been drawn."""
        with torch.random.fork_rng(self.devices):
            torch.set_rng_state(self.host)
            for device, state in zip(self.devices, self.states, strict=True):
                torch.cuda.set_rng_state(state, device)
            yield
