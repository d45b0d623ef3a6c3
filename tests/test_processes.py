"""What ranks tell each other."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import HIDDEN
from mlbseg import processes
from mlbseg.core.ranks import ALONE, Ranks
from mlbseg.errors import OtherRank, UserError
from ranks import together


def test_a_process_by_itself_asks_no_one() -> None:
    with processes.joined(torch.device("cpu")) as ranks:
        assert ranks is ALONE
    assert processes.of_first(ALONE, lambda: 3) == 3
    assert processes.of_all(ALONE, "x") == ["x"]
    error = UserError("said")
    assert processes.same_on_all(ALONE, error) is error
    assert processes.own_device("cpu") == torch.device("cpu")
    processes.wait_for_all(ALONE)
    processes.require_no_launch(2)


def test_ranks_are_not_launched_by_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(
        UserError,
        match=r"--devices: found 2, but torchrun has already started 4 processes \(leave --devices out",
    ):
        processes.require_no_launch(2)
    with pytest.raises(UserError, match="--device cpu:0: several ranks cannot share one device"):
        processes.own_device("cpu:0")
    assert processes.nodes() == (1, 4)


def told(ranks: Ranks) -> dict[str, Any]:
    def refuse() -> None:
        raise Refusal("not so")

    found: dict[str, Any] = {"first": processes.of_first(ranks, lambda: f"from {ranks.index}")}
    found["all"] = processes.of_all(ranks, ranks.index)
    with processes.joined(torch.device("cpu")) as joined:  # there already is a group
        found["place"] = (joined.index, joined.count)
    try:
        processes.of_first(ranks, refuse)
    except UserError as error:
        found["error"] = (type(error).__name__, str(error), error.exit_code)
    found["same"] = type(processes.same_on_all(ranks, UserError("x"))).__name__
    return found


class Refusal(UserError):
    """With an exit code of its own."""

    exit_code = 7


@pytest.mark.slow
def test_rank_0_tells_the_others_what_it_found_and_why_it_failed() -> None:
    for index, found in enumerate(together(2, told)):
        assert found["first"] == "from 0"
        assert found["all"] == [0, 1]
        assert found["place"] == (index, 2)
        other = OtherRank.__name__
        assert found["error"] == ("Refusal" if index == 0 else other, "not so", 7)
        assert found["same"] == ("UserError" if index == 0 else other)


LEFT = """
import os, sys
from pathlib import Path
import torch
from mlbseg import processes
from mlbseg.networks import make_network

processes.started = lambda: True
with processes.joined(torch.device("cpu")):
    make_network("unet", ndim=2, in_channels=1, num_classes=2, channels=(4, 8))
print(*sorted(path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="threads are only listed on Linux")
def test_no_thread_of_the_group_outlives_it() -> None:
    """A thread that does would end with the process, which is aborted then, now and then."""
    path = [part for part in os.environ["PYTHONPATH"].split(os.pathsep) if part != str(HIDDEN)]
    place = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    environment = {
        **os.environ,
        **place,
        "PYTHONPATH": os.pathsep.join(path),
    }  # MONAI as it is with all it imports
    done = subprocess.run(
        [sys.executable, "-c", LEFT], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "python" in done.stdout
    assert "gloo" not in done.stdout
