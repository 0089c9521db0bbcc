"""The model `auto`, /admin/v1/route and /admin/v1/routers, around an encoder that counts words."""

from typing import Any

import pytest
from world import World, error_of

V1 = "/admin/v1"
SQL = ["how many orders were placed in may", "list all customers of berlin"]
PIRATE = ["talk like a pirate", "say ahoy like a pirate"]


async def ask(client: Any, prompt: str, **fields: Any) -> Any:
    body = {"model": "auto", "messages": [{"role": "user", "content": prompt}], "max_tokens": 2} | fields
    return await client.post("/v1/chat/completions", json=body)


def names(answer: Any) -> list[str]:
    assert answer.status_code == 200, answer.text
    return [adapter["name"] for adapter in answer.json()["lora"]["adapters"]]


async def test_a_registered_adapter_is_chosen_by_the_next_request(routed: World) -> None:
    await routed.added(routed.a, "sql", 0, samples=SQL)
    await routed.added(routed.a, "sea", 1, samples=PIRATE)
    answer = await ask(routed.a, "how many customers were placed in berlin")
    assert names(answer) == ["sql"]
    lora = answer.json()["lora"]
    assert (lora["router"], lora["cached"], lora["adapters"][0]["weight"]) == ("retriever", False, 1.0)
    assert 0.3 < lora["adapters"][0]["score"] < 1
    (request,) = routed.harness.engine.requests
    assert request.mix.digests == (lora["adapters"][0]["digest"],)
    assert (await ask(routed.a, "how many customers were placed in berlin")).json()["lora"]["cached"] is True
    assert names(await ask(routed.a, "talk like a pirate now")) == ["sea"]


async def test_changes_count_at_once(routed: World) -> None:
    await routed.added(routed.a, "sql", 0, description="talks to databases")
    assert names(await ask(routed.a, "talk like a pirate")) == []
    assert (await routed.a.patch(f"{V1}/adapters/sql", json={"samples": PIRATE})).status_code == 200
    assert names(await ask(routed.a, "talk like a pirate")) == ["sql"]
    assert (await routed.a.delete(f"{V1}/adapters/sql?wait=true")).status_code == 200
    answer = await ask(routed.a, "talk like a pirate")
    assert names(answer) == []
    assert answer.json()["lora"]["outcome"] == "no_candidates"


async def test_what_nothing_fits_goes_to_the_base_model(routed: World) -> None:
    await routed.added(routed.a, "sql", 0, samples=SQL)
    for prompt, outcome in (("zebra", "below_min_score"), ("  \n", "empty_text")):
        lora = (await ask(routed.a, prompt)).json()["lora"]
        assert (lora["router"], lora["adapters"], lora["outcome"]) == ("retriever", [], outcome)
    assert names(await ask(routed.a, "zebra", lora={"min_score": -1})) == ["sql"]


async def test_options_of_a_request(routed: World) -> None:
    await routed.added(routed.a, "sql", 0, samples=SQL)
    await routed.added(routed.a, "sea", 1, samples=PIRATE)
    both = "list all customers like a pirate"
    assert set(names(await ask(routed.a, both, lora={"min_score": 0.1}))) == {"sql", "sea"}
    assert len(names(await ask(routed.a, both, lora={"min_score": 0.1, "top_k": 1}))) == 1
    assert names(await ask(routed.a, both, lora={"candidates": ["sea"]})) == ["sea"]
    weights = (await ask(routed.a, both, lora={"min_score": 0.1, "temperature": 0.5})).json()["lora"]["adapters"]
    assert sum(entry["weight"] for entry in weights) == 1
    assert all((entry["weight"] * 32).is_integer() for entry in weights)
    shown = (await ask(routed.a, both, lora={"explain": True})).json()["lora"]["scores"]
    assert {entry["name"] for entry in shown} == {"sql", "sea"}
    assert [entry["score"] for entry in shown] == sorted((entry["score"] for entry in shown), reverse=True)
    one = await ask(routed.a, both, lora={"composition": "selection", "min_score": 0.1})
    assert [entry["weight"] for entry in one.json()["lora"]["adapters"]] == [1.0]


