"""`mlbseg audit`: planted errors are found, written down in every way, and nothing is lost."""

from __future__ import annotations

import csv
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813 - as its documentation does

import mlbseg
from blocks import TINY, write_case
from conftest import Command
from mlbseg.apps.audit import audit
from mlbseg.apps.audit.trust import WAYS
from mlbseg.data.planted import plant_error
from mlbseg.errors import FaultsError, UserError
from mlbseg.inference import predict

pytestmark = pytest.mark.slow

VALUES = (0, 2, 5)
WRONG = {"case_6": "wrong-scan", "case_9": "missing"}
POSE = {
    "spacing": (1.0, 1.1, 1.3),
    "direction": (0.8, -0.6, 0, 0.6, 0.8, 0, 0, 0, 1),
    "origin": (3.0, -7.0, 11.0),
}


def write_label(path: Path, array: np.ndarray, like: Path) -> None:
    image = sitk.GetImageFromArray(array.astype(np.uint8))
    image.CopyInformation(sitk.ReadImage(str(like)))
    path.parent.mkdir(exist_ok=True)
    sitk.WriteImage(image, str(path))


def array(path: Path) -> np.ndarray:
    return sitk.GetArrayFromImage(sitk.ReadImage(str(path)))


@pytest.fixture(scope="module")
def audited(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Scans, of which four have careful labels and six noisy ones, two of these wrong; and a run on them."""
    root = tmp_path_factory.mktemp("audited")
    data = root / "scans"
    for i in range(10):
        write_case(data, f"case_{i}.nii.gz", i, labelled=True, values=VALUES, **POSE)
        if i >= 4:
            right = data / "labels" / f"case_{i}.nii.gz"
            label = array(right).astype(np.int32)
            if kind := WRONG.get(f"case_{i}"):
                label = plant_error(
                    label, kind, np.random.default_rng(i), spacing=(1.3, 1.1, 1.0), other=np.flip(label)
                )
            write_label(data / "labels_noisy" / right.name, label, right)
            right.rename(root / right.name)
    # Few steps, with no pasting of 16-voxel patches, which hides most of them.
    overrides = [*TINY, "steps=160", "checkpoint_every=80", "stage1_share=0.7", "mlb.mix=0"]
    mlbseg.train(data, root / "run", overrides=overrides, device="cpu")
    return data, root / "run"


@pytest.fixture(scope="module")
def out(audited: tuple[Path, Path]) -> Path:
    """The run's audit, in its usual place."""
    return audit(audited[1]).out


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_the_wrong_labels_are_the_least_trusted(audited: tuple[Path, Path], out: Path) -> None:
    assert out == audited[1] / "audit"
    cases = rows(out / "cases.csv")
    assert [row["rank"] for row in cases] == [str(n) for n in range(1, 11)]
    assert {cases[0]["case"], cases[1]["case"]} == set(WRONG)
    assert float(cases[1]["trust"]) < float(cases[2]["trust"]) - 0.02
    assert {row["role"] for row in cases} == {"clean", "noisy"}
    assert {"trust_label 2", "trust_label 5", "suspected_volume"} <= set(cases[0])


def test_trust_maps_lie_on_their_scans_and_doubt_what_is_wrong(audited: tuple[Path, Path], out: Path) -> None:
    data, run = audited
    for i in range(10):
        found = sitk.ReadImage(str(out / "trust" / f"case_{i}.nii.gz"))
        scan = sitk.ReadImage(str(data / "images" / f"case_{i}.nii.gz"))
        assert found.GetSize() == scan.GetSize()
        for name in ("Spacing", "Origin", "Direction"):
            np.testing.assert_allclose(
                getattr(found, f"Get{name}")(), getattr(scan, f"Get{name}")(), atol=1e-5
            )
        trust = sitk.GetArrayFromImage(found)
        assert trust.dtype == np.float32
        assert 0 <= trust.min() < trust.max() <= 1
    trust = array(out / "trust" / "case_6.nii.gz")
    wrong = array(data / "labels_noisy" / "case_6.nii.gz") != array(run.parent / "case_6.nii.gz")
    assert trust[wrong].mean() < 0.5 < trust[~wrong].mean()


def test_regions_name_a_place_in_the_error_and_what_belongs_there(
    audited: tuple[Path, Path], out: Path
) -> None:
    data, run = audited
    given, right = array(data / "labels_noisy" / "case_9.nii.gz"), array(run.parent / "case_9.nii.gz")
    first = next(row for row in rows(out / "regions.csv") if row["case"] == "case_9")
    x, y, z = (int(first[f"{axis}_index"]) for axis in "xyz")
    assert given[z, y, x] != right[z, y, x]
    assert (int(first["label"]), int(first["suggested"])) == (0, right[z, y, x])
    image = sitk.ReadImage(str(data / "images" / "case_9.nii.gz"))
    expected = image.TransformIndexToPhysicalPoint((x, y, z))
    np.testing.assert_allclose([float(first[f"{axis}_mm"]) for axis in "xyz"], expected, atol=2)
    assert float(first["volume"]) == pytest.approx(int(first["voxels"]) * 1.0 * 1.1 * 1.3, rel=0.3)


def test_the_page_needs_nothing_but_itself(out: Path) -> None:
    page = (out / "audit.html").read_text(encoding="utf-8")
    page = re.sub(r"<script>.*?</script>", "", page, flags=re.S)  # NiiVue's comments name their sources
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert "https://" not in page
    assert page.index("case_6") < page.index("case_0")
    assert "A low trust is a reason to look, not a verdict" in page


@pytest.mark.parametrize("way", WAYS)
def test_every_method_judges(audited: tuple[Path, Path], tmp_path: Path, way: str, command: Command) -> None:
    found = command("audit", audited[1], "--method", way, "--out", tmp_path / "a", "--json").json
    assert found["method"] == way
    assert len(found["cases"]) == 10
    assert all(0 <= case["trust"] <= 1 for case in found["cases"])
    if way != "alignment":  # docs/audit.md says why
        assert {case["case"] for case in found["cases"][:2]} == set(WRONG)


def test_labels_of_ones_own_are_judged_and_strangers_named(
    audited: tuple[Path, Path], tmp_path: Path, command: Command
) -> None:
    data, run = audited
    labels = tmp_path / "labels"
    for name in ("case_4", "case_6", "case_1"):
        source = data / ("labels" if name == "case_1" else "labels_noisy") / f"{name}.nii.gz"
        labels.mkdir(exist_ok=True)
        shutil.copy(source, labels)
    found = command("audit", run, "--labels", labels, "--out", tmp_path / "a", "--json").json
    assert [case["role"] for case in found["cases"]] == ["given"] * 3
    assert found["cases"][0]["case"] == "case_6"
    shutil.copy(labels / "case_1.nii.gz", labels / "stranger.nii.gz")
    outcome = command("audit", run, "--labels", labels, "--out", tmp_path / "b", "--quiet")
    assert outcome.code == 2
    assert "stranger.nii.gz: no scan named stranger (name their folder with --scans)" in outcome.err
    assert "the other labels were judged" in outcome.err
    assert len(rows(tmp_path / "b" / "cases.csv")) == 3


def test_a_label_that_cannot_be_used_stops_no_other(audited: tuple[Path, Path], tmp_path: Path) -> None:
    data, run = audited
    labels = tmp_path / "labels"
    labels.mkdir()
    shutil.copy(data / "labels" / "case_0.nii.gz", labels)
    (labels / "case_1.nii.gz").write_bytes(b"no image")
    moved = sitk.ReadImage(str(data / "labels" / "case_2.nii.gz"))
    moved.SetOrigin((0, 0, 0))
    sitk.WriteImage(moved, str(labels / "case_2.nii.gz"))
    sitk.WriteImage(sitk.ReadImage(str(data / "labels" / "case_3.nii.gz")) + 1, str(labels / "case_3.nii.gz"))
    for way in ("regional", "confident"):
        result = audit(run, labels, tmp_path / way, way=way)
        assert [found.case for found in result.cases] == ["case_0"]
        told = {fault.case_id: str(fault) for fault in result.faults}
        assert set(told) == {"case_1", "case_2", "case_3"}
        assert "origin" in told["case_2"]
        assert "label values" in told["case_3"]
    (labels / "case_0.nii.gz").unlink()
    with pytest.raises(FaultsError, match="no label could be judged"):
        audit(run, labels, tmp_path / "none")
    assert not (tmp_path / "none" / "cases.csv").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--method", "regionl"], "unknown audit method 'regionl': did you mean 'regional'"),
        (["--threshold", "1"], "--threshold: found 1.0, expected a number between 0 and 1"),
        (["--scans", "x"], "--scans names the scans of --labels"),
        (["--labels", "nowhere"], "nowhere"),
        ([], "exists already and is not empty (pass --overwrite, or choose another OUT)"),
    ],
)
def test_what_cannot_be_asked_is_refused(
    audited: tuple[Path, Path], out: Path, arguments: list[str], message: str, command: Command
) -> None:
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    fresh = ["--out", out.parent / "fresh"] if arguments else []
    outcome = command("audit", audited[1], *arguments, *fresh)
    assert outcome.code == 2
    assert message in outcome.err
    assert before == {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    assert not (out.parent / "fresh").exists()


def test_proposals_mend_the_suspected_regions_and_nothing_else(
    audited: tuple[Path, Path], tmp_path: Path, command: Command
) -> None:
    data, run = audited
    outcome = command("audit", run, "--propose", "--out", tmp_path / "a", "--quiet")
    assert outcome.code == 0
    assert len(list((tmp_path / "a" / "proposed").iterdir())) == 10
    for case in ("case_6", "case_9", "case_5"):
        given, right, proposed = (
            array(folder / f"{case}.nii.gz")
            for folder in (data / "labels_noisy", run.parent, tmp_path / "a" / "proposed")
        )
        if case in WRONG:
            assert (proposed != right).sum() < 0.5 * (given != right).sum()
        else:
            np.testing.assert_array_equal(proposed, given)


def test_proposals_are_never_replaced_and_old_maps_do_not_stay(
    audited: tuple[Path, Path], tmp_path: Path
) -> None:
    data, run = audited
    audit(run, out=tmp_path / "a", propose=True)
    before = (tmp_path / "a" / "proposed" / "case_6.nii.gz").read_bytes()
    with pytest.raises(UserError, match="holds proposals, which somebody may have corrected"):
        audit(run, tmp_path / "a" / "proposed", tmp_path / "a", propose=True, overwrite=True)
    labels = tmp_path / "labels"
    labels.mkdir()
    shutil.copy(data / "labels" / "case_0.nii.gz", labels)
    audit(run, labels, tmp_path / "a", overwrite=True)
    assert [p.name for p in (tmp_path / "a" / "trust").iterdir()] == ["case_0.nii.gz"]
    assert (tmp_path / "a" / "proposed" / "case_6.nii.gz").read_bytes() == before


def test_an_audit_repeats_and_can_be_replaced(audited: tuple[Path, Path], tmp_path: Path) -> None:
    first = audit(audited[1], out=tmp_path / "a")
    text = (tmp_path / "a" / "cases.csv").read_text()
    (tmp_path / "a" / "cases.csv").write_text("old")
    again = audit(audited[1], out=tmp_path / "a", overwrite=True)
    assert (tmp_path / "a" / "cases.csv").read_text() == text
    assert again.cases == first.cases


def test_what_no_audit_has_written_is_never_removed(audited: tuple[Path, Path], tmp_path: Path) -> None:
    audit(audited[1], out=tmp_path / "a")
    (tmp_path / "a" / "trust" / "mine.nii.gz").write_bytes(b"mine")
    with pytest.raises(UserError, match=r"trust: holds 'mine\.nii\.gz', which is no map of this audit"):
        audit(audited[1], out=tmp_path / "a", overwrite=True)
    assert (tmp_path / "a" / "cases.csv").exists()
    assert len(list((tmp_path / "a" / "trust").iterdir())) == 11


def test_a_scan_that_is_gone_stops_no_other(audited: tuple[Path, Path], tmp_path: Path) -> None:
    data, run = audited
    moved = shutil.copytree(data, tmp_path / "scans")
    own = shutil.copytree(run, tmp_path / "run")
    record = json.loads((own / "data.json").read_text())
    (own / "data.json").write_text(json.dumps({**record, "root": str(moved)}))
    (moved / "images" / "case_1.nii.gz").unlink()
    (moved / "labels" / "case_1.nii.gz").unlink()
    (moved / "labels_noisy" / "case_5.nii.gz").unlink()
    result = audit(own, out=tmp_path / "a")
    assert len(result.cases) == 8
    assert [str(fault) for fault in result.faults] == [
        f"case_1: no scan of this name in {moved} any more",
        f"case_5: no label of this name in {moved} any more",
    ]
    moved.rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=r"put the scans back, or correct root in .*data\.json"):
        audit(own, out=tmp_path / "b")


