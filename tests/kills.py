"""Processes that are killed at their n-th change of a file system, simulated within the process of the test."""

from __future__ import annotations

import builtins
import io
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import pytest

CHANGES = ("mkdir", "rename", "replace", "unlink", "rmdir", "link", "open")


class Killed(BaseException):
    """The process is dead: from here on it changes nothing."""


@contextmanager
def killed_at(change: int) -> Iterator[Callable[[], bool]]:
    """Stop a block at its n-th change of the file system, and all changes after it, as tidying up would make them.

    What the operating system does when a process ends it does here too: files are closed, locks are freed.

    Args:
        change: Counted from 1.

    Yields:
        Whether it came to that.
    """
    seen = 0

    def count(call: Callable[..., Any], changes: Callable[..., bool]) -> Callable[..., Any]:
        def counted(*arguments: Any, **named: Any) -> Any:
            nonlocal seen
            if changes(*arguments, **named):
                seen += 1
                if seen >= change:
                    raise Killed
            return call(*arguments, **named)

        return counted

    with pytest.MonkeyPatch.context() as patch:
        for name in CHANGES:
            makes = (lambda path, flags, *_, **__: bool(flags & os.O_CREAT)) if name == "open" else _always
            patch.setattr(os, name, count(getattr(os, name), makes))
        for module in (io, builtins):
            patch.setattr(module, "open", count(module.open, _writes))
        with suppress(Killed):
            yield lambda: seen >= change


def _always(*_: Any, **__: Any) -> bool:
    return True


def _writes(file: Any, mode: str = "r", *_: Any, **__: Any) -> bool:
    return any(letter in mode for letter in "wxa+")