@pytest.mark.parametrize("composition", ["mixture", "fusion", "selection"])
async def test_a_dry_run_of_every_composition(routed: World, composition: str) -> None:
    await routed.added(routed.a, "sql", 0, samples=SQL)
    for prompt, chosen in ((SQL[0], ["sql"]), ("zebra", []), ("  ", [])):
        answer = await routed.a.post(f"{V1}/route", json={"prompt": prompt, "composition": composition})
        assert answer.status_code == 200, answer.text
        assert answer.json()["composition"] == composition
        assert [entry["name"] for entry in answer.json()["adapters"]] == chosen
        assert names(await ask(routed.a, prompt, lora={"composition": composition})) == chosen


@pytest.mark.parametrize(
    ("fields", "status", "param", "code"),
    [
        ({"lora": {"candidates": ["absent"]}}, 404, "lora.candidates.0", "model_not_found"),
        ({"lora": {"router": "absent"}}, 404, "lora.router", "router_not_found"),
        ({"model": "auto:absent"}, 404, "model", "router_not_found"),
        ({"lora": {"top_k": 0}}, 400, "lora.top_k", "invalid_value"),
        ({"lora": {"temperature": 0}}, 400, "lora.temperature", "invalid_value"),
        ({"lora": {"score_mass": 1.5}}, 400, "lora.score_mass", "invalid_value"),
        ({"lora": {"adapters": [{"name": "sql"}]}}, 400, "lora.adapters", "invalid_value"),
    ],
)
async def test_refusals(routed: World, fields: dict[str, Any], status: int, param: str, code: str) -> None:
    await routed.added(routed.a, "sql", 0, samples=SQL)
    answer = await ask(routed.a, "list all customers", **fields)
    assert answer.status_code == status
    error = error_of(answer)
    assert (error["param"], error["code"]) == (param, code)


async def test_one_request_has_one_decision(routed: World) -> None:
    body = {"model": "auto", "prompt": ["a", "b"], "max_tokens": 1}
    answer = await routed.a.post("/v1/completions", json=body)
    assert (answer.status_code, error_of(answer)["param"]) == (400, "prompt")
    await routed.added(routed.a, "sql", 0, samples=["Hi"])
    tokens = routed.harness.services.tokenizer
    for prompt in ("Hi", await tokens.encode("Hi")):
        answer = await routed.a.post("/v1/completions", json=body | {"prompt": prompt})
        assert names(answer) == ["sql"]


async def test_the_last_turn_decides_the_conversation_or_the_first_one_on_request(routed: World) -> None:
    await routed.added(routed.a, "sql", 0, samples=SQL)
    await routed.added(routed.a, "sea", 1, samples=PIRATE)
    messages = [
        {"role": "system", "content": "talk like a pirate"},
        {"role": "user", "content": "list all customers of berlin"},
        {"role": "assistant", "content": "which ones"},
        {"role": "user", "content": "say ahoy like a pirate"},
    ]
    assert names(await ask(routed.a, "", messages=messages)) == ["sea"]
    assert names(await ask(routed.a, "", messages=messages, lora={"sticky": True})) == ["sql"]
    both = {"query": "conversation", "min_score": 0.2}
    assert set(names(await ask(routed.a, "", messages=messages, lora=both))) == {"sql", "sea"}


async def test_nobody_is_routed_to_others_adapters(routed: World) -> None:
    await routed.added(routed.a, "secret", 0, samples=SQL)
    lora = (await ask(routed.b, SQL[0], lora={"explain": True})).json()["lora"]
    assert (lora["adapters"], lora["outcome"], lora["scores"]) == ([], "no_candidates", [])
    answer = await routed.b.post(f"{V1}/route", json={"prompt": SQL[0]})
    assert (answer.json()["adapters"], answer.json()["scores"]) == ([], [])
    for candidate in ("secret", "absent"):
        refused = await ask(routed.b, SQL[0], lora={"candidates": [candidate]})
        assert refused.status_code == 404
        assert error_of(refused)["message"] == f"lora.candidates.0: '{candidate}' does not exist, no such adapter"
    assert (await routed.b.post(f"{V1}/route", json={"prompt": "x", "tenant": "a"})).status_code == 403
    await routed.added(routed.admin, "open", 1, samples=SQL, public=True)
    assert names(await ask(routed.b, SQL[0])) == ["open"]
    await routed.added(routed.b, "open", 2, samples=PIRATE)  # hides the public one
    assert names(await ask(routed.b, SQL[0])) == []
    assert names(await ask(routed.b, PIRATE[0])) == ["open"]


