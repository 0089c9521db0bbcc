"""Requests made of any JSON in any field, by our own OpenAPI document: none is a bug, none leaves anything behind."""

import asyncio
import json
from collections.abc import Callable
from typing import Any

import pytest
from fake_engine import REPLY
from fakes import Harness
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

GOOD: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 3},
    "/v1/completions": {"model": "sql", "prompt": "Hi", "max_tokens": 3},
    "/v1/embeddings": {"model": "encoder", "input": "Hi"},
    "/tokenize": {"prompt": "Hi"},
    "/detokenize": {"tokens": [5, 6]},
}
EDGES = st.sampled_from([0, -1, 1, 2**31, 2**63, 10**400, 1e308, -0.0, 0.1, True, "", "auto", "\0", "漢", [], {}, [[]]])
ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text() | EDGES,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


def near(schema: Any) -> st.SearchStrategy[Any]:
    """What nearly fits the schema, which gets further than anything does."""
    if options := schema.get("anyOf"):
        return st.one_of([near(option) for option in options])
    if "enum" in schema:
        return st.sampled_from(schema["enum"]) | st.text(max_size=5)
    match schema.get("type"):
        case "object":
            fields = {name: near(inner) for name, inner in schema.get("properties", {}).items()}
            return (
                st.fixed_dictionaries({}, optional=fields)
                if fields
                else st.dictionaries(st.text(), ANYTHING, max_size=3)
            )
        case "array":
            return st.lists(near(schema.get("items", {})), max_size=4)
        case "string":
            return st.text(max_size=20)
        case "integer":
            return st.integers(-3, 40) | st.integers()
        case "number":
            return st.floats(-3, 3) | st.floats(allow_nan=False)
        case "boolean":
            return st.booleans()
    return ANYTHING


@pytest.mark.parametrize("most", [15, pytest.param(250, marks=pytest.mark.slow)])
@pytest.mark.parametrize("url", GOOD)
def test_any_json_in_any_field(make_harness: Callable[..., Harness], url: str, most: int) -> None:
    harness = make_harness()
    operation = harness.app.openapi()["paths"][url]["post"]
    fields = operation["requestBody"]["content"]["application/json"]["schema"]["properties"]
    changed = st.fixed_dictionaries({}, optional={name: near(inner) | ANYTHING for name, inner in fields.items()})
    bodies = st.tuples(changed, st.sets(st.sampled_from(sorted(fields)), max_size=3), st.booleans())

    async def send(body: dict[str, Any]) -> None:
        async with harness.client(timeout=60) as client:
            try:
                content = json.dumps(body).encode()
            except UnicodeEncodeError:  # half a pair, which the table has
                return
            answer = await client.post(url, content=content, headers={"content-type": "application/json"})
            assert answer.status_code in (200, 400, 404), answer.text
            if answer.status_code != 200:
                error = answer.json()["error"]
                assert len(error["message"]) < 1000
                assert error["param"] is None or str(error["param"]).partition(".")[0] in {*body, "prompt", "body"}, (
                    error
                )
            after = await client.post("/v1/completions", json=GOOD["/v1/completions"] | {"max_tokens": 100})
            assert after.json()["choices"][0]["text"] == REPLY
        harness.check_all_given_back()

    @settings(max_examples=most, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
    @given(bodies)
    def check(made: tuple[dict[str, Any], set[str], bool]) -> None:
        values, chosen, is_alone = made
        body = {name: value for name, value in values.items() if is_alone or name in chosen}
        asyncio.run(send(GOOD[url] | body))

    check()
