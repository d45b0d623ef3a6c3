"""Shared fixtures."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from blocks import TINY, write_blocks

REPOSITORY = Path(__file__).resolve().parents[1]
HIDDEN = Path(__file__).parent / "hidden"
"""Libraries that the tests need and mlbseg does not. MONAI imports them where they are, which takes seconds."""

LONGEST = (
    "test_devices", "test_training", "test_plugin", "test_bench", "test_bounds", "test_global_state", "test_cli",
    "test_reading", "test_ranks", "test_cache", "test_audit", "test_bundle", "test_nets", "test_benchmarks",
)  # fmt: skip
"""The files that take longest. They come first, so that no worker is left with one at the end."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the longest files first."""
    place = {name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.stem, len(place)))


def with_hidden(environment: Mapping[str, str]) -> str:
    """Return PYTHONPATH of a process that is to find no library which users do not have."""
    return os.pathsep.join([str(HIDDEN), *filter(None, [environment.get("PYTHONPATH")])])


@pytest.fixture(scope="session")
def realdata() -> Path:
    """The folder of real scans; the test is skipped where it is absent."""
    root = Path(os.environ.get("MLBSEG_REALDATA", REPOSITORY.parent / "shared" / "data"))
    if not root.is_dir():
        pytest.skip(f"no real scans at {root} (set MLBSEG_REALDATA)")
    return root


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep prepared scans out of the user's cache; one thread, as many for tiny tensors only wait."""
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLBSEG_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session", autouse=True)
def _as_users_have_it() -> Iterator[None]:
    """Hide from processes that tests start what users do not have."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", with_hidden(os.environ))
        yield


@pytest.fixture(autouse=True)
def _on_the_cpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests mean the CPU, where runs repeat bit for bit, unless they are marked gpu."""
    if "gpu" not in request.keywords:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # of the processes that a test starts


@dataclass(frozen=True)
class Outcome:
    """What a command did: its exit code and what it printed."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        """Return stdout, which must be one JSON object."""
        record = json.loads(self.out, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
        assert isinstance(record, dict)
        return record


Command = Callable[..., Outcome]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Command:
    """Run `mlbseg` with these arguments in this process; what processes that it starts print counts too."""
    from mlbseg.cli import main

    def run(*arguments: object) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["mlbseg", *map(str, arguments)])
        capfd.readouterr()
        code = 0
        try:
            main()
        except SystemExit as stop:
            code = stop.code or 0  # type: ignore[assignment]
        return Outcome(code, *capfd.readouterr())

    return run


@pytest.fixture(scope="session")
def scans(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight 3D scans with two structures, the first four labelled."""
    return write_blocks(tmp_path_factory.mktemp("scans"))


@pytest.fixture(scope="session")
def supervised_run(scans: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on `scans` that has learned both blocks; case_3 was set apart for testing."""
    from mlbseg import train

    out = tmp_path_factory.mktemp("runs") / "supervised"
    overrides = [*TINY, "steps=80", "checkpoint_every=40"]
    train(str(scans), str(out), method="supervised", test=["case_3"], overrides=overrides, device="cpu")
    return out


@pytest.fixture(scope="session")
def mlb_run(scans: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on `scans` with both stages, 12 steps each, a checkpoint every 4."""
    from mlbseg import train

    out = tmp_path_factory.mktemp("runs") / "mlb"
    train(str(scans), str(out), overrides=[*TINY, "steps=24"], device="cpu")
    return out
