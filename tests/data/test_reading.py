"""Several processes give what one gives, whatever becomes of them."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import time
from contextlib import closing, suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import readers
from data.broken import healthy
from mlbseg.data import reading as module
from mlbseg.data.cases import find_cases
from mlbseg.data.reading import HERE, Reading
from mlbseg.errors import Fault, FaultsError, ReadError, UserError

TWO = Reading(2)


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have even what takes no time done in other processes."""
    monkeypatch.setattr(module, "SOON", -1.0)


def collected(way: Reading, function: Any, count: int = 6, **options: Any) -> tuple[list[Any], str]:
    """Return what was yielded, and the error that ended it."""
    found: list[Any] = []
    try:
        found.extend(one for one in map(found.append, way.each(function, range(count), **options)) if one)
    except UserError as error:
        return found, f"{error} {[fault.where for fault in error.faults]}"
    return found, ""


@pytest.mark.slow
@pytest.mark.usefixtures("elsewhere")
def test_results_come_in_order_with_the_errors_of_one_process() -> None:
    for function in (readers.square, readers.fail_at_three_and_one, readers.tell):
        assert collected(TWO, function) == collected(HERE, function)
    assert collected(TWO, readers.square) == ([0, 1, 4, 9, 16, 25], "")
    assert collected(TWO, readers.fail_at_three_and_one)[0] == [0]


@pytest.mark.slow
@pytest.mark.usefixtures("elsewhere")
def test_an_error_of_ours_keeps_its_place() -> None:
    with pytest.raises(ZeroDivisionError) as raised:
        list(TWO.each(readers.break_down, range(4)))
    assert "in break_down" in raised.value.__notes__[0]


@pytest.mark.slow
@pytest.mark.usefixtures("elsewhere")
def test_a_process_that_is_killed_costs_one_item_and_the_rest_goes_on(tmp_path: Path) -> None:
    done: list[tuple[int, int]] = []
    found = TWO.each(
        partial(readers.die_at_two, tmp_path), range(6), lost=lambda number: -number,
        progress=lambda now, total: done.append((now, total)),
    )  # fmt: skip
    assert list(found) == [0, 1, -2, 3, 4, 5]
    assert len(list(tmp_path.glob("2.*"))) == 2  # it was given a second chance, alone
    assert done[-1] == (6, 6)
    with pytest.raises(ReadError, match=r"2: the process that read it was killed.*more memory"):
        list(TWO.each(partial(readers.die_at_two, tmp_path), range(6)))


@pytest.mark.slow
@pytest.mark.usefixtures("elsewhere")
def test_an_item_is_not_lost_to_the_memory_of_others(tmp_path: Path) -> None:
    assert list(TWO.each(partial(readers.die_unless_alone, tmp_path), range(6))) == list(range(6))
    assert len(list(tmp_path.glob("2.*"))) == 2


@pytest.mark.slow
@pytest.mark.usefixtures("elsewhere")
def test_what_was_short_of_memory_is_done_again_alone(tmp_path: Path) -> None:
    found = TWO.each(partial(readers.in_use, tmp_path), range(6), short=lambda others: others > 1)
    assert list(found) == [1] * 6


@pytest.mark.slow
@pytest.mark.usefixtures("elsewhere")
def test_an_error_for_lack_of_memory_is_no_error_if_there_is_enough_alone(tmp_path: Path) -> None:
    assert list(TWO.each(partial(readers.refuse_once, tmp_path), range(6))) == list(range(6))
    assert (tmp_path / "2").exists()


