"""What files hold, by content hash. An unchanged file is hashed once: what the file system says of it tells.

A file is known by its device, inode, size and times. Its time of writing can be set, as `cp -p` does, but the time of
any change (ctime) is set by the system alone. Two changes within one tick of its clock have the same time, so a hash is
kept only if the file was left alone for a while before it was hashed. Where ctime is no such time (on Windows, on FAT)
a hash is not kept beyond the process.
"""

from __future__ import annotations

import errno
import hashlib
import os
import stat
import time
from io import BufferedReader
from pathlib import Path

from mlbseg.data.formats import dicom
from mlbseg.data.readers import pixel_file
from mlbseg.data.remembered import Remembered, combined_hash
from mlbseg.errors import ReadError, UserError

_GRAIN = 2 * 10**9  # ns; file systems' clocks tick more often
_COARSE = 10**7  # ns; a file system whose times are all multiples of it makes ctime from the time of writing
_Known = tuple[int, ...]
_hashes: dict[_Known, str] = {}
_NOTHING = Remembered()


def content_hash(path: Path, remembered: Remembered = _NOTHING) -> str:
    """Return the SHA-256 of what a scan's path stands for.

    Of a DICOM series all slices count; of a header file also the data file that it names.

    Args:
        path: A file, or a folder of DICOM files.
        remembered: Where hashes of unchanged files are kept between processes.

    Raises:
        UserError: A file cannot be read.
    """
    try:
        files = [path]
        if path.is_dir():
            files = dicom.slice_files(path) or sorted(p for p in path.iterdir() if p.is_file())
        files += _data_files(path)
        looks = [_look_at(file) for file in files]
        name = combined_hash("content", looks)
        if _lasts(looks) and (known := remembered.recall(str, name)):
            return known
        began = time.time_ns()
        digests = [_file_hash(file) for file in files]
        content = combined_hash([digest for digest, _ in digests])
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from error
    settled = all(_settled(look, began) for look in looks)
    if settled and _lasts(looks) and [look for _, look in digests] == looks:
        remembered.remember(str, name, content)
    return content


def _file_hash(path: Path) -> tuple[str, _Known]:
    """Hash a file once per process, as long as the file system says that it is the same."""
    began = time.time_ns()
    with _opened(path) as file:
        look = _look(os.fstat(file.fileno()))
        if look in _hashes:
            return _hashes[look], look
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if _settled(look, began):
        _hashes[look] = digest
    return digest, look


def _look_at(path: Path) -> _Known:
    """Look at an open file: only when a file is opened does NFS ask the server whether another machine changed it."""
    with _opened(path) as file:
        return _look(os.fstat(file.fileno()))


def _opened(path: Path) -> BufferedReader:
    if not stat.S_ISREG(path.stat().st_mode):  # a pipe would wait for ever
        raise OSError(errno.EINVAL, "not a file of bytes")
    return path.open("rb")


def _look(found: os.stat_result) -> _Known:
    return (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)


def _settled(look: _Known, began: int) -> bool:
    """Say whether a change after the hashing began would have another time than the last one."""
    return began - look[-1] > _GRAIN


def _lasts(looks: list[_Known]) -> bool:
    return os.name == "posix" and all(look[-1] % _COARSE for look in looks)


def _data_files(path: Path) -> list[Path]:
    """Return the file beside a detached header that holds its pixels."""
    if path.is_dir():
        return []
    try:
        data = pixel_file(path)
    except ReadError:  # whoever reads the scan says why
        return []
    return [] if data == path else [data]