def test_an_audit_that_is_stopped_leaves_the_earlier_one_whole(
    audited: tuple[Path, Path], tmp_path: Path
) -> None:
    audit(audited[1], out=tmp_path / "a")

    def content() -> dict[str, bytes]:
        return {str(path): path.read_bytes() for path in (tmp_path / "a").rglob("*") if path.is_file()}

    before = content()

    def stop(done: int, _: int, __: str) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        audit(audited[1], out=tmp_path / "a", way="disagreement", overwrite=True, progress=stop)
    assert content() == before
    (tmp_path / "a" / f".mlbseg-{'0' * 32}").mkdir()  # as a kill leaves it
    assert len(audit(audited[1], out=tmp_path / "a", overwrite=True).cases) == 10
    assert content() == before


def test_networks_that_doubt_most_labels_are_doubted_themselves(
    audited: tuple[Path, Path], command: Command, tmp_path: Path
) -> None:
    data, run = audited
    assert not audit(run, out=tmp_path / "a").caution
    (tmp_path / "swapped").mkdir()
    for path in (data / "labels").iterdir():
        write_label(tmp_path / "swapped" / path.name, np.flip(array(path)), path)
    outcome = command("audit", run, "--labels", tmp_path / "swapped", "--out", tmp_path / "b", "--quiet")
    assert "note: half of the labels have a trust below 0." in outcome.out
    assert "Half of the labels" in (tmp_path / "b" / "audit.html").read_text()


