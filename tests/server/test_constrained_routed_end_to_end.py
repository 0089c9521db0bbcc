"""Answers bound to a form, of the base model, adapters, mixes and all kinds of routers at once, over a real socket."""

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import pytest
from fakes import events
from served import Served
from toy_routers import loramux

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
DEMO = Path(__file__).parents[2] / "deploy" / "demo"
ROUTERS = ("gates", "milora", "moa")
MESSAGES = [{"role": "user", "content": "Give the facts as JSON.\nAmir is 73 years old and lives in Montreal."}]
FACTS = {
    "type": "object",
    "properties": {"name": {"type": "string", "pattern": "^[A-Za-z]{1,10}$"}, "age": {"enum": [7, 73, 200]}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
TOOL = {"type": "function", "function": {"name": "note", "parameters": FACTS}}
FORMS: dict[str, dict[str, Any]] = {
    "schema": {"response_format": {"type": "json_schema", "json_schema": {"name": "facts", "schema": FACTS}}},
    "call": {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "note"}}},
}
MIX = {"adapters": [{"name": "json_fields", "weight": 0.7}, {"name": "spell", "weight": -0.2}]}


@pytest.fixture(scope="module")
def served(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """With so little room for keys and values that requests are preempted."""
    options = ("--adapters", str(DEMO / "adapters"), "--max-model-len", "512", "--kv-memory", "32MiB")
    served = Served(smollm2, tmp_path_factory.mktemp("data"), *options, "--page-memory", "256MiB")
    for name in ROUTERS:
        loramux("routers", "add", name, str(DEMO / name), url=served.url)
    yield served
    assert served.stop() == 0


async def ask(client: httpx.AsyncClient, body: dict[str, Any]) -> list[str]:
    """What each choice says, or what its call is given."""
    answer = await client.post("/v1/chat/completions", json=body)
    assert answer.status_code == 200, answer.text
    said = [""] * body["n"]
    if not body.get("stream"):
        for choice in answer.json()["choices"]:
            calls = choice["message"].get("tool_calls")
            said[choice["index"]] = calls[0]["function"]["arguments"] if calls else choice["message"]["content"]
        return said
    for event in events(answer.text):
        for choice in event["choices"]:
            calls = choice["delta"].get("tool_calls") or [{"function": {}}]
            said[choice["index"]] += calls[0]["function"].get("arguments", "") + (choice["delta"].get("content") or "")
    return said


async def test_every_answer_has_its_form(served: Served, smollm2: Path) -> None:
    models: list[dict[str, Any]] = [{"model": smollm2.name}, {"model": "pirate"}, {"model": smollm2.name, "lora": MIX}]
    models += [{"model": f"auto:{name}"} for name in ROUTERS]
    shared: dict[str, Any] = {"messages": MESSAGES, "n": 2, "seed": 3, "max_tokens": 150}
    bodies = [shared | model | form for model in models for form in FORMS.values()]
    bodies = [body | {"stream": index % 4 in (0, 3)} for index, body in enumerate(bodies)]
    async with httpx.AsyncClient(base_url=served.url, timeout=500) as client:
        answers = await asyncio.gather(*(ask(client, body) for body in bodies))
    texts = [text for said in answers for text in said]
    for text in texts:
        jsonschema.validate(json.loads(text), FACTS)
    assert len(texts) == 2 * len(bodies)
    assert len(set(texts)) > 1, "they are not all the same"
    assert served.metric("loramux_preemptions_total") > 0
    for name in ("loramux_requests_running", "loramux_requests_waiting"):
        served.until(lambda name=name: served.metric(name) == 0)
