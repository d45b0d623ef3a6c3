"""Kills aimed at the moments at which commands change the file system; then the same command is given again.

Each command runs once undisturbed, its changes under the folder of its result counted (folders and files made, renamed,
removed). Then it is started anew for every kill and ends at one of these changes, by SIGKILL, SIGINT and SIGTERM in
turn. Right after the kill the result must be whole or not be there. Then the same command is given again, or
`mlbseg train --resume` where the run folder is there: it must end well (or refuse because the result is whole), with
the same files as undisturbed, bit for bit where they hold results, and nothing left beside them or in the temporary
folder.

    python benchmarks/aimed_kills.py                    # 5 kills of each command
    python benchmarks/aimed_kills.py --kills 20 --only run,audit
"""

from __future__ import annotations

import argparse
import builtins
import hashlib
import importlib
import io
import os
import shutil
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SIGNALS = (signal.SIGKILL, signal.SIGINT, signal.SIGTERM)
TINY = [
    word
    for setting in (
        "network=unet",
        "network_channels=4,8,8",
        "patch_size=16",
        "steps=8",
        "checkpoint_every=2",
    )
    for word in ("-o", setting)
]
COMPARED = (".safetensors", ".nii.gz", ".csv", ".npy", ".onnx", ".pt", ".yaml")
"""Endings of files that an undisturbed command writes the same each time."""


@dataclass(frozen=True)
class Aim:
    """A command to be killed.

    Attributes:
        command: Called with the folder of the trial; its arguments.
        out: Its result, in the folder of the trial.
        ready: Makes what must be there before, in the folder of the trial.
        again: What to give once the result is there although the command did not end; the same command when None.
        first: Only so many changes are aimed at; all when None.
        whole: The result appears as a whole.
    """

    command: Callable[[Path], list[str]]
    out: str
    ready: Callable[[Path], None] = lambda _: None
    again: Callable[[Path], list[str]] | None = None
    first: int | None = None
    whole: bool = True


@dataclass
class Figures:
    """What kills of a command came to: numbers of trials, and of those that went wrong in each way."""

    kills: int = 0
    half: list[str] = field(default_factory=list)
    stuck: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)
    other: list[str] = field(default_factory=list)

    @property
    def wrong(self) -> list[str]:
        """All that went wrong, in words."""
        return [*self.half, *self.stuck, *self.left, *self.other]


def aims(scans: Path, run: Path) -> dict[str, Aim]:
    """Return the commands by name; `run` is a finished run on `scans`."""
    train = ["train", str(scans), "--test", "1", *TINY, "-q", "--out"]
    resume = ["train", "-q", "--resume"]
    export = ["export", str(run)]

    def audited(folder: Path) -> None:
        shutil.copytree(run.parent / "audited", folder / "audit")

    return {
        "run": Aim(
            lambda f: [*train, str(f / "run")], "run", again=lambda f: [*resume, str(f / "run")], first=30
        ),
        "run in a folder that is there": Aim(
            lambda f: [*train, str(f / "run")],
            "run",
            ready=lambda f: (f / "run").mkdir(),
            again=lambda f: [*resume, str(f / "run")],
            first=40,
            whole=False,
        ),
        "training": Aim(lambda f: [*train, str(f / "run")], "run", again=lambda f: [*resume, str(f / "run")]),
        "export nnunet": Aim(
            lambda f: [*export, str(f / "raw"), "--format", "nnunet", "--dataset", "Dataset501_Kills"],
            "raw/Dataset501_Kills",
        ),
        "export itksnap": Aim(lambda f: [*export, str(f / "out"), "--format", "itksnap"], "out"),
        "export bundle in a folder that is there": Aim(
            lambda f: [*export, str(f / "out"), "--format", "bundle"],
            "out",
            ready=lambda f: (f / "out").mkdir(),
            whole=False,
        ),
        "audit": Aim(lambda f: ["audit", str(run), "--out", str(f / "audit")], "audit"),
        "audit over another": Aim(
            lambda f: ["audit", str(run), "--out", str(f / "audit"), "--overwrite"],
            "audit",
            ready=audited,
            whole=False,
        ),
        "report": Aim(lambda f: ["report", str(run), "--out", str(f / "out" / "report.html")], "out"),
        "predict": Aim(
            lambda f: ["predict", str(run), str(scans), "--out", str(f / "out"), "--probabilities"],
            "out",
            again=lambda f: [
                *("predict", str(run), str(scans), "--out", str(f / "out")),
                *("--probabilities", "--overwrite"),
            ],
            whole=False,
        ),
    }


