"""Suspected regions: where they are, how large, and what is none."""

from __future__ import annotations

import numpy as np
import SimpleITK as sitk  # noqa: N813 - as its documentation does

from mlbseg.apps.audit.regions import LARGEST, find_regions
from mlbseg.data.preprocess import Frame
from mlbseg.types import Geometry

OBLIQUE = (0.8, -0.6, 0.0, 0.6, 0.8, 0.0, 0.0, 0.0, 1.0)


def frame(shape: tuple[int, ...], spacing: tuple[float, ...]) -> Frame:
    size = shape[::-1]
    n = len(size)
    direction = OBLIQUE if n == 3 else (1.0, 0.0, 0.0, 1.0)
    grid = Geometry(size, spacing, (5.0, -7.0, 11.0)[:n], direction)
    native = Geometry(
        tuple(2 * s for s in size), tuple(s / 2 for s in spacing), (5.0, -7.0, 11.0)[:n], direction
    )
    return Frame(native, grid)


def test_a_region_has_its_volume_its_classes_and_its_place() -> None:
    shape = (12, 14, 16)
    trust = np.ones(shape, np.float32)
    trust[3:8, 4:9, 5:10] = 0.2
    label, predicted = np.zeros(shape, int), np.zeros(shape, int)
    predicted[3:8, 4:9, 5:10] = 7
    where = frame(shape, (1.0, 2.0, 3.0))
    (region,), suspected, _ = find_regions(trust, label, predicted, where, threshold=0.5, smallest=0)
    assert (region.label, region.suggested, region.voxels) == (0, 7, 125)
    assert region.volume == 125 * 6
    assert abs(region.trust - 0.2) < 1e-6
    np.testing.assert_array_equal(suspected, trust < 0.5)
    image = sitk.Image(list(where.native.size), sitk.sitkUInt8)
    image.SetSpacing(where.native.spacing)
    image.SetOrigin(where.native.origin)
    image.SetDirection(where.native.direction)
    assert region.index == (14, 12, 10)  # (7, 6, 5) of the grid, at half the spacing
    np.testing.assert_allclose(
        image.TransformPhysicalPointToContinuousIndex(region.position), region.index, atol=1e-6
    )


def test_borders_and_specks_are_no_regions() -> None:
    trust = np.ones((14, 14, 14), np.float32)
    trust[2:4, 2:12, 2:12] = 0  # two voxels thick, however wide
    trust[8:11, 8:11, 8:11] = 0  # 27 voxels
    zeros = np.zeros(trust.shape, int)
    where = frame(trust.shape, (1.0, 1.0, 1.0))
    found, suspected, count = find_regions(trust, zeros, zeros, where, threshold=0.5, smallest=27)
    assert [region.voxels for region in found] == [27]
    assert count == 1
    assert not suspected[:5].any()
    found, suspected, count = find_regions(trust, zeros, zeros, where, threshold=0.5, smallest=28)
    assert found == []
    assert count == 0
    assert not suspected.any()


def test_a_region_at_the_edge_of_the_scan_counts() -> None:
    trust = np.ones((10, 10), np.float32)
    trust[:2, :] = 0
    zeros = np.zeros(trust.shape, int)
    (region,), _, count = find_regions(
        trust, zeros, zeros, frame(trust.shape, (1.0, 1.0)), threshold=0.5, smallest=0
    )
    assert region.voxels == 20
    assert count == 1
    assert len(region.index) == len(region.position) == 2


def test_the_largest_come_first_and_no_more_than_some() -> None:
    trust = np.ones((4 * (LARGEST + 3), 9), np.float32)
    for i in range(LARGEST + 3):
        trust[4 * i : 4 * i + 3, : 9 if i == 4 else 3] = 0
    zeros = np.zeros(trust.shape, int)
    found, suspected, count = find_regions(
        trust, zeros, zeros, frame(trust.shape, (1.0, 1.0)), threshold=0.5, smallest=0
    )
    assert [region.voxels for region in found[:2]] == [27, 9]
    assert len(found) == LARGEST
    assert count == LARGEST + 3
    np.testing.assert_array_equal(suspected, trust < 0.5)
