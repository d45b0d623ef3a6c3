"""Connected components of masks."""

from __future__ import annotations

from collections.abc import Collection
from typing import TypeVar

import numpy as np
import numpy.typing as npt
from scipy import ndimage

Class = TypeVar("Class", bound=np.integer)


def largest_components(mask: npt.NDArray[Class], values: Collection[int] | None = None) -> npt.NDArray[Class]:
    """Return the mask with only the largest connected component (full connectivity) of some classes kept.

    Args:
        mask: (*S); 0 is background, and so is what goes.
        values: Of which classes; of all when None.
    """
    kept = mask.copy()
    structure = np.ones((3,) * mask.ndim)
    for value in np.unique(mask[mask > 0]):
        if values is not None and int(value) not in values:
            continue
        components, count = ndimage.label(mask == value, structure=structure)
        if count > 1:
            sizes = np.bincount(components.ravel())
            sizes[0] = 0
            kept[(components > 0) & (components != sizes.argmax())] = 0
    return kept
