"""User errors: what a user can cause and correct. Anything else that is raised is an internal error.

The command line prints a `UserError` as one clear line (or one line per fault) and exits with code 2.
"""

from __future__ import annotations

import contextlib
import difflib
import reprlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

_MOST_LISTED = 20
_FIRST = 3


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing that is wrong with the user's data, and what to do about it.

    Attributes:
        where: The case id or the file (as the user would name it).
        found: What is there.
        expected: What should be there; empty if `found` says it all.
        remedy: What the user can do; empty if it is obvious.
        case_id: The case to leave out under `--skip-bad`; None for a fault of the whole data set.
        kind: A short stable name for programs, such as ``geometry`` or ``unreadable``.
    """

    where: str
    found: str
    expected: str = ""
    remedy: str = ""
    case_id: str | None = None
    kind: str = "input"

    def __str__(self) -> str:
        line = f"{self.where}: {self.found}"
        if self.expected:
            line += f", expected {self.expected}"
        if self.remedy:
            line += f" ({self.remedy})"
        return printable(line)

    def as_dict(self) -> dict[str, str | None]:
        """Return the fields, for `--json`."""
        return asdict(self)


class UserError(Exception):
    """Something the user gave is wrong; the message says file, found, expected and remedy."""

    exit_code = 2

    def __init__(self, message: str, *, faults: Sequence[Fault] = ()) -> None:
        super().__init__(printable(message))
        self.faults = tuple(faults)

    def __reduce__(self) -> tuple[Any, ...]:
        # Kinds of this error are made of other arguments than the message, which is all that pickle has.
        return _as_it_was, (type(self), self.args, self.__dict__)


def _as_it_was(kind: type[UserError], arguments: tuple[Any, ...], state: dict[str, Any]) -> UserError:
    error = kind.__new__(kind, *arguments)
    error.__dict__.update(state)
    return error


class ReadError(UserError):
    """A file could not be read as what it should be."""

    def __init__(self, fault: Fault) -> None:
        super().__init__(str(fault), faults=[fault])
        self.fault = fault


class OtherRank(UserError):
    """Another of the processes that work together has failed.

    Attributes:
        told: That process reports the reason itself.
    """

    def __init__(self, message: str, *, exit_code: int = 2, told: bool = True) -> None:
        super().__init__(message)
        self.exit_code = exit_code
        self.told = told


class FaultsError(UserError):
    """Several faults found together, reported together."""

    def __init__(self, faults: Sequence[Fault], where: str, advice: str = "") -> None:
        count = "1 fault" if len(faults) == 1 else f"{len(faults)} faults"
        lines = [f"{count} in {where}", *(f"  {fault}" for fault in faults)]
        if advice:
            lines.append(advice)
        super().__init__("\n".join(lines), faults=faults)


def note_lines(notes: Iterable[Fault]) -> list[str]:
    """Return notes in words, those of one kind together: one line with their number and the first names."""
    kinds: dict[tuple[str, str, str], list[Fault]] = {}
    for note in notes:
        kinds.setdefault((note.found, note.expected, note.remedy), []).append(note)
    lines = []
    for alike in kinds.values():
        names = ", ".join(note.where for note in alike[:_FIRST]) + (", ..." if len(alike) > _FIRST else "")
        first = alike[0] if len(alike) == 1 else replace(alike[0], where=f"{len(alike)} times ({names})")
        lines.append(f"note: {first}")
    return lines


class _Brief(reprlib.Repr):
    def repr_int(self, x: int, level: int) -> str:
        if x.bit_length() > 256:  # Python refuses to write very long ones out
            return f"<a number of some {x.bit_length() * 3 // 10} digits>"
        return repr(x)


_BRIEF = _Brief()
_BRIEF.maxlevel, _BRIEF.maxstring, _BRIEF.maxother = 3, 80, 80
_BRIEF.maxdict = _BRIEF.maxlist = _BRIEF.maxtuple = 8


def brief(value: object) -> str:
    """Return a value for a message, shortened if it is large."""
    return _BRIEF.repr(value)


def printable(text: str) -> str:
    """Return `text` with control characters escaped, so that a file's name cannot drive a terminal."""
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)


def nearest(name: str, known: Iterable[str]) -> str:
    """Say which of the `known` names an unknown `name` may mean.

    Returns:
        A sentence such as ``did you mean 'unet'? (known: unet, vnet)``, or ``known: unet, vnet`` if none is near. More
        than 20 names are not listed.
    """
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=2, cutoff=0.5)
    hint = f"did you mean {' or '.join(repr(n) for n in close)}?" if close else ""
    if len(names) > _MOST_LISTED:
        return hint or f"none of the {len(names)} known is near it"
    listed = f"known: {', '.join(names)}"
    return f"{hint} ({listed})" if hint else listed


def out_of_memory(error: BaseException) -> bool:
    """Return whether an error says, in any of the libraries' ways, that memory ran out."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":  # torch's, of a GPU
        return True
    words = ("allocate memory", "out of memory", "not enough memory")
    return isinstance(error, RuntimeError) and any(each in str(error) for each in words)


def why_case_failed(error: BaseException, what: str = "scan") -> str:
    """Return the reason of a fault for an error that stops one case and no other.

    Args:
        error: What was raised: a user error, or a limit of the machine.
        what: What there was not enough memory for.

    Raises:
        RuntimeError: the error itself, if it is an internal error.
    """
    if out_of_memory(error):
        return f"not enough memory for this {what}"
    if isinstance(error, RuntimeError):
        raise error
    return str(error)


@contextlib.contextmanager
def one_case(case_id: str, faults: list[Fault], kind: str, what: str = "scan") -> Iterator[None]:
    """Record an error of one case as a fault, so that the other cases go on.

    Args:
        case_id: The case.
        faults: Gets a fault if the case fails.
        kind: Of that fault.
        what: What there was not enough memory for.

    Raises:
        RuntimeError: an internal error.
    """
    try:
        yield
    except (UserError, MemoryError, OSError, RuntimeError) as error:
        if isinstance(error, ReadError) and error.fault.case_id == case_id:
            faults.append(error.fault)  # names file and case already
        else:
            faults.append(Fault(case_id, why_case_failed(error, what), case_id=case_id, kind=kind))
