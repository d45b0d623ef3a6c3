"""What a page holds of a scan, without a browser."""

from __future__ import annotations

import numpy as np
import pytest

from mlbseg.apps.report.packing import LEVELS, Subject, from_ras, pack, towards_ras
from mlbseg.apps.report.viewer import Gallery, opener
from mlbseg.types import Geometry
from report.pages import EVIL, data_of, layer, page_of, subject, unpack


def test_layers_hold_what_was_given() -> None:
    shown = subject()
    data = data_of(page_of(shown))[0]
    assert (data["size"], data["flat"]) == ([30, 20, 6], False)
    assert [(item["name"], item["kind"], item["shown"]) for item in data["layers"]] == [
        ("label", "mask", True),
        ("prediction", "mask", True),
        ("difference", "difference", False),
        ("trust", "map", False),
    ]
    for name, mask in shown.masks.items():
        assert np.array_equal(layer(data, name), mask)
    label, prediction = shown.masks.values()
    kinds = layer(data, "difference")
    assert np.array_equal(kinds == 1, (label > 0) & (prediction == 0))
    assert np.array_equal(kinds == 2, (label == 0) & (prediction > 0))
    assert np.array_equal(kinds == 0, label == prediction)
    levels, trust = layer(data, "trust"), shown.maps["trust"]
    assert np.array_equal(levels == 0, np.isnan(trust))
    assert (levels[trust == 0].item(), levels[trust == 1].item()) == (1, 255)
    step = data["step"]
    assert (
        np.abs(data["image"] - shown.image.clip(data["image"].min(), data["image"].max())).max()
        <= step / 2 + 1e-6
    )


def test_whole_numbers_are_kept_and_others_have_levels() -> None:
    whole = np.arange(-30, 90).reshape(4, 5, 6)
    kept = unpack(pack(Subject("a", "", whole, Geometry.identity((6, 5, 4))), {}))
    assert np.array_equal(kept["image"], whole)
    assert kept["note"] == ""
    assert (
        f"{LEVELS} grey levels"
        in unpack(pack(Subject("a", "", whole * 0.1, Geometry.identity((6, 5, 4))), {}))["note"]
    )


def test_a_place_in_mm_is_that_of_the_file() -> None:
    image = np.zeros((4, 5, 6))
    image[1, 2, 3] = 9
    geometry = Geometry(
        (6, 5, 4), (1.0, 2.0, 3.0), (10.0, 20.0, 30.0), (0.0, 1.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0, -1.0)
    )
    data = unpack(pack(Subject("a", "", image, geometry), {}))
    nz, ny, nx = data["image"].shape
    z, y, x = np.argwhere(np.flip(data["image"], (1, 2)))[0]
    lps = np.array([10 + 2 * 2.0, 20 + 3 * 1.0, 30 - 1 * 3.0])
    found = np.array(data["affine"]) @ [x, y, z, 1]
    assert np.allclose(found[:3], lps * [-1, -1, 1])
    assert (nx, ny, nz) == (5, 6, 4)


def test_opens_where_most_is_drawn_unless_told() -> None:
    assert data_of(page_of(subject()))[0]["focus"][2] == 4
    focus = np.zeros((6, 20, 30), bool)
    focus[2, 7, 9] = True
    assert data_of(page_of(subject(focus=focus)))[0]["focus"] == [29 - 9, 19 - 7, 2]


def test_large_scans_are_cropped_and_thinned_and_that_is_said() -> None:
    mask = np.zeros((40, 60, 70), int)
    mask[10:20, 20:30, 30:40] = 1
    mask[15, 25, 35] = 2
    large = Subject(
        "a", "", np.zeros(mask.shape, np.float32), Geometry.identity((70, 60, 40)), {"label": mask}
    )
    cropped = unpack(pack(large, {}, most=30_000))
    assert cropped["size"] == [26, 26, 26]
    assert "the 26×26×26 voxels around what is drawn, of 70×60×40" in cropped["note"]
    assert (layer(cropped, "label") == 2).sum() == 1
    thinned = unpack(pack(large, {}, most=3000))
    assert np.prod(thinned["size"]) <= 3000
    assert "voxels as one" in thinned["note"]
    assert 1 in layer(thinned, "label")


def test_ct_has_the_usual_windows() -> None:
    rng = np.random.default_rng(0)
    image = np.where(rng.random((8, 9, 10)) < 0.3, -1000, 40)
    names = [
        w["name"] for w in unpack(pack(Subject("a", "", image, Geometry.identity((10, 9, 8))), {}))["windows"]
    ]
    assert names[:2] == ["soft tissue", "liver"]
    assert "soft tissue" not in [w["name"] for w in data_of(page_of(subject()))[0]["windows"]]


def test_names_stay_text() -> None:
    html = page_of(subject(EVIL), subject("b"), title=EVIL)
    assert EVIL not in html
    assert "<b>x</b>" not in html
    assert data_of(html)[0]["name"] == EVIL
    assert "<b>" not in opener(EVIL)


def test_unknown_values_are_named_by_their_number() -> None:
    shown = subject()
    assert [c["name"] for c in unpack(pack(shown, {1: "organ"}))["classes"]] == ["organ", "label 2"]
    assert [c["name"] for c in unpack(pack(shown, {1: "organ"}, unknown=2))["classes"]] == [
        "organ",
        "unknown",
    ]


def test_arrays_of_another_shape_are_refused() -> None:
    with pytest.raises(ValueError, match="label is"):
        pack(subject(masks={"label": np.zeros((1, 2, 3))}), {})
    with pytest.raises(ValueError, match="lattice"):
        pack(subject(geometry=Geometry.identity((1, 2, 3))), {})
    with pytest.raises(ValueError, match="class values"):
        pack(subject(masks={"label": np.arange(6 * 20 * 30).reshape(6, 20, 30)}), {})


def test_a_gallery_keeps_what_is_most_worth_showing() -> None:
    size = len(page_of(subject())) - len(page_of())
    looked = Gallery({}, most=2 * size)
    kept = [
        looked.add(subject(name), rank) for name, rank in (("c", 3.0), ("a", 1.0), ("b", 2.0), ("d", 4.0))
    ]
    assert kept == [True, True, True, False]
    assert (looked.names, looked.beyond) == (["a", "b"], 2)
    assert "2 more are beyond it" in looked.note


@pytest.mark.parametrize(
    "direction",
    [
        (1, 0, 0, 0, 1, 0, 0, 0, 1),
        (0, 1, 0, -1, 0, 0, 0, 0, -1),
        (0, 0, 1, 1, 0, 0, 0, -1, 0),
        (0.96, -0.28, 0, 0.28, 0.96, 0, 0, 0, 1),
        (1.0, 0.0, 0.0, 1.0),
    ],
)
def test_turning_is_undone(direction: tuple[float, ...]) -> None:
    n = 3 if len(direction) == 9 else 2
    size = (4, 5, 6)[:n]
    geometry = Geometry(size, (1.0, 2.0, 3.0)[:n], (7.0, 8.0, 9.0)[:n], tuple(map(float, direction)))
    array = np.arange(np.prod(size)).reshape(size[::-1])
    assert np.array_equal(from_ras(towards_ras(array, geometry)[0], geometry), array)
