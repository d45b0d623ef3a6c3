"""Checkpoints are what was saved, or refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mlbseg.errors import UserError
from mlbseg.runs import checkpoints

CPU = torch.device("cpu")


def saved(folder: Path) -> Path:
    torch.manual_seed(0)
    content = {"weights": {"a": torch.randn(5, 7), "b": torch.arange(9)}, "best": 0.5}
    return checkpoints.save(folder, 1, 3, content)


def test_a_flipped_bit_anywhere_changes_no_weight(tmp_path: Path) -> None:
    path = saved(tmp_path)
    whole, before = path.read_bytes(), checkpoints.find(tmp_path)[0].load(CPU)
    refused: list[str] = []
    for place in range(0, len(whole), 3):
        content = bytearray(whole)
        content[place] ^= 1 << place % 8
        path.write_bytes(content)
        try:
            after = checkpoints.find(tmp_path)[0].load(CPU)
        except UserError as error:
            refused.append(str(error))
        else:
            assert all(torch.equal(after["weights"][k], v) for k, v in before["weights"].items())
            assert {k: v for k, v in after.items() if k != "weights"} == {"best": 0.5, "stage": 1, "step": 3}
    assert {text.partition(" (")[0] for text in refused} == {f"{path}: damaged checkpoint"}
    assert len(refused) > len(whole) / 3 / 4  # the rest lies between the parts of the archive


@pytest.mark.parametrize("content", [b"", b"PK", b"no checkpoint" * 100])
def test_what_is_no_checkpoint_is_refused(content: bytes, tmp_path: Path) -> None:
    path = saved(tmp_path)
    path.write_bytes(content)
    with pytest.raises(UserError, match="damaged checkpoint"):
        checkpoints.find(tmp_path)[0].load(CPU)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.999])
def test_a_truncated_checkpoint_is_refused(share: float, tmp_path: Path) -> None:
    path = saved(tmp_path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(UserError, match="damaged checkpoint"):
        checkpoints.find(tmp_path)[0].load(CPU)
