"""Quotas and the ledger around the life of a request: charged, counted and given back once, however it ends."""

import asyncio
import itertools
from collections.abc import AsyncIterator
from contextlib import aclosing
from datetime import UTC, datetime
from typing import Any

import pytest
from fake_engine import BLOCK, REPLY
from fakes import NOON, Harness

from adapters_store.registry import Quotas, TenantRow
from routing.router import NamedWeight, RouteQuery
from server.ask import Ask
from server.choice import Piece
from server.engine.blocks import BlockPool
from server.engine.config import RequestError
from server.engine.sequence import NOT_FINITE, FinishReason, Output, Request, SamplingParams
from server.errors import BadRequest, NotFound, TooManyRequests, Unavailable
from server.generation import Generation
from server.openai.answer import collect
from server.tenants import Tenant

NUMBERS = itertools.count()
PROMPT = tuple(range(5, 15))


@pytest.fixture
async def tenant(harness: Harness) -> Tenant:
    """One with quotas that nothing here uses up; its id is new, since all tests share one registry."""
    row = TenantRow(f"tenant{next(NUMBERS)}", 2.5, Quotas(1000, 6000, 100))
    stored = await harness.services.accounts.create_tenant(row)
    harness.services.quotas.clock = lambda: 0.0
    return Tenant.of(stored)


def ask(tenant: Tenant, model: str = "sql", mix: tuple[NamedWeight, ...] | None = None, **fields: Any) -> Ask:
    query = RouteQuery(tenant.id, model, mix)
    return Ask(tenant, query, SamplingParams(), **{"prompts": (PROMPT,), "max_tokens": 200, **fields})


async def finish(generation: Generation) -> None:
    async with aclosing(generation.pieces()) as pieces:
        await collect(pieces)


async def lines(harness: Harness, tenant: Tenant) -> list[tuple[str, int, int, int]]:
    """The tenant's ledger: adapter, requests, tokens of prompts and of answers."""
    assert await harness.services.usage.flush()
    rows = harness.store.registry.ledger.read(tenant.id).items
    assert {row.day for row in rows} <= {datetime.fromtimestamp(NOON, UTC).date()}
    return [(row.adapter, row.requests, row.prompt_tokens, row.generation_tokens) for row in rows]


def used(harness: Harness, tenant: Tenant) -> int:
    """Tokens that the quota has been charged with, by a clock that stands still."""
    return 6000 - int(harness.services.quotas.headers(tenant.id)["x-ratelimit-remaining-tokens"])


async def start(generation: Generation, count: int = 1) -> tuple[Any, list[Piece]]:
    """Its pieces, of which `count` have come."""
    pieces = generation.pieces()
    return pieces, [await anext(pieces) for _ in range(count)]


async def test_an_answer_that_stops(harness: Harness, tenant: Tenant) -> None:
    generation = harness.services.generator.start(ask(tenant))
    await finish(generation)
    made = len(harness.engine.encode(REPLY))
    assert generation.usage.completion_tokens == made
    assert await lines(harness, tenant) == [("sql", 1, 10, made)]
    assert used(harness, tenant) == 10 + made
    assert harness.services.quotas.running(tenant.id) == 0
    adapter = harness.store.registry.get(tenant.id, "sql")
    assert adapter.requests == 1


async def test_the_engine_hears_of_the_tenant_and_its_weight(harness: Harness, tenant: Tenant) -> None:
    await finish(harness.services.generator.start(ask(tenant)))
    (request,) = harness.engine.requests
    assert (request.tenant, request.weight) == (tenant.id, 2.5)


async def test_the_limit_of_length(harness: Harness, tenant: Tenant) -> None:
    await finish(harness.services.generator.start(ask(tenant, "tiny", max_tokens=3)))
    assert await lines(harness, tenant) == [("", 1, 10, 3)]
    assert used(harness, tenant) == 13


async def test_a_stop_string(harness: Harness, tenant: Tenant) -> None:
    generation = harness.services.generator.start(ask(tenant, stop=("world",)))
    await finish(generation)
    made = generation.usage.completion_tokens
    assert 0 < made < len(harness.engine.encode(REPLY))
    assert await lines(harness, tenant) == [("sql", 1, 10, made)]
    assert used(harness, tenant) == 10 + made


async def test_several_choices_and_prompts_are_one_request(harness: Harness, tenant: Tenant) -> None:
    generation = harness.services.generator.start(ask(tenant, prompts=(PROMPT, PROMPT[:4]), n=3, max_tokens=5))
    await finish(generation)
    assert await lines(harness, tenant) == [("sql", 1, 14, 30)]
    assert used(harness, tenant) == 44


