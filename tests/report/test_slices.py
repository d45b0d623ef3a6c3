"""The widget's data: what a page holds of a scan, without a browser."""

from __future__ import annotations

import numpy as np
import pytest

from mlbseg.apps.report.slices import MOST_PIXELS, MOST_SLICES, Subject, browser
from report.pages import EVIL, data_of, layer, page_of, sprite, subject


def test_layers_hold_what_was_given() -> None:
    shown = subject()
    data = data_of(page_of(shown))[0]
    assert (data["size"], data["of"], data["slices"]) == ([30, 20], 6, [1, 2, 3, 4, 5, 6])
    assert [(item["name"], item["style"], item["shown"]) for item in data["layers"]] == [
        ("label", "fill", True),
        ("prediction", "line", True),
        ("differences", "fill", False),
        ("trust", "map", False),
    ]
    for name, mask in shown.masks.items():
        assert np.array_equal(layer(data, name), mask)
    label, prediction = shown.masks.values()
    kinds = layer(data, "differences")
    assert np.array_equal(kinds == 1, (label > 0) & (prediction == 0))
    assert np.array_equal(kinds == 2, (label == 0) & (prediction > 0))
    assert np.array_equal(kinds == 0, label == prediction)
    levels, trust = layer(data, "trust"), shown.maps["trust"]
    assert np.array_equal(levels == 0, np.isnan(trust))
    assert (levels[trust == 0].item(), levels[trust == 1].item()) == (1, 255)


def test_slices_lie_in_rows_on_the_sheet() -> None:
    image = np.zeros((5, 16, 16))
    image[:] = np.arange(5)[:, None, None] * 50.0
    data = data_of(page_of(Subject("a", "", image, (1.0, 1.0, 1.0))))[0]
    sheet = sprite(data)
    assert sheet.shape == (2 * 16, 3 * 16)
    middles = [sheet[8 + 16 * (i // 3), 8 + 16 * (i % 3)] for i in range(5)]
    assert np.allclose(middles, [0, 64, 128, 191, 255], atol=6)


def test_opens_at_the_fullest_slice_unless_told() -> None:
    assert 'value="4"' in page_of(subject())
    assert 'value="2"' in page_of(subject(focus=2))
    assert 'value="5"' in page_of(subject(focus=99))


def test_a_picture_is_one_slice_without_a_slider() -> None:
    html = page_of(subject(shape=(20, 30)))
    assert data_of(html)[0]["of"] == 1
    assert 'class="position"' not in html


def test_spacing_sets_the_shape() -> None:
    assert "aspect-ratio: 0.75;" in page_of(subject(spacing=(1.0, 2.0, 1.0)))


def test_large_scans_are_thinned_and_that_is_said() -> None:
    n, side = MOST_SLICES * 2 + 1, MOST_PIXELS + 10
    mask = np.zeros((n, side, side), int)
    mask[101] = 1
    html = page_of(Subject("a", "", np.zeros(mask.shape, np.float32), (1.0, 1.0, 1.0), {"label": mask}))
    data = data_of(html)[0]
    assert len(data["slices"]) == MOST_SLICES
    assert 102 in data["slices"]
    assert data["size"] == [side // 2, side // 2]
    assert f"{MOST_SLICES} of {n} slices, 1/2 of the resolution" in html
    filled = layer(data, "label").any(axis=(1, 2))
    assert [data["slices"][i] for i in np.flatnonzero(filled)] == [102]


def test_names_stay_text() -> None:
    html = page_of(subject(EVIL), title=EVIL)
    assert EVIL not in html
    assert "<b>x</b>" not in html
    assert data_of(html)[0]["name"] == EVIL


def test_unknown_values_are_named_by_their_number() -> None:
    shown = subject()
    html = browser(shown, {1: "organ"})
    assert "organ" in html
    assert "label 2" in html


def test_arrays_of_another_shape_are_refused() -> None:
    with pytest.raises(ValueError, match="label is"):
        browser(subject(masks={"label": np.zeros((1, 2, 3))}), {})
    with pytest.raises(ValueError, match="spacing"):
        browser(subject(spacing=(1.0,)), {})
