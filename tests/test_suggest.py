"""From a run to the scans to label next: who is a candidate, what is written, what is refused."""

from __future__ import annotations

import csv
import json
import re
import shutil
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from blocks import SIZE, blocks, save
from conftest import Command
from mlbseg.apps import suggest as suggest_room
from mlbseg.apps.suggest import COLUMNS, suggest
from mlbseg.apps.suggest.look import Looker
from mlbseg.errors import FaultsError, UserError

pytestmark = pytest.mark.slow  # the runs are trained once for all tests
UNLABELLED = {"case_4", "case_5", "case_6", "case_7"}
LABELLED = {"case_0", "case_1", "case_2"}  # case_3 is for testing


def new_scans(root: Path, seeds: dict[str, int]) -> Path:
    for name, seed in seeds.items():
        save(root / f"{name}.nii.gz", blocks(seed)[0])
    return root


def with_root(run: Path, copy: Path, root: Path) -> Path:
    """Return a copy of a run whose scans are said to be in `root`."""
    shutil.copytree(run, copy)
    record = json.loads((copy / "data.json").read_text())
    (copy / "data.json").write_text(json.dumps({**record, "root": str(root)}))
    return copy


def test_the_runs_own_unlabelled_scans_are_ranked(supervised_run: Path) -> None:
    seen: list[tuple[int, int, str]] = []
    result = suggest(supervised_run, progress=lambda *step: seen.append(step))
    assert {row.case for row in result.suggested} == UNLABELLED
    assert [row.rank for row in result.suggested] == [1, 2, 3, 4]
    assert (result.candidates, result.labelled, result.faults) == (4, 3, ())
    assert (seen[0][:2], seen[-1]) == ((0, 7), (7, 7, ""))
    for i, row in enumerate(result.suggested):
        assert row.nearest_labelled in LABELLED
        earlier = {r.case for r in result.suggested[:i]}
        assert row.nearest_picked in (earlier or {""})
        assert 0 < row.uncertainty < 1
        assert 0 <= row.score <= 1
    assert suggest(supervised_run) == result
    assert suggest(supervised_run, n=2).suggested == result.suggested[:2]


def test_a_method_with_a_teacher(mlb_run: Path) -> None:
    assert {row.case for row in suggest(mlb_run).suggested} == UNLABELLED


def test_of_copies_under_other_names_one_is_picked(supervised_run: Path, tmp_path: Path) -> None:
    names = {f"copy_{i}": 20 for i in range(4)} | {"x": 21, "y": 22}
    result = suggest(supervised_run, scans=new_scans(tmp_path / "scans", names), n=3)
    assert sum(row.case.startswith("copy") for row in result.suggested) == 1
    every = suggest(supervised_run, scans=tmp_path / "scans").suggested
    assert [row.case.startswith("copy") for row in every[3:]] == [True] * 3
    assert [row.score for row in every[3:]] == [0.0] * 3


def test_a_copy_of_a_labelled_scan_comes_last_and_is_called_one(
    supervised_run: Path, scans: Path, tmp_path: Path
) -> None:
    folder = new_scans(tmp_path / "scans", {"a": 20, "b": 21})
    shutil.copy(scans / "images" / "case_1.nii.gz", folder / "c.nii.gz")
    last = suggest(supervised_run, scans=folder).suggested[-1]
    assert (last.case, last.nearest_labelled, last.distance_to_labelled, last.score) == ("c", "case_1", 0, 0)
    assert "nearly a copy of case_1, which is labelled" in last.reason


@pytest.mark.parametrize("rule", ["cover", "spread"])
def test_an_unlike_scan_is_found(rule: str, supervised_run: Path, tmp_path: Path) -> None:
    folder = new_scans(tmp_path / "scans", {f"usual_{i}": 20 + i for i in range(4)})
    odd = np.random.default_rng(0).normal(100, 10, SIZE).astype(np.float32)
    odd[::2] += 150
    save(folder / "odd.nii.gz", odd)
    result = suggest(supervised_run, scans=folder, n=5, rule=rule)
    row = next(row for row in result.suggested if row.case == "odd")
    assert row.distance_to_labelled == max(r.distance_to_labelled for r in result.suggested)
    assert "unlike any labelled scan" in row.reason
    assert row.rank <= 2


