"""The server of a review: what it serves, and what it refuses."""

from __future__ import annotations

import re
import shutil
import zlib
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from blocks import write_blocks
from mlbseg.apps.review import desk as desk_room
from mlbseg.apps.review.listing import list_cases
from mlbseg.data.readers import read_label
from mlbseg.errors import UserError
from report.pages import EVIL, layer
from review.served import TOKEN, Served, served

STREAM = {"Content_Type": "application/octet-stream"}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write_blocks(tmp_path / "scans", count=3, labelled=2)


@pytest.fixture
def folder(root: Path) -> Iterator[Served]:
    with served(root) as found:
        yield found


def test_a_case_is_opened_corrected_and_saved(folder: Served, root: Path) -> None:
    path = root / "labels" / "case_1.nii.gz"
    case = folder.case(1)
    assert (case["name"], case["part"], case["parts"], case["readonly"]) == ("case_1", 0, 1, "")
    drawn = layer(case, "label").copy()
    assert np.array_equal(drawn, read_label(path)[0])
    drawn[2:4, 3:5, 6:9] = 2
    status, answer = folder.save(1, drawn, case["base"])
    assert status == 200
    assert np.array_equal(read_label(path)[0], drawn)
    assert folder.case(1)["base"] == answer["base"]
    status, answer = folder.save(1, drawn * 0, case["base"])
    assert status == 409
    assert "changed since it was opened here; tester saved it" in answer["error"]
    assert np.array_equal(read_label(path)[0], drawn)
    new = folder.case(2)
    assert (new["base"], layer(new, "label").max()) == ("none", 0)
    assert folder.save(2, drawn, "none")[0] == 200
    assert np.array_equal(read_label(root / "labels" / "case_2.nii.gz")[0], drawn)
    assert folder.desk.state()[2]["state"] == "save by tester"


