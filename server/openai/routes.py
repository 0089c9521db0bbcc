"""OpenAI's endpoints, and vLLM's tokenize and detokenize."""

import asyncio
from collections.abc import AsyncGenerator
from typing import Annotated, Any

import msgspec
from fastapi import APIRouter, Depends, Query, Request
from starlette.responses import Response

from adapters_store.registry import ModelRow
from adapters_store.registry import NotFound as UnknownName
from routing.router import AUTO, RouteError, RouteQuery
from server.ask import Ask
from server.body import document, json_body
from server.chat import num_characters
from server.choice import Piece
from server.config import HttpSettings
from server.deps import CallerDep, Services, ServicesDep, count_request, get_caller, knock
from server.errors import BadRequest, NotFound
from server.generation import Generation, route_error
from server.openai.answer import Answer, Collected, Json, collect
from server.openai.answers import ChatCompletion, Model, ModelList, Text, TextCompletion, Tokens, answers
from server.openai.chat import ChatAnswer, ChatRequest
from server.openai.completions import CompletionAnswer, CompletionRequest
from server.openai.messages import plain
from server.openai.stream import EventStream, begun, unless_gone
from server.openai.tokens import DetokenizeRequest, TokenizeRequest
from server.route_view import route_header
from server.tenants import Tenant

router = APIRouter(dependencies=[Depends(get_caller)])

ChatBody = Annotated[ChatRequest, Depends(json_body(ChatRequest))]
CompletionBody = Annotated[CompletionRequest, Depends(json_body(CompletionRequest))]
TokenizeBody = Annotated[TokenizeRequest, Depends(json_body(TokenizeRequest))]
DetokenizeBody = Annotated[DetokenizeRequest, Depends(json_body(DetokenizeRequest))]


@router.post(
    "/v1/chat/completions",
    dependencies=[Depends(knock)],
    openapi_extra=document(ChatRequest),
    responses=answers(ChatCompletion, streams=True),
)
async def chat_completions(body: ChatBody, request: Request, services: ServicesDep, caller: CallerDep) -> Response:
    """An answer to messages, whole or as a stream."""
    ask = body.ask(caller.tenant)
    generation = services.generator.start(ask)
    answer = ChatAnswer(
        generation,
        body.model_name,
        created=int(services.now()),
        streamed_usage=body.streamed_usage,
        prompt_logprobs=body.prompt_logprobs,
        with_logprobs=bool(body.logprobs),
        tools=ask.tools,
        form=services.tokenizer.tool_form,
    )
    return await _respond(request, generation, answer, services.http if body.stream else None)


@router.post(
    "/v1/completions",
    dependencies=[Depends(knock)],
    openapi_extra=document(CompletionRequest),
    responses=answers(TextCompletion, streams=True),
)
async def completions(body: CompletionBody, request: Request, services: ServicesDep, caller: CallerDep) -> Response:
    """What follows one prompt or many, whole or as a stream."""
    ask = body.ask(caller.tenant)
    generation = services.generator.start(ask)
    answer = CompletionAnswer(
        generation,
        body.model_name,
        created=int(services.now()),
        streamed_usage=body.streamed_usage,
        prompt_logprobs=body.prompt_logprobs,
        logprobs=body.logprobs,
        candidates=body.candidates,
        n=body.choices,
        echoes=await _echoes(ask, services) if body.echo else (),
    )
    return await _respond(request, generation, answer, services.http if body.stream else None)


@router.get("/v1/models", responses=answers(ModelList))
async def list_models(
    services: ServicesDep,
    caller: CallerDep,
    limit: Annotated[int | None, Query(ge=1, lt=2**31)] = None,
    cursor: Annotated[str | None, Query(max_length=256)] = None,
) -> Response:
    """The base model, the embedding model, then the adapters by name: all or, as an addition to OpenAI's list, a part.

    What is no adapter is in the first part only. `next` is the cursor of the following one.
    """
    page = await services.store.names.models(caller.tenant.id, limit, cursor)
    base = [_base(services), *_embedding(services)] if cursor is None else []

    def encode() -> bytes:
        data = base + [_adapter(row, services) for row in page.items]
        return msgspec.json.encode({"object": "list", "data": data, "next": page.next})

    # Ten thousand adapters are four megabytes, for which the event loop has no time.
    return Response(await asyncio.to_thread(encode), media_type="application/json")


@router.get("/v1/models/{model:path}", response_model=None, responses=answers(Model))
async def get_model(model: str, services: ServicesDep, caller: CallerDep) -> Json:
    """One model; `name@digest` is a revision of an adapter."""
    if model == services.served_name:
        return _base(services)
    if services.embedder is not None and model == services.embedder.name:
        return _embedding(services)[0]
    try:
        found = (await services.store.resolve(caller.tenant.id, [model]))[model]
        named = await services.store.names.get(caller.tenant.id, found.name)
    except (KeyError, UnknownName):
        raise NotFound("there is no such model", param="model", code="model_not_found") from None
    return _adapter(ModelRow(named.tenant, named.name, found.digest, named.public, named.created), services)


@router.post(
    "/tokenize",
    dependencies=[Depends(count_request)],
    openapi_extra=document(TokenizeRequest),
    response_model=None,
    responses=answers(Tokens),
)
async def tokenize(body: TokenizeBody, services: ServicesDep, caller: CallerDep) -> Json:
    """The tokens of a text, or of messages in the chat template."""
    await _check_model(body.model, services, caller.tenant)
    if body.messages is not None:
        messages, tools = plain(body.messages), body.tool_use
        _check_length(len(messages), services, "messages")
        _check_characters(num_characters(messages, tools), services, "messages")
        tokens = await services.tokenizer.encode_chat(
            messages, body.add_generation_prompt, tools, body.chat_template_kwargs
        )
    else:
        _check_characters(len(body.prompt or ""), services, "prompt")
        tokens = await services.tokenizer.encode(body.prompt or "", body.add_special_tokens)
    info = services.engine.info
    answer: Json = {
        "count": len(tokens),
        "max_model_len": info.max_model_len if info is not None else None,
        "tokens": tokens,
    }
    return answer | {"token_strs": services.tokenizer.tokens(tokens)} if body.return_token_strs else answer