async def test_a_mix_has_its_own_line_and_each_adapter_its_use(harness: Harness, tenant: Tenant) -> None:
    mix = (NamedWeight("sql", 0.5), NamedWeight("german", 0.5))
    for _ in range(2):
        await finish(harness.services.generator.start(ask(tenant, "tiny", mix, max_tokens=1)))
    await finish(harness.services.generator.start(ask(tenant, "german", max_tokens=1)))
    assert await lines(harness, tenant) == [("german", 1, 10, 1), ("german+sql", 2, 20, 2)]
    requests = {name: harness.store.registry.get(tenant.id, name).requests for name in ("sql", "german", "pirate")}
    assert requests == {"sql": 2, "german": 3, "pirate": 0}


@pytest.mark.parametrize("n", [1, 3])
async def test_a_client_that_leaves_in_the_middle(harness: Harness, tenant: Tenant, n: int) -> None:
    harness.engine.gate.clear()
    harness.engine.hold_at = 2
    generation = harness.services.generator.start(ask(tenant, n=n))
    pieces, _ = await start(generation, 2 * n)
    assert harness.services.quotas.running(tenant.id) == n
    assert used(harness, tenant) == 10 + 2 * n  # while it runs
    await pieces.aclose()
    assert harness.services.quotas.running(tenant.id) == 0
    assert await lines(harness, tenant) == [("sql", 1, 10, 2 * n)]
    assert used(harness, tenant) == 10 + 2 * n


async def test_a_client_that_leaves_before_the_first_token_has_used_its_prompt(
    harness: Harness, tenant: Tenant
) -> None:
    harness.engine.gate.clear()
    generation = harness.services.generator.start(ask(tenant))
    starting = asyncio.create_task(start(generation))
    while not harness.engine.requests:
        await asyncio.sleep(0.001)
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starting
    assert await lines(harness, tenant) == [("sql", 1, 10, 0)]
    assert used(harness, tenant) == 10
    assert harness.services.quotas.running(tenant.id) == 0


@pytest.mark.parametrize("made", [0, 2])
async def test_an_engine_that_dies(harness: Harness, tenant: Tenant, made: int) -> None:
    harness.engine.gate.clear()
    harness.engine.hold_at = made
    generation = harness.services.generator.start(ask(tenant))
    finishing = asyncio.create_task(finish(generation))
    while not harness.engine.num_waiting:
        await asyncio.sleep(0.001)
    harness.engine.kill()
    with pytest.raises(Unavailable):
        await finishing
    prompt = 10 if made else 0  # nobody pays for nothing
    assert await lines(harness, tenant) == [("sql", 1, prompt, made)]
    assert used(harness, tenant) == prompt + made
    assert harness.services.quotas.running(tenant.id) == 0


async def test_tokens_whose_text_an_engine_took_with_it(harness: Harness, tenant: Tenant) -> None:
    """The client was told of one token; the second is the first byte of a character."""
    harness.engine.say("a€")
    assert len(harness.engine.encode("a€")) == 4
    harness.engine.gate.clear()
    harness.engine.hold_at = 2
    finishing = asyncio.create_task(finish(harness.services.generator.start(ask(tenant))))
    while not harness.engine.num_waiting:
        await asyncio.sleep(0.001)
    harness.engine.kill()
    with pytest.raises(Unavailable):
        await finishing
    assert await lines(harness, tenant) == [("sql", 1, 10, 1)]
    assert used(harness, tenant) == 11


async def test_what_the_engine_refuses_costs_nothing(harness: Harness, tenant: Tenant) -> None:
    harness.engine.refusal = RequestError("too many pages", code="mix_too_large")
    with pytest.raises(BadRequest):
        await finish(harness.services.generator.start(ask(tenant, n=2)))
    assert await lines(harness, tenant) == []
    assert harness.store.registry.get(tenant.id, "sql").requests == 0
    assert used(harness, tenant) == 0
    assert harness.services.quotas.running(tenant.id) == 0


