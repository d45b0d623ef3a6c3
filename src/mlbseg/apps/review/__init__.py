"""A review: labels looked at and corrected in a browser, in the order in which they are worth it.

`listing.py` orders the cases, `desk.py` holds them, `saving.py` writes labels, `server.py` is the web side, and
`following.py` goes on training. `docs/review.md` says what users see.
"""

from __future__ import annotations

import secrets
import socket
import webbrowser
from collections.abc import Callable
from pathlib import Path

from mlbseg.apps.review.listing import ORDERS, list_cases
from mlbseg.inference import Progress

__all__ = ["ORDERS", "review"]


def review(
    target: str | Path,
    *,
    order: str | Path = "audit",
    port: int = 0,
    browser: bool = True,
    who: str | None = None,
    device: str = "auto",
    progress: Progress | None = None,
    say: Callable[[str], None] = print,
) -> None:
    """Serve a review on this machine's own address until it is interrupted.

    Args:
        target: A run folder, or a folder or list of scans.
        order: ``audit`` (the last audit's), ``suggest`` (unlabelled scans ranked now), ``names``, or a CSV file with a
            column ``case``.
        port: Of the address; a free one when 0.
        browser: Open the page.
        who: Name for the log of corrections; the user's when None.
        device: Where networks compute.
        progress: Called with (done, all, case id) while the scans are ranked.
        say: Gets the address.

    Raises:
        UserError: if there is nothing to review, or the port is taken.
    """
    import uvicorn

    from mlbseg.apps.review.desk import Desk
    from mlbseg.apps.review.saving import user
    from mlbseg.apps.review.server import application
    from mlbseg.errors import UserError

    listing = list_cases(Path(target), order, device=device, progress=progress)
    desk = Desk(listing, who=who or user(), device=device)
    token = secrets.token_urlsafe(24)
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(("127.0.0.1", port))
    except OSError as error:
        raise UserError(
            f"--port {port}: {error.strerror} (choose another one, or 0 for a free one)"
        ) from None
    address = f"http://127.0.0.1:{listener.getsockname()[1]}/{token}/"
    say(f"{len(desk.items)} cases; open {address}")
    say("Only this machine can open it, and only with this address. Ctrl+C ends it.")
    if browser:
        webbrowser.open(address)
    config = uvicorn.Config(
        application(desk, token), log_level="warning", access_log=False, server_header=False, limit_concurrency=500,
        timeout_graceful_shutdown=5, h11_max_incomplete_event_size=65_536,
    )  # fmt: skip
    with listener:
        uvicorn.Server(config).run(sockets=[listener])
