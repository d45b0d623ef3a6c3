"""log.csv as charts, weight maps as strips, and what is said of a run."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from mlbseg.apps.report.charts import line_chart
from mlbseg.apps.report.curves import MOST_POINTS, WORDS, Log, charts, read_log
from mlbseg.apps.report.findings import Finding, findings, shown
from mlbseg.apps.report.scoring import Scored
from mlbseg.apps.report.sections import weights_section
from mlbseg.apps.report.weights import MOST_STEPS, snapshots, strips
from mlbseg.config import load_config
from mlbseg.errors import Fault, UserError
from mlbseg.evaluation import Evaluation, Row
from mlbseg.methods.mlb import MLB
from mlbseg.metrics import Scores, summarise
from mlbseg.training.log import append_row, cut_log
from report.pages import EVIL


def write_log(path: Path, rows: list[dict[str, float]]) -> Path:
    for row in rows:
        append_row(path, row)
    return path


def test_steps_count_on_from_stage_to_stage(tmp_path: Path) -> None:
    rows = [{"stage": stage, "step": step, "clean": step} for stage in (1, 2) for step in (10, 20)]
    log = read_log(write_log(tmp_path / "log.csv", [*rows, {"stage": 2, "step": 30, "pseudo": 0.5}]))
    assert log.columns == {"clean": [(10, 10), (20, 20), (30, 10), (40, 20)], "pseudo": [(50, 0.5)]}
    assert (log.boundary, log.stages) == (20, (1, 2))
    assert log.tail("clean", 0.5) == [10, 20]
    assert log.tail("nothing") == []
    alone = read_log(write_log(tmp_path / "b.csv", rows[2:]))
    assert (alone.boundary, alone.columns["clean"][0]) == (None, (10, 10))


def test_long_logs_are_thinned_by_means(tmp_path: Path) -> None:
    count = 2 * MOST_POINTS
    rows = [{"stage": 1, "step": i, "clean": i % 2} for i in range(1, count + 1)]
    points = read_log(write_log(tmp_path / "log.csv", rows)).columns["clean"]
    assert len(points) == MOST_POINTS
    assert {value for _, value in points} == {0.5}
    assert points[-1][0] == count


def test_no_log_and_a_damaged_one(tmp_path: Path) -> None:
    assert read_log(tmp_path / "log.csv") == Log({}, None, ())
    (tmp_path / "log.csv").write_text("stage,step,clean\n1,x,2\n")
    with pytest.raises(UserError, match="damaged"):
        read_log(tmp_path / "log.csv")


def test_every_column_of_the_log_has_its_chart() -> None:
    values = ("lr", "validation_dice", "kept_pseudo", "kept_teacher", "mass_initial", "mass_pseudo")
    names = [*WORDS, *values, "of_a_package"]
    html = charts(Log({name: [(1, 0.25), (2, 0.5)] for name in names}, None, (1,)))
    assert html.count("<figure") == 6
    assert "of a package" in html
    drawn = len(re.findall('class="line"', html)) - len(re.findall('class="sample"', html))
    assert drawn == len(names)


def test_a_new_name_becomes_a_column_of_the_log(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    write_log(
        path,
        [{"stage": 1, "step": 10, "lr": 0.5, "clean": 1}, {"stage": 2, "step": 10, "lr": 0.25, "pale": 3}],
    )
    assert path.read_text() == "stage,step,lr,clean,pale\n1,10,0.5,1,\n2,10,0.25,,3\n"
    with path.open("a") as file:
        file.write("2,20,0.1")  # what a kill leaves
    cut_log(path, 2, 20)
    write_log(path, [{"stage": 2, "step": 20, "lr": 0.1, "clean": 4, "paleness": 5}])
    assert path.read_text().splitlines() == [
        "stage,step,lr,clean,pale,paleness", "1,10,0.5,1,,", "2,10,0.25,,3,", "2,20,0.1,4,,5",
    ]  # fmt: skip
    assert read_log(path).columns["paleness"] == [(30, 5)]
    with pytest.raises(ValueError, match="letters"):
        append_row(path, {"a,b": 1})
    path.write_text("2,10,0.0")  # of a row that was cut off, and nothing else
    cut_log(path, 2, 20)
    assert not path.exists()


def test_a_chart_goes_where_its_values_go() -> None:
    html = line_chart("t", {"a": [(0, 0.0), (10, 1.0)]}, bounds=(0, 1))
    path = re.findall(r'class="line"[^>]* d="M([\d.]+) ([\d.]+)L([\d.]+) ([\d.]+)"', html)
    assert path == [("52.0", "212.0", "548.0", "12.0")]
    assert line_chart("t", {"a": []}) == ""
    assert "logarithmic" in line_chart("t", {"a": [(0, 0.01), (1, 10)]}, may_be_log=True)
    assert "logarithmic" not in line_chart("t", {"a": [(0, 0), (1, 10)]}, may_be_log=True)
    cut = line_chart("t", {"a": [(0, 0), (1, 1), (2, 0), (3, 1)]}, mark=(1, "stage 2"))
    assert re.findall(r' d="([^"]+)"', cut)[0].count("M") == 2
    assert EVIL not in line_chart(EVIL, {EVIL: [(0, 1), (1, 2)], "b": [(0, 1)]}, note=EVIL, mark=(0, EVIL))
    assert line_chart("t", {"a": [(5, 2.0)]})  # one point, no range


def test_noise_is_smoothed_by_its_mean() -> None:
    html = line_chart("t", {"a": [(i, float(i % 2)) for i in range(200)]}, bounds=(0, 1))
    line = re.findall(r'class="line"[^>]* d="([^"]+)"', html)[0]
    heights = [float(pair.split()[1]) for pair in re.split("[ML]", line)[1:]]
    assert np.allclose(heights, 112, atol=25)  # the middle of 12 ... 212
    assert 'class="pale"' in html


# --- weight maps -------------------------------------------------------------------------------------------


def write_weights(folder: Path, count: int, shape: tuple[int, ...] = (5, 8, 9)) -> Path:
    folder.mkdir()
    rng = np.random.default_rng(0)
    for step in range(count):
        arrays = {"image": rng.random(shape), "case_id": np.array(EVIL)}
        for source in ("initial", "pseudo"):
            weight = np.zeros(shape) if step == 0 else rng.random(shape) + 0.1
            arrays |= {f"label_{source}": rng.integers(0, 3, shape), f"weight_{source}": weight}
        np.savez(folder / f"{10 * (step + 1):08d}.npz", **arrays)
    return folder


@pytest.mark.parametrize("shape", [(5, 8, 9), (8, 9)])
def test_weight_maps_become_small_multiples(shape: tuple[int, ...], tmp_path: Path) -> None:
    files = snapshots(write_weights(tmp_path / "weights", 10, shape))
    html = strips(files)
    assert [p.stem for p in files][:2] == ["00000010", "00000020"]
    assert html.count("<img") == 1 + 4 * MOST_STEPS
    assert "step 10<" in html
    assert "step 100<" in html
    assert "weights of the initial labels at step 10: 0% of the pixels above 0" in html
    assert "weights of the pseudo labels at step 100: 100% of the pixels above 0" in html
    assert EVIL not in html


def test_damaged_weight_maps_are_named(tmp_path: Path) -> None:
    folder = write_weights(tmp_path / "weights", 2)
    (folder / "00000020.npz").write_bytes(b"x")
    with pytest.raises(UserError, match=r"00000020\.npz: damaged"):
        strips(snapshots(folder))
    np.savez(
        folder / "00000020.npz", image=np.zeros((2, 2)), weight_a=np.zeros((3, 3)), case_id=np.array("a")
    )
    with pytest.raises(UserError, match="damaged"):
        strips(snapshots(folder))
    np.savez(folder / "00000020.npz", image=np.array([object()]), case_id=np.array("a"))  # never unpickled
    with pytest.raises(UserError, match="damaged"):
        strips(snapshots(folder))


def test_without_weight_maps_the_reason_is_given(tmp_path: Path) -> None:
    split = SimpleNamespace(noisy=())
    assert (
        weights_section(SimpleNamespace(root=tmp_path, config=load_config(method="bcp"), split=split)) is None
    )  # type: ignore[arg-type]
    section = weights_section(SimpleNamespace(root=tmp_path, config=load_config(method="mlb"), split=split))  # type: ignore[arg-type]
    assert section is not None
    assert "every pixel counts alike" in section.body

    def why(*overrides: str, noisy: bool) -> str:
        return MLB.why_no_weights(load_config(overrides=overrides).of("mlb"), noisy=noisy)

    assert "no weight maps" in why(noisy=True)
    confident = ("mlb.weighting=confidence", "mlb.decides=everywhere")
    assert "no weight maps" in why(*confident, noisy=False)
    assert "every pixel" in why(*confident, "mlb.weighting=uniform", noisy=True)


# --- what is said ------------------------------------------------------------------------------------------


class FakeRun:
    """What the rules look at of a run."""

    class plan:  # noqa: N801 - as the run's attribute is called
        structures = {1: "organ", 2: "vessel"}  # noqa: RUF012 - nobody changes it

    class result:  # noqa: N801 - likewise
        warnings: tuple[str, ...] = ()


def scored(
    dice: list[float],
    *,
    group: str = "test",
    voxels: tuple[int, int] = (100, 100),
    faults: tuple[Fault, ...] = (),
) -> Scored:
    """Return cases of two classes: organ with these Dice, vessel with the same and these voxel counts."""
    rows = []
    for i, value in enumerate(dice):
        one = Scores(value, value / (2 - value), 1.0, 0.5, 1.0, 0.5)
        rows += [Row(f"case_{i}", 1, "organ", one), Row(f"case_{i}", 2, "vessel", one)]
    table = [{1: rows[2 * i].scores, 2: rows[2 * i + 1].scores} for i in range(len(dice))]
    result = Evaluation({1: "organ", 2: "vessel"}, tuple(rows), summarise(table), faults, ())
    counts = {1: dict.fromkeys(result.cases, (100, 100)), 2: dict.fromkeys(result.cases, voxels)}
    cases = dict.fromkeys(result.cases)
    return Scored(group, cases, {}, result, faults, 0, counts)  # type: ignore[arg-type]


def said(found: list[Finding], words: str) -> bool:
    return any(words in finding.title and finding.warning for finding in found)


def test_a_good_run_gets_no_warning() -> None:
    log = Log(
        {"kept_pseudo": [(1, 0.8)], "validation_dice": [(i, 0.8 + i / 1e3) for i in range(5)]}, None, (1,)
    )
    found = findings(FakeRun(), log, scored([0.9] * 12), 0.92)  # type: ignore[arg-type]
    assert [finding for finding in found if finding.warning] == []
    assert "No warnings" in shown(found)


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ({"kept_pseudo": [(i, 1.0 if i < 70 else 0.001) for i in range(100)]}, "The weights have collapsed"),
        ({"mass_initial": [(1, 0.0)], "mass_pseudo": [(1, 1.0)]}, "One source of labels has no say"),
        ({"validation_dice": [(1, 0.5), (2, 0.8), (3, 0.7)]}, "validation was better before the end"),
        ({"validation_dice": [(1, 0.5), (2, 0.6), (3, 0.7)]}, "Still learning"),
    ],
)
def test_logs_are_read(columns: dict[str, list[tuple[float, float]]], words: str) -> None:
    assert said(findings(FakeRun(), Log(columns, None, (1,)), scored([0.9] * 12), None), words)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("cases", "trained", "words"),
    [
        (scored([0.7] * 12), 0.95, "much better on the cases it was trained on"),
        (scored([0.9] * 12, voxels=(0, 50)), None, "vessel is never predicted"),
        (scored([0.9] * 12, voxels=(50, 0)), None, "vessel is invented"),
        (scored([0.9] * 12, voxels=(150, 100)), None, "vessel is too large throughout"),
        (scored([0.9] * 12, voxels=(50, 100)), None, "vessel is too small throughout"),
        (scored([0.9] * 11 + [0.3]), None, "1 case falls far behind"),
        (scored([0.9] * 12, group="clean"), None, "The scores are of training cases"),
        (scored([0.9] * 12, group="noisy"), None, "unverified labels"),
        (scored([0.9] * 12, faults=(Fault("case_9", "unreadable"),)), None, "Not all is scored"),
        (None, None, "Nothing could be scored"),
    ],
)
def test_scores_are_judged(cases: Scored | None, trained: float | None, words: str) -> None:
    found = findings(FakeRun(), Log({}, None, ()), cases, trained)  # type: ignore[arg-type]
    assert said(found, words)
    assert sum(finding.warning for finding in found) == 1
    assert "Warning: " in shown(found)


def test_warnings_of_training_are_findings() -> None:
    run = FakeRun()
    run.result = SimpleNamespace(warnings=("the network has not learned the careful labels",))  # type: ignore[assignment, misc]
    html = shown(findings(run, Log({}, None, ()), scored([0.9] * 12), None))  # type: ignore[arg-type]
    assert "The network has not learned the careful labels" in html


def test_few_cases_are_a_note() -> None:
    found = findings(FakeRun(), Log({}, None, ()), scored([0.9, 0.9]), None)  # type: ignore[arg-type]
    assert [(f.title, f.warning) for f in found] == [("2 cases are few", False)]
