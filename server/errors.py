"""Errors that a client sees: one base with HTTP status and OpenAI's `type`, `code` and `param`, and one shape for all.

    ServerError                500  the base; raised itself only for what is a bug
    ├── BadRequest             400  a parameter is missing, malformed or not served
    ├── Unauthorized           401  no key, or a wrong one
    ├── Forbidden              403  a key that may not do this
    ├── NotFound               404  unknown model, adapter, endpoint
    ├── BodyTooLarge           413
    ├── UnsupportedMediaType   415
    └── Unavailable            503  engine down or draining; says when to try again

`ClientGone` is none of them: nobody is left to read an answer.
"""

import logging
from collections.abc import Mapping
from http import HTTPStatus

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

logger = logging.getLogger(__name__)

BUG = "internal error; the server's log has the details"
RETRY_SECONDS = 2
"""What `Retry-After` tells clients while the engine restarts: its first attempt comes after half a second."""


class ServerError(Exception):
    """An answer that is not the wished one. `message` goes to the client: no paths, addresses or internals in it."""

    status = HTTPStatus.INTERNAL_SERVER_ERROR
    type = "server_error"
    code: str | None = "internal_error"

    def __init__(self, message: str = BUG, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.code = code or self.code

    @property
    def headers(self) -> Mapping[str, str]:
        return {}

    def body(self) -> dict[str, dict[str, str | None]]:
        """OpenAI's error object."""
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}


class BadRequest(ServerError):
    status = HTTPStatus.BAD_REQUEST
    type = "invalid_request_error"
    code = "invalid_value"


class Unauthorized(ServerError):
    status = HTTPStatus.UNAUTHORIZED
    type = "authentication_error"
    code = "invalid_api_key"

    @property
    def headers(self) -> Mapping[str, str]:
        return {"WWW-Authenticate": "Bearer"}


class Forbidden(ServerError):
    status = HTTPStatus.FORBIDDEN
    type = "permission_error"
    code = "forbidden"


class NotFound(ServerError):
    status = HTTPStatus.NOT_FOUND
    type = "invalid_request_error"
    code = "not_found"


class BodyTooLarge(ServerError):
    status = HTTPStatus.REQUEST_ENTITY_TOO_LARGE
    type = "invalid_request_error"
    code = "body_too_large"


class UnsupportedMediaType(ServerError):
    status = HTTPStatus.UNSUPPORTED_MEDIA_TYPE
    type = "invalid_request_error"
    code = "unsupported_media_type"


class Unavailable(ServerError):
    status = HTTPStatus.SERVICE_UNAVAILABLE
    type = "server_error"
    code = "unavailable"

    @property
    def headers(self) -> Mapping[str, str]:
        return {"Retry-After": str(RETRY_SECONDS)}


class ClientGone(Exception):
    """The client closed its connection before the answer was complete."""


def install_error_handlers(app: FastAPI) -> None:
    """Every error that leaves the application has OpenAI's form."""
    app.add_exception_handler(ServerError, _on_server_error)
    app.add_exception_handler(HTTPException, _on_http_exception)
    app.add_exception_handler(ClientGone, _on_client_gone)


def error_response(error: ServerError) -> JSONResponse:
    return JSONResponse(error.body(), status_code=error.status, headers=dict(error.headers))


async def _on_server_error(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, ServerError)
    return error_response(error)


async def _on_http_exception(request: Request, error: Exception) -> JSONResponse:
    """What the framework itself raises: no such endpoint, or not with this method."""
    assert isinstance(error, HTTPException)
    if error.status_code == HTTPStatus.NOT_FOUND:
        return error_response(NotFound("there is no such endpoint here; GET /docs lists all", code="unknown_endpoint"))
    refusal = BadRequest(f"{HTTPStatus(error.status_code).phrase}: {request.method} is not possible here")
    refusal.status = HTTPStatus(error.status_code)
    if error.status_code == HTTPStatus.METHOD_NOT_ALLOWED:
        refusal.code = "method_not_allowed"
    return JSONResponse(refusal.body(), status_code=refusal.status, headers=dict(error.headers or {}))


async def _on_client_gone(request: Request, _: Exception) -> JSONResponse:
    logger.info("499 %s %s: the client left", request.method, request.url.path)
    return JSONResponse(None, status_code=499)
