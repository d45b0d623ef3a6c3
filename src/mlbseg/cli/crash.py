"""An error that no function expected: one line for the user, and a file to report it with."""

from __future__ import annotations

import os
import platform
import sys
import tempfile
import traceback

import mlbseg
from mlbseg.terminal import one_line

_MOST = 200  # characters of an error's text that are shown


def crash_message(error: BaseException, command: str) -> str:
    """Write down where an error came from, for a report; return the line to print.

    The file has the traceback and versions. Neither variables nor arguments are in it, as they may hold the data of
    patients, and nobody else may read it.

    Args:
        error: What was raised.
        command: Name of the command.
    """
    what = one_line(f"{type(error).__name__}: {error}")
    what = what if len(what) <= _MOST else f"{what[:_MOST]} ..."
    lines = [
        f"mlbseg {mlbseg.__version__}, Python {platform.python_version()}, {platform.platform()}",
        f"command: {command}",
        "",
        "".join(traceback.format_exception(error, limit=-50)),
    ]
    try:
        number, name = tempfile.mkstemp(prefix="mlbseg-error-", suffix=".txt")
        with os.fdopen(number, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write("\n".join(lines))
    except OSError:
        print("\n".join(lines), file=sys.stderr)
        return f"internal error ({what}); please report it with the traceback above"
    return f"internal error ({what}); please report it, with the file {name}"
