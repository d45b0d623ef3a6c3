"""Small JSON records (plan, split, result): checked when read, written whole or not at all."""

from __future__ import annotations

import codecs
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, TypeVar

from pydantic import AfterValidator, TypeAdapter, ValidationError

from mlbseg.errors import UserError, brief
from mlbseg.files import write_atomic

T = TypeVar("T")
MOST_FAULTS = 20
"""Faults of one record that are listed."""


def _no_null(text: str) -> str:
    if "\0" in text:
        raise ValueError("a null character, which no path has")
    return text


PathText = Annotated[str, AfterValidator(_no_null)]
"""A path, as text."""


def read_text(path: Path) -> str:
    """Return the text of a file that a user wrote, in UTF-8 or, as programs on Windows write it, in marked UTF-16.

    Raises:
        OSError: It cannot be read.
        UnicodeDecodeError: It is no such text.
    """
    content = path.read_bytes()
    wide = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    return content.decode("utf-16" if wide else "utf-8-sig")


def write_record(path: Path, record: Mapping[str, object]) -> None:
    """Write `record` as JSON to a temporary name beside `path`, then rename it.

    Raises:
        UserError: The file cannot be written.
    """
    text = json.dumps(record, indent=2, ensure_ascii=False) + "\n"
    # A path may hold bytes that are no text; what Python writes for them is JSON's own escape.
    write_atomic(path, text.encode(errors="backslashreplace"))


def parse_json(text: str) -> object:
    """Return what a JSON text from elsewhere says.

    Raises:
        ValueError: It is none, or holds what no text, number or nesting can be; the message is for users.
    """
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except json.JSONDecodeError:
        raise
    except ValueError:
        raise ValueError("a number of more digits than can be read") from None
    if "\\ud" in text.lower():
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise ValueError("half of a surrogate pair, which is no character") from None
    return value


def read_record(path: Path, what: str) -> dict[str, object]:
    """Read a JSON object.

    Raises:
        UserError: The file is missing, unreadable or not a JSON object; `what` names what it should be.
    """
    try:
        if path.exists() and not path.is_file():  # a FIFO would be waited for
            raise UserError(f"{path}: is no file, expected {what}")
        record = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}, expected {what}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON, expected {what}") from error
    if not isinstance(record, dict):
        raise UserError(f"{path}: holds a {type(record).__name__}, expected {what}")
    return record


def validate(adapter: TypeAdapter[T], value: object, where: str) -> T:
    """Return `value` as the adapter's type.

    Raises:
        UserError: It is not; one line per field says what was found and what was expected.
    """
    try:
        return adapter.validate_python(value)
    except ValidationError as error:
        lines = []
        for fault in error.errors(include_url=False):
            name = ".".join([where, *(str(part) for part in fault["loc"])])
            found = "" if fault["type"] == "missing" else f" (found {brief(fault['input'])})"
            lines.append(f"{name}: {fault['msg']}{found}")
        if len(lines) > MOST_FAULTS:
            lines[MOST_FAULTS:] = [f"{where}: {len(lines) - MOST_FAULTS} more of this kind"]
        raise UserError("\n".join(lines)) from error


def read_as(adapter: TypeAdapter[T], path: Path, what: str) -> T:
    """Read a JSON object as the adapter's type.

    Raises:
        UserError: As `read_record` and `validate`.
    """
    return validate(adapter, read_record(path, what), str(path))
