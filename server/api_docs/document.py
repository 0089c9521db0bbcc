"""The parts of docs/api.md, and the whole."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from pydantic import BaseModel

from server.absent_endpoints import INSTEAD, OF_OTHERS
from server.api_docs.error_codes import ERROR_CODES
from server.api_docs.schema_text import described, rows, values
from server.app import create_app
from server.body import schema_of
from server.config import HttpSettings, LimitSettings, RoutingSettings, Settings, SourceSettings
from server.openai.chat import ChatRequest
from server.openai.completions import CompletionRequest
from server.openai.embeddings import EmbeddingsRequest
from server.openai.lora import LoraOptions
from server.openai.protocol import IGNORED, NOT_SERVED, GenerationRequest
from server.openai.tokens import DetokenizeRequest, TokenizeRequest

Operation = tuple[str, str, Mapping[str, Any]]

MARK = re.compile(r"(Ignored|Refused)(?:: |\.$)")
"""How the description begins of a field that is not supported."""
HEAD = """# The HTTP API

Written from the code by `python -m server.api_docs docs/api.md`; a test compares. OpenAI's own reference says what its
fields mean; here stands what this server makes of each. **Supported** fields do what they do at OpenAI or vLLM,
**ignored** ones are checked and change nothing, **refused** ones are answered 400 `unsupported_parameter` unless they
have the listed value, which changes nothing. Fields that are not listed are ignored, as OpenAI does; in `lora` and in
admin calls they are refused. `null` is the same as absent. JSON types are taken as they are: `"1"` and `true` are no
numbers.
"""
HEADERS = """## Headers

| header | in | out |
|---|---|---|
| `Authorization: Bearer <key>` | needed where the server has keys | |
| `x-request-id` | 1 to 128 visible ASCII characters | the same, or a new one; in each line of the log |
| `traceparent` | W3C trace context; invalid ones are ignored | `traceresponse` with the same trace |
| `x-loramux-route` | | the object `lora`, compact, without `scores`, at most 16 adapters |
| `x-ratelimit-{limit,remaining,reset}-{requests,tokens}` | | where the tenant has such quotas |
| `Retry-After` | | whole seconds, with 429, 503 and 409 `adapter_deleting` |
| `Allow` | | with 405 |

Bodies are `application/json`. Streams are server-sent events without compression; lines that begin with a colon are
comments, sent when there was nothing else to say for `http.keep_alive` seconds.
"""
REQUEST_LORA = """What routers are told (`top_k` to `query`, `sticky`, `explain`) changes nothing where none is asked,
by `router` or by the model `auto` or `auto:<router>`. So one object may go with requests for any model.
"""
RESPONSE_LORA = """## `lora` in responses

In the body, of a stream in the last event with choices or usage. Of a base answer it is
`{"router": null, "adapters": [], ...}`.

