"""The documentation's site: it builds without a warning, leaves nothing out, and fetches nothing from elsewhere."""

from __future__ import annotations

import html
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

import mlbseg
from mlbseg import core
from mlbseg.cli import app
from mlbseg.config import load_config

REPOSITORY = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
        cwd=REPOSITORY,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    return folder


def text(page: Path) -> str:
    """Return what a page shows."""
    shown = re.sub(r"<(script|style)\b.*?</\1>", " ", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    shown = re.sub(r"<[^>]+>", " ", re.sub(r"</?(code|em)\b[^>]*>", "", shown))
    return " ".join(html.unescape(shown).split())


def words(help_text: str) -> str:
    """Return a help text as a page shows it."""
    return " ".join(help_text.replace("`", "").split())


def test_every_option_of_every_command_is_there(site: Path) -> None:
    page = text(site / "reference" / "cli.html")
    group = get_command(app)
    commands = group.commands  # type: ignore[attr-defined]
    assert len(commands) > 5
    for parameter in group.params:
        assert parameter.opts[0] in page
    for name, command in commands.items():
        section = page.partition(f"mlbseg {name} ¶")[2].partition("¶")[0]
        assert words(command.help) in section
        for parameter in command.params:
            assert words(parameter.help) in section, f"{name} {parameter.name}"
            for option in parameter.opts if parameter.opts[0].startswith("-") else ():
                assert option in section, f"{name} {option}"


def settings(record: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in record.items():
        if isinstance(value, dict) and not prefix:
            yield from settings(value, f"{key}.")
        else:
            yield prefix + key


def test_every_setting_is_there_with_its_default_and_its_meaning(site: Path) -> None:
    page = (site / "reference" / "settings.html").read_text(encoding="utf-8")
    rows = {
        cells[0]: cells
        for row in re.findall(r"<tr>(.*?)</tr>", page, re.DOTALL)
        if (
            cells := [
                re.sub(r"<[^>]+>", "", cell) for cell in re.findall(r"<td[^>]*>(.*?)</td>", row, re.DOTALL)
            ]
        )
    }
    keys = list(settings(load_config().model_dump()))
    assert rows.keys() >= set(keys)
    for key in keys:
        assert rows[key][2], f"{key}: no values"
        assert rows[key][3], f"{key}: no meaning"
    assert [rows[key][1] for key in ("train.clip", "mlb.views", "bcp.largest", "plan.steps")] == [
        "1", "[zoom-out]", "true", "",
    ]  # fmt: skip


def test_what_is_public_has_its_reference(site: Path) -> None:
    page = (site / "reference" / "api.html").read_text(encoding="utf-8")
    for module in (mlbseg, core):
        for name in set(module.__all__) - {"__version__", "ALONE"}:
            assert f'id="{getattr(module, name).__module__}.{name}"' in page, name


def test_formulae_are_mathml(site: Path) -> None:
    source = (REPOSITORY / "docs" / "method.md").read_text(encoding="utf-8")
    page = (site / "method.html").read_text(encoding="utf-8")
    formulae = re.findall(r"\$\$.+?\$\$|\$[^$\n]+\$", source)
    assert len(formulae) > 20
    assert page.count("<math ") == len(formulae)
    assert "arithmatex" not in page


def test_shapes_are_no_emphasis(site: Path) -> None:
    for page in site.rglob("*.html"):
        assert not re.search(r"<em>S\b", page.read_text(encoding="utf-8")), page.name


def test_nothing_is_fetched_from_elsewhere(site: Path) -> None:
    pages = list(site.rglob("*.html"))
    assert len(pages) > 12
    for page in pages:
        tags = re.findall(r"<(?:script|img|link|iframe|source)\b[^>]*>", page.read_text(encoding="utf-8"))
        for tag in tags:
            fetched = re.findall(r'(?:src|href)="?((?:https?:)?//[^"\s>]+)', tag)
            assert not fetched or 'rel="canonical"' in tag, f"{page.name}: {tag}"