@pytest.mark.slow
@pytest.mark.usefixtures("elsewhere")
def test_no_more_at_once_than_memory_allows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    three = Reading(3)
    monkeypatch.setattr(module, "free_memory", lambda: 8 * module.PROCESS_BYTES)
    room = 5 * module.PROCESS_BYTES  # less three processes
    work = partial(readers.in_use, tmp_path)
    assert max(three.each(work, range(6), need=lambda _: room // 3)) == 3
    assert max(three.each(work, range(6), need=lambda _: room // 2)) == 2
    assert max(three.each(work, range(4), need=lambda _: 2 * room)) == 1
    monkeypatch.setattr(module, "free_memory", lambda: 2 * module.PROCESS_BYTES)
    assert max(three.each(work, range(4))) == 1  # memory for one process


@pytest.mark.slow
@pytest.mark.usefixtures("elsewhere")
def test_warnings_are_given_here() -> None:
    with pytest.warns(UserWarning, match="one is odd") as given:
        assert list(TWO.each(readers.warn, range(4))) == [0, 1, 2, 3]
    assert len(given) == 1


@pytest.mark.slow
@pytest.mark.usefixtures("elsewhere")
def test_a_process_imports_what_reading_needs_and_no_more(tmp_path: Path) -> None:
    cases = find_cases(healthy(tmp_path)).cases
    assert list(TWO.each(readers.loaded, cases)) == [[]] * 4


@pytest.mark.slow
@pytest.mark.usefixtures("elsewhere")
def test_a_closed_iterator_ends_its_processes() -> None:
    with closing(TWO.each(readers.process, range(8))) as found:
        worker = next(found)
    assert worker != os.getpid()
    with pytest.raises(ProcessLookupError):
        os.kill(worker, 0)


def test_little_is_done_in_this_process() -> None:
    assert set(TWO.each(readers.process, range(8))) == {os.getpid()}
    assert list(TWO.each(readers.process, [0], need=lambda _: 1 << 40)) == [os.getpid()]
    assert set(HERE.each(readers.process, range(8), need=lambda _: 1 << 40)) == {os.getpid()}


@pytest.mark.slow
def test_what_may_need_much_is_done_in_another() -> None:
    assert os.getpid() not in set(TWO.each(readers.process, range(3), need=lambda _: module.SMALL + 1))


def test_a_number_of_processes_that_is_none_is_refused() -> None:
    with pytest.raises(UserError, match="--processes: found 0, expected at least 1"):
        Reading(0)


def test_processes_that_read_at_once_share_the_cores() -> None:
    assert Reading(8).shared(2).processes == 4
    assert Reading(1).shared(2).processes == 1
    assert Reading(None).shared(10**6).processes == 1
    assert Reading(None).shared(1).processes is None


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_nothing_is_left_when_the_process_is_ended(number: signal.Signals, tmp_path: Path) -> None:
    # No `if __name__ == "__main__"` around it: what a user's script does must not be done again in each process.
    script = tmp_path / "script.py"
    source = Path(readers.__file__)
    script.write_text(source.read_text().replace('if __name__ == "__main__":', "if True:"))
    marks = tmp_path / "marks"
    marks.mkdir()
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(source.parent), *sys.path])}
    process = subprocess.Popen(
        [sys.executable, str(script), str(marks)], stderr=subprocess.PIPE, text=True,
        env=environment, start_new_session=True,
        # A shell has its background jobs ignore it, and so would the process.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    try:
        wait_for(lambda: len(list(marks.iterdir())) == 2)
        workers = [int(mark.name) for mark in marks.iterdir()]
        if number is signal.SIGINT:
            os.killpg(process.pid, number)  # as a terminal does: all of them get it
        else:
            process.send_signal(number)
        _, said = process.communicate(timeout=20)
        wait_for(lambda: not any(map(lives, workers)))
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert said.count("Traceback") <= 1, said  # that of the script


def lives(process: int) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in ("Z", "X")


def wait_for(condition: Any, seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize(
    "error",
    [
        UserError("a\x1b", faults=[Fault("x", "y")]),
        ReadError(Fault("x", "y", "z", case_id="c")),
        FaultsError([Fault("x", "y")], "here", "advice"),
    ],
)
def test_errors_survive_the_way_between_processes(error: UserError) -> None:
    again = pickle.loads(pickle.dumps(error))  # noqa: S301 - our own bytes
    assert type(again) is type(error)
    assert str(again) == str(error)
    assert vars(again) == vars(error)