def start(
    arguments: Sequence[str], folder: Path, at: int = 0, number: int = signal.SIGKILL
) -> tuple[int, str, int]:
    """Run `mlbseg` in a process of its own; return its exit code, what it printed, and its changes in the folder.

    The process is forked, as this one has imported by now what takes seconds to import.

    Args:
        arguments: Of the command.
        folder: Of the trial; changes elsewhere do not count.
        at: The change at which it is to be killed, from 1; 0 for none.
        number: The signal.
    """
    place = folder.parent / f"{folder.name}.around"
    (place / "tmp").mkdir(parents=True, exist_ok=True)
    count, said = place / "count", place / "said"
    count.write_bytes(b"")
    process = os.fork()
    if process == 0:
        for descriptor in (1, 2):
            os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
        os.environ |= {"TMPDIR": str(place / "tmp"), "MLBSEG_CACHE": str(folder.parent / "cache")}
        tempfile.tempdir = None
        hook(str(folder), at, number, count)
        os._exit(be_command(arguments))
    _, status = os.waitpid(process, 0)
    return os.waitstatus_to_exitcode(status), said.read_text(errors="replace"), len(count.read_bytes())


def be_command(arguments: Sequence[str]) -> int:
    """Run a command in this process; return its exit code."""
    from mlbseg.cli import main as command

    sys.argv = ["mlbseg", *arguments]
    try:
        command()
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 0
    except BaseException:  # what Python does with it
        traceback.print_exc()
        return 1
    return 0


