"""How often whole scans are labelled anew."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mlbseg.training.scan_labels import MOST_TURNS, turns_of
from mlbseg.windows import predict_grid


class Counting(torch.nn.Module):
    """Counts the windows that it is shown."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen += len(x)
        return x.expand(-1, 2, *x.shape[2:])


@pytest.mark.parametrize(
    ("shape", "patch"),
    [((9, 20), (8, 8)), ((8, 9, 10), (8, 8, 8)), ((7, 24, 17), (8, 8, 8)), ((5, 20, 9), (8, 8))],
)
def test_labelling_takes_no_more_than_its_share_of_the_passes(
    shape: tuple[int, ...], patch: tuple[int, ...]
) -> None:
    network = Counting()
    predict_grid(network, np.zeros((1, *shape), np.float32), patch_size=patch, device=torch.device("cpu"))
    scans = 5
    once = scans * network.seen
    for patches in range(1, 4 * once):
        asked = turns_of([shape] * scans, patch, patches)
        fits = int(0.6 * 3 * patches / once)
        assert asked == min(fits, MOST_TURNS)


def test_where_a_patch_holds_most_scans_nothing_is_gained() -> None:
    assert turns_of([(8, 8, 8), (7, 5, 8), (7, 9, 8)], (8, 8, 8), 10**6) == 0
    assert turns_of([(8, 8, 8), (7, 9, 8), (9, 8, 8)], (8, 8, 8), 10**6) == MOST_TURNS
    assert turns_of([(30, 8, 8)], (8, 8), 10**6) == 0  # slices of it
