"""How every command ends: text or one JSON object, notes, faults, and the exit code."""

from __future__ import annotations

import errno
import json
import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

import typer
from rich.console import RenderableType

from mlbseg.cli.crash import crash_message
from mlbseg.cli.printing import print_line, result_console
from mlbseg.errors import Fault, FaultsError, OtherRank, UserError, note_lines, printable
from mlbseg.files import machines_temporary_folder
from mlbseg.launch import speaks

INTERRUPTED = 128 + signal.SIGINT  # as shells have it
# Typer's name for it differs between its versions.
UsageError: type[Exception] = typer.BadParameter.__mro__[1]

_MACHINE = (
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.ENAMETOOLONG,
    errno.EMFILE,
    errno.ENOMEM,
    errno.EIO,
)
"""Limits of the machine, which the user can mend. Any other operating-system error is an internal error."""


def finish(
    record: Mapping[str, Any],
    *,
    as_json: bool,
    tables: Sequence[RenderableType] = (),
    notes: Sequence[Fault] = (),
    lines: Sequence[str] = (),
    faults: Sequence[Fault] = (),
    where: str = "",
    advice: str = "",
    code: int = 0,
) -> None:
    """Print what a command found, and end it.

    Args:
        record: The result for `--json`, faults included.
        as_json: Print `record` and nothing else.
        tables: What is printed first.
        notes: Printed next, equal ones as one line.
        lines: Printed last.
        faults: Cases that failed. They are listed at the end, on stderr, and the exit code is 2.
        where: Where the faults are, in words.
        advice: What to do about the faults, or what was done without these cases.
        code: Exit code where there are no faults.

    Raises:
        FaultsError: if there are faults, and text is printed.
        typer.Exit: with the exit code.
    """
    if speaks():
        if as_json:
            print(json.dumps(record))
        else:
            for table in tables:
                result_console().print(table)
            for line in (*note_lines(notes), *lines):
                print_line(line)
            if faults:
                raise FaultsError(faults, where, advice)
    if faults or code:
        raise typer.Exit(2 if faults else code)


def run(command: Callable[[], Any], name: str) -> NoReturn:
    """Run a command and exit. A user error is one clear message and exit code 2, an internal error has code 1.

    Args:
        command: The command, with its arguments. It returns its exit code.
        name: Its name, for the file that an internal error is reported with.
    """
    try:
        code = command()
    except OtherRank as error:
        # A rank that was lost is reported by each machine, as rank 0 may be the one.
        if error.told or os.environ["LOCAL_RANK"] != "0":
            sys.exit(error.exit_code)
        _fail(str(error), error.exit_code)
    except UserError as error:
        _fail(str(error), error.exit_code, error.faults)
    except UsageError as error:
        if "--json" in sys.argv:
            _fail(error.format_message(), 2)  # type: ignore[attr-defined]
        error.show()  # type: ignore[attr-defined]
        sys.exit(2)
    except MemoryError:
        _fail("not enough memory", 2)
    except OSError as error:
        if error.errno not in _MACHINE:
            _require_temporary_folder()
            _fail(crash_message(error, name), 1)
        _fail(f"{error.filename or 'the disk'}: {error.strerror}", 2)
    except Exception as error:
        _fail(crash_message(error, name), 1)
    if code == INTERRUPTED:
        _fail("interrupted; all files that were written are complete", INTERRUPTED)
    sys.exit(code)


def _require_temporary_folder() -> None:
    """Say so if no temporary file can be made: libraries raise all sorts of errors then, matplotlib at its import."""
    try:
        machines_temporary_folder()
    except UserError as error:
        _fail(str(error), error.exit_code)


def _fail(message: str, code: int, faults: Sequence[Fault] = ()) -> NoReturn:
    if "--json" in sys.argv:
        print(json.dumps({"error": message, "faults": [f.as_dict() for f in faults]}))
    else:
        print(f"error: {printable(message)}", file=sys.stderr)
    sys.exit(code)
