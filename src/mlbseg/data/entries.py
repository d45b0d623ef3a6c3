"""Cache entries: Zarr (version 3) stores that are written once, and checked whenever they are read.

A manifest holds size and CRC-32 of every other file of the entry. All of them are checked when an entry is opened,
and each again when it is read: to Zarr a chunk that has gone would be zeros. An entry is built under a temporary name
and renamed when it is complete, so two processes may build the same one, and a half-written one is never used.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import zlib
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy.typing as npt
import zarr
from pydantic import TypeAdapter, ValidationError
from zarr.abc.store import ByteRequest
from zarr.codecs import BloscCodec
from zarr.core.buffer import Buffer, BufferPrototype
from zarr.storage import LocalStore

from mlbseg.temporaries import temporary_folder

MANIFEST = "manifest.json"

_COMPRESSOR = BloscCodec(cname="lz4", clevel=5, shuffle="bitshuffle")
_MACHINE = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)  # say nothing of the file
_SUMS = TypeAdapter(dict[str, tuple[int, int]])


class Damaged(Exception):
    """An entry is not what was written; the message names the file and says how it differs."""


@dataclass(frozen=True)
class Content:
    """What goes into an entry: arrays with their chunks, and attributes."""

    arrays: dict[str, tuple[npt.NDArray[Any], tuple[int, ...]]]
    attributes: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Opened:
    """What an entry holds: its arrays by name, read when they are indexed, and its attributes."""

    arrays: dict[str, zarr.Array]
    attributes: dict[str, Any]


def build(final: Path, content: Content) -> None:
    """Write an entry under a temporary name and rename it; if another process was first, its entry stays.

    Raises:
        OSError: It cannot be written; nothing is left of it.
    """
    final.parent.mkdir(parents=True, exist_ok=True)
    with temporary_folder(final.parent, mode=0o777) as temporary:
        group = zarr.create_group(temporary, attributes=content.attributes)
        for name, (array, chunks) in content.arrays.items():
            # Chunks of zeros too: one that is not there must be a loss.
            config = {"write_empty_chunks": True}
            group.create_array(name, data=array, chunks=chunks, compressors=_COMPRESSOR, config=config)
        sums = {
            path.relative_to(temporary).as_posix(): _sum(path.read_bytes())
            for path in sorted(temporary.rglob("*"))
            if path.is_file()
        }
        (temporary / MANIFEST).write_text(json.dumps(sums))
        _flush(temporary)
        _put(temporary, final)


def open_entry(folder: Path) -> Opened:
    """Open an entry for reading, after a look at all of its files. What is read from it later is checked too.

    Raises:
        FileNotFoundError: There is no such entry.
        Damaged: It is not what was written. Arrays of it raise the same while they are read.
        OSError: The machine has no memory or no files left.
    """
    if not os.path.lexists(folder):
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(folder))
    sums = _manifest(folder)
    for key, expected in sums.items():
        _require_same(key, _bytes(folder, key), expected)
    store = _Checked(folder, sums)
    group = zarr.open_group(store, mode="r", zarr_format=3, use_consolidated=False)
    names = [key.removesuffix("/zarr.json") for key in sums if key.endswith("/zarr.json")]
    arrays = {name: zarr.open_array(store, path=name, mode="r", zarr_format=3) for name in names}
    return Opened(arrays, group.attrs.asdict())


class _Checked(LocalStore):
    """A store that gives out nothing but what was written."""

    def __init__(self, root: Path, sums: Mapping[str, tuple[int, int]], *, read_only: bool = True) -> None:
        super().__init__(root, read_only=read_only)
        self.sums = sums

    async def get(
        self, key: str, prototype: BufferPrototype | None = None, byte_range: ByteRequest | None = None
    ) -> Buffer | None:
        """Return a whole file."""
        try:
            value = await super().get(key, prototype)
        except OSError as error:
            raise _unreadable(key, error) from error
        _require_same(key, None if value is None else value.to_bytes(), self.sums.get(key))
        return value


def _manifest(folder: Path) -> dict[str, tuple[int, int]]:
    text = _bytes(folder, MANIFEST)
    try:
        return _SUMS.validate_json(text or b"")
    except ValidationError:
        found = "is no list of the entry's files" if text is not None else "is missing"
        raise Damaged(f"{MANIFEST} {found}") from None


def _bytes(folder: Path, key: str) -> bytes | None:
    """Return a file's content, None if there is no such file."""
    try:
        return (folder / key).read_bytes()
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        return None
    except OSError as error:
        raise _unreadable(key, error) from error


def _unreadable(key: str, error: OSError) -> Exception:
    return error if error.errno in _MACHINE else Damaged(f"{key} cannot be read: {error.strerror or error}")


def _require_same(key: str, content: bytes | None, expected: tuple[int, int] | None) -> None:
    if content is None:
        raise Damaged(f"{key} is missing")
    if expected is None:
        raise Damaged(f"{key} is not in {MANIFEST}")
    if len(content) != expected[0]:
        raise Damaged(f"{key} has {len(content)} bytes, expected {expected[0]}")
    if _sum(content) != expected:
        raise Damaged(f"{key} holds other bytes than were written")


def _sum(content: bytes) -> tuple[int, int]:
    return len(content), zlib.crc32(content)


def _put(temporary: Path, final: Path) -> None:
    """Give a complete entry its name, unless a whole one has it: what is damaged makes way.

    Processes that mend the same entry at once do each other no harm: their entries are alike, and one that reads while
    the name is free meets a loss and looks again.
    """
    try:
        temporary.rename(final)
    except OSError:
        if not os.path.lexists(final):
            raise
    else:
        return
    if _is_whole(final):
        return
    with temporary_folder(final.parent) as taken:
        aside = taken / final.name
        with suppress(FileNotFoundError):  # another process has just moved it
            final.rename(aside)
        try:
            temporary.rename(final)
        except OSError:
            if not _is_whole(final):
                raise
        _remove(aside)


def _is_whole(folder: Path) -> bool:
    try:
        open_entry(folder)
    except (Damaged, FileNotFoundError):
        return False
    return True


def _remove(path: Path) -> None:
    """Remove what is no entry any more: a folder, a file or a link."""
    with suppress(OSError):  # it does no harm, and is swept another day
        if path.is_dir() and not path.is_symlink():
            path.chmod(0o700)
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _flush(folder: Path) -> None:
    """Force files onto the disk: a rename must not outlive a power cut that its chunks did not."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