def hook(under: str, at: int, number: int, count: Path) -> None:
    """Count this process's changes in a folder, and kill it by a signal at one of them."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # jobs in the background of a shell ignore it
    seen, counting = 0, os.open(count, os.O_WRONLY | os.O_APPEND)

    def hooked(call: Callable[..., Any], changes: Callable[..., bool]) -> Callable[..., Any]:
        def wrapper(*arguments: Any, **named: Any) -> Any:
            nonlocal seen
            if changes(*arguments, **named) and any(is_under(path) for path in arguments[:2]):
                seen += 1
                os.write(counting, b".")
                if seen == at:
                    os.kill(os.getpid(), number)
            return call(*arguments, **named)

        return wrapper

    def is_under(path: object) -> bool:
        if not isinstance(path, str | bytes | os.PathLike):
            return False
        return os.path.abspath(os.fsdecode(path)).startswith(under)  # noqa: PTH100 - links are not to be followed

    def writes(file: object, mode: str = "r", *_: object, **__: object) -> bool:
        return any(letter in mode for letter in "wxa+")

    for name in ("mkdir", "rename", "replace", "unlink", "rmdir", "link"):
        setattr(os, name, hooked(getattr(os, name), lambda *_, **__: True))
    os.open = hooked(os.open, lambda path, flags, *_, **__: bool(flags & os.O_CREAT))
    for module in (io, builtins):
        module.open = hooked(module.open, writes)  # type: ignore[attr-defined]


def content(out: Path) -> dict[str, str]:
    """Return what can be seen in a folder: a digest of files that must be equal, else only the name."""
    found = {}
    for path in sorted(out.rglob("*")):
        name = str(path.relative_to(out))
        if path.is_file() and "tensorboard" not in name and ".mlbseg-" not in name:
            equal = name.endswith(COMPARED)
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest() if equal else ""
    return found


def remains(folder: Path) -> list[str]:
    """Return what a kill has left in the folder of a trial and among its temporary files."""
    temporary = folder.parent / f"{folder.name}.around" / "tmp"
    found = [path for path in folder.rglob(".*") if path.name != ".lock"]
    # torch and matplotlib keep caches there, which hold nothing of the user's.
    found += [path for path in temporary.iterdir() if not path.name.startswith(("torch", "matplotlib"))]
    return [path.name for path in found]


def trial(aim: Aim, folder: Path, at: int, number: int, reference: dict[str, str], figures: Figures) -> None:
    """Kill a command, look, and give it again; write down what went wrong."""
    folder.mkdir()
    aim.ready(folder)
    before = content(folder / aim.out)
    out, where = folder / aim.out, f"change {at}, {signal.Signals(number).name}"
    code, said, _ = start(aim.command(folder), folder, at, number)
    figures.kills += 1
    if code == 0:
        figures.other.append(f"{where}: was not killed")
    there = content(out)
    begun = {name for name in reference if name in ("config.yaml", "plan.json", "split.json", "data.json")}
    if aim.whole and there not in ({}, before) and not (begun or set(reference)) <= set(there):
        figures.half.append(f"{where}: {sorted(there)}")
    resumes = aim.again is not None and ((out / "config.yaml").is_file() or "config.yaml" not in reference)
    again = aim.again if resumes and aim.again is not None else aim.command
    code, said, _ = start(again(folder), folder)
    was_whole = there == reference and any(
        words in said for words in ("exists already", "holds something already")
    )
    if code and not was_whole:
        figures.stuck.append(f"{where}: exit code {code}, {said.strip()[-300:]}")
    elif (after := content(out)) != reference:
        different = sorted(name for name in {*after, *reference} if after.get(name) != reference.get(name))
        figures.other.append(f"{where}: other content {different}")
    if found := remains(folder):
        figures.left.append(f"{where}: {found}")
    shutil.rmtree(folder)


def spread(total: int, count: int) -> list[int]:
    """Return so many of the numbers from 1 to `total`, evenly spread, the first and the last among them."""
    if count == 1:
        return [(total + 1) // 2]
    return sorted({1 + round(step * (total - 1) / (count - 1)) for step in range(count)})


def measure(name: str, aim: Aim, work: Path, kills: int, turn: int) -> Figures:
    """Kill a command so many times; signals in turn, from `turn` on."""
    folder = work / "trial"
    folder.mkdir()
    aim.ready(folder)
    code, said, changes = start(aim.command(folder), folder)
    if code:
        raise SystemExit(f"{name}: failed undisturbed: {said}")
    reference, figures = content(folder / aim.out), Figures()
    shutil.rmtree(folder)
    for index, at in enumerate(spread(min(changes, aim.first or changes), kills)):
        number = SIGNALS[(turn + index) % len(SIGNALS)]
        trial(aim, folder, at, number, reference, figures)
        print(
            f"{name}, {at}/{changes}, {signal.Signals(number).name}: {len(figures.wrong)} wrong", flush=True
        )
    return figures


def prepare(work: Path) -> tuple[Path, Path]:
    """Make scans, a finished run and an audit of it; return the scans and the run."""
    from mlbseg.data.phantom import write_phantoms

    for module in ("apps.audit", "apps.export", "apps.report", "inference", "training"):
        importlib.import_module(f"mlbseg.{module}")  # once, for all processes that are forked
    scans, run = work / "scans", work / "made" / "run"
    write_phantoms(scans, count=4, seed=0, size=(20, 24, 24))
    for name in ("phantom_002", "phantom_003"):
        (scans / "labels" / f"{name}.nii.gz").unlink()
    for arguments in (
        ["train", str(scans), "--out", str(run), *TINY, "-q"],
        ["audit", str(run), "--out", str(work / "made" / "audited")],
    ):
        code, said, _ = start(arguments, work / "made")
        if code:
            raise SystemExit(said)
    return scans, run


def main(arguments: Sequence[str] | None = None) -> None:
    """Print a table of what kills came to; exit with 1 if anything went wrong."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=5, help="of each command")
    parser.add_argument("--only", help="names of commands, with commas; see `aims`")
    asked = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as name:
        work = Path(name).resolve()
        chosen = aims(*prepare(work))
        if asked.only:
            chosen = {key: chosen[key] for key in asked.only.split(",")}
        table = {
            key: measure(key, aim, work, asked.kills, turn) for turn, (key, aim) in enumerate(chosen.items())
        }
    print(
        "\n| command | kills | half-visible | stuck | left behind | otherwise wrong |\n|---|---|---|---|---|---|"
    )
    for key, row in table.items():
        print(
            f"| {key} | {row.kills} | {len(row.half)} | {len(row.stuck)} | {len(row.left)} | {len(row.other)} |"
        )
    print(f"\n{sum(row.kills for row in table.values())} kills")
    for key, row in table.items():
        for line in row.wrong:
            print(f"{key}: {line}")
    sys.exit(any(row.wrong for row in table.values()))


if __name__ == "__main__":
    main()
