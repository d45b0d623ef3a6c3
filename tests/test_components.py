"""Connected components of masks."""

from __future__ import annotations

import numpy as np

from mlbseg.components import largest_components


def test_the_largest_component_of_each_class_is_kept() -> None:
    mask = np.zeros((6, 8), np.int32)
    mask[0:3, 0:3] = 1
    mask[3, 3] = 1  # touches by a corner: the same component
    mask[5, 7] = 1
    mask[0, 7] = 5
    mask[4:6, 0:2] = 5
    kept = largest_components(mask)
    expected = mask.copy()
    expected[5, 7] = expected[0, 7] = 0
    np.testing.assert_array_equal(kept, expected)
    assert not largest_components(np.zeros_like(mask)).any()
    np.testing.assert_array_equal(largest_components(mask, ()), mask)
    np.testing.assert_array_equal(largest_components(mask, (1,)), np.where(mask == 1, kept, mask))
