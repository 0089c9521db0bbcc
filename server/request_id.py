"""Every response has a header `x-request-id`: the client's own, or a new one. Traces of the caller's go on."""

import asyncio
import logging
import re
from collections.abc import Callable
from typing import cast

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.deps import Services
from server.error_handlers import error_response
from server.errors import NO_FAILURE, ServerError, Unavailable
from server.journal import Journal, opened
from server.observer import Observer
from server.trace_context import parse_traceparent

logger = logging.getLogger(__name__)

HEADER = "x-request-id"
ACCEPTED = re.compile(rb"[\x21-\x7e]{1,128}")


class RequestIds:
    """ASGI middleware, the outermost one. Ids that are long or not plain ASCII are replaced, not echoed.

    It opens the request's journal, and hands it to the observer of the application's state. A trace, the caller's or
    this server's own, is answered with `traceresponse`. What no handler caught is a bug, here or in a library: it is
    logged with the id and answered with 500, traceback and all kept back. A request that is cancelled because the
    server stops is answered with 503. `new_id` gives hex digits, 16 at least.
    """

    def __init__(self, app: ASGIApp, new_id: Callable[[], str]) -> None:
        self._app = app
        self._new_id = new_id

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        observer = cast(Services, scope["state"]["services"]).observer
        journal = self._journal(scope, observer)
        span = observer.begin(journal)
        added = {HEADER: journal.request_id}
        if journal.trace is not None:
            added["traceresponse"] = journal.trace.response(
                span.context.parent_id if span is not None else self._new_id()[:16]
            )

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                journal.status = message["status"]
                MutableHeaders(scope=message).update(added)
            await send(message)

        with opened(journal):
            try:
                await self._answer(journal, scope, receive, send_with_id)
            finally:
                observer.end(journal, span, getattr(scope.get("route"), "path", None))

    async def _answer(self, journal: Journal, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await self._app(scope, receive, send)
        except asyncio.CancelledError:
            if not journal.status:
                cut = Unavailable("the server is shutting down: look later whether this was done", code="draining")
                await error_response(cut)(scope, receive, send)
            raise
        except NO_FAILURE:
            raise
        except BaseException:
            if journal.status:
                raise
            logger.exception("a request failed")
            await error_response(ServerError())(scope, receive, send)

    def _journal(self, scope: Scope, observer: Observer) -> Journal:
        given, traces, states = b"", [], []
        for name, value in scope["headers"]:
            if name == b"traceparent":
                traces.append(value)
            elif name == b"tracestate":
                states.append(value)
            elif name == HEADER.encode():
                given = value
        return Journal(
            given.decode() if ACCEPTED.fullmatch(given) else self._new_id(),
            scope["method"],
            scope["path"],
            observer.clock(),
            parse_traceparent(traces, states),
        )
