"""Training that went wrong says so without a test label; training that went well says nothing."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from blocks import TINY
from mlbseg import train
from mlbseg.data.preprocess import UNKNOWN
from mlbseg.training.guard import LOOKED_AT, Look, few, look, warnings_of

NAMES = ("background", "organ", "vessel")


def scan(ndim: int = 3, size: int = 12) -> np.ndarray:
    """Return class indices: a block of the organ, a smaller one of the vessel."""
    mask = np.zeros((size,) * ndim, np.uint8)
    mask[(slice(2, 8),) * ndim] = 1
    mask[(slice(9, 11),) * ndim] = 2
    return mask


def said(first: Look | None, last: Look) -> str:
    return "\n".join(warnings_of(first, last, NAMES))


GOOD = Look((0.9, 0.95), (scan(), scan()))


def test_a_good_training_is_not_warned_of() -> None:
    assert warnings_of(None, GOOD, NAMES) == []
    assert warnings_of(GOOD, GOOD, NAMES) == []
    grown = scan()
    grown[1] = grown[2]  # a fifth more, as a better network may find
    assert warnings_of(GOOD, Look((0.88, 0.93), (grown, scan())), NAMES) == []


def test_careful_labels_that_are_not_learned_are_named_with_what_to_change() -> None:
    assert "not learned the careful labels: mean Dice 0.50" in said(None, Look((0.4, 0.6), ()))
    text = said(Look((0.6,), (scan(),)), Look((0.5,), (scan(),)))
    assert "(stage 1: 0.60)" in text
    assert "-o steps=N" in text
    assert "unlearned careful labels" in said(GOOD, Look((0.8, 0.85), GOOD.masks))


@pytest.mark.parametrize("ndim", [2, 3])
def test_volumes_that_shrink_or_grow_are_named(ndim: int) -> None:
    small = np.where(scan(ndim) == 2, 2, 0).astype(np.uint8)
    large = np.where(scan(ndim) == 0, 1, scan(ndim)).astype(np.uint8)
    first = Look((0.9,), (scan(ndim),))
    assert "times as much organ in unlabelled scans" in said(first, Look((0.9,), (small,)))
    assert "times as much organ in unlabelled scans" in said(first, Look((0.9,), (large,)))
    assert "vessel" not in said(first, Look((0.9,), (large,)))


def test_components_that_multiply_are_named() -> None:
    scattered = scan()
    scattered[::3, 9:, ::3] = 1
    assert "finds organ in" in said(GOOD, Look((0.9,), (scattered, scattered)))


def test_stages_that_disagree_are_named() -> None:
    moved = np.roll(scan(), 4, axis=(0, 1, 2))
    assert "agree little on unlabelled scans" in said(GOOD, Look((0.9,), (moved, moved)))


def test_structures_that_nobody_finds_count_nothing() -> None:
    empty = np.zeros((6, 6), np.uint8)
    assert warnings_of(Look((), (empty,)), Look((), (empty,)), NAMES) == []


def test_a_look_leaves_out_what_is_not_known_and_labels_without_structures() -> None:
    label = scan()
    label[2:4] = UNKNOWN
    found = look([(scan(), label), (scan(), np.zeros_like(label))], [scan()])
    assert found.fit == (1.0,)
    assert len(found.masks) == 1


@pytest.mark.parametrize(("count", "taken"), [(0, []), (2, [0, 1]), (3, [0, 1, 2]), (9, [0, 4, 8])])
def test_a_few_are_spread_over_all(count: int, taken: Sequence[int]) -> None:
    assert list(few(range(count))) == taken
    assert len(taken) <= LOOKED_AT


@pytest.mark.slow
def test_a_run_that_learned_nothing_says_so_and_one_that_learned_does_not(
    scans: Path, supervised_run: Path, tmp_path: Path, command
) -> None:  # type: ignore[no-untyped-def]
    assert json.loads((supervised_run / "result.json").read_text())["warnings"] == []
    out = tmp_path / "run"
    options = [part for item in (*TINY, "steps=4", "train.lr=1e-9") for part in ("-o", item)]
    done = command("train", scans, "--out", out, "--method", "bcp", *options)
    assert done.code == 0
    assert "warning: the network has not learned the careful labels" in done.out
    [first, *_] = json.loads((out / "result.json").read_text())["warnings"]
    assert first.startswith("the network has not learned")
    assert "The network has not learned the careful labels" in (out / "report.html").read_text()
    assert train(resume=out).warnings[0] == first
