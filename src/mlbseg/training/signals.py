"""SIGINT and SIGTERM while a run is trained: a checkpoint first, then the end."""

from __future__ import annotations

import shlex
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from mlbseg.errors import UserError


def how_to_continue(root: Path) -> str:
    """Return the command that continues a run, to be pasted."""
    return f"continue with: mlbseg train --resume {shlex.quote(str(root))}"


class Interrupted(UserError):
    """Training was asked to stop by a signal; the last step that was done is in a checkpoint.

    The exit code is 128 + the signal's number, as shells have it.
    """

    def __init__(self, root: Path, number: int, where: str = "") -> None:
        super().__init__(f"stopped{where}; {how_to_continue(root)}")
        self.exit_code = 128 + number


class StopSignals:
    """What a signal does: the loop stops after its step, all else at once.

    Python lets only the main thread handle signals; training from another thread leaves them alone.

    Attributes:
        stopped_by: The signal that asked the loop to stop; 0 before.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.stopped_by = 0
        self._stepping = False

    @contextmanager
    def handled(self) -> Iterator[None]:
        """Handle SIGINT and SIGTERM until the end of the block.

        Raises:
            Interrupted: on a signal while the loop does not run.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler or signal.SIG_DFL)

    @contextmanager
    def stepping(self) -> Iterator[None]:
        """Leave it to the loop to stop, until the end of the block."""
        self._stepping = True
        try:
            yield
        finally:
            self._stepping = False

    def _stop(self, number: int, frame: FrameType | None) -> None:
        if not self._stepping:
            raise Interrupted(self.root, number)
        self.stopped_by = number
