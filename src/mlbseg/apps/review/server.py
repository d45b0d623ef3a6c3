"""The web side of a review: on this machine's own address alone, behind a token, for one page and its requests."""

from __future__ import annotations

import gzip
import json
import secrets
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any

from markupsafe import Markup
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from mlbseg.apps.report.page import Section, render, render_page
from mlbseg.apps.report.viewer import SCRIPTS, viewer
from mlbseg.apps.review.desk import MOST_PART, Desk
from mlbseg.apps.review.following import TrainOn
from mlbseg.apps.review.saving import Conflict
from mlbseg.errors import UserError

ROOM = "mlbseg.apps.review"
HOSTS = ("127.0.0.1", "localhost", "[::1]")
MOST_BODY = 2 * MOST_PART + 1_000_000
"""Bytes of a request; a part of a scan, however badly it is compressed, has fewer."""

MOST_NAME = 80
HEADERS = {
    b"x-content-type-options": b"nosniff",
    b"x-frame-options": b"DENY",
    b"referrer-policy": b"no-referrer",
    b"cross-origin-opener-policy": b"same-origin",
    b"cross-origin-resource-policy": b"same-origin",
    b"cache-control": b"no-store",
    b"content-security-policy": b"frame-ancestors 'none'",
}
"""Of every answer; the page has a policy of its own too, which names its scripts."""


class Guard:
    """Refuses what does not come from the page itself, before anything is looked at.

    Another name in the Host header is what DNS rebinding would bring, another Origin what a foreign page would send;
    the token is what other users of this machine do not know.
    """

    def __init__(self, app: ASGIApp, token: str) -> None:
        self.app, self.token = app, token

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer 403 or 404, or pass the request on."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":
            return

        async def with_headers(message: Any) -> None:
            if message["type"] == "http.response.start":
                known = {name for name, _ in message["headers"]}
                message["headers"] = [
                    *message["headers"], *((n, v) for n, v in HEADERS.items() if n not in known)
                ]  # fmt: skip
            await send(message)

        refusal = self.refusal(scope)
        if refusal is None:
            await self.app(scope, receive, with_headers)
        else:
            status, words = refusal
            await JSONResponse({"error": words}, status)(scope, receive, with_headers)

    def refusal(self, scope: Scope) -> tuple[int, str] | None:
        """Return status and reason, or None for a request that may pass."""
        headers: dict[bytes, list[bytes]] = {}
        for name, value in scope["headers"]:
            headers.setdefault(name.lower(), []).append(value)
        hosts = [value.decode("latin-1") for value in headers.get(b"host", [])]
        if len(hosts) != 1 or (hosts[0].rpartition(":")[0] not in HOSTS and hosts[0] not in HOSTS):
            return 403, "another host"
        first = scope["path"].split("/")[1] if scope["path"].startswith("/") else ""
        if not secrets.compare_digest(first.encode(), self.token.encode()):
            return 403, "no token, or another one (open the address that mlbseg review has printed)"
        origins = [value.decode("latin-1") for value in headers.get(b"origin", [])]
        if any(origin != f"http://{hosts[0]}" for origin in origins):
            return 403, "another origin"
        if headers.get(b"sec-fetch-site", [b"none"])[0] not in (b"none", b"same-origin"):
            return 403, "another site"
        if scope["method"] == "POST" and not (
            headers.get(b"content-type", [b""])[0].startswith(
                (b"application/octet-stream", b"application/json")
            )
        ):
            return 415, "expected application/octet-stream or application/json"
        return None


