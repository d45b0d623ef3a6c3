"""`mlbseg config`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table

from mlbseg.cli.arguments import Json
from mlbseg.cli.ending import finish
from mlbseg.errors import UserError, nearest

if TYPE_CHECKING:
    from mlbseg.reference import Setting


def config(
    words: Annotated[
        list[str] | None,
        typer.Argument(help="Sections or settings to print, such as train or mlb.mix (default: all)."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Print every setting with its default, the values that it takes and its meaning."""
    from mlbseg.reference import describe_settings

    sections = describe_settings()
    names = [section.name for section in sections if section.name]
    keys = [setting.key for section in sections for setting in section.settings]
    for word in words or []:
        if word not in names and word not in keys:
            raise UserError(f"{word}: no section and no setting, {nearest(word, [*names, *keys])}")
    tables, found = [], []
    for section in sections:
        asked = section.name in (words or [section.name])
        shown = [setting for setting in section.settings if asked or setting.key in (words or ())]
        if shown:
            found += shown
            tables.append(_table(f"{section.name}: {section.text}" if section.name else "", shown))
    record = {setting.key: {"default": setting.default, "values": setting.values, "meaning": setting.meaning}
              for setting in found}  # fmt: skip
    advice = "set one with -o KEY=VALUE, or in a YAML file with --config"
    finish({"settings": record}, as_json=as_json, tables=tables, lines=[advice])


def _table(title: str, settings: list[Setting]) -> Table:
    table = Table(
        "setting", "default", "values", "meaning", title=escape(title) or None, title_justify="left"
    )
    for setting in settings:
        table.add_row(
            *(escape(text) for text in (setting.key, setting.default, setting.values, setting.meaning))
        )
    return table
