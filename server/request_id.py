"""Every response has a header `x-request-id`: the client's own, or a new one. Traces of the caller's go on."""

import asyncio
import logging
import re
from collections.abc import Callable

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.errors import ServerError, Unavailable, error_response
from server.trace_context import CURRENT, RequestContext, parse_traceparent

logger = logging.getLogger(__name__)

HEADER = "x-request-id"
ACCEPTED = re.compile(rb"[\x21-\x7e]{1,128}")


class RequestIds:
    """ASGI middleware, the outermost one. Ids that are long or not plain ASCII are replaced, not echoed.

    A caller's `traceparent` is named in the log, and answered with `traceresponse`. What no handler caught is a bug:
    it is logged with the id and answered with 500, traceback and all kept back. A request that is cancelled because
    the server stops is answered with 503. `new_id` gives hex digits, 16 at least.
    """

    def __init__(self, app: ASGIApp, new_id: Callable[[], str]) -> None:
        self._app = app
        self._new_id = new_id

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        context = self._context(scope)
        added = {HEADER: context.request_id}
        if context.trace is not None:
            added["traceresponse"] = context.trace.response(self._new_id()[:16])
        has_started = False

        async def send_with_id(message: Message) -> None:
            nonlocal has_started
            if message["type"] == "http.response.start":
                has_started = True
                MutableHeaders(scope=message).update(added)
            await send(message)

        token = CURRENT.set(context)
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
            logger.exception("a request failed")
            await error_response(ServerError())(scope, receive, send_with_id)
        finally:
            CURRENT.reset(token)

    def _context(self, scope: Scope) -> RequestContext:
        given, traces = b"", []
        for name, value in scope["headers"]:
            if name == b"traceparent":
                traces.append(value)
            elif name == HEADER.encode():
                given = value
        request_id = given.decode() if ACCEPTED.fullmatch(given) else self._new_id()
        return RequestContext(request_id, parse_traceparent(traces))