def application(desk: Desk, token: str) -> Starlette:
    """Return the server of a review.

    Args:
        desk: What it does.
        token: First part of every address.
    """
    follow = TrainOn(desk)

    async def page(request: Request) -> Response:
        content = (await run_in_threadpool(page_of, desk)).encode(errors="backslashreplace")
        headers = {}
        if "gzip" in request.headers.get("accept-encoding", ""):
            content, headers = gzip.compress(content, 4), {"content-encoding": "gzip"}
        return Response(content, headers=headers, media_type="text/html; charset=utf-8")

    async def listing(_: Request) -> Response:
        return JSONResponse(await run_in_threadpool(desk.state))

    async def packed(request: Request) -> Response:
        with _request_alone():
            asked = request.query_params.get("part")
            part = None if asked is None else int(asked)
        content = await _asked(desk.packed, _number(request), part)
        _start(desk.predict, _number(request))
        return Response(content, media_type="application/octet-stream")

    async def save(request: Request) -> Response:
        content = await _body(request, MOST_BODY)
        with _request_alone():
            query = request.query_params
            part, values = int(query["part"]), [int(value) for value in query["values"].split(",")]
            base, who = query["base"], query.get("who", "")[:MOST_NAME]
        version = await _asked(lambda: desk.save(_number(request), part, base, values, content, who=who))
        return JSONResponse({"base": version})

    async def mark(request: Request) -> Response:
        content = await _body(request, 10_000)
        with _request_alone():
            asked = dict(json.loads(content))
            what, who = str(asked["what"]), str(asked.get("who", ""))[:MOST_NAME]
        await _asked(lambda: desk.mark(_number(request), what, who=who))
        return JSONResponse({})

    async def audit(request: Request) -> Response:
        await _body(request, 10_000)
        return JSONResponse(await _asked(desk.audit, _number(request)))

    async def train(request: Request) -> Response:
        if request.method == "POST":
            await _body(request, 10_000)
            await _asked(follow.start)
        return JSONResponse(await _asked(follow.status))

    below = f"/{token}"
    routes = [
        Route(f"{below}/", page),
        Route(f"{below}/list", listing),
        Route(f"{below}/case/{{number:int}}", packed),
        Route(f"{below}/case/{{number:int}}/save", save, methods=["POST"]),
        Route(f"{below}/case/{{number:int}}/mark", mark, methods=["POST"]),
        Route(f"{below}/case/{{number:int}}/audit", audit, methods=["POST"]),
        Route(f"{below}/train", train, methods=["GET", "POST"]),
    ]
    return Starlette(
        routes=routes,
        middleware=[Middleware(Guard, token=token)],
        exception_handlers={
            Conflict: _said(409),
            UserError: _said(422),
            Malformed: _said(400),
            TooLarge: _said(413),
        },
    )


class TooLarge(Exception):
    """A request with more bytes than any page sends."""


class Malformed(Exception):
    """A request that no page sends."""


@contextmanager
def _request_alone() -> Iterator[None]:
    """Take what goes wrong for a fault of the request; nothing but the request is looked at in here."""
    try:
        yield
    except (ValueError, KeyError, TypeError, RecursionError):
        raise Malformed from None


def page_of(desk: Desk) -> str:
    """Return the page of a review."""
    editor = Markup(render("editor.html", room=ROOM, run=desk.run is not None))  # noqa: S704 - all escaped
    body = Markup(  # noqa: S704 - all escaped
        render(
            "review.html",
            room=ROOM,
            viewer=viewer([], editor=editor),
            items=desk.state(),
            run=desk.run is not None,
        )
    )
    folder = desk.listing.dataset.root.name
    notes = [desk.listing.note, f"Old labels are kept in {folder}/labels_history."]
    section = Section(
        "Cases", body, " ".join(note for note in notes if note), (*SCRIPTS, f"{ROOM}:templates/review.js")
    )
    title = f"Review of {desk.run.root.name if desk.run else folder}"
    return render_page(title, [section], connect=True)


def _number(request: Request) -> int:
    return int(request.path_params["number"])


async def _asked(function: Callable[..., Any], *arguments: Any) -> Any:
    return await run_in_threadpool(function, *arguments)


async def _body(request: Request, most: int) -> bytes:
    """Return the body of a request; one that is too long is not even read to its end."""
    with _request_alone():
        announced = int(request.headers.get("content-length") or 0)
    if announced > most:
        raise TooLarge
    found = bytearray()
    async for chunk in request.stream():
        found += chunk
        if len(found) > most:
            raise TooLarge
    return bytes(found)


def _said(status: int) -> Callable[[Request, Exception], Awaitable[Response]]:
    async def answer(_: Request, error: Exception) -> Response:
        words = str(error) if isinstance(error, UserError) else "not a request of this page"
        return JSONResponse({"error": words}, status)

    return answer


def _start(function: Callable[..., None], *arguments: Any) -> None:
    threading.Thread(target=function, args=arguments, daemon=True).start()
