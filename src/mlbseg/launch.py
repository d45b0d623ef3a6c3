"""Start several processes on this machine that do one thing together, and watch them.

Each of them calls one function of the package, with the environment that torchrun would give it. When one fails, the
others are stopped. torch's own launcher is not used: it kills a rank 30 seconds after it was asked to stop, even in the
middle of a step, and reports in words of its own.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

from mlbseg.errors import Fault, OtherRank, UserError
from mlbseg.files import machines_temporary_folder, working_folder, write_atomic

# torch is imported where it is needed: a process that starts must soon be able to take a signal.

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""The environment of a rank, as torchrun sets it."""

GRACE = 10.0
"""Seconds that the others have to end by themselves when one has failed."""


def started() -> bool:
    """Return whether this process was started as one of several ranks."""
    return all(name in os.environ for name in VARIABLES) and os.environ["WORLD_SIZE"] != "1"


def speaks() -> bool:
    """Return whether this process speaks for all that were started with it, as one of them does."""
    return not started() or os.environ["RANK"] == "0"


class Signalled(UserError):
    """The processes were stopped by a signal to the one that had started them."""

    def __init__(self, number: int) -> None:
        super().__init__("stopped")
        self.number = number
        self.exit_code = 128 + number


class Killed(UserError):
    """A process was killed, and could not say why."""


def launch(function: str, arguments: Mapping[str, Any], count: int) -> list[Any]:
    """Call a function in several processes at once, each of which is a rank.

    Args:
        function: ``module:name``; what it takes and returns must be JSON.
        arguments: Its keyword arguments.
        count: Number of processes.

    Returns:
        What each of them returned.

    Raises:
        UserError: that of a process that failed.
        Killed: if one ended without a message.
        Signalled: on SIGINT or SIGTERM, when all have ended.
        RuntimeError: if one failed by an internal error; its traceback is the error's note.
    """
    from torch import get_num_threads
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    # Here and not in rank 0, so that the port is a free one and outlives any rank.
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with working_folder(machines_temporary_folder()) as folder:
        (folder / "task.json").write_text(json.dumps({"function": function, "arguments": arguments}))
        processes: list[subprocess.Popen[bytes]] = []
        with _forwarding(processes) as signals:
            try:
                for index in range(count):
                    processes.append(
                        subprocess.Popen(  # noqa: S603 - our own module
                            [sys.executable, "-m", "mlbseg.launch", str(folder)],
                            stdin=subprocess.PIPE,
                            start_new_session=True,  # Ctrl-C reaches this process, which tells them
                            env={
                                **os.environ,
                                "OMP_NUM_THREADS": str(max(1, get_num_threads() // count)),
                                **_place(index, count, store.port),
                            },
                        )
                    )
                killed = _wait(processes, signals)
            finally:
                for process in processes:
                    process.kill()
                    with process:  # waits, and closes its input
                        pass
        reports = [_read_report(folder, index) for index in range(count)]
    if signals and any(process.returncode for process in processes):
        raise Signalled(signals[0])
    _raise_failure([p.returncode for p in processes], reports, killed)
    return [report["value"] for report in reports]


def _place(index: int, count: int, port: int) -> dict[str, str]:
    """Return the environment of a rank, as torchrun sets it."""
    return {
        "RANK": str(index), "LOCAL_RANK": str(index), "GROUP_RANK": "0",
        "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        # The store is in the process that launches.
        "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0",
    }  # fmt: skip


@contextmanager
def _forwarding(processes: Sequence[subprocess.Popen[bytes]]) -> Iterator[list[int]]:
    """Pass SIGINT and SIGTERM on to the processes, as SIGTERM; yield the list of those that came."""
    came: list[int] = []

    def forward(number: int, frame: object) -> None:
        came.append(number)
        for process in processes:
            process.terminate()

    if threading.current_thread() is not threading.main_thread():
        yield came
        return
    before = {number: signal.signal(number, forward) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)


def _wait(processes: Sequence[subprocess.Popen[bytes]], signals: Sequence[int]) -> set[int]:
    """Wait for all to end, for `GRACE` only once one has failed; return the indices of those to be killed."""
    deadline = None
    told = False
    while any(process.poll() is None for process in processes):
        if signals and not told:  # one that came while they were being started reached only some
            told = True
            for process in processes:
                process.terminate()
        if deadline is None and any(process.poll() for process in processes):
            deadline = time.monotonic() + GRACE
        if deadline is not None and time.monotonic() > deadline:
            break
        time.sleep(0.05)
    return {index for index, process in enumerate(processes) if process.poll() is None}


def _read_report(folder: Path, index: int) -> dict[str, Any]:
    path = folder / f"{index}.json"
    report: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    return report


def _raise_failure(codes: Sequence[int], reports: Sequence[Mapping[str, Any]], killed: set[int]) -> None:
    """Raise what ended the processes, if anything but their end did."""
    errors = [report["error"] for report in reports if "error" in report]
    for first in sorted(errors, key=lambda error: bool(error["other"])):
        if not first["other"]:
            failure = UserError(first["message"], faults=[Fault(**fault) for fault in first["faults"]])
            failure.exit_code = first["code"]
            raise failure
    for index, code in enumerate(codes):
        if code < 0 and index not in killed:
            name = signal.Signals(-code).name
            hint = ", as the system does when memory runs out" if -code == signal.SIGKILL else ""
            raise Killed(f"rank {index} of {len(codes)} was killed ({name}{hint}); the others were stopped")
    for index, report in enumerate(reports):
        if "crash" in report:
            failed = RuntimeError(f"rank {index} of {len(codes)} failed: {report['crash']['what']}")
            failed.add_note(report["crash"]["traceback"])
            raise failed
    for index, code in enumerate(codes):
        if code > 0 and "error" not in reports[index]:
            raise RuntimeError(f"rank {index} of {len(codes)} failed with exit code {code}")
    if errors:
        raise Killed(errors[0]["message"])


# --- in the processes that were started -------------------------------------------------------------------


def main() -> None:
    """Be one of the processes that `launch` starts: call the function, and report what it returned or raised."""
    threading.Thread(target=end_with_parent, daemon=True).start()
    folder = Path(sys.argv[1])
    task = json.loads((folder / "task.json").read_text())
    module, _, name = task["function"].partition(":")
    report: dict[str, Any]
    code = 0
    try:
        report = {"value": getattr(import_module(module), name)(**task["arguments"])}
    except UserError as error:
        code = error.exit_code
        report = {
            "error": {
                "message": str(error),
                "faults": [fault.as_dict() for fault in error.faults],
                "code": code,
                "other": isinstance(error, OtherRank),
            }
        }
    except Exception as error:  # an internal error: the process that launched this one raises it
        code = 1
        trace = "".join(traceback.format_exception(error, limit=-50))
        report = {"crash": {"what": f"{type(error).__name__}: {error}", "traceback": trace}}
    write_atomic(folder / f"{os.environ['RANK']}.json", json.dumps(report).encode())
    sys.exit(code)


def end_with_parent() -> None:
    """Stop in order when the process that launched this one is gone, however it went: our input then ends."""
    os.read(0, 1)
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    main()