def test_reasons_say_what_the_numbers_say(supervised_run: Path, tmp_path: Path) -> None:
    folder = new_scans(tmp_path / "scans", {f"s{i}": 20 + i for i in range(8)})
    rows = suggest(supervised_run, scans=folder).suggested
    assert len(rows) == 8
    for row in rows:
        found = re.search(r"expects a Dice of ([\d.]+) here and more in (\d+)% of the scans", row.reason)
        assert found
        assert float(found[1]) == pytest.approx(1 - row.uncertainty, abs=6e-4)
        surer = np.mean([other.uncertainty < row.uncertainty for other in rows])
        assert int(found[2]) == pytest.approx(100 * surer, abs=0.51)
        assert row.nearest_labelled in row.reason
        if times := re.search(r"([\d.]+) times the usual distance", row.reason):
            assert float(times[1]) == pytest.approx(row.distance_to_labelled, abs=6e-3)
        assert ("unlike any" in row.reason) == (row.distance_to_labelled > suggest_room.FAR)


def test_the_file_holds_what_is_returned(supervised_run: Path, tmp_path: Path) -> None:
    folder = new_scans(tmp_path / "scans", {"=cmd()": 20, "b": 21})
    out = tmp_path / "new" / "next.csv"
    result = suggest(supervised_run, scans=folder, out=out)
    with out.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == COLUMNS
    assert {row["case"] for row in rows} == {"'=cmd()", "b"}
    for row, own in zip(rows, result.suggested, strict=True):
        assert float(row["score"]) == pytest.approx(own.score, rel=1e-5)
        assert row["reason"] == own.reason


def test_nothing_is_written_over(supervised_run: Path, scans: Path, tmp_path: Path) -> None:
    out = tmp_path / "a.csv"
    out.write_text("mine")
    with pytest.raises(UserError, match=r"a\.csv exists already \(pass --overwrite"):
        suggest(supervised_run, out=out)
    assert out.read_text() == "mine"
    suggest(supervised_run, out=out, overwrite=True, n=1)
    assert len(out.read_text().splitlines()) == 2
    with pytest.raises(UserError, match=r"expected a name that ends in \.csv"):
        suggest(supervised_run, out=scans / "images" / "case_0.nii.gz", overwrite=True)
    listed = tmp_path / "list.csv"
    listed.write_text(f"id,image\na,{scans / 'images' / 'case_5.nii.gz'}\n")
    with pytest.raises(UserError, match="is the list of the scans itself"):
        suggest(supervised_run, scans=listed, out=listed, overwrite=True)
    assert [row.case for row in suggest(supervised_run, scans=listed).suggested] == ["a"]
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file: cannot be made a folder"):
        suggest(supervised_run, out=tmp_path / "file" / "a.csv")


def test_labelled_and_test_scans_are_no_candidates(supervised_run: Path, scans: Path, tmp_path: Path) -> None:
    result = suggest(supervised_run, scans=scans)
    assert {row.case for row in result.suggested} == UNLABELLED
    assert set(result.left_out) == {*LABELLED, "case_3"}
    with pytest.raises(UserError, match="labelled or set apart for testing"):
        suggest(supervised_run, scans=scans / "images" / "case_3.nii.gz")
    # Another folder's scan of the same name is another scan.
    other = new_scans(tmp_path / "other", {"case_0": 30})
    assert [row.case for row in suggest(supervised_run, scans=other).suggested] == ["case_0"]


