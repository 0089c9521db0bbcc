"""What a server without keys does not do for pages of the web: everything here is allowed to whoever may connect."""

import logging
import re
from collections.abc import Collection

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from server.body import has_body
from server.config import ServeSettings, is_loopback
from server.error_handlers import error_response
from server.errors import Forbidden, ServerError, UnsupportedMediaType

logger = logging.getLogger(__name__)

_HOST = re.compile(r"(?:https?://)?(\[[0-9a-f:.]+\]|[^/:@\[\]]+)(?::\d{1,5})?", re.IGNORECASE)


def log_who_may_ask(settings: ServeSettings) -> None:
    """A line of the log about a server without keys, which whoever starts it may not be aware of."""
    if not settings.is_open:
        return
    if is_loopback(settings.host):
        logger.info("no key is set: every program of this machine may do everything, others cannot connect")
    else:
        logger.warning("no key is set: whoever reaches %s may do everything", settings.host)


class LocalOnly:
    """ASGI middleware: refuses requests that a browser of this machine sends for somebody else.

    A page's name that was made to mean this machine shows in `Host`, another page's script in `Origin`. Browsers send
    bodies of some content types, and of none, without asking first. Scripts of `origins` are welcome; `*` is not among
    them, since it would mean every page of the web.
    """

    def __init__(self, app: ASGIApp, origins: Collection[str] = ()) -> None:
        self._app = app
        self._origins = frozenset(origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        refusal = _refusal(Headers(scope=scope), self._origins) if scope["type"] == "http" else None
        app = self._app if refusal is None else error_response(refusal)
        await app(scope, receive, send)


def _refusal(headers: Headers, origins: Collection[str]) -> ServerError | None:
    for name in ("host", "origin"):
        values = headers.getlist(name)
        if not all(_is_local(value) or (name == "origin" and value in origins) for value in values):
            return Forbidden(
                f"without keys this server answers to its own machine only, and the header {name.title()} names"
                " another one: expected http://localhost, or a server with --api-key or --admin-key"
            )
    if has_body(headers) and "content-type" not in headers:
        return UnsupportedMediaType("the body has no content type, expected `Content-Type: application/json`")
    return None


def _is_local(value: str) -> bool:
    """Whether a host, with or without a port, or the origin of a page is this machine."""
    match = _HOST.fullmatch(value)
    if match is None:
        return False
    host = match[1].strip("[]").lower().rstrip(".")
    return is_loopback(host) or host.endswith(".localhost")
