"""What mkdocs is told while it builds the site: pages that are made from the source, and formulae as MathML.

A page says ``<!-- commands -->``, ``<!-- settings -->`` or ``<!-- plan rules -->`` where the generated part stands, so
that no option and no default is written down twice. Formulae are written as ``$...$`` and ``$$...$$``; as MathML
browsers draw them without a script or a font from elsewhere.
"""

from __future__ import annotations

import html
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import griffe
import typer
from latex2mathml.converter import convert
from mkdocs.exceptions import PluginError
from typer.core import TyperArgument, TyperGroup, TyperOption
from typer.main import get_command

from mlbseg.cli import app
from mlbseg.reference import describe_settings

SOURCE = Path(__file__).resolve().parents[2] / "src"


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Fill in the generated parts of a page."""
    for name, written in PARTS.items():
        if (marker := f"<!-- {name} -->") in markdown:
            markdown = markdown.replace(marker, "\n".join(written()))
    return markdown


def on_page_content(content: str, **_: Any) -> str:
    """Turn formulae into MathML."""
    return _FORMULA.sub(_mathml, content)


_FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)


def _mathml(found: re.Match[str]) -> str:
    formula = html.unescape(found[2]).strip()
    written = convert(formula, display="block" if found[1] == "div" else "inline")
    if "\\" in written:  # a command that the converter does not know, passed on as it is
        raise PluginError(f"cannot be written as MathML: {formula}")
    return written


def commands() -> Iterator[str]:
    """Yield the lines of the commands' reference: what `--help` says, a section each."""
    group = get_command(app)
    assert isinstance(group, TyperGroup)  # noqa: S101 - of one command it would be that command
    for name, command in group.commands.items():
        context = typer.Context(command, info_name=f"mlbseg {name}")
        yield f"\n## mlbseg {name}\n"
        yield f"{command.help}\n"
        yield f"```text\nmlbseg {name} {' '.join(command.collect_usage_pieces(context))}\n```\n"
        yield from _table("Argument or option", "Default", "Meaning")
        for parameter in command.params:
            assert isinstance(parameter, Parameter)  # noqa: S101 - Typer makes no others
            yield _row(_spelling(parameter, context), _default(parameter), parameter.help or "")


Parameter = TyperArgument | TyperOption


def _spelling(parameter: Parameter, context: typer.Context) -> str:
    record = parameter.get_help_record(context)
    return _code(record[0]) if record else ""


def _default(parameter: Parameter) -> str:
    default = parameter.default
    if parameter.required:
        return "needed"
    return "" if default is None or default is False or callable(default) else _code(default)


def settings() -> Iterator[str]:
    """Yield the lines of the settings' reference: every key with default, values and meaning."""
    for section in describe_settings():
        if section.name:
            yield f"\n## {section.name}\n"
            yield f"{section.text}\n"
        if not section.settings:
            yield "It has no settings of its own."
            continue
        yield from _table(*_HEADINGS)
        for each in section.settings:
            default = f"`{each.default}`" if each.default else ""
            yield _row(f"`{each.key}`", default, each.values, each.meaning)


_HEADINGS = ("Setting", "Default", "Values", "Meaning")
PLAN = "mlbseg.data.plan.Plan"


def _object(path: str) -> griffe.Object | griffe.Alias:
    package, _, rest = path.partition(".")
    loaded = griffe.load(package, search_paths=[SOURCE], resolve_aliases=False)
    return loaded[rest]


def plan_rules() -> Iterator[str]:
    """Yield the table of rules that stands in the plan's module."""
    docstring = _object(PLAN.rpartition(".")[0]).docstring
    assert docstring is not None  # noqa: S101 - it has one, and the table is in it
    yield from (line for line in docstring.value.splitlines() if line.startswith("|"))


def _table(*headings: str) -> Iterator[str]:
    yield f"| {' | '.join(headings)} |"
    yield f"|{'---|' * len(headings)}"


def _row(*cells: str) -> str:
    return f"| {' | '.join(' '.join(cell.split()).replace('|', '&#124;') for cell in cells)} |"


def _code(value: object) -> str:
    if value is None:
        return ""
    text = {True: "true", False: "false"}[value] if isinstance(value, bool) else f"{value}"
    if isinstance(value, float):
        text = f"{value:.4g}"
    if isinstance(value, list):
        text = f"[{', '.join(map(str, value))}]"
    return f"`{text}`"


PARTS: dict[str, Callable[[], Iterator[str]]] = {
    "commands": commands,
    "settings": settings,
    "plan rules": plan_rules,
}
