"""Many files read at once: each in one of several processes, with the results of one process, in the same order.

The processes are loky's. They import what the function that they call needs, and end with the process that started
them.
"""

from __future__ import annotations

import os
import signal
import threading
import time
import traceback
import warnings
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, NoReturn, TypeVar

from mlbseg.data.cache_root import default_cache_root
from mlbseg.data.remembered import Remembered
from mlbseg.errors import Fault, ReadError, UserError, out_of_memory
from mlbseg.memory import free_memory

if TYPE_CHECKING:
    from loky.process_executor import ProcessPoolExecutor

T = TypeVar("T")
R = TypeVar("R")

SOON = 1.0
"""Seconds: what takes no longer is done in this process, as others take as long to start."""
WORTH = 3.0
"""Seconds: where no more is left to do, at the pace so far, other processes are not started."""
SMALL = 256 * 2**20
"""Bytes of memory: what may need more is done in another process, in case it is killed."""
PROCESS_BYTES = 256 * 2**20
"""Memory of a process that reads nothing yet."""
KILLED = "the process that read it was killed, as the system does when memory runs out"
"""What has happened to a scan whose process is gone."""


@dataclass(frozen=True)
class Reading:
    """How files are read.

    Attributes:
        processes: In how many processes; as many as there are cores when None.
        remembered: Where is kept what was read.
    """

    processes: int | None = 1
    remembered: Remembered = field(default_factory=Remembered)

    def __post_init__(self) -> None:
        if self.processes is not None and self.processes < 1:
            raise UserError(f"--processes: found {self.processes}, expected at least 1")

    @classmethod
    def of(cls, processes: int | None = None, cache: Path | None = None) -> Reading:
        """Return how a command reads: what was read is remembered in its cache folder.

        Args:
            processes: In how many processes; as many as there are cores when None.
            cache: The folder; the user's when None.

        Raises:
            UserError: The number of processes is none.
        """
        try:
            root = default_cache_root() if cache is None else cache
        except UserError:  # no folder can be written: nothing is remembered then
            return cls(processes)
        return cls(processes, Remembered.at(root))

    def shared(self, count: int) -> Reading:
        """Return how each of several processes is to read that do so at once."""
        if count == 1:
            return self
        return replace(self, processes=max(1, (self.processes or _cores()) // count))

    def each(
        self,
        function: Callable[[T], R],
        items: Sequence[T],
        *,
        need: Callable[[T], int] = lambda _: 0,
        lost: Callable[[T], R] | None = None,
        short: Callable[[R], bool] = lambda _: False,
        progress: Callable[[int, int], None] | None = None,
    ) -> Generator[R, None, None]:
        """Call a function with each of some items, several at once; yield what it returns, in their order.

        As many are done at once as there are processes and as their needs fit into the memory that is free; one that
        needs more is done alone. Close the iterator, or use it up: the processes end then.

        Args:
            function: A function of a module, or a `partial` of one.
            items: What it is called with; picklable, as are its results.
            need: Bytes of memory that an item takes; called in this process.
            lost: Gives the result for an item whose process was killed, and killed again with no other beside it.
                Without it that is an error.
            short: Whether a result says that memory was short; such an item is done again, alone.
            progress: Called with (items done, items in all).

        Raises:
            UserError: What the function has raised for an item, when it is that item's turn; or a process was killed.
        """
        total, began = len(items), time.monotonic()
        processes = 1 if total < 2 else self.processes
        done = 0
        for item in items:
            spent = time.monotonic() - began
            long = spent > SOON and (done == 0 or spent / done * (total - done) > WORTH)
            if processes != 1 and (long or need(item) > SMALL):
                processes = processes or _cores()
                if processes > 1:
                    break
            yield function(item)
            done += 1
            if progress:
                progress(done, total)
        if done < total and processes:
            pool = _Pool(function, items[done:], processes, need, lost or _killed, short)
            yield from pool.results(lambda more: progress(done + more, total) if progress else None)


HERE = Reading()
"""One after the other in this process, and nothing is remembered."""


@dataclass
class _Outcome(Generic[R]):
    value: R | None = None
    error: BaseException | None = None
    warned: list[tuple[type[Warning], str]] = field(default_factory=list)

    def result(self) -> R:
        """Return or raise what the function has, after the warnings that it gave."""
        for category, message in self.warned:
            warnings.warn(message, category, stacklevel=2)
        if self.error is not None:
            raise self.error
        return self.value  # type: ignore[return-value]


class _Pool(Generic[T, R]):
    """Items on their way through processes."""

    def __init__(
        self,
        function: Callable[[T], R],
        items: Sequence[T],
        processes: int,
        need: Callable[[T], int],
        lost: Callable[[T], R],
        short: Callable[[R], bool],
    ) -> None:
        self.function, self.items, self.need, self.lost, self.short = function, items, need, lost, short
        free = free_memory()
        self.width = max(1, min(processes, len(items), free // (2 * PROCESS_BYTES)))
        self.room = free - self.width * PROCESS_BYTES
        self.waiting = deque(range(len(items)))
        self.alone: deque[int] = deque()  # to be done with no other beside them
        self.running: dict[Future[_Outcome[R]], int] = {}
        self.needs: dict[int, int] = {}  # bytes
        self.outcomes: dict[int, _Outcome[R]] = {}
        self.executor: ProcessPoolExecutor | None = None
        self.is_wide = True  # it has all its processes, not one

    def results(self, progress: Callable[[int], None]) -> Iterator[R]:
        """Yield the results in order; call `progress` with the number of items that are done."""
        done = turn = 0
        try:
            while turn < len(self.items):
                self._start()
                done += self._gather()
                progress(done)
                while turn in self.outcomes:
                    yield self.outcomes.pop(turn).result()
                    turn += 1
        except BaseException:  # also Ctrl-C, and an iterator that is closed
            self._end(kill=True)
            raise
        self._end()

    def _start(self) -> None:
        """Hand out what may be done now."""
        while self.waiting and len(self.running) < self.width:
            index = self.waiting[0]
            taken = sum(self.needs[other] for other in self.running.values())
            self.needs[index] = self.need(self.items[index])
            if self.running and taken + self.needs[index] > self.room:
                return
            if not self._submit(index, wide=True):
                return
            self.waiting.popleft()
        if self.alone and not self.running and self._submit(self.alone[0], wide=False):
            self.alone.popleft()

    def _submit(self, index: int, *, wide: bool) -> bool:
        """Hand out an item; return False if the processes were lost meanwhile."""
        if self.executor is None or self.is_wide != wide:
            self._end()
            self.executor, self.is_wide = _executor(self.width if wide else 1), wide
        try:
            with _interrupts_held():
                future = self.executor.submit(_call, self.function, self.items[index])
        except BrokenProcessPool:
            return False
        self.running[future] = index
        return True

    def _gather(self) -> int:
        """Wait for what is done, and return how many are."""
        finished = wait(self.running, return_when=FIRST_COMPLETED).done
        if any(isinstance(future.exception(), BrokenProcessPool) for future in finished) or not finished:
            finished = wait(self.running).done  # none of them goes on
            self._end(kill=True)
        return sum(self._take(future, self.running.pop(future)) for future in finished)

    def _take(self, future: Future[_Outcome[R]], index: int) -> bool:
        """Take what has become of an item; return whether it is done."""
        error = future.exception()
        if isinstance(error, BrokenProcessPool):
            if self.is_wide:  # which of them had it killed is seen when each is alone
                self.alone.append(index)
                return False
            self.outcomes[index] = _call(self.lost, self.items[index])
            return True
        outcome = future.result()
        if self.is_wide and (_is_short(outcome.error) or _says(self.short, outcome)):
            self.alone.append(index)
            return False
        self.outcomes[index] = outcome
        return True

    def _end(self, *, kill: bool = False) -> None:
        executor, self.executor = self.executor, None
        if executor is not None:
            with (
                warnings.catch_warnings()
            ):  # without psutil and pgrep loky warns, and kills them all the same
                warnings.simplefilter("ignore")
                executor.shutdown(kill_workers=kill)


def _is_short(error: BaseException | None) -> bool:
    """Say whether an error means that memory was short, which it may not be with no other process beside this one."""
    if error is None:
        return False
    faults = error.faults if isinstance(error, UserError) else ()
    return out_of_memory(error) or any(fault.kind == "memory" for fault in faults)


def _says(short: Callable[[R], bool], outcome: _Outcome[R]) -> bool:
    return outcome.error is None and short(outcome.value)  # type: ignore[arg-type]


def _killed(item: object) -> NoReturn:
    name = getattr(item, "id", str(item))
    remedy = "use a machine with more memory, or leave the scan out"
    raise ReadError(Fault(name, KILLED, remedy=remedy, case_id=name, kind="memory"))


def _cores() -> int:
    """Return the cores that this process may use: within its affinity and what a container grants."""
    from loky import cpu_count

    return int(cpu_count())


def _executor(width: int) -> ProcessPoolExecutor:
    from loky.process_executor import ProcessPoolExecutor

    threads = str(max(1, _cores() // width))
    ending, self_kept = Pipe(duplex=False)
    executor = ProcessPoolExecutor(
        width,
        initializer=_begin,
        initargs=(ending,),
        env={
            "OMP_NUM_THREADS": threads,
            "ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS": threads,
            "LOKY_MAX_MEMORY_LEAK_SIZE": "1e15",  # a large scan after a small one is no leak
        },
    )
    executor.kept = self_kept  # open until this process ends
    return executor


@contextmanager
def _interrupts_held() -> Iterator[None]:
    """Start processes that Ctrl-C does not reach: this one gets it, and ends them."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


# --- in the processes that were started -------------------------------------------------------------------


def _begin(ending: Connection) -> None:
    threading.Thread(target=_end_with, args=(ending,), daemon=True).start()


def _end_with(ending: Connection) -> None:
    """End at once when the process that started this one is gone, however it went: our pipe then ends."""
    try:
        ending.recv_bytes()
    except (EOFError, OSError):
        os._exit(1)


def _call(function: Callable[[Any], R], item: Any) -> _Outcome[R]:
    outcome: _Outcome[R] = _Outcome()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            outcome.value = function(item)
        except Exception as error:
            if not isinstance(error, UserError):
                error.add_note("".join(traceback.format_exception(error, limit=-50)))
            outcome.error = error
    outcome.warned = [(warning.category, str(warning.message)) for warning in caught]
    return outcome