def test_what_lies_outside_the_crop_is_background_or_doubted(tmp_path: Path) -> None:
    for i in range(3):
        write_case(tmp_path / "scans", f"{i}.nii.gz", i, labelled=True)
        for folder in ("images", "labels"):
            path = tmp_path / "scans" / folder / f"{i}.nii.gz"
            padded = np.pad(array(path), ((9, 12), (5, 8), (6, 14)))
            if folder == "labels":
                padded[:3, :4, :5] = i == 0  # far outside the scan's content
            sitk.WriteImage(sitk.GetImageFromArray(padded), str(path))
    overrides = [*TINY, "steps=4", "crop=true"]
    mlbseg.train(tmp_path / "scans", tmp_path / "run", method="supervised", overrides=overrides)
    result = audit(tmp_path / "run", propose=True)
    trust, proposed = (array(result.out / folder / "0.nii.gz") for folder in ("trust", "proposed"))
    assert not trust[:3, :4, :5].any()
    assert not proposed[:3, :4, :5].any()
    assert (trust[:3, 4:] == 1).all()
    cases = {found.case: found for found in result.cases}
    first = cases["0"].regions[0]
    assert (first.label, first.suggested, first.voxels, first.volume) == (1, 0, 60, 60.0)
    assert first.index in {(x, y, z) for x in range(5) for y in range(4) for z in range(3)}
    label = array(tmp_path / "scans" / "labels" / "0.nii.gz")
    assert cases["0"].trust <= 1 - 60 / (label > 0).sum() / 2
    assert all(region.voxels != 60 for name in "12" for region in cases[name].regions[:1])


