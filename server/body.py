"""A request's body: bytes to a checked model, or an error that names the field."""

import asyncio
import json
import re
from collections.abc import Awaitable, Callable
from typing import Any, Protocol, Self, TypeVar

from fastapi import Request
from pydantic import BaseModel, ConfigDict, ValidationError, ValidationInfo
from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect

from server.config import LimitSettings
from server.deps import services_of
from server.errors import BadRequest, BodyTooLarge, ClientGone, UnsupportedMediaType
from server.json_structure import TooComplex, check_structure

SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
IN_THREAD = 1 << 16
"""Bodies of so many bytes are parsed in a thread: the event loop has a millisecond for one, not more."""
WORDS = {
    "model_type": "expected an object",
    "dict_type": "expected an object",
    "too_short": "expected at least {min_length}, found {actual_length}",
    "too_long": "expected at most {max_length}, found {actual_length}",
}
"""What clients are told where pydantic speaks of Python's types, by the kind of its error."""
CODES = {"missing": "missing_required_parameter", "unsupported": "unsupported_parameter"}
"""Codes of kinds of errors that have one of their own; `unsupported` is what our own validators raise."""
DRAINED = 4
"""A body up to this many times the limit is read to its end, so that its sender gets to see the refusal."""


class RequestModel(BaseModel):
    """JSON types are taken as they are: "1" and true are no numbers. Unknown fields are ignored.

    A field's docstring is what OpenAPI and docs/api.md say of it. It begins with `Ignored` if the field is checked and
    changes nothing, and with `Refused` if it is there for one value only.
    """

    model_config = ConfigDict(
        strict=True,
        extra="ignore",
        frozen=True,
        allow_inf_nan=False,
        protected_namespaces=(),
        use_attribute_docstrings=True,
    )


class Body(Protocol):
    """A request model that can be made from a JSON object."""

    @classmethod
    def parse(cls, data: dict[str, Any], limits: LimitSettings) -> Self: ...


B = TypeVar("B", bound=Body)
M = TypeVar("M", bound=BaseModel)


def json_body(model: type[B], *, optional: bool = False) -> Callable[[Request], Awaitable[B]]:
    """A dependency that reads, parses and checks the body. It runs after the key was checked, and before all work.

    No body at all counts as an empty object if it is `optional`.
    """

    async def parsed(request: Request) -> B:
        limits = services_of(request).limits
        if optional and not has_body(request.headers):
            return model.parse({}, limits)
        content_type = request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
        if content_type != "application/json" and not content_type.endswith("+json"):
            raise UnsupportedMediaType("the content type is not JSON, expected `Content-Type: application/json`")
        if request.headers.get("content-encoding", "identity").strip().lower() not in ("", "identity"):
            raise UnsupportedMediaType("the body is compressed, expected it as it is, without `Content-Encoding`")
        body = await read_body(request, limits.body_bytes)
        return await parse(model, body, limits)

    return parsed


async def parse(model: type[B], body: bytes, limits: LimitSettings) -> B:
    """The checked body. Raises BadRequest."""

    def work() -> B:
        return model.parse(parse_object(body), limits)

    return await asyncio.to_thread(work) if len(body) >= IN_THREAD else work()


def has_body(headers: Headers) -> bool:
    """Whether a request with these headers has a body (RFC 9112, section 6.3)."""
    return headers.get("content-length", "0") != "0" or "transfer-encoding" in headers


async def read_body(request: Request, limit: int) -> bytes:
    """The whole body. Raises BodyTooLarge beyond `limit` bytes, ClientGone."""
    body, size = bytearray(), 0
    try:
        async for chunk in request.stream():
            size += len(chunk)
            if size <= limit:
                body += chunk
            elif size > DRAINED * limit:
                break
    except ClientDisconnect:
        raise ClientGone from None
    if size > limit:
        raise BodyTooLarge(f"the body is larger than {limit} bytes")
    return bytes(body)


