"""The demo, in small: three trainings, one table, one picture."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
from rich.console import Console

from blocks import TINY, blocks
from conftest import Command
from mlbseg.apps import demo as module
from mlbseg.apps.demo import ARMS, demo
from mlbseg.data.phantom import write_phantoms
from mlbseg.errors import UserError
from mlbseg.pictures import Row, overlay
from mlbseg.training import train

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer and coarser phantoms, a smaller network: the way is the same."""
    monkeypatch.setattr(module, "SCANS", 9)
    monkeypatch.setattr(module, "TESTED", 3)
    monkeypatch.setattr(module, "write_phantoms", partial(write_phantoms, size=(16, 16, 16)))

    def small(*arguments: object, overrides: list[str], **options: object) -> object:
        return train(*arguments, overrides=[*overrides, *TINY], **options)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "train", small)


def picture(path: Path) -> np.ndarray:
    return matplotlib.image.imread(path)


def test_the_demo_makes_its_files_prints_its_table_and_can_be_repeated(
    tmp_path: Path, command: Command
) -> None:
    out = tmp_path / "demo"
    first = command("demo", "--out", out, "--steps", 4, "-q")
    assert first.code == 0
    assert first.err == ""
    for arm in ARMS:
        assert arm.title in first.out
        assert (out / "runs" / arm.folder / "model.safetensors").is_file()
        assert {p.name for p in (out / "masks" / arm.folder).iterdir()} == {
            f"{name}.nii.gz"
            for name in json.loads((out / "runs" / arm.folder / "split.json").read_text())["test"]
        }
        assert len((out / f"{arm.folder}.csv").read_text().splitlines()) == 1 + 3 * 2
    assert f"picture: {out / 'demo.png'}" in first.out
    assert picture(out / "demo.png")[..., :3].std() > 0.1

    splits = [json.loads((out / "runs" / arm.folder / "split.json").read_text()) for arm in ARMS]
    assert splits[0] == splits[1]
    assert (len(splits[0]["clean"]), len(splits[2]["clean"])) == (4, 6)
    assert splits[0]["test"] == splits[2]["test"]
    steps = {json.loads((out / "runs" / arm.folder / "result.json").read_text())["steps"] for arm in ARMS}
    assert steps == {4}

    record = json.loads((out / "demo.json").read_text())
    again = command("demo", "--out", out, "--steps", 4, "--json")
    assert again.code == 0
    assert again.json == record  # the same seed, the same figures


def test_a_folder_that_holds_something_else_is_left_alone(tmp_path: Path, command: Command) -> None:
    (tmp_path / "scans").mkdir()
    (tmp_path / "scans" / "mine.txt").write_text("mine")
    outcome = command("demo", "--out", tmp_path)
    assert outcome.code == 2
    assert "holds something else than a demo (choose another --out)" in outcome.err
    assert [p.name for p in tmp_path.iterdir()] == ["scans"]
    assert (tmp_path / "scans" / "mine.txt").read_text() == "mine"
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file: is a file, expected a folder"):
        demo(tmp_path / "file")


def test_a_demo_that_was_stopped_early_can_be_run_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(scans: Path, **_: object) -> None:
        (scans / "images").mkdir(parents=True)
        (scans / "images" / "phantom_000.nii.gz").write_bytes(b"half a scan")
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(module, "write_phantoms", stop)
        for _ in range(2):
            with pytest.raises(KeyboardInterrupt):
                demo(tmp_path / "demo")

    def all_there(scans: Path, *_: object, **__: object) -> None:
        assert (scans / "images" / "phantom_000.nii.gz").stat().st_size > 100
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "train", all_there)
    with pytest.raises(KeyboardInterrupt):
        demo(tmp_path / "demo")


class _Score:
    def __init__(self, mean_dice: float) -> None:
        self.mean_dice = mean_dice


@pytest.mark.parametrize(
    ("dice", "expected"), [((0.4, 0.5, 0.6), 0.5), ((0.4, 0.3, 0.6), -0.5), ((0.5, 0.5, 0.5), None)]
)
def test_the_share_of_the_gap_that_is_closed(dice: tuple[float, ...], expected: float | None) -> None:
    scores = {arm.folder: _Score(value) for arm, value in zip(ARMS, dice, strict=True)}
    result = module.DemoResult(scores, Path("demo.png"))  # type: ignore[arg-type]
    assert result.gap_closed == (None if expected is None else pytest.approx(expected))


def test_the_demo_tells_what_it_is_doing(tmp_path: Path) -> None:
    console = Console(file=(tmp_path / "log").open("w"), width=120)
    demo(tmp_path / "demo", steps=2, console=console)
    console.file.close()
    log = (tmp_path / "log").read_text()
    assert [log.index(arm.title) for arm in ARMS] == sorted(log.index(arm.title) for arm in ARMS)


@pytest.mark.parametrize("size", [(16, 18, 20), (24, 30)], ids=["3D", "2D"])
def test_a_picture_shows_each_mask_in_the_colour_of_its_class(size: tuple[int, ...], tmp_path: Path) -> None:
    image, label = blocks(0, size)
    nothing = np.zeros_like(label, np.int32)
    masked, bare = tmp_path / "masked.png", tmp_path / "bare.png"
    overlay(
        [Row("$\\frac{", image, label.astype(np.int32), [label.astype(np.int32)])], ["truth", "mask"], masked
    )
    overlay([Row("$\\frac{", image, label.astype(np.int32), [nothing])], ["truth", "mask"], bare)

    def coloured(path: Path) -> int:
        pixels = picture(path)[..., :3]
        return int((np.ptp(pixels, axis=-1) > 0.3).sum())  # the scan and the text are grey

    assert coloured(masked) > 1.5 * coloured(bare) > 0