def test_a_faulty_scan_stops_no_other(supervised_run: Path, tmp_path: Path, scans: Path) -> None:
    folder = new_scans(tmp_path / "scans", {"a": 20, "b": 21})
    (folder / "c.nii.gz").write_bytes(b"no scan")
    result = suggest(supervised_run, scans=folder)
    assert {row.case for row in result.suggested} == {"a", "b"}
    assert [fault.case_id for fault in result.faults] == ["c"]
    for name in ("a", "b"):
        (folder / f"{name}.nii.gz").write_bytes(b"no scan")
    with pytest.raises(FaultsError, match="3 faults in the scans to choose from"):
        suggest(supervised_run, scans=folder)
    copy = shutil.copytree(scans, tmp_path / "data")
    (copy / "images" / "case_1.nii.gz").unlink()
    (copy / "images" / "case_2.nii.gz").write_bytes(b"no scan")
    run = with_root(supervised_run, tmp_path / "run", copy)
    with pytest.warns(UserWarning, match="case_2.nii.gz: changed since the run began"):
        result = suggest(run)
    assert {fault.case_id for fault in result.faults} == {"case_1", "case_2"}
    assert {row.nearest_labelled for row in result.suggested} == {"case_0"}
    (copy / "images" / "case_0.nii.gz").write_bytes(b"no scan")
    with (
        pytest.warns(UserWarning, match="changed since the run began"),
        pytest.raises(FaultsError, match="in the labelled scans"),
    ):
        suggest(run)


def test_an_error_of_ours_is_not_taken_for_a_bad_scan(
    supervised_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("sizes do not match")

    monkeypatch.setattr(Looker, "look", broken)
    with pytest.raises(RuntimeError, match="sizes do not match"):
        suggest(supervised_run)


def test_labels_are_not_looked_at(supervised_run: Path, scans: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(scans, tmp_path / "data")
    for path in (copy / "labels").iterdir():
        path.write_bytes(b"no label")
    run = with_root(supervised_run, tmp_path / "run", copy)
    assert suggest(run) == suggest(supervised_run)


def test_what_cannot_be_suggested(supervised_run: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--n: found 0"):
        suggest(supervised_run, n=0)
    with pytest.raises(UserError, match="unknown rule"):
        suggest(supervised_run, rule="best")
    with pytest.raises(UserError, match="not a run folder"):
        suggest(tmp_path)
    run = with_root(supervised_run, tmp_path / "run", tmp_path / "gone")
    with pytest.raises(UserError, match=r"gone: cannot be opened.*correct root in .*data\.json"):
        suggest(run)
    split = json.loads((run / "split.json").read_text())
    (run / "split.json").write_text(json.dumps({**split, "unlabelled": []}))
    with_root(run, tmp_path / "full", Path(json.loads((supervised_run / "data.json").read_text())["root"]))
    with pytest.raises(UserError, match="all of the run's scans are labelled"):
        suggest(tmp_path / "full")


def test_the_command(supervised_run: Path, scans: Path, tmp_path: Path, command: Command) -> None:
    out = tmp_path / "next.csv"
    outcome = command("suggest", supervised_run, "--n", 2, "--out", out, "--device", "cpu", "--threads", 1)
    assert outcome.code == 0
    assert "label next, of 4 scans (3 labelled)" in outcome.out
    assert f"wrote {out}" in outcome.out
    machine = command("suggest", supervised_run, "--n", 2, "--json")
    assert machine.code == 0
    with out.open(newline="") as file:
        assert [row["case"] for row in csv.DictReader(file)] == [r["case"] for r in machine.json["suggested"]]
    wrong = command("suggest", supervised_run, "--rule", "covr", "--json")
    assert (wrong.code, "did you mean 'cover'" in wrong.json["error"]) == (2, True)
    assert command("suggest", supervised_run, "--rule", "spread", "--json").json["suggested"] == [
        asdict(row) for row in suggest(supervised_run, rule="spread").suggested
    ]
    again = command("suggest", supervised_run, "--n", 2, "--out", out, "--json")
    assert again.code == 2
    assert "exists already" in again.json["error"]
    passed = command("suggest", supervised_run, "--scans", scans, "--quiet")
    assert (passed.code, passed.err) == (0, "")
    assert "note: 4 already labelled or set apart for testing, left out" in passed.out


def test_the_command_names_faults(supervised_run: Path, tmp_path: Path, command: Command) -> None:
    folder = new_scans(tmp_path / "scans", {"a": 20})
    (folder / "c.nii.gz").write_bytes(b"no scan")
    text = command("suggest", supervised_run, "--scans", folder)
    assert text.code == 2
    assert "label next, of 1 scans" in text.out
    assert "c.nii.gz" in text.err
    assert "the other scans were ranked" in text.err
    machine = command("suggest", supervised_run, "--scans", folder, "--json")
    assert (machine.code, machine.json["faults"][0]["case_id"]) == (2, "c")
