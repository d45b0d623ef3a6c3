"""What the tests of a review share: a server in a thread, and requests to it as they are typed."""

from __future__ import annotations

import contextlib
import http.client
import json
import threading
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import uvicorn

from mlbseg.apps.review.desk import Desk
from mlbseg.apps.review.listing import list_cases
from mlbseg.apps.review.server import application

TOKEN = "a-token-of-the-tests"  # noqa: S105 - of a server that lives for a test


@dataclass(frozen=True)
class Served:
    """A review that is served."""

    desk: Desk
    port: int

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}/{TOKEN}/"

    def ask(
        self, path: str, method: str = "GET", body: bytes = b"", **headers: str
    ) -> tuple[int, bytes, dict[str, str]]:
        """Send a request with just these headers beside Host; return status, body and headers."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        connection.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
        sent = {"Host": f"127.0.0.1:{self.port}", "Content-Length": str(len(body)), **headers}
        for name, value in sent.items():
            connection.putheader(name.replace("_", "-"), value)
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # refused before all of it was sent
            connection.endheaders(body)
        answer = connection.getresponse()
        found = answer.status, answer.read(), {k.lower(): v for k, v in answer.getheaders()}
        connection.close()
        return found

    def case(self, number: int, part: int | None = None) -> dict[str, Any]:
        from report.pages import unpack

        where = "" if part is None else f"?part={part}"
        status, body, _ = self.ask(f"/{TOKEN}/case/{number}{where}")
        assert status == 200, body
        return unpack(body)

    def save(self, number: int, drawn: np.ndarray, base: str, part: int = 0) -> tuple[int, dict[str, Any]]:
        """Save indices (Z, Y, X) in the order in which `unpack` gives them."""
        return self.save_turned(number, np.flip(drawn, (1, 2)), base, part)

    def save_turned(
        self, number: int, drawn: np.ndarray, base: str, part: int = 0
    ) -> tuple[int, dict[str, Any]]:
        """Save indices (Z, Y, X) as the browser has them."""
        turned = np.ascontiguousarray(drawn.astype(np.uint8))
        path = f"/{TOKEN}/case/{number}/save?part={part}&base={base}&values=1,2"
        body = zlib.compress(turned.tobytes())
        status, found, _ = self.ask(path, "POST", body, Content_Type="application/octet-stream")
        return status, json.loads(found)


@contextmanager
def served(target: Path, order: str = "names") -> Iterator[Served]:
    desk = Desk(list_cases(target, order), who="tester", device="cpu")
    config = uvicorn.Config(
        application(desk, TOKEN), port=0, log_level="error", access_log=False, lifespan="off"
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield Served(desk, server.servers[0].sockets[0].getsockname()[1])
    server.should_exit = True
    thread.join(10)
