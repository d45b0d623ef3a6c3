"""The weights of a run: one safetensors file with a checksum."""

from __future__ import annotations

import io
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from mlbseg.errors import UserError
from mlbseg.files import write_atomic

WEIGHTS = "model.safetensors"
_SUM = "crc32"  # in the metadata of the file


def save_weights(root: Path, networks: Mapping[str, nn.Module]) -> None:
    """Write the networks' weights to `WEIGHTS`."""
    tensors = {
        f"{which}.{key}": tensor.detach().cpu().contiguous().clone()
        for which, network in networks.items()
        for key, tensor in network.state_dict().items()
    }
    metadata = {_SUM: _sum(tensors)}
    write_atomic(root / WEIGHTS, safetensors.torch.save(tensors, metadata))


def load_weights(path: Path) -> dict[str, Tensor]:
    """Return what `save_weights` wrote.

    Raises:
        SafetensorError: if it is damaged.
    """
    weights = safetensors.torch.load_file(path)
    with safetensors.safe_open(path, "pt") as file:
        known = (file.metadata() or {}).get(_SUM)  # earlier versions wrote none
    if known is not None and known != _sum(weights):
        raise SafetensorError("it holds other weights than were written")
    return weights


def require_numbers(path: Path, found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Refuse weights that would be loaded without a word, and predict nothing.

    Raises:
        UserError: naming the weight.
    """
    for name, tensor in found.items():
        if name in expected and tensor.is_floating_point() != expected[name].is_floating_point():
            kinds = [str(t.dtype).removeprefix("torch.") for t in (tensor, expected[name])]
            raise UserError(
                f"{path}: weight {name!r} is of type {kinds[0]}, expected {kinds[1]} as training wrote it"
            )
        if not tensor.isfinite().all():
            raise UserError(
                f"{path}: weight {name!r} holds values that are no finite numbers (copy the file again, or train anew)"
            )


def _sum(weights: Mapping[str, Tensor]) -> str:
    """Return the CRC-32 of weights with their names, types and shapes."""
    return f"{zlib.crc32(safetensors.torch.save(dict(weights))):08x}"


def dump_tensors(content: Mapping[str, Any]) -> bytes:
    """Return what `torch.save` would write, so that a full disk is met by `write_atomic` and not by torch."""
    buffer = io.BytesIO()
    torch.save(dict(content), buffer)
    return buffer.getvalue()
