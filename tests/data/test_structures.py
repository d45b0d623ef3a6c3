"""What clean labels show of their structures."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from mlbseg.data.structures import Structure, structures
from mlbseg.types import Geometry


def disc(shape: tuple[int, int], centre: tuple[int, int], radius: float) -> np.ndarray:
    y, x = np.indices(shape)
    return (y - centre[0]) ** 2 + (x - centre[1]) ** 2 <= radius**2


def test_extent_and_components_are_what_was_drawn() -> None:
    label = np.zeros((20, 30, 40), np.int32)
    label[2:10, 3:9, 5:25] = 7
    label[15, 20, 30:33] = 7  # a component of its own
    label[12:14, 20:22, 2:6] = 3
    label[12:14, 25:27, 2:6] = 3
    first, second = structures(label, Geometry.identity((40, 30, 20), (1.0, 2.0, 3.0)))
    assert (first.value, first.extent, first.largest) == (3, (6.0, 4.0, 4.0), 0.5)
    assert (second.value, second.extent, second.largest) == (7, (24.0, 12.0, 20.0), 960 / 963)


def test_extent_follows_the_axes_as_they_lie_in_the_patient() -> None:
    label = np.zeros((5, 6, 7), np.int32)
    label[1:3, 1:5, 1:4] = 1
    sagittal = (0.0, 0, -1, 1, 0, 0, 0, -1, 0)  # x to P, y to I, z to R
    geometry = replace(Geometry.identity((7, 6, 5), (1.0, 2.0, 4.0)), direction=sagittal)
    (found,) = structures(label, geometry)
    assert found.extent == (8.0, 3.0, 8.0)  # to S, P and L
    # z runs to R, y to I and x to P.
    assert found.centre == pytest.approx((1 - 3 / 6, 2.5 / 7, 1 - 2 / 5))


def test_coarse_voxels_keep_a_large_structure_and_lose_thin_ones() -> None:
    geometry = Geometry.identity((200, 160))
    large, thin = disc((160, 200), (80, 100), 60), np.zeros((160, 200), bool)
    thin[::8] = True
    (kept,) = structures(large.astype(np.int32), geometry)
    (lost,) = structures(thin.astype(np.int32), geometry)
    assert kept.detail[0] == lost.detail[0] == (1.0, 1.0)
    assert kept.kept(4.0) > 0.98
    assert lost.kept(4.0) < 0.6
    assert lost.kept(1.5) < lost.kept(1.0) == 1


def test_what_was_not_measured_counts_as_lost() -> None:
    found = Structure(1, (9.0, 9.0), (0.5, 0.5), 1, ((1.0, 1.0), (2.0, 0.8)))
    assert found.kept(1.5) == pytest.approx(0.9)
    assert found.kept(0.5) == 1
    assert found.kept(2.1) == 0


def test_thick_slices_are_not_made_thinner_or_thicker_by_a_finer_spacing() -> None:
    label = np.zeros((4, 40, 40), np.int32)
    label[1:3] = disc((40, 40), (20, 20), 15)
    (found,) = structures(label, Geometry.identity((40, 40, 4), (1.0, 1.0, 10.0)))
    (flat,) = structures(label[1], Geometry.identity((40, 40)))
    assert found.detail == flat.detail  # slice by slice


def test_values_may_be_large_and_the_background_is_none() -> None:
    label = np.zeros((8, 8), np.int32)
    assert structures(label, Geometry.identity((8, 8))) == ()
    label[2:5, 2:5] = 2**31 - 1
    (found,) = structures(label, Geometry.identity((8, 8)))
    assert found.value == 2**31 - 1