def test_the_terminal_shows_names_as_they_are_and_units_of_pictures(tmp_path: Path, command: Command) -> None:
    for i in range(2):
        write_case(
            tmp_path / "scans", f"scan[b]_{i}.png", i, labelled=True, size=(32, 40), values=(0, 100, 200)
        )
    overrides = [*TINY, "steps=2", "normalisation=zscore"]
    mlbseg.train(tmp_path / "scans", tmp_path / "run", method="supervised", overrides=overrides)
    out = command("audit", tmp_path / "run", "--quiet").out
    assert "scan[b]_0" in out
    assert "mm²" in out
    assert "mm³" not in out


def test_pictures_get_maps_that_hold_fractions(tmp_path: Path) -> None:
    for i in range(3):
        write_case(tmp_path / "scans", f"{i}.png", i, labelled=True, size=(32, 40), values=(0, 100, 200))
    overrides = [*TINY, "steps=4", "normalisation=zscore"]
    mlbseg.train(tmp_path / "scans", tmp_path / "run", method="supervised", overrides=overrides)
    result = audit(tmp_path / "run")
    trust = array(result.out / "trust" / "1.tiff")
    assert trust.shape == (32, 40)
    assert len(np.unique(trust)) > 2
    assert "mm²" in (result.out / "audit.html").read_text(encoding="utf-8")


def test_probabilities_and_trust_mean_the_same_networks(audited: tuple[Path, Path], tmp_path: Path) -> None:
    data, run = audited
    predict(run, data, tmp_path / "masks", only=["case_9"], probabilities=True)
    result = audit(run, out=tmp_path / "a", way="disagreement")
    label = array(data / "labels_noisy" / "case_9.nii.gz")
    p = np.stack([array(tmp_path / "masks" / "probabilities" / f"case_9_{v}.nii.gz") for v in VALUES])
    own = np.take_along_axis(p, np.searchsorted(VALUES, label)[None], 0)[0]
    trust = array(result.out / "trust" / "case_9.nii.gz")
    assert ((own > 0.6) & (trust < 0.5)).mean() < 0.01
    assert ((own < 0.3) & (trust > 0.6)).mean() < 0.01
