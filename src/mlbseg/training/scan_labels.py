"""What a network predicted of whole scans, to be learnt from in stage 2: an `.npy` file each.

Behind the array, where NumPy does not look, stands the CRC-32 of all before it.
"""

from __future__ import annotations

import io
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from mlbseg.errors import Fault, ReadError
from mlbseg.files import write_atomic


def write_label(path: Path, label: npt.NDArray[np.uint8]) -> None:
    """Write the class indices of a case on the prepared grid, (*S).

    Raises:
        UserError: if it cannot be written.
    """
    content = io.BytesIO()
    np.save(content, label, allow_pickle=False)
    array = content.getvalue()
    write_atomic(path, array + _sum(array))


def check_label(path: Path, shape: Sequence[int], num_classes: int) -> None:
    """Make sure that a file is still what `write_label` wrote.

    Args:
        path: The file.
        shape: The prepared grid, voxels.
        num_classes: Class indices are below it.

    Raises:
        ReadError: if it is damaged, or of another grid or other classes.
    """
    expected = f"class indices below {num_classes} of shape {tuple(shape)}"
    remedy = "delete it to have it predicted anew"
    try:
        label = np.lib.format.open_memmap(path, mode="r")
    except (OSError, ValueError) as error:
        reason = str(getattr(error, "strerror", None) or error).partition("\n")[0]
        raise ReadError(Fault(str(path), f"cannot be read: {reason}", expected, remedy)) from None
    found = f"{label.dtype} of shape {label.shape}"
    if label.dtype == np.uint8 and label.shape == tuple(shape):
        content = path.read_bytes()
        end = label.offset + label.nbytes
        # Earlier versions wrote none.
        if len(content) > end and content[end:] != _sum(content[:end]):
            found = "other bytes than were written"
        elif label.max() < num_classes:
            return
        else:
            found = f"class index {label.max()}"
    raise ReadError(Fault(str(path), f"found {found}", expected, remedy))


def _sum(content: bytes) -> bytes:
    return zlib.crc32(content).to_bytes(4, "big")
