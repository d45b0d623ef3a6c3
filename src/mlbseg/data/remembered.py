"""What is known of files that were read, kept in the user's cache, so that an unchanged file is not read again.

An entry is a small file of JSON that begins with its own checksum. Its name is a hash: of what the files held, of what
is asked of them, and of the code that read them. It holds numbers about a scan, and neither names nor paths.
An entry that is damaged, half-written or of other code counts as none: the scan is read again. Entries are written
under another name and renamed, so several processes can share them. All of them can be deleted at any time.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import warnings
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar, cast

from pydantic import TypeAdapter, ValidationError

from mlbseg.temporaries import temporary_file

T = TypeVar("T")

_LIBRARIES = ("numpy", "scipy", "SimpleITK", "nibabel", "pydicom", "h5py", "Pillow")


@dataclass(frozen=True)
class Remembered:
    """A store of facts by name.

    Attributes:
        folder: Where the entries are; None: nothing is remembered.
        writable: Whether entries can be added.
    """

    folder: Path | None = None
    writable: bool = True

    @classmethod
    def at(cls, root: Path) -> Remembered:
        """Return the store in a cache folder. It warns if nothing can be added to it."""
        folder = root / f"read-{reader_version()[:16]}"
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError:  # a full or read-only disk, or somebody else's folder
            writable = False
        else:
            writable = os.access(folder, os.W_OK)
        if not writable:
            warnings.warn(f"{root}: cannot be written, so what is read now will be read again", stacklevel=2)
        return cls(folder, writable)

    def recall(self, kind: type[T], name: str) -> T | None:
        """Return what is kept under a name; None if there is no sound entry."""
        if self.folder is None:
            return None
        try:
            checksum, _, text = (self.folder / f"{name}.json").read_bytes().partition(b"\n")
        except OSError:
            return None
        if checksum.decode(errors="replace") != _checksum(text):
            return None
        try:
            return _adapter(cast(Any, kind)).validate_python(json.loads(text))
        except (ValueError, ValidationError, RecursionError):
            return None

    def remember(self, kind: type[T], name: str, value: T) -> None:
        """Keep something under a name. Where it cannot be written it is not kept: it will be read again."""
        if self.folder is None or not self.writable:
            return
        text = _adapter(cast(Any, kind)).dump_json(value)
        with suppress(OSError), temporary_file(self.folder) as temporary:
            temporary.write_bytes(_checksum(text).encode() + b"\n" + text)
            temporary.replace(self.folder / f"{name}.json")


def combined_hash(*parts: object) -> str:
    """Return the SHA-256 of what JSON can hold."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


@functools.cache
def reader_version() -> str:
    """Return a hash of the code that reads: of this room's source, and of the versions of what it reads with."""
    room = Path(__file__).parent
    return _version([room.parent / "types.py", *sorted(room.rglob("*.py"))], _LIBRARIES)


def _version(sources: Sequence[Path], libraries: Sequence[str]) -> str:
    code = [hashlib.sha256(path.read_bytes()).hexdigest() for path in sources]
    return combined_hash(code, [metadata.version(name) for name in libraries])


def _checksum(text: bytes) -> str:
    return hashlib.sha256(text).hexdigest()


@functools.cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)
