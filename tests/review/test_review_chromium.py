"""A review in a real browser: a planted error corrected by pen and by take-over, saved, merged; by keys alone."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813 - as its documentation does

from mlbseg.data.readers import read_label
from report.test_chromium import ARGUMENTS, CHROMIUM
from review.served import Served, served

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium on the path (apt-get install chromium)"),
]


@pytest.fixture
def review(supervised_run: Path, scans: Path, tmp_path: Path) -> Iterator[Served]:
    """A review of a run whose case_1 lacks a part of block 1 in its label; its prediction has the part."""
    run, data = shutil.copytree(supervised_run, tmp_path / "run"), shutil.copytree(scans, tmp_path / "scans")
    record = json.loads((run / "data.json").read_text())
    (run / "data.json").write_text(json.dumps({**record, "root": str(data)}))
    path = data / "labels" / "case_1.nii.gz"
    label = sitk.ReadImage(str(path))
    array = sitk.GetArrayFromImage(label)
    shutil.copy(path, tmp_path / "right.nii.gz")
    first = np.flatnonzero((array == 1).any(axis=(1, 2)))[0]
    array[first : first + 3][array[first : first + 3] == 1] = 0
    wrong = sitk.GetImageFromArray(array)
    wrong.CopyInformation(label)
    sitk.WriteImage(wrong, str(path))
    order = tmp_path / "order.csv"
    order.write_text("case,reason\ncase_1,planted\ncase_0,second\n")
    with served(run, str(order)) as found:
        found.desk.predict(0)
        yield found


@pytest.fixture
def page(review: Served) -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    complaints: list[str] = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=list(ARGUMENTS))

        def opened() -> Any:
            page = browser.new_page(viewport={"width": 900, "height": 420})
            page.on("console", lambda m: complaints.append(m.text) if "409" not in m.text else None)
            page.on("pageerror", lambda error: complaints.append(str(error)))
            page.on("dialog", lambda dialog: dialog.accept())
            page.goto(review.address)
            page.wait_for_selector("html[data-ready]")
            page.wait_for_selector('.viewer[data-ready="case_1"]')
            page.get_by_role("button", name="Axial", exact=True).click()  # 3D without a graphics card is slow
            return page

        yield opened
        browser.close()
    assert complaints == []


def said(page: Any, words: str) -> None:
    page.wait_for_function("words => document.querySelector('.said').textContent.includes(words)", arg=words)


def test_an_error_is_corrected_by_take_over_and_by_pen_and_two_windows_merge(
    review: Served, page: Any, tmp_path: Path
) -> None:
    root = review.desk.shelf.root
    path, right = root / "labels" / "case_1.nii.gz", read_label(tmp_path / "right.nii.gz")[0]
    wrong = read_label(path)[0]
    first, second = page(), page()
    # By keys alone: to a place where the label lacks what the prediction has, take it over, undo, again, save.
    places = np.argwhere((right == 1) & (wrong == 0))
    z, y, x = places[np.abs(places - places.mean(0)).sum(1).argmin()]
    first.evaluate("mm => document.querySelector('.viewer').viewer.gotoPlace(mm)", [-int(x), -int(y), int(z)])
    assert "label: background · prediction: label 1" in first.locator(".place").inner_text()
    first.locator("canvas").focus()
    first.keyboard.press("t")
    said(first, "voxels changed")
    assert "label: label 1" in first.locator(".place").inner_text()
    first.keyboard.press("u")
    assert "label: background" in first.locator(".place").inner_text()
    first.keyboard.press("t")
    first.keyboard.press("s")
    said(first, "saved")
    saved = read_label(path)[0]
    assert np.count_nonzero(saved != right) < 0.2 * np.count_nonzero(wrong != right)
    assert (
        sitk.ReadImage(str(path)).GetDirection()
        == sitk.ReadImage(str(root / "images" / "case_1.nii.gz")).GetDirection()
    )
    kept = list((root / "labels_history").glob("case_1.*.nii.gz"))
    assert [np.array_equal(read_label(p)[0], wrong) for p in kept] == [True]

    # In the second window, opened before: draw by pen in a corner, save is refused, merge, save.
    second.get_by_label("Draw").check()
    second.get_by_label("Class").select_option("label 2")
    second.locator("canvas").scroll_into_view_if_needed()
    box = second.locator("canvas").bounding_box()
    before = second.evaluate("document.querySelector('.viewer').review.drawing().slice().join()")
    side = min(box["width"] / 20, box["height"] / 18)
    corner = (box["x"] + box["width"] / 2 + 8 * side, box["y"] + box["height"] / 2 + 7 * side)
    second.mouse.move(*corner)
    second.mouse.down()
    second.mouse.move(corner[0] - 2 * side, corner[1], steps=4)
    second.mouse.up()
    assert second.evaluate("document.querySelector('.viewer').review.drawing().slice().join()") != before
    second.get_by_role("button", name="Copy to next slice").click()
    said(second, "voxels changed")
    second.get_by_role("button", name="Save").click()
    said(second, "changed since it was opened here")
    assert np.array_equal(read_label(path)[0], saved)
    second.get_by_role("button", name="Merge with mine").click()
    said(second, "merged; 0 voxels were changed by both")
    second.get_by_role("button", name="Save").click()
    said(second, "saved")
    merged = read_label(path)[0]
    added = merged != saved
    assert added.any()
    assert set(merged[added]) == {2}
    assert len(set(np.argwhere(added)[:, 0])) == 2  # the slice and its copy
    # Reload: what was saved is there; accepting goes on to the next case.
    second.reload()
    second.wait_for_selector(".viewer[data-ready]")
    assert "save by tester" in second.locator("tr[data-number='0'] .state").inner_text()
    second.locator("tr[data-number='0'] .pick").click()
    second.wait_for_selector('.viewer[data-ready="case_1"]')
    second.get_by_role("button", name="Accept").click()
    second.wait_for_function("() => !document.querySelector('.viewer').dataset.ready.includes('case_1')")
    assert "accept by tester" in second.locator("tr[data-number='0'] .state").inner_text()
