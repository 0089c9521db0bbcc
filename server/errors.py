"""Errors that a client sees: one base with HTTP status and OpenAI's `type`, `code` and `param`.

    ServerError                500  the base; raised itself only for what is a bug
    ├── BadRequest             400  a parameter is missing, malformed or not served
    ├── Unauthorized           401  no key, or a wrong one
    ├── Forbidden              403  a key that may not do this
    ├── NotFound               404  unknown model, adapter, endpoint
    ├── RequestTooSlow         408  a request whose bytes do not come
    ├── Conflict               409  a name that exists, an adapter in use
    │   └── ConflictForNow          a name that is being deleted; says when to try again
    ├── PayloadTooLarge        413
    │   └── BodyTooLarge
    ├── UnsupportedMediaType   415
    ├── Unprocessable          422  an adapter that cannot be served
    ├── TooManyRequests        429  beyond a quota; says when to try again
    ├── HeadTooLarge           431  an address with headers without end
    ├── Unavailable            503  engine down or draining; says when to try again
    │   ├── TooManyConnections      for this process's descriptors
    │   └── DeadlineTooNear         for the request's own `timeout`
    └── DeadlinePassed         504  the request's own `timeout`, before the first token

`ClientGone` is none of them: nobody is left to read an answer. What adapters_store raises becomes the class of its
status, see `refusal`.
"""

import asyncio
import math
from collections.abc import Mapping
from http import HTTPStatus

from adapters_store.blobs import BlobError
from adapters_store.registry import RegistryError
from adapters_store.types import AdapterError

BUG = "internal error; the server's log has the details"
NO_FAILURE = (asyncio.CancelledError, GeneratorExit, KeyboardInterrupt, SystemExit)
"""What is raised to end a task, a generator or the process. All else is a failure of what raises it, also what is no
Exception: PyO3 raises such for a panic of a library in Rust, as of a tokenizer."""
RETRY_SECONDS = 2
"""What `Retry-After` tells clients while the engine restarts: a small model is back after two to three seconds."""
QUOTA_SECONDS = 60
"""What it tells those whose store is full: no clock makes room there, their own deletions do."""


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


class Conflict(ServerError):
    status = HTTPStatus.CONFLICT
    type = "invalid_request_error"
    code = "conflict"


class ConflictForNow(Conflict):
    """A conflict that passes by itself."""

    @property
    def headers(self) -> Mapping[str, str]:
        return {"Retry-After": str(RETRY_SECONDS)}


class PayloadTooLarge(ServerError):
    status = HTTPStatus.REQUEST_ENTITY_TOO_LARGE
    type = "invalid_request_error"
    code = "payload_too_large"


class BodyTooLarge(PayloadTooLarge):
    code = "body_too_large"


class UnsupportedMediaType(ServerError):
    status = HTTPStatus.UNSUPPORTED_MEDIA_TYPE
    type = "invalid_request_error"
    code = "unsupported_media_type"


class Unprocessable(ServerError):
    status = HTTPStatus.UNPROCESSABLE_ENTITY
    type = "invalid_request_error"
    code = "unprocessable"


class TooManyRequests(ServerError):
    """Beyond a quota. `retry_after` is in seconds, `limits` are headers as they stand (`x-ratelimit-...`)."""

    status = HTTPStatus.TOO_MANY_REQUESTS
    type = "rate_limit_error"
    code = "rate_limit_exceeded"

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: float = 1.0,
        limits: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message, param=param, code=code)
        self.retry_after = retry_after
        self.limits = limits or {}

    @property
    def headers(self) -> Mapping[str, str]:
        return {"Retry-After": str(max(1, math.ceil(self.retry_after))), **self.limits}


class HeadTooLarge(ServerError):
    status = HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE
    type = "invalid_request_error"
    code = "headers_too_large"

    def __init__(self, most: int) -> None:
        super().__init__(f"the request's address and headers are larger than {most} bytes")


class Unavailable(ServerError):
    status = HTTPStatus.SERVICE_UNAVAILABLE
    type = "server_error"
    code = "unavailable"

    @property
    def headers(self) -> Mapping[str, str]:
        return {"Retry-After": str(RETRY_SECONDS)}


class TooManyConnections(Unavailable):
    code = "too_many_connections"

    def __init__(self) -> None:
        super().__init__("the server has no room for more connections; please retry")


class DeadlineTooNear(Unavailable):
    """`wait` and `timeout` are in seconds."""

    code = "deadline_too_near"

    def __init__(self, wait: float, timeout: float) -> None:
        super().__init__(
            f"timeout: the request has {timeout:g} s, and would wait about {wait:.0f} s for its first token",
            param="timeout",
        )
        self._later = wait - timeout

    @property
    def headers(self) -> Mapping[str, str]:
        return {"Retry-After": str(min(QUOTA_SECONDS, max(1, math.ceil(self._later))))}


class RequestTooSlow(ServerError):
    status = HTTPStatus.REQUEST_TIMEOUT
    type = "invalid_request_error"
    code = "request_timeout"

    def __init__(self) -> None:
        super().__init__("the request did not arrive in time")


class DeadlinePassed(ServerError):
    status = HTTPStatus.GATEWAY_TIMEOUT
    type = "server_error"
    code = "deadline_exceeded"

    def __init__(self) -> None:
        super().__init__("timeout: the time that the request gave was over before its answer began", param="timeout")


class ClientGone(Exception):
    """The client closed its connection before the answer was complete."""


BY_STATUS: Mapping[int, type[ServerError]] = {
    each.status: each
    for each in (BadRequest, Unauthorized, Forbidden, NotFound, Conflict, PayloadTooLarge, UnsupportedMediaType)
} | {each.status: each for each in (Unprocessable, TooManyRequests, Unavailable)}

PARAMS: Mapping[str, str] = {
    "invalid_name": "name",
    "adapter_exists": "name",
    "adapter_deleting": "name",
    "bad_source": "source",
    "source_not_allowed": "source",
    "source_refused": "source",
    "tenant_not_found": "tenant",
}
"""The fields at fault of errors that know of no request, by their code."""

StoreError = AdapterError | BlobError | RegistryError


def refusal(error: StoreError, param: str | None = None) -> ServerError:
    """What a client is told of an error of the store; `param` is the field that it comes from, if known."""
    kind = BY_STATUS.get(error.status, ServerError)
    if kind is ServerError:
        return ServerError()
    param = param or getattr(error, "param", None) or PARAMS.get(error.code)
    if kind is TooManyRequests:
        return TooManyRequests(error.message, param=param, code=error.code, retry_after=QUOTA_SECONDS)
    kind = ConflictForNow if error.code == "adapter_deleting" else kind
    return kind(error.message, param=param, code=error.code)