async def test_a_dry_run_shows_every_score(routed: World) -> None:
    await routed.added(routed.a, "sql", 0, samples=SQL)
    await routed.added(routed.a, "sea", 1, samples=PIRATE)
    for body in ({"prompt": SQL[0]}, {"messages": [{"role": "user", "content": SQL[0]}]}):
        answer = (await routed.a.post(f"{V1}/route", json=body)).json()
        assert [entry["name"] for entry in answer["adapters"]] == ["sql"]
        assert [entry["name"] for entry in answer["scores"]] == ["sql", "sea"]
    assert not routed.harness.engine.requests
    as_a = (await routed.admin.post(f"{V1}/route", json={"prompt": SQL[0], "tenant": "a"})).json()
    assert [entry["name"] for entry in as_a["adapters"]] == ["sql"]
    for body in ({}, {"prompt": "x", "messages": [{"role": "user", "content": "x"}]}, {"prompt": "x", "extra": 1}):
        assert (await routed.a.post(f"{V1}/route", json=body)).status_code == 400


async def test_routers_are_the_administrators(routed: World) -> None:
    (built_in,) = (await routed.admin.get(f"{V1}/routers")).json()["data"]
    assert (built_in["name"], built_in["stale"], built_in["adapters"]) == ("retriever", False, 0)
    assert (await routed.a.get(f"{V1}/routers")).status_code == 403
    assert (await routed.a.post(f"{V1}/routers/retriever/default")).status_code == 403
    assert (await routed.admin.get(f"{V1}/routers/absent")).status_code == 404
    assert (await routed.admin.delete(f"{V1}/routers/absent")).status_code == 404
    assert (await routed.admin.delete(f"{V1}/routers/retriever")).status_code == 400
    assert (await routed.admin.post(f"{V1}/routers/absent/default?tenant=a")).status_code == 404
    tenant = (await routed.admin.post(f"{V1}/routers/retriever/default?tenant=a")).json()
    assert (tenant["id"], tenant["default_router"]) == ("a", "retriever")


async def test_without_an_encoder_auto_says_what_is_missing(world: World) -> None:
    answer = await ask(world.a, "hello")
    assert answer.status_code == 400
    error = error_of(answer)
    assert (error["param"], error["code"]) == ("model", "no_router")
    assert "it has no encoder" in error["message"]
    assert (await world.admin.get(f"{V1}/routers")).json()["data"] == []


async def test_a_failing_encoder_stops_neither_registrations_nor_the_rest(routed: World) -> None:
    routed.harness.services.routers._process.failure = "the encoder has ended"  # type: ignore[union-attr]
    await routed.added(routed.a, "sql", 0, samples=SQL)
    assert (await routed.use(routed.a, "sql")).status_code == 200
    routed.harness.services.routers._process.failure = None  # type: ignore[union-attr]
    await routed.added(routed.a, "sea", 1, samples=PIRATE)
    assert names(await ask(routed.a, PIRATE[0])) == ["sea"]
    routed.harness.services.routers._process.failure = "the encoder has ended"  # type: ignore[union-attr]
    answer = await ask(routed.a, "something new")
    assert (answer.status_code, error_of(answer)["code"]) == (503, "router_unavailable")
    assert "Retry-After" in answer.headers


async def test_decisions_are_counted(routed: World) -> None:
    await routed.added(routed.a, "sql", 0, samples=SQL)
    for prompt in (SQL[0], SQL[0], "zebra"):
        await ask(routed.a, prompt)
    value = routed.harness.services.metrics.registry.get_sample_value
    assert value("loramux_route_total", {"router": "retriever", "outcome": "routed"}) == 2
    assert value("loramux_route_total", {"router": "retriever", "outcome": "below_min_score"}) == 1
    assert value("loramux_route_cache_hits_total", {}) == 1
    assert value("loramux_route_similarity_count", {"router": "retriever"}) == 3
    assert value("loramux_route_similarity_bucket", {"router": "retriever", "le": "0.25"}) == 1
