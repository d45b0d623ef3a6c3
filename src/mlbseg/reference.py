"""Every setting with its default, its values and its meaning, as `mlbseg config` and the manual show it."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from mlbseg.config import config_model, section_name
from mlbseg.data.plan import Plan
from mlbseg.methods import METHODS

_PARAGRAPH = "\n\n"
_BOUNDS = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
_KINDS = {"integer": "whole number", "number": "number", "boolean": "true, false", "string": "text"}


@dataclass(frozen=True)
class Setting:
    """One setting.

    Attributes:
        key: As in ``-o key=value``.
        default: As one would write it; empty if the data or another setting decides.
        values: What it takes, in words.
        meaning: What it is.
    """

    key: str
    default: str
    values: str
    meaning: str


@dataclass(frozen=True)
class SettingsSection:
    """Settings that belong together.

    Attributes:
        name: Empty for those of no section.
        text: What they are about.
        settings: They themselves; a method may have none.
    """

    name: str
    text: str
    settings: tuple[Setting, ...]

    def as_dict(self) -> dict[str, Any]:
        """Return the fields, for JSON."""
        return asdict(self)


def describe_settings() -> tuple[SettingsSection, ...]:
    """Return every section of the configuration, those of installed packages among them."""
    return tuple(_sections())


def _sections() -> Iterator[SettingsSection]:
    schema = config_model().model_json_schema()
    methods = {section_name(name): kind for name, kind in METHODS.items()}
    sections = {key: field for key, field in schema["properties"].items() if "$ref" in field}
    alone = {key: field for key, field in schema["properties"].items() if key not in sections}
    yield SettingsSection(
        "", "", tuple(_setting(key, field, field["description"]) for key, field in alone.items())
    )
    for name, field in sections.items():
        section = schema["$defs"][field["$ref"].rpartition("/")[2]]
        text = inspect.getdoc(methods[name]) if name in methods else section["description"]
        meanings = _attributes(Plan) if name == "plan" else {}
        found = tuple(
            _setting(f"{name}.{key}", value, value.get("description") or meanings[key])
            for key, value in section["properties"].items()
        )
        yield SettingsSection(name, (text or "").partition(_PARAGRAPH)[0], found)


def _setting(key: str, field: dict[str, Any], meaning: str) -> Setting:
    return Setting(key, _written(field["default"]), " or ".join(_values(field)), " ".join(meaning.split()))


def _values(schema: dict[str, Any]) -> Iterator[str]:
    """Yield the kinds of value that a setting takes, in words."""
    if "anyOf" in schema:
        for part in schema["anyOf"]:
            yield from _values(part)
    elif "enum" in schema:
        yield ", ".join(_written(value) for value in schema["enum"])
    elif schema.get("type") == "array":
        yield "list: " + " or ".join(_values(schema["items"]))
    elif schema.get("type") == "object":
        yield "key: number"
    elif schema.get("type") != "null":
        bounds = [f"{sign} {schema[key]:.10g}" for key, sign in _BOUNDS.items() if key in schema]
        yield " ".join([_KINDS[schema["type"]], " and ".join(bounds)]).strip()


def _written(value: object) -> str:
    """Return a value as one would write it in YAML; nothing for None."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list):
        return f"[{', '.join(map(str, value))}]"
    return f"{value}"


def _attributes(kind: type) -> dict[str, str]:
    """Return what a class's docstring says of each attribute."""
    listed = (inspect.getdoc(kind) or "").partition("Attributes:\n")[2]
    return dict(re.findall(r"^    (\w+): (.+(?:\n {8}.+)*)", listed, re.MULTILINE))
