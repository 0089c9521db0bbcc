"""Whatever is raised becomes an answer, with OpenAI's error object as its body."""

import logging
from http import HTTPStatus

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.routing import Match

from adapters_store.blobs import BlobError
from adapters_store.registry import RegistryError
from adapters_store.store import UnknownAdapter
from adapters_store.threads import NoThread
from adapters_store.types import AdapterError
from server import journal
from server.absent_endpoints import no_endpoint
from server.errors import BY_STATUS, BadRequest, ClientGone, NotFound, ServerError, Unavailable, refusal

logger = logging.getLogger(__name__)

METHODS = ("DELETE", "GET", "HEAD", "PATCH", "POST", "PUT")


def install_error_handlers(app: FastAPI) -> None:
    """Every error that leaves the application has OpenAI's form."""
    app.add_exception_handler(ServerError, _on_server_error)
    for kind in (AdapterError, BlobError, RegistryError):
        app.add_exception_handler(kind, _on_store_error)
    app.add_exception_handler(NoThread, _on_no_thread)
    app.add_exception_handler(UnknownAdapter, _on_unknown_adapter)
    app.add_exception_handler(RequestValidationError, _on_bad_query)
    app.add_exception_handler(HTTPException, _on_http_exception)
    app.add_exception_handler(ClientGone, _on_client_gone)


def error_response(error: ServerError) -> JSONResponse:
    journal.failed(error.code)
    return JSONResponse(error.body(), status_code=error.status, headers=dict(error.headers))


async def _on_server_error(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, ServerError)
    return error_response(error)


async def _on_store_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, AdapterError | BlobError | RegistryError)
    if error.status >= HTTPStatus.INTERNAL_SERVER_ERROR:
        if error.status in BY_STATUS:  # what is not there at the moment needs no traceback
            reason = " ".join(f"({error.__cause__})".split()) if error.__cause__ is not None else ""
            logger.error("%s %s: %s %s", request.method, request.url.path, error, reason)
        else:
            logger.error("%s %s: %s", request.method, request.url.path, error, exc_info=error)
    return error_response(refusal(error))


async def _on_no_thread(request: Request, error: Exception) -> JSONResponse:
    logger.error("%s %s: %s", request.method, request.url.path, error)
    return error_response(Unavailable("the server has no thread for this at the moment; please retry"))


async def _on_unknown_adapter(_: Request, error: Exception) -> JSONResponse:
    return error_response(NotFound(str(error), code="adapter_not_found"))


async def _on_bad_query(_: Request, error: Exception) -> JSONResponse:
    """What the framework says of query parameters, the only part of a request that it parses."""
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    param = str(first["loc"][-1])
    if first["type"] == "extra_forbidden":
        return error_response(
            BadRequest(f"{param}: there is no such query parameter here", param=param, code="unknown_parameter")
        )
    is_day = str(first["type"]).startswith("date_")
    message = "expected a day such as 2026-01-31" if is_day else str(first["msg"]).removeprefix("Value error, ")
    return error_response(BadRequest(f"{param}: {message}", param=param))


async def _on_http_exception(request: Request, error: Exception) -> JSONResponse:
    """What the framework itself raises: no such endpoint, or not with this method."""
    assert isinstance(error, HTTPException)
    if error.status_code == HTTPStatus.NOT_FOUND:
        return error_response(NotFound(no_endpoint(request.url.path), code="unknown_endpoint"))
    wrong = BadRequest(f"{HTTPStatus(error.status_code).phrase}: {request.method} is not possible here")
    wrong.status = HTTPStatus(error.status_code)
    headers = dict(error.headers or {})
    if error.status_code == HTTPStatus.METHOD_NOT_ALLOWED:
        wrong.code = "method_not_allowed"
        headers["Allow"] = ", ".join(_methods(request))
    journal.failed(wrong.code)
    return JSONResponse(wrong.body(), status_code=wrong.status, headers=headers)


def _methods(request: Request) -> list[str]:
    """All that the path takes; the framework names those of its first route only."""
    routes, scope = request.app.router.routes, dict(request.scope)
    return [
        method
        for method in METHODS
        if any(route.matches({**scope, "method": method})[0] is Match.FULL for route in routes)
    ]


async def _on_client_gone(_: Request, __: Exception) -> JSONResponse:
    journal.failed(journal.CLIENT_GONE)
    return JSONResponse(None, status_code=499)
