"""Processes that do one thing together: what they are told, and what becomes of the others when one ends."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from conftest import Command
from mlbseg import launch as module
from mlbseg.errors import UserError
from mlbseg.launch import Killed, Signalled, launch, speaks, started

pytestmark = pytest.mark.slow

TESTS = Path(__file__).parent
PATIENCE = 120.0  # seconds; generous


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    path = os.environ.get("PYTHONPATH")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(TESTS), *([path] if path else [])]))


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_every_process_is_a_rank_and_returns_its_value() -> None:
    found = launch("launched:place", {"word": "hello"}, 3)
    assert found == [["hello", rank, "3", "1"] for rank in range(3)]


def test_this_process_is_none_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not started()
    assert speaks()
    for name in module.VARIABLES:
        monkeypatch.setenv(name, "1")
    assert not started()  # one of one: it is by itself
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert started()
    assert not speaks()


@pytest.mark.parametrize("rank", [0, 1])
def test_a_users_fault_in_one_is_raised_and_ends_the_others(
    rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "GRACE", 0.5)
    with pytest.raises(UserError, match=r"^found this, expected that \(do this\)$") as caught:
        launch("launched:fail", {"rank": rank}, 2)
    assert caught.value.exit_code == 2
    assert [fault.case_id for fault in caught.value.faults] == ["c"]


def test_a_fault_of_ours_is_raised_with_its_traceback_and_nothing_is_printed(
    capfd: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(RuntimeError, match="rank 1 of 2 failed: ZeroDivisionError: ours") as caught:
        launch("launched:crash", {}, 2)
    assert "\n" not in str(caught.value)
    assert re.search(r"launched\.py.*in crash.*ZeroDivisionError: ours", caught.value.__notes__[0], re.DOTALL)
    assert capfd.readouterr().err == ""


def test_a_fault_of_ours_in_a_rank_ends_a_command_with_one_line_and_a_file(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, command: Command
) -> None:
    monkeypatch.setattr("mlbseg.training.train_run", lambda *_, **__: launch("launched:crash", {}, 2))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    done = command("train", "--resume", tmp_path, "--devices", "2")
    assert (done.code, done.err.count("\n")) == (1, 1), done.err
    assert done.err.startswith(
        "error: internal error (RuntimeError: rank 1 of 2 failed: ZeroDivisionError: ours); "
    )
    (file,) = tmp_path.glob("mlbseg-error-*.txt")
    assert 'raise ZeroDivisionError("ours")' in file.read_text()


def test_a_killed_process_is_named_and_ends_the_others(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(Killed, match=r"rank 1 of 2 was killed \(SIGKILL, as .* memory runs out\)"):
        launch("launched:end", {"code": -signal.SIGKILL}, 2)
    assert capfd.readouterr().err == ""


def test_an_end_without_a_word_is_told_by_the_one_that_lost_it() -> None:
    with pytest.raises(Killed, match="rank 0 lost another of the 2 ranks"):
        launch("launched:end", {"code": 0}, 2)


def test_a_rank_that_does_not_answer_is_lost_after_the_time_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "GRACE", 0.5)
    with pytest.raises(Killed, match=r"it ended, or did not answer for 0\.05 minutes"):
        launch("launched:keep_waiting", {"minutes": 0.05}, 2)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_passed_on_and_waited_for(number: signal.Signals, tmp_path: Path) -> None:
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)

    def interrupt() -> None:
        wait_until(lambda: len(list(tmp_path.glob("running*"))) == 2)
        os.kill(os.getpid(), number)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(Signalled) as caught:
        launch("launched:stop_in_order", {"folder": str(tmp_path)}, 2)
    thread.join()
    assert caught.value.exit_code == 128 + number
    assert {path.name for path in tmp_path.glob("stopped*")} == {"stopped0", "stopped1"}
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers


def test_what_was_done_in_spite_of_a_signal_counts(tmp_path: Path) -> None:
    def interrupt() -> None:
        wait_until(lambda: len(list(tmp_path.glob("running*"))) == 2)
        os.kill(os.getpid(), signal.SIGTERM)
        (tmp_path / "go on").touch()

    thread = threading.Thread(target=interrupt)
    thread.start()
    assert launch("launched:finish_all_the_same", {"folder": str(tmp_path)}, 2) == ["done", "done"]
    thread.join()


def test_processes_end_in_order_when_the_one_that_started_them_is_killed(tmp_path: Path) -> None:
    code = f"from mlbseg.launch import launch; launch('launched:stop_in_order', {{'folder': {str(tmp_path)!r}}}, 2)"
    with subprocess.Popen([sys.executable, "-c", code]) as parent:
        wait_until(lambda: len(list(tmp_path.glob("running*"))) == 2)
        parent.kill()
    wait_until(lambda: len(list(tmp_path.glob("stopped*"))) == 2)