def parse_object(body: bytes) -> dict[str, Any]:
    """The JSON object in `body`. Raises BadRequest for anything else, repeated keys and NaN included."""
    try:
        check_structure(body)
        data = json.loads(body.decode(), object_pairs_hook=_unique, parse_constant=_no_constant)
        path = _surrogate_path(data) if SURROGATE.search(body) and not _can_be_written(data) else None
    except TooComplex as error:
        raise BadRequest(str(error), code="body_too_complex") from None
    except UnicodeDecodeError:
        raise _bad_json("the body is not UTF-8") from None
    except RecursionError:
        raise _bad_json("the body is nested too deeply") from None
    except json.JSONDecodeError as error:
        raise _bad_json(f"the body is not valid JSON: {error.msg} at character {error.pos}") from None
    except ValueError:  # the interpreter's bound on the digits of an integer
        raise _bad_json("the body has a number with too many digits") from None
    if not isinstance(data, dict):
        raise _bad_json("the body is not a JSON object")
    if path is not None:
        raise BadRequest(f"{path}: expected text, found half of a surrogate pair", param=path)
    return data


def validate(model: type[M], data: dict[str, Any], limits: LimitSettings) -> M:
    """The model, or a BadRequest that names the first offending field by its dotted path."""
    try:
        return model.model_validate(data, context=limits)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
    param = ".".join(str(part) for part in first["loc"]) or None
    kind = first["type"]
    if kind == "extra_forbidden":
        raise BadRequest(f"{param}: there is no such field here", param=param, code="unknown_parameter")
    code = "invalid_type" if kind.endswith("_type") else "invalid_value"
    code = CODES.get(kind, code)
    said = WORDS[kind].format(**first.get("ctx", {})) if kind in WORDS else first["msg"]
    message = said.removeprefix("Value error, ")
    raise BadRequest(f"{param}: {message}" if param else message, param=param, code=code)


def limits_of(info: ValidationInfo) -> LimitSettings:
    """The limits that `validate` was given, inside a validator."""
    assert isinstance(info.context, LimitSettings)
    return info.context


def document(model: type[BaseModel], *, required: bool = True) -> dict[str, Any]:
    """What OpenAPI says of the body, which this module and not the framework parses."""
    return {"requestBody": {"required": required, "content": {"application/json": {"schema": schema_of(model)}}}}


def schema_of(model: type[BaseModel]) -> dict[str, Any]:
    """The model's JSON schema in one piece."""
    schema = model.model_json_schema()
    definitions = schema.pop("$defs", {})
    inlined: dict[str, Any] = _inline(schema, definitions)
    return inlined


def _bad_json(message: str) -> BadRequest:
    return BadRequest(message, code="invalid_json")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for key, value in pairs:
        if key in fields:
            param = key.encode(errors="replace").decode()[:100]
            raise BadRequest(f"{param}: the field is given more than once", param=param, code="duplicate_field")
        fields[key] = value
    return fields


def _no_constant(name: str) -> None:
    raise _bad_json(f"the body has the number {name}, which JSON does not know")


def _can_be_written(data: object) -> bool:
    """Whether all of its text can be written in UTF-8: to look for the place costs a hundred times as much."""
    try:
        json.dumps(data, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


def _surrogate_path(value: object, path: str = "") -> str | None:
    """Dotted path of the first text that cannot be written in UTF-8."""
    if isinstance(value, str):
        return None if value.isascii() or _is_unicode(value) else path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        if isinstance(key, str) and not _is_unicode(key):
            return path or "body"
        found = _surrogate_path(item, f"{path}.{key}" if path else str(key))
        if found is not None:
            return found
    return None


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _inline(schema: Any, definitions: dict[str, Any]) -> Any:
    """The schema with its references replaced: they would point into the wrong document."""
    if isinstance(schema, list):
        return [_inline(item, definitions) for item in schema]
    if not isinstance(schema, dict):
        return schema
    if "$ref" in schema:
        return _inline(definitions[schema["$ref"].rpartition("/")[2]], definitions)
    return {key: _inline(value, definitions) for key, value in schema.items()}