@router.post(
    "/detokenize",
    dependencies=[Depends(count_request)],
    openapi_extra=document(DetokenizeRequest),
    response_model=None,
    responses=answers(Text),
)
async def detokenize(body: DetokenizeBody, services: ServicesDep, caller: CallerDep) -> Json:
    """The text of tokens."""
    await _check_model(body.model, services, caller.tenant)
    largest = services.tokenizer.vocab_size
    _check_length(len(body.tokens), services, "tokens")
    if not all(0 <= token < largest for token in body.tokens):
        raise BadRequest(f"tokens: expected token ids from 0 to {largest - 1}", param="tokens")
    return {"prompt": await services.tokenizer.decode(body.tokens)}


async def _respond(
    request: Request, generation: Generation, answer: Answer, streaming: HttpSettings | None
) -> Response:
    """The answer as one body or as a stream. Errors before the first piece have a status of their own in both.

    A stream whose first piece takes longer than the silence that the settings allow has begun before.
    """
    pieces = generation.pieces()
    try:
        if streaming is None:
            whole = await _encoded(answer, await unless_gone(request, collect(pieces)))
            return Response(whole, headers=_headers(generation), media_type="application/json")
        first = asyncio.create_task(_first(pieces))
        await begun(request, first, lambda: generation.settled is not None, streaming.keep_alive)
    except BaseException:
        await pieces.aclose()
        raise
    return EventStream(answer, first, pieces, _headers(generation), streaming)


async def _encoded(answer: Answer, choices: list[Collected]) -> bytes:
    def encode() -> bytes:
        return msgspec.json.encode(answer.whole(choices))

    return await asyncio.to_thread(encode) if answer.is_long(*choices) else encode()


async def _first(pieces: AsyncGenerator[Piece, None]) -> Piece:
    return await anext(pieces)


def _headers(generation: Generation) -> dict[str, str]:
    route = generation.settled
    return {} if route is None else route_header(route)


async def _echoes(ask: Ask, services: Services) -> list[str]:
    """The prompts' texts; those given as token ids are decoded."""
    decode, largest = services.tokenizer.decode, services.tokenizer.vocab_size
    for prompt in ask.prompts:
        if isinstance(prompt, tuple):
            _check_length(len(prompt), services, "prompt")
            if not all(0 <= token < largest for token in prompt):
                raise BadRequest(f"prompt: expected token ids from 0 to {largest - 1}", param="prompt")
    return [prompt if isinstance(prompt, str) else await decode(prompt, True) for prompt in ask.prompts]


def _check_length(count: int, services: Services, param: str) -> None:
    """Lists that no context holds are refused before a library works on them, which would stop everything else."""
    info = services.engine.info
    if info is not None and count > info.max_model_len:
        message = f"{param}: has {count} entries; the context is {info.max_model_len} tokens"
        raise BadRequest(message, param=param, code="context_length_exceeded")


def _check_characters(count: int, services: Services, param: str) -> None:
    """The same for texts, of which no token is longer than the vocabulary's longest."""
    _check_length(-(-count // services.tokenizer.max_token_characters), services, param)


async def _check_model(model: str | None, services: Services, tenant: Tenant) -> None:
    """All models of this server have one tokenizer, but only those that exist."""
    if model is None or model == AUTO or model.startswith(f"{AUTO}:"):
        return
    try:
        await services.generator.routers.route(RouteQuery(tenant.id, model))
    except RouteError as error:
        raise route_error(error) from error


def _base(services: Services) -> Json:
    info = services.engine.info
    return {
        "id": services.served_name,
        "object": "model",
        "created": int(services.started),
        "owned_by": "loramux",
        "root": services.served_name,
        "parent": None,
        "kind": "base",
        "max_model_len": info.max_model_len if info is not None else None,
        "permission": [_permission(services.served_name, services.started)],
    }


def _embedding(services: Services) -> list[Json]:
    """The model of /v1/embeddings, if there is one."""
    if services.embedder is None:
        return []
    name = services.embedder.name
    return [
        {
            "id": name,
            "object": "model",
            "created": int(services.started),
            "owned_by": "loramux",
            "root": name,
            "parent": None,
            "kind": "embedding",
            "max_model_len": services.embedder.max_tokens,
            "dimensions": services.embedder.width,
            "permission": [_permission(name, services.started)],
        }
    ]


def _adapter(adapter: ModelRow, services: Services) -> Json:
    return {
        "id": adapter.name,
        "object": "model",
        "created": int(adapter.created),
        "owned_by": "loramux" if adapter.public else adapter.tenant,
        "root": adapter.digest,
        "parent": services.served_name,
        "kind": "adapter",
        "permission": [_permission(adapter.name, adapter.created)],
    }


def _permission(model: str, created: float) -> dict[str, Any]:
    """What clients of OpenAI's first API read: this caller may use the model."""
    return {
        "id": f"modelperm-{model}",
        "object": "model_permission",
        "created": int(created),
        "allow_create_engine": False,
        "allow_sampling": True,
        "allow_logprobs": True,
        "allow_search_indices": False,
        "allow_view": True,
        "allow_fine_tuning": False,
        "organization": "*",
        "group": None,
        "is_blocking": False,
    }