def test_a_folder_may_be_named_from_where_one_stands(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(root.parent)
    with served(Path(root.name)) as folder:
        case = folder.case(0)
        assert folder.save(0, layer(case, "label") * 0 + 2, case["base"])[0] == 200
        (entry,) = folder.desk.shelf.entries()
    assert (entry["case"], entry["file"]) == ("case_0", "labels/case_0.nii.gz")


def test_a_change_from_outside_is_seen(folder: Served, root: Path) -> None:
    case = folder.case(0)
    drawn = layer(case, "label")
    base = folder.save(0, drawn * 0 + 2, case["base"])[1]["base"]
    shutil.copy(root / "labels" / "case_1.nii.gz", root / "labels" / "case_0.nii.gz")
    status, answer = folder.save(0, drawn, base)
    assert (status, "another program did it" in answer["error"]) == (409, True)
    assert np.array_equal(layer(folder.case(0), "label"), read_label(root / "labels" / "case_1.nii.gz")[0])


def test_a_large_scan_comes_in_parts(folder: Served, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(desk_room, "MOST_PART", 2000)
    before = read_label(root / "labels" / "case_0.nii.gz")[0]
    case = folder.case(0)
    assert case["parts"] == 3
    drawn = [layer(folder.case(0, part), "label") for part in range(3)]
    assert np.array_equal(np.concatenate(drawn), before)
    assert folder.save(0, np.full_like(drawn[1], 2), case["base"], part=1)[0] == 200
    after = read_label(root / "labels" / "case_0.nii.gz")[0]
    edges = np.cumsum([len(part) for part in drawn])
    assert (after[edges[0] : edges[1]] == 2).all()
    assert np.array_equal(after[: edges[0]], before[: edges[0]])
    assert np.array_equal(after[edges[1] :], before[edges[1] :])


@pytest.mark.parametrize(
    ("suffix", "geometry"),
    [
        (".nii.gz", {"direction": (0, 0, 1, 1, 0, 0, 0, -1, 0), "spacing": (1.0, 2.0, 3.0)}),
        (".png", {}),
    ],
)
def test_any_pose_and_pictures_are_saved_as_they_lie(
    tmp_path: Path, suffix: str, geometry: dict[str, object]
) -> None:
    size = (14, 15) if suffix == ".png" else (14, 15, 16)
    root = write_blocks(tmp_path / "scans", count=1, labelled=1, suffix=suffix, size=size, **geometry)
    path = root / "labels" / f"case_0{suffix}"
    before = read_label(path)
    with served(root) as found:
        case = found.case(0)
        assert case["flat"] == (suffix == ".png")
        status, _ = found.save_turned(0, case["turned"]["label"], case["base"])
        assert status == 200
        found.desk.mark(0, "accept")
    after = read_label(path)
    assert np.array_equal(before[0], after[0])
    assert before[1] == after[1]


@pytest.mark.parametrize(
    ("path", "method", "headers", "status"),
    [
        ("/", "GET", {}, 403),
        ("/another-token/", "GET", {}, 403),
        ("/another-token/list", "GET", {}, 403),
        (f"/{TOKEN}/", "GET", {"Host": "evil.example"}, 403),
        (f"/{TOKEN}/", "GET", {"Host": "127.0.0.1.evil.example:80"}, 403),
        (f"/{TOKEN}/", "GET", {"Host": "localhost:9999"}, 200),
        (f"/{TOKEN}/list", "GET", {"Origin": "http://evil.example"}, 403),
        (f"/{TOKEN}/list", "GET", {"Sec-Fetch-Site": "cross-site"}, 403),
        (f"/{TOKEN}/case/0/mark", "POST", {"Content-Type": "application/x-www-form-urlencoded"}, 415),
        (f"/{TOKEN}/case/0/mark", "POST", {"Content-Type": "text/plain"}, 415),
        (f"/{TOKEN}/case/0/mark", "GET", {}, 405),
        (f"/{TOKEN}/case/9", "GET", {}, 422),
        (f"/{TOKEN}/case/-1", "GET", {}, 404),
        (f"/{TOKEN}/case/0?part=7", "GET", {}, 422),
        (f"/{TOKEN}/case/0?part=x", "GET", {}, 400),
        (f"/{TOKEN}/../../etc/passwd", "GET", {}, 404),
        (f"/{TOKEN}/case/..%2f..%2fetc%2fpasswd", "GET", {}, 404),
        (f"/{TOKEN}/%2e%2e/%2e%2e/etc/passwd", "GET", {}, 404),
    ],
)  # fmt: skip
def test_attacks_are_refused(
    folder: Served, path: str, method: str, headers: dict[str, str], status: int
) -> None:
    found, body, answer = folder.ask(path, method, b"", **headers)
    assert found == status, body
    assert answer["x-content-type-options"] == "nosniff"
    assert answer["x-frame-options"] == "DENY"
    assert b"root:" not in body


def test_bodies_that_are_too_large_or_none_of_ours_save_nothing(
    folder: Served, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = root / "labels" / "case_0.nii.gz"
    before, base = path.read_bytes(), folder.case(0)["base"]
    where = f"/{TOKEN}/case/0/save?part=0&base={base}&values=1,2"
    count = 16 * 18 * 20
    for body, status in (
        (b"", 422),
        (b"rubbish", 422),
        (zlib.compress(bytes(count - 1)), 422),
        (zlib.compress(bytes(count + 1)), 422),
        (zlib.compress(bytes(50_000_000)), 422),  # a bomb
        (zlib.compress(b"\xff" * count), 422),  # classes that there are not
        (zlib.compress(bytes(count))[:-3], 422),
    ):
        assert folder.ask(where, "POST", body, **STREAM)[0] == status
    monkeypatch.setattr("mlbseg.apps.review.server.MOST_BODY", 1000)
    assert folder.ask(where, "POST", bytes(2000), **STREAM)[0] == 413
    assert folder.ask(f"/{TOKEN}/case/0/save", "POST", b"", **STREAM)[0] == 400
    assert folder.ask(f"/{TOKEN}/case/0/mark", "POST", b'{"what": "delete"}', **STREAM)[0] == 422
    for body in (b"{", b"[]", b"3", b'{"who": "me"}', b"[" * 9000):
        assert folder.ask(f"/{TOKEN}/case/0/mark", "POST", body, **STREAM)[0] == 400
    place = f"/{TOKEN}/case/0/save?part=0&base={folder.case(0)['base']}&values=77,99"
    status, answer, _ = folder.ask(place, "POST", zlib.compress(bytes(count)), **STREAM)
    assert (status, b"77 is no class" in answer) == (422, True)
    assert path.read_bytes() == before


def test_of_200_saves_at_once_one_is_kept_and_none_lost(folder: Served, root: Path) -> None:
    case = folder.case(0)
    drawn = layer(case, "label")
    with ThreadPoolExecutor(200) as pool:
        found = list(
            pool.map(
                lambda n: folder.save(0, np.where(drawn == 1, 1 + n % 2, 0), case["base"])[0], range(200)
            )
        )
    assert Counter(found) == {200: 1, 409: 199}
    assert len([e for e in folder.desk.shelf.entries() if e["what"] == "save"]) == 1
    assert read_label(root / "labels" / "case_0.nii.gz")[0].shape == drawn.shape


def test_links_out_of_the_folder_are_not_followed(root: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret.nii.gz"
    shutil.copy(root / "images" / "case_1.nii.gz", secret)
    (root / "images" / "case_1.nii.gz").unlink()
    (root / "images" / "case_1.nii.gz").symlink_to(secret)
    with served(root) as found:
        status, body, _ = found.ask(f"/{TOKEN}/case/1")
        assert status == 422
        assert b"leads out of" in body


def test_the_page_escapes_and_allows_its_own_scripts_alone(tmp_path: Path) -> None:
    name = EVIL.replace("/", "")
    write_blocks(tmp_path / "scans", count=1, labelled=1)
    for kind in ("images", "labels"):
        (tmp_path / "scans" / kind / "case_0.nii.gz").rename(tmp_path / "scans" / kind / f"{name}.nii.gz")
    with served(tmp_path / "scans") as found:
        status, body, headers = found.ask(f"/{TOKEN}/")
    page = body.decode()
    assert status == 200
    assert name not in page
    assert "<b>x" not in page
    policy = re.search(r'Content-Security-Policy" content="([^"]+)"', page)
    assert policy is not None
    assert "connect-src 'self'" in policy[1]
    assert "'unsafe-eval'" not in policy[1]
    assert headers["content-security-policy"] == "frame-ancestors 'none'"
    assert headers["cache-control"] == "no-store"


def test_a_run_predicts_and_judges_again(supervised_run: Path, scans: Path, tmp_path: Path) -> None:
    import json

    run, data = shutil.copytree(supervised_run, tmp_path / "run"), shutil.copytree(scans, tmp_path / "scans")
    record = json.loads((run / "data.json").read_text())
    (run / "data.json").write_text(json.dumps({**record, "root": str(data)}))
    with served(run, "audit") as found:
        names = [item["name"] for item in found.desk.state()]
        assert "case_3" not in names  # it is set apart for testing
        found.desk.predict(0)
        case = found.case(0)
        assert [item["name"] for item in case["layers"]] == ["label", "prediction", "difference"]
        status, body, _ = found.ask(f"/{TOKEN}/case/0/audit", "POST", b"{}", **STREAM)
        assert (status, b"trust now" in body) == (200, True)
        case = found.case(0)
        assert [item["name"] for item in case["layers"]][-2:] == ["suspected", "doubt"]
        assert found.save(0, layer(case, "label"), case["base"])[0] == 200
    assert not (run / "audit").exists()  # what is judged here is not written over an audit


def test_orders(root: Path, supervised_run: Path, tmp_path: Path) -> None:
    table = tmp_path / "a.csv"
    table.write_text("rank,case,reason\n1,case_2,why\n2,gone,x\n")
    listing = list_cases(root, table)
    assert [(item.case.id, item.reason) for item in listing.items] == [
        ("case_2", "why"), ("case_0", "label: clean"), ("case_1", "label: clean"),
    ]  # fmt: skip
    with pytest.raises(UserError, match="expected a run folder"):
        list_cases(root, "suggest")
    with pytest.raises(UserError, match="column case"):
        list_cases(root, root / "images" / "case_0.nii.gz")
    assert "there is no audit" in list_cases(supervised_run, "audit").note
    suggested = list_cases(supervised_run, "suggest", device="cpu").items
    assert "expects a Dice" in suggested[0].reason or "Dice" in suggested[0].reason
