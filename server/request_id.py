"""Every response has a header `x-request-id`: the client's own, or a new one."""

import asyncio
import logging
import re
from collections.abc import Callable

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.errors import ServerError, Unavailable, error_response

logger = logging.getLogger(__name__)

HEADER = "x-request-id"
ACCEPTED = re.compile(rb"[\x21-\x7e]{1,128}")


class RequestIds:
    """ASGI middleware, the outermost one. Ids that are long or not plain ASCII are replaced, not echoed.

    What no handler caught is a bug: it is logged with the id and answered with 500, traceback and all kept back. A
    request that is cancelled because the server stops is answered with 503.
    """

    def __init__(self, app: ASGIApp, new_id: Callable[[], str]) -> None:
        self._app = app
        self._new_id = new_id

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = dict(scope["headers"]).get(HEADER.encode(), b"")
        request_id = given.decode() if ACCEPTED.fullmatch(given) else self._new_id()

        has_started = False

        async def send_with_id(message: Message) -> None:
            nonlocal has_started
            if message["type"] == "http.response.start":
                has_started = True
                MutableHeaders(scope=message)[HEADER] = request_id
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except asyncio.CancelledError:
            if not has_started:
                cut = Unavailable("the server is shutting down: look later whether this was done", code="draining")
                await error_response(cut)(scope, receive, send_with_id)
            raise
        except Exception:
            if has_started:
                raise
            logger.exception("request %s failed", request_id)
            await error_response(ServerError())(scope, receive, send_with_id)
