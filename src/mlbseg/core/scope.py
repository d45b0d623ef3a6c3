"""Parts of a network: which parameters a direction moves, or are drawn anew.

That is all of them, the decoder's, the last layer's, or those that a predicate names. Outside a direction's scope there
are no tangents, so a smaller scope makes the forward-mode pass cheaper and the weights coarser.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Set
from typing import Literal

import torch
from torch import Tensor, nn

Scope = Literal["all", "decoder", "head"] | Callable[[str], bool]
"""``all``, ``decoder``, ``head``, or whether a parameter of this name belongs to it."""


def parameters_in_scope(model: nn.Module, x: Tensor, scope: Scope) -> frozenset[str]:
    """Return the names of the trainable parameters in a scope.

    Layers are told by when they run on `x` and by how fine their output is, so that no network needs to be known:
    the decoder is every layer that runs after the coarsest one, the head is the last layer that has parameters.

    Args:
        model: A network; it is run once, in evaluation mode and without gradient, unless the scope is a predicate.
        x: (B, C, *S); its first image is used.
        scope: See `Scope`.

    Raises:
        ValueError: if no parameter is in the scope, or the scope is unknown.
    """
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    if callable(scope):
        chosen = {name for name in trainable if scope(name)}
    elif scope == "all":
        chosen = set(trainable)
    elif scope in ("decoder", "head"):
        layers = layers_in_order(model, x[:1])
        coarsest = min(size for _, size in layers)
        after = max(i for i, (_, size) in enumerate(layers) if size == coarsest) + 1
        names = [name for name, _ in (layers[after:] if scope == "decoder" else layers[-1:])]
        # One that runs before the bottleneck too (shared weights) stays out: its tangent would start there.
        early = {name for name, _ in layers[:after]} if scope == "decoder" else set()
        chosen = {t for t in trainable if t.rpartition(".")[0] in set(names) - early}
    else:
        raise ValueError(f"unknown scope {scope!r}: use all, decoder, head or a predicate of parameter names")
    if not chosen:
        raise ValueError(f"no trainable parameter is in the scope {scope!r}")
    return frozenset(chosen)


@torch.no_grad()
def redraw(model: nn.Module, names: Set[str], seed: int) -> None:
    """Draw parameters anew, in place, as torch draws those of a layer of their kind when it is made.

    The numbers are the CPU's, whatever the device, and the global stream of random numbers stays as it is. A parameter
    that no layer of torch owns, such as a table of position biases, keeps its values.

    Args:
        model: A network.
        names: Of the parameters (see `parameters_in_scope`).
        seed: The same seed gives the same numbers.
    """
    with torch.random.fork_rng(devices=[]):
        # Not `torch.manual_seed`: it would seed the streams of other devices too.
        torch.default_generator.manual_seed(seed)
        for prefix, module in model.named_modules():
            own = {name: p for name, p in module.named_parameters(prefix, recurse=False) if name in names}
            if own and hasattr(module, "reset_parameters"):
                fresh = copy.deepcopy(module).cpu()
                fresh.reset_parameters()
                for name, p in own.items():
                    p.copy_(fresh.get_parameter(name.removeprefix(f"{prefix}.")))
    torch.clear_autocast_cache()  # else autocast goes on with its copies of the old values


def layers_in_order(model: nn.Module, x: Tensor, *, containers: bool = False) -> list[tuple[str, int]]:
    """Return name and output size (pixels per channel) of each module that owns parameters, as they end.

    Args:
        model: A network; it is run once, in evaluation mode and without gradient.
        x: (B, C, *S).
        containers: Return every module instead, with parameters of its own or without.

    Raises:
        ValueError: if no module has such an output.
    """
    order: list[tuple[str, int]] = []
    handles = []
    for name, module in model.named_modules():
        if not (containers or any(True for _ in module.parameters(recurse=False))):
            continue

        def note(_: nn.Module, __: object, output: object, name: str = name) -> None:
            if isinstance(output, Tensor) and output.ndim == x.ndim and len(output) == len(x):
                order.append((name, int(output[0, 0].numel())))

        handles.append(module.register_forward_hook(note))
    modes = {module: module.training for module in model.modules()}
    try:
        model.eval()
        with torch.no_grad():
            model(x)
    finally:
        for module, training in modes.items():
            module.training = training
        for handle in handles:
            handle.remove()
    if not order:
        raise ValueError("no layer of the model has parameters and an output (B, K, *S)")
    return order
