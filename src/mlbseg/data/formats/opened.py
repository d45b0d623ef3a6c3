"""What every format gives: a file whose header is sound, and its pixels when they are asked for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy.typing as npt

from mlbseg.errors import Fault, ReadError
from mlbseg.types import Geometry


@dataclass(frozen=True)
class Opened:
    """A file whose header has been read and judged.

    Attributes:
        geometry: Where it lies.
        components: Numbers per pixel.
        read: Returns the pixels, (C, *S) with C components, in the type that holds them best. Raises a
            `ReadError` if they are not what the header says.
        notes: What was left out or done to the file, for the user to know.
    """

    geometry: Geometry
    components: int
    read: Callable[[], npt.NDArray[Any]]
    notes: tuple[str, ...] = ()


def fail(path: Path, found: str, expected: str = "", remedy: str = "", kind: str = "unreadable") -> NoReturn:
    """Raise a `ReadError` about `path`."""
    raise ReadError(Fault(str(path), found, expected, remedy, kind=kind))
