"""Pixels as plain numbers behind a header or in a file of their own, read here: no library sees the header again."""

from __future__ import annotations

import bz2
import gzip
import io
import os
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from mlbseg.data.formats.opened import fail
from mlbseg.memory import require_memory

Encoding = Literal["raw", "zlib", "gzip", "bzip2", "text"]

_CHUNK = 1 << 20
_MOST_SKIPPED = 1 << 24  # bytes of a compressed stream; a header inside it is no larger
_LINE_END = 2  # bytes behind the pixels that an editor may have added
_WORD_BYTES = 64  # memory that a number takes as text, cut out of its file
_DAMAGED = (EOFError, zlib.error, OSError, ValueError)  # what decoders raise


@dataclass(frozen=True)
class Pixels:
    """Where the numbers of a scan lie and how they are written.

    Attributes:
        header: The file that says so, for messages.
        file: The file that holds them: the header's own, or another.
        kind: Type of a number, with its byte order.
        count: How many there are.
        encoding: How they are written.
        start: Where they begin, or what lies before them ends.
        last: They are the last bytes of the file (raw only).
        skip: Bytes of the decoded stream that come before them.
        stated: The header says where they begin, so that what follows them is no sign of a mistake.
    """

    header: Path
    file: Path
    kind: np.dtype[Any]
    count: int
    encoding: Encoding = "raw"
    start: int = 0
    last: bool = False
    skip: int = 0
    stated: bool = False

    @property
    def bytes(self) -> int:
        """What they take, as stored."""
        return self.count * self.kind.itemsize

    def require_complete(self) -> None:
        """Compare what is announced with what is there.

        Raises:
            ReadError: If raw pixels are too few, or the file has more than the header accounts for.
        """
        if self.encoding == "text":
            require_memory(self.header, self.file.stat().st_size * _WORD_BYTES)
        elif self.encoding != "raw":
            if self.skip > _MOST_SKIPPED:
                fail(self.header, f"skips {self.skip} bytes", f"at most {_MOST_SKIPPED}", "write it again")
        else:
            self._compare(self.file.stat().st_size - self.start - self.skip)

    def _compare(self, held: int, *, more: bool = False) -> None:
        if held < self.bytes or more or (held > self.bytes + _LINE_END and not self.stated):
            found = f"{self.file.name} holds {'more than ' * more}{max(held, 0)} bytes of pixels"
            remedy = "copy it again" if held < self.bytes else "correct the size, type or place of its pixels"
            fail(self.header, found, f"{self.bytes} as its header announces", remedy)

    def read(self) -> npt.NDArray[Any]:
        """Return the numbers, (count,), in the machine's byte order; text becomes float64.

        Raises:
            ReadError: If they are not there.
        """
        if self.encoding == "text":
            return self._text()
        array = np.empty(self.count, self.kind)
        place = memoryview(array.view(np.uint8))  # type: ignore[arg-type]
        held, more = 0, False
        try:
            with self.file.open("rb") as file:
                file.seek(-self.bytes if self.last else self.start, os.SEEK_END if self.last else os.SEEK_SET)
                stream = self._decoded(file)
                _pass_over(stream, self.skip)
                while held < self.bytes and (n := stream.readinto(place[held : held + _CHUNK])):
                    held += n
                more = self.encoding != "raw" and held == self.bytes and bool(stream.read(1))
        except _DAMAGED as error:
            found = f"truncated or damaged {self.encoding} data in {self.file.name}"
            fail(self.header, found, "complete pixels", f"copy it again; {error}")
        self._compare(held, more=more)
        if not self.kind.isnative:
            array = array.byteswap(inplace=True).view(self.kind.newbyteorder("="))
        return array

    def _decoded(self, file: io.BufferedReader) -> Any:
        if self.encoding == "gzip":
            return gzip.GzipFile(fileobj=file)
        if self.encoding == "bzip2":
            return bz2.BZ2File(file)
        return io.BufferedReader(_Deflated(file), _CHUNK) if self.encoding == "zlib" else file

    def _text(self) -> npt.NDArray[np.float64]:
        with self.file.open("rb") as file:
            file.seek(self.start + self.skip)
            words = file.read().split()
        if len(words) != self.count:
            fail(
                self.header,
                f"{len(words)} numbers of text in {self.file.name}",
                f"{self.count}",
                "copy it again",
            )
        try:
            return np.fromiter(map(float, words), np.float64, self.count)
        except ValueError as error:
            fail(self.header, f"{error} among its pixels"[:100], "numbers", "write the file again")


class _Deflated(io.RawIOBase):
    """A zlib or gzip stream, decoded no further than is asked for."""

    def __init__(self, file: io.BufferedReader) -> None:
        self._file = file
        self._decoder = zlib.decompressobj(wbits=zlib.MAX_WBITS | 32)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._decoder.eof:
            raw = self._decoder.unconsumed_tail or self._file.read(_CHUNK)
            piece = self._decoder.decompress(raw, len(buffer))
            if piece:
                buffer[: len(piece)] = piece
                return len(piece)
            if not raw:
                raise EOFError("the stream does not end")
        return 0


def _pass_over(stream: Any, count: int) -> None:
    while count > 0:
        passed = len(stream.read(min(count, _CHUNK)))
        if not passed:
            raise EOFError("nothing behind what is to be skipped")
        count -= passed