| field | |
|---|---|
| `router` | who chose: `explicit`, `retriever`, the name of a trained router, or null |
| `composition` | `mixture`, `fusion` or `selection` |
| `cached` | whether the decision was remembered |
| `route_ms` | milliseconds for the decision |
| `adapters[].name`, `.digest`, `.weight` | the mix |
| `adapters[].score` | similarity to the prompt, of routers that compare |
| `adapters[].share` | part in the answer, of token-level routers; of the layers or linears, of prompt-level ones |
| `outcome` | why a router chose nothing: `below_min_score`, `no_candidates`, `empty_text`, `no_adapter` |
| `scores[].name`, `.score` | all candidates, best first, if `lora.explain` |
| `tokens` | the leading adapter of each token, of token-level routers, if `lora.explain` |
| `layers[].chosen` | adapters or linears that act in a layer, of prompt-level routers, if `lora.explain` |
| `layers[].probabilities[].name`, `.probability` | what a layer's router gave to each, where it was read |
| `warnings` | sentences, as of an adapter that is used without the router it was trained with |
| `truncated` | in the header only: there are more adapters |
"""


def api_document() -> str:
    """The whole file."""
    parts = [
        HEAD,
        *_endpoints(),
        _fields("POST /v1/chat/completions", ChatRequest, NOT_SERVED),
        _fields("POST /v1/completions", CompletionRequest, NOT_SERVED),
        _fields("`lora` in requests", LoraOptions, about=REQUEST_LORA),
        RESPONSE_LORA,
        _fields("POST /v1/embeddings", EmbeddingsRequest),
        _fields("POST /tokenize", TokenizeRequest, expands=False),
        _fields("POST /detokenize", DetokenizeRequest),
        HEADERS,
        _settings("Limits", "limits", LimitSettings),
        _settings("How answers travel", "http", HttpSettings),
        _settings("Where adapters may come from", "sources", SourceSettings),
        _settings("How `auto` chooses", "routing", RoutingSettings),
        _errors(),
        *_admin(),
    ]
    return "\n".join(parts)


def field_rows(model: type[BaseModel], refused: Mapping[str, tuple[object, ...]] | None = None) -> list[list[str]]:
    """[field, values, status, notes] of all that a request may hold; last the `refused` with what changes nothing."""
    schema = schema_of(model)
    needed = schema.get("required", ())
    found = [
        [f"`{name}`", values(field), _status(field), _notes(field, required)]
        for top, top_schema in schema["properties"].items()
        for name, field, required in _expanded(model, top, top_schema, top in needed)
    ]
    for name, harmless in (refused or {}).items():
        if name not in schema["properties"]:
            allowed = ", ".join(_literal(value) for value in harmless if value is not None)
            found.append([f"`{name}`", allowed or "null", "refused", ""])
    if refused:
        found += [[f"`{name}`", "any", "ignored", why] for name, why in IGNORED.items()]
    return found


def _expanded(
    model: type[BaseModel], name: str, schema: Mapping[str, Any], required: bool
) -> Iterable[tuple[str, Mapping[str, Any], bool]]:
    if name == "lora" and issubclass(model, GenerationRequest):  # it has a table of its own
        return [(name, {"type": "object", "description": described(schema)}, required)]
    return rows(name, schema, required)


def _fields(
    title: str,
    model: type[BaseModel],
    refused: Mapping[str, tuple[object, ...]] | None = None,
    expands: bool = True,
    about: str = "",
) -> str:
    shown = [row for row in field_rows(model, refused) if expands or not set(".[") & set(row[0])]
    head = f"## {title}\n\n{about}\n" if about else f"## {title}\n\n"
    return f"{head}{_table(('field', 'values', 'status', 'notes'), shown)}"


def _status(schema: Mapping[str, Any]) -> str:
    marked = MARK.match(described(schema))
    return marked[1].lower() if marked else "supported"


def _notes(schema: Mapping[str, Any], required: bool) -> str:
    notes = MARK.sub("", described(schema))
    notes = f"{notes[:1].upper()}{notes[1:]}"
    return " ".join(part for part in ("Required." if required else "", notes) if part)


def _endpoints() -> Iterator[str]:
    served = [(method, path, says) for method, path, says in _operations() if not path.startswith("/admin/")]
    lines = [[f"`{method} {path}`", _sentence(says)] for method, path, says in served]
    yield f"## Endpoints\n\n{_table(('call', ''), lines)}"
    hints = {f"/v1/{name}": hint for name, hint in INSTEAD.items()}
    hints |= {f"/{name}": hint for name, hint in OF_OTHERS.items()}
    absent = [[f"`{path}`", f"{hint[0].upper()}{hint[1:]}."] for path, hint in hints.items()]
    yield f"Not here, and answered 404 `unknown_endpoint` with what there is instead:\n\n{_table(('path', ''), absent)}"


def _admin() -> Iterator[str]:
    yield "## Admin calls\n\nSizes in bytes, times in seconds since the epoch. `/docs` of a server has all answers.\n"
    for method, path, says in _operations():
        if not path.startswith("/admin/"):
            continue
        queries = [parameter["name"] for parameter in says.get("parameters", ()) if parameter["in"] == "query"]
        text = f"### {method} {path}\n\n{says['summary']}. {_sentence(says)}\n"
        if queries:
            text += f"\nQuery: {', '.join(f'`{name}`' for name in queries)}.\n"
        body = says.get("requestBody", {}).get("content", {}).get("application/json")
        if body is not None and body["schema"].get("properties"):
            schema = body["schema"]
            needed = schema.get("required", ())
            lines = [
                [f"`{name}`", values(field), _notes(field, required)]
                for top, top_schema in schema["properties"].items()
                for name, field, required in rows(top, top_schema, top in needed)
            ]
            text += f"\n{_table(('field', 'values', 'notes'), lines)}"
        yield text


def _settings(title: str, group: str, model: type[BaseModel]) -> str:
    lines = [
        [f"`{group}.{name}`", values(schema), _default(schema)]
        for name, schema in model.model_json_schema()["properties"].items()
    ]
    about = " ".join((model.__doc__ or "").split())
    where = f"In a file (`[{group}]`) or the environment (`LORAMUX_{group.upper()}__...`)."
    return f"## {title}\n\n{about} {where}\n\n{_table(('setting', 'values', 'default'), lines)}"


def _default(schema: Mapping[str, Any]) -> str:
    default = schema.get("default")
    return "" if default is None else _literal(default)


def _errors() -> str:
    lines = [[str(each.status), f"`{each.code}`", each.meaning] for each in ERROR_CODES]
    about = (
        'Each is `{"error": {"message", "type", "param", "code"}}`; `param` is the dotted path of the field at fault.'
        " In a stream that has begun it is the last event. Codes of routers' uploads begin with `router_` where those"
        " of adapters begin with `adapter_`."
    )
    return f"## Errors\n\n{about}\n\n{_table(('status', 'code', ''), lines)}"


def _operations() -> Iterator[Operation]:
    for path, methods in create_app(Settings()).openapi()["paths"].items():
        for method, says in methods.items():
            yield method.upper(), path, says


def _sentence(says: Mapping[str, Any]) -> str:
    """The first paragraph of what an operation says of itself."""
    return " ".join(str(says.get("description", "")).split("\n\n")[0].split())


def _literal(value: object) -> str:
    if isinstance(value, list | tuple | dict) and not value:
        return "{}" if isinstance(value, dict) else "[]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_literal(key)}: {_literal(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_literal, value)) + "]"
    return str(value).lower() if isinstance(value, bool) else f'"{value}"' if isinstance(value, str) else str(value)


def _table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    def row(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    return "\n".join([row(head), "|" + "---|" * len(head), *map(row, lines), ""])
