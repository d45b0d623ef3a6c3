"""Connected components of masks."""

from __future__ import annotations

from typing import TypeVar

import numpy as np
import numpy.typing as npt
from scipy import ndimage

Class = TypeVar("Class", bound=np.integer)


def largest_components(mask: npt.NDArray[Class]) -> npt.NDArray[Class]:
    """Return the mask (*S) with only the largest connected component (full connectivity) of each class kept."""
    kept = np.zeros_like(mask)
    structure = np.ones((3,) * mask.ndim)
    for value in np.unique(mask[mask > 0]):
        components, count = ndimage.label(mask == value, structure=structure)
        if count:
            sizes = np.bincount(components.ravel())
            sizes[0] = 0
            kept[components == sizes.argmax()] = value
    return kept