async def test_an_answer_that_is_not_finite_was_computed(
    harness: Harness, tenant: Tenant, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fails(request: Request) -> AsyncIterator[Output]:
        yield Output(request.id, finish_reason=FinishReason.ERROR, error=NOT_FINITE)

    monkeypatch.setattr(harness.engine, "_outputs", fails)
    with pytest.raises(BadRequest) as refused:
        await finish(harness.services.generator.start(ask(tenant)))
    assert refused.value.code == "output_not_finite"
    assert await lines(harness, tenant) == [("sql", 1, 10, 0)]
    assert used(harness, tenant) == 10


async def test_what_never_reaches_the_engine_is_not_counted(harness: Harness, tenant: Tenant) -> None:
    generator = harness.services.generator
    with pytest.raises(NotFound):
        await finish(generator.start(ask(tenant, "nobody")))
    with pytest.raises(BadRequest):
        await finish(generator.start(ask(tenant, prompts=((),))))
    await generator.start(ask(tenant)).pieces().aclose()
    harness.engine.alive = False
    with pytest.raises(Unavailable):
        await finish(generator.start(ask(tenant)))
    assert await lines(harness, tenant) == []
    assert used(harness, tenant) == 0
    assert harness.services.quotas.running(tenant.id) == 0


async def test_a_refused_prompt_uses_nothing_up(harness: Harness) -> None:
    row = TenantRow(f"tenant{next(NUMBERS)}", quotas=Quotas(tokens_per_minute=9))
    tenant = Tenant.of(await harness.services.accounts.create_tenant(row))
    with pytest.raises(TooManyRequests) as refused:
        await finish(harness.services.generator.start(ask(tenant)))
    assert refused.value.code == "quota_tokens"
    assert not harness.engine.requests
    assert await lines(harness, tenant) == []
    assert harness.services.quotas.headers(tenant.id)["x-ratelimit-remaining-tokens"] == "9"


async def test_an_answer_is_not_cut_but_the_next_request_waits(harness: Harness) -> None:
    row = TenantRow(f"tenant{next(NUMBERS)}", quotas=Quotas(tokens_per_minute=12))
    tenant = Tenant.of(await harness.services.accounts.create_tenant(row))
    now = 0.0
    harness.services.quotas.clock = lambda: now
    generation = harness.services.generator.start(ask(tenant))
    await finish(generation)
    made = generation.usage.completion_tokens
    assert made > 2
    with pytest.raises(TooManyRequests) as refused:
        await finish(harness.services.generator.start(ask(tenant, prompts=((5,),))))
    debt = 10 + made - 12
    assert refused.value.headers["Retry-After"] == str((debt + 1) * 5)
    now += (debt + 1) * 5
    await finish(harness.services.generator.start(ask(tenant, prompts=((5,),))))


async def test_tenants_never_share_the_prefix_cache(harness: Harness, monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine's own cache of blocks behind the fake engine: each tenant finds its own prompts only."""
    pool, outputs = BlockPool(64, BLOCK), harness.engine._outputs

    async def with_cache(request: Request) -> AsyncIterator[Output]:
        found, _ = pool.match(request.prompt, request.cache_key)
        whole = request.prompt[: len(request.prompt) // BLOCK * BLOCK]
        blocks, parent = pool.allocate(len(whole) // BLOCK) or [], request.cache_key
        for index, block in enumerate(blocks):
            parent = pool.publish(block, whole[index * BLOCK : (index + 1) * BLOCK], parent)
        pool.release(blocks)
        pool.release(found)
        async for output in outputs(request):
            is_first = output.timings is not None
            yield Output(**{**vars(output), "cached_tokens": len(found) * BLOCK if is_first else 0})

    monkeypatch.setattr(harness.engine, "_outputs", with_cache)
    prompt = tuple(range(5, 5 + 3 * BLOCK + 1))
    cached: dict[str, list[int]] = {}
    tenants = [Tenant("default"), *[Tenant(f"tenant{next(NUMBERS)}") for _ in range(2)]]
    for _ in range(2):
        for tenant in tenants:
            for model in ("tiny", "sql"):
                generation = harness.services.generator.start(ask(tenant, model, prompts=(prompt,)))
                await finish(generation)
                cached.setdefault(f"{tenant.id} {model}", []).append(generation.usage.cached_tokens)
    assert len(cached) == 6
    assert set(map(tuple, cached.values())) == {(0, 3 * BLOCK)}
    assert len({request.cache_key for request in harness.engine.requests}) == 6


async def test_the_ledger_of_many_requests_at_once_adds_up(harness: Harness, tenant: Tenant) -> None:
    harness.engine.answer(lambda request: [5] * (1 + sum(request.prompt) % 7))
    prompts = [tuple(range(5, 6 + index % 11)) for index in range(60)]

    async def one(index: int) -> tuple[int, int]:
        generation = harness.services.generator.start(ask(tenant, prompts=(prompts[index],)))
        if index % 5:
            await finish(generation)
        else:
            pieces, _ = await start(generation)
            await pieces.aclose()
        return generation.usage.prompt_tokens, generation.usage.completion_tokens

    flushing = asyncio.create_task(harness.services.usage.flush())
    counts = await asyncio.gather(*(one(index) for index in range(60)))
    await flushing
    prompt, generated = (sum(each) for each in zip(*counts, strict=True))
    assert await lines(harness, tenant) == [("sql", 60, prompt, generated)]
    assert used(harness, tenant) == prompt + generated
