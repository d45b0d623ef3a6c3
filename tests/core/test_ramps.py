"""The ramp against its formula and at its ends."""

from __future__ import annotations

import itertools
import math

import pytest

from mlbseg.core.ramps import sigmoid_ramp


@pytest.mark.parametrize("progress", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_the_ramp_is_that_of_the_paper(progress: float) -> None:
    assert sigmoid_ramp(progress) == pytest.approx(math.exp(-5 * (1 - progress) ** 2))


def test_before_it_the_ramp_is_as_at_its_beginning_and_after_it_1() -> None:
    assert sigmoid_ramp(-1) == sigmoid_ramp(0) == math.exp(-5)
    assert sigmoid_ramp(1) == sigmoid_ramp(7) == 1


def test_the_ramp_rises_all_the_way() -> None:
    values = [sigmoid_ramp(i / 50) for i in range(51)]
    assert all(low < high for low, high in itertools.pairwise(values))
