"""Which adapters a request uses: `model`, `adapter_id` and the `lora` object."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from byte_tokenizer import byte_level_tokenizer
from fakes import Harness, events, make_store

from adapters_store.types import Composition, Mix
from server.config import Settings

Json = dict[str, Any]


async def complete(client: httpx.AsyncClient, **fields: object) -> httpx.Response:
    response = await client.post("/v1/completions", json={"model": "tiny", "prompt": "Hi", **fields})
    assert response.status_code == 200, response.text
    return response


@pytest.fixture
def digest(harness: Harness) -> Callable[[str], str]:
    return harness.digests.__getitem__


async def test_what_an_answer_says_of_its_adapters_can_be_asked_for(client: httpx.AsyncClient) -> None:
    adapters = [{"name": "sql", "weight": 0.7}, {"name": "pirate", "weight": -0.25}]
    said = (await complete(client, lora={"adapters": adapters})).json()["lora"]["adapters"]
    again = [entry | {"score": 0.5, "share": 0.25} for entry in said]  # as routers say
    assert (await complete(client, lora={"adapters": again})).json()["lora"]["adapters"] == said


async def test_model_names_an_adapter(
    client: httpx.AsyncClient, harness: Harness, digest: Callable[[str], str]
) -> None:
    response = await complete(client, model="sql")
    (request,) = harness.engine.requests
    assert request.mix == Mix(((digest("sql"), 1.0),))
    assert set(request.paths) == {digest("sql")}
    assert (Path(request.paths[digest("sql")]) / "adapter_config.json").is_file()
    lora = response.json()["lora"]
    assert lora["router"] == "explicit"
    assert lora["adapters"] == [{"name": "sql", "digest": digest("sql"), "weight": 1.0}]
    assert response.json()["model"] == "sql"


@pytest.mark.parametrize("which", [{"model": "sql"}, {"lora": {"adapters": [{"name": "sql"}]}}])
async def test_what_routers_are_told_changes_nothing_without_one(client: httpx.AsyncClient, which: Json) -> None:
    told = {"top_k": 1, "temperature": 0.5, "score_mass": 0.5, "min_score": 2.0, "candidates": ["pirate"]}
    told |= {"query": "conversation", "sticky": True, "explain": True}
    plain = (await complete(client, **which)).json()["lora"]
    more = (await complete(client, **which | {"lora": which.get("lora", {}) | told})).json()["lora"]
    assert more["adapters"] == plain["adapters"] != []


async def test_a_revision_is_pinned_by_its_digest(
    client: httpx.AsyncClient, harness: Harness, digest: Callable[[str], str]
) -> None:
    await complete(client, model=f"sql@{digest('sql')[:8]}")
    assert harness.engine.requests[0].mix.digests == (digest("sql"),)


async def test_adapter_id_means_the_same_as_model(
    client: httpx.AsyncClient, harness: Harness, digest: Callable[[str], str]
) -> None:
    await complete(client, adapter_id="german")
    response = await client.post("/v1/completions", json={"adapter_id": "german", "prompt": "Hi"})
    assert response.status_code == 200
    assert [request.mix.digests for request in harness.engine.requests] == [(digest("german"),)] * 2


@pytest.mark.parametrize(
    ("lora", "weights", "composition"),
    [
        ({"adapters": [{"name": "sql", "weight": 0.7}, {"name": "german", "weight": 0.3}]}, (0.7, 0.3), "mixture"),
        ({"adapters": [{"name": "sql"}, {"name": "german"}]}, (0.5, 0.5), "mixture"),
        ({"adapters": [{"name": "sql", "weight": -2}, {"name": "german", "weight": 1e-3}]}, (-2.0, 0.001), "mixture"),
        (
            {"adapters": [{"name": "sql", "weight": 3}, {"name": "german", "weight": 1}], "composition": "fusion"},
            (0.75, 0.25),
            "fusion",
        ),
    ],
)
async def test_explicit_mixes(
    client: httpx.AsyncClient,
    harness: Harness,
    digest: Callable[[str], str],
    lora: Json,
    weights: tuple[float, float],
    composition: str,
) -> None:
    answer = (await complete(client, lora=lora)).json()["lora"]
    expected = Mix.of([(digest("sql"), weights[0]), (digest("german"), weights[1])], Composition(composition))
    assert harness.engine.requests[0].mix == expected
    assert [(adapter["name"], adapter["weight"]) for adapter in answer["adapters"]] == [
        ("sql", weights[0]),
        ("german", weights[1]),
    ]
    assert answer["composition"] == composition


async def test_selection_keeps_the_heaviest(
    client: httpx.AsyncClient, harness: Harness, digest: Callable[[str], str]
) -> None:
    adapters = [{"name": "sql", "weight": 0.2}, {"name": "german", "weight": 0.9}, {"name": "pirate", "weight": 0.9}]
    answer = (await complete(client, lora={"adapters": adapters, "composition": "selection"})).json()["lora"]
    assert harness.engine.requests[0].mix == Mix(((digest("german"), 1.0),))
    assert answer["adapters"] == [{"name": "german", "digest": digest("german"), "weight": 1.0}]


async def test_an_explicit_list_overrides_model(
    client: httpx.AsyncClient, harness: Harness, digest: Callable[[str], str]
) -> None:
    await complete(client, model="sql", lora={"adapters": [{"name": "german"}]})
    await complete(client, model="sql", lora={"adapters": []})
    assert [request.mix.digests for request in harness.engine.requests] == [(digest("german"),), ()]


@pytest.mark.parametrize("composition", ["mixture", "fusion", "selection"])
async def test_every_composition_of_nothing_is_the_base_model(
    client: httpx.AsyncClient, harness: Harness, composition: str
) -> None:
    for lora in ({"composition": composition}, {"adapters": [], "composition": composition}):
        response = await complete(client, lora=lora)
        assert response.status_code == 200, response.text
    assert [request.mix.digests for request in harness.engine.requests] == [(), ()]


async def test_the_stream_says_the_same_as_the_whole(client: httpx.AsyncClient) -> None:
    response = await complete(client, model="sql", stream=True)
    last = events(response.text)[-1]["lora"]
    assert last["adapters"][0]["name"] == "sql"
    header = response.headers["x-loramux-route"]
    assert json.loads(header) == last
    assert header.isascii()
    assert ": " not in header


async def test_long_mixes_are_cut_in_the_header(tmp_path: Path) -> None:
    names = [f"adapter-{number}" for number in range(20)]
    store = make_store(tmp_path, names)
    harness = Harness(store, byte_level_tokenizer(), Settings())
    async with harness.client() as client:
        response = await complete(client, lora={"adapters": [{"name": name} for name in names]})
    header = json.loads(response.headers["x-loramux-route"])
    assert len(header["adapters"]) == 16
    assert header["truncated"] is True
    assert len(response.json()["lora"]["adapters"]) == 20
    assert "truncated" not in response.json()["lora"]
    harness.check_all_given_back()
    await store.close()


async def test_the_cache_key_depends_on_the_mix(client: httpx.AsyncClient, harness: Harness) -> None:
    pair = [{"name": "sql", "weight": 0.5}, {"name": "german", "weight": 0.5}]
    same: list[Json] = [{"lora": {"adapters": pair}}, {"lora": {"adapters": pair[::-1]}}]
    different: list[Json] = [
        {},
        {"model": "sql"},
        {"lora": {"adapters": [{"name": "sql", "weight": 0.5}]}},
        {"lora": {"adapters": pair, "composition": "fusion"}},
    ]
    for fields in [*same, *different]:
        await complete(client, **fields)
    keys = [request.cache_key for request in harness.engine.requests]
    assert keys[0] == keys[1]
    assert len(set(keys)) == 1 + len(different)
    assert all(len(key) == 32 for key in keys)
