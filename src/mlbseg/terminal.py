"""What comes from files, shown on a terminal: as the characters that it has, and as nothing else."""

from __future__ import annotations

from rich.console import Console
from rich.text import Text

from mlbseg.errors import printable


def one_line(text: object) -> str:
    """Return a text on one line, with what would drive a terminal, line feeds too, escaped."""
    return printable(str(text)).replace("\n", "\\n")


def plain(text: object) -> Text:
    """Return a cell or a title of a table: no escape sequence reaches the terminal, and no ``[bold]`` is markup."""
    return Text(one_line(text))


def say(console: Console | None, text: str) -> None:
    """Print a line where there is a console; it is neither markup nor wrapped."""
    if console is not None:
        console.print(printable(text), markup=False, highlight=False, soft_wrap=True)
