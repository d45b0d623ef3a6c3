"""What the documents say can be done can be done: their Python runs, their commands are such as the real ones take."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import pytest
from pydantic import BaseModel
from typer.main import get_command

from conftest import Command
from mlbseg.cli import app
from mlbseg.cli.arguments import case_ids, count_or_ids, join_lists, label_values, names, numbers, part_of
from mlbseg.cli.bench import LISTS
from mlbseg.cli.ending import UsageError
from mlbseg.config import load_config, parse_override
from mlbseg.errors import UserError

REPOSITORY = Path(__file__).resolve().parents[1]
TUTORIAL = REPOSITORY / "docs" / "tutorial.md"
PAGES = sorted([REPOSITORY / "README.md", *(REPOSITORY / "docs").rglob("*.md")])

# Scripts that pass their arguments on to mlbseg, with what they put before and after them.
WRAPPERS = {
    "examples/torchrun.sh": ([], []),
    "examples/slurm.sbatch": (["train"], []),
    "examples/predict-array.sbatch": (["predict"], ["--part", "1/16"]),
}


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    name: str
    language: str
    text: str


def blocks(page: Path) -> Iterator[Block]:
    fenced = re.finditer(r"^```(\w*)\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    for number, found in enumerate(fenced, start=1):
        yield Block(f"{page.name} {number}", found[1], found[2])


def lines(block: Block) -> list[list[str]]:
    """Return the command lines of a shell block, as words; none of a block that is no shell."""
    if block.language not in ("", "sh", "bash") or not re.search(STARTS, block.text, re.MULTILINE):
        return []
    found = [shlex.split(line, comments=True) for line in block.text.replace("\\\n", " ").splitlines()]
    return [words for words in found if words]


STARTS = r"^(\w+=\S+ )*(mlbseg|make|python|bash|sbatch) "


def require_valid(words: list[str]) -> None:
    """Fail unless a command line is one that can be given."""
    while re.fullmatch(r"[A-Z]+=.*", words[0]):
        words = words[1:]
    match words:
        case ["mlbseg", *arguments]:
            require_parsed(arguments)
        case ["make", target]:
            assert f"\n{target}: " in (REPOSITORY / "Makefile").read_text(encoding="utf-8")
        case ["bash" | "sbatch", *rest] if script := next((word for word in rest if word in WRAPPERS), None):
            before, after = WRAPPERS[script]
            require_parsed([*before, *rest[rest.index(script) + 1 :], *after])
        case ["python", "-m", module, *_]:  # another package's command: that it is there is all that is known
            assert find_spec(module), module
        case ["cd", _] | ["awk", *_]:
            pass
        case ["python", script, *arguments]:
            source = (REPOSITORY / script).read_text(encoding="utf-8")
            for option in (word for word in arguments if word.startswith("--")):
                assert f'"{option}"' in source, f"{script} has no {option}"
        case _:
            pytest.fail(f"no command that this test knows: {shlex.join(words)}")


def require_parsed(arguments: list[str]) -> None:
    """Parse the arguments of mlbseg as it does, down to the settings."""
    if arguments[0] == "bench":
        arguments = join_lists(arguments, LISTS)
    commands = get_command(app).commands  # type: ignore[attr-defined]
    assert arguments[0] in commands, f"no command {arguments[0]}"
    with commands[arguments[0]].make_context(arguments[0], arguments[1:]) as context:
        given = context.params
    load_config(preset=given.get("preset"), overrides=given.get("override") or ())
    if isinstance(labels := given.get("labels"), str):  # of other commands a folder
        label_values(labels)
    part_of(given.get("part"))
    case_ids(given.get("only") or "")
    if arguments[0] == "bench":
        from mlbseg.apps.bench.cells import parse_rows

        parse_rows(names(given["methods"]), given["variant"] or ())
        numbers("--labelled", given["labelled"])
        numbers("--seeds", given["seeds"])
    elif arguments[0] == "train" and given["method"]:
        from mlbseg.methods import find_method

        find_method(given["method"])
    elif arguments[0] == "audit":
        from mlbseg.apps.audit.trust import WAYS

        assert given["method"] in WAYS
    for choice in ("test", "validation"):
        count_or_ids(given.get(choice))


SHELL = [block for page in PAGES for block in blocks(page) if lines(block)]


def test_there_are_commands_to_look_at() -> None:
    assert len(SHELL) > 20


@pytest.mark.parametrize("block", [pytest.param(block, id=block.name) for block in SHELL])
def test_commands_can_be_given(block: Block, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)
    for words in lines(block):
        require_valid(words)


@pytest.mark.parametrize(
    "line",
    [
        "mlbseg segment scans/",
        "mlbseg train scans/ --out a --lables 0,1",
        "mlbseg train scans/ --out a -o plan.stepz=4",
        "mlbseg train scans/ --out a --method mbl",
        "mlbseg predict runs/a new_scans/ --out masks/ --part 3",
        "sbatch examples/predict-array.sbatch runs/a",
        "mlbseg bench scans/ --out b --methods supervised mbl --labelled 4 --test 2",
        "make tea",
        "python benchmarks/method_cost.py --thread 1",
        "brew install mlbseg",
    ],
)
def test_a_wrong_command_is_seen(line: str) -> None:
    with pytest.raises((UserError, AssertionError, pytest.fail.Exception, UsageError)):
        require_valid(shlex.split(line))


def test_settings_named_in_prose_exist() -> None:
    sections = "|".join(name for name, value in load_config() if isinstance(value, BaseModel))
    named = {
        (page.name, key)
        for page in PAGES
        for code in re.findall(r"`([^`\n]+)`", page.read_text(encoding="utf-8"))
        for key in re.findall(rf"(?<![\w.])((?:{sections})\.[a-z]\w*)=", code)
    }
    assert len(named) > 20
    for page, key in named:
        assert parse_override(f"{key}=1")[0] == key, page


def snippets() -> list[Block]:
    """Return every Python block that stands by itself."""
    found = [block for page in PAGES if page != TUTORIAL for block in blocks(page)]
    return [block for block in found if block.language == "python"]


@pytest.mark.slow
@pytest.mark.parametrize("block", [pytest.param(block, id=block.name) for block in snippets()])
def test_snippets_run(
    block: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(block.text, block.name, "exec"), {"__name__": "__main__"})  # noqa: S102 - our own documents
    assert capsys.readouterr().out.strip()


# Smaller scans and fewer steps, so that it does not take minutes.
SMALLER = {"size=(32, 40, 40)": "size=(16, 16, 16)", "plan.steps=400": "plan.steps=8"}


@pytest.mark.slow
def test_the_tutorial_can_be_followed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: Command
) -> None:
    monkeypatch.chdir(tmp_path)
    found = list(blocks(TUTORIAL))
    for long in SMALLER:
        assert any(long in block.text for block in found)
    for block in found:
        text = block.text
        for long, short in SMALLER.items():
            text = text.replace(long, short)
        if block.language == "python":
            exec(compile(text, block.name, "exec"), {"__name__": "__main__"})  # noqa: S102 - as above
        for words in lines(Block(block.name, block.language, text)):
            assert words[0] == "mlbseg", words
            done = command(*words[1:])
            assert done.code == 0, f"{shlex.join(words)}: {done.err}"
    assert len(list(Path("masks").iterdir())) == 6
    assert Path("runs/first/audit/audit.html").is_file()
    assert Path("runs/first/report.html").is_file()
    assert Path("masks.html").is_file()
    assert "phantom_024,1," in Path("scores.csv").read_text(encoding="utf-8")
