"""MoA and MiLoRA as their users meet them: trained, added and asked by commands, over restarts, in a real process."""

import json
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from served import Served
from toy_routers import KEY, NAMES, loramux, train

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

MESSAGES = [{"role": "user", "content": "abab"}]


@pytest.fixture
def served(served_model: Path, toy_adapters: Path, tmp_path: Path) -> Iterator[Served]:
    limit = ("--max-layered-tokens", "60")
    served = Served(
        served_model, tmp_path / "data", "--adapters", str(toy_adapters), "--admin-key", KEY, *limit, key=KEY
    )
    yield served
    if served.process.poll() is None:
        served.stop(signal.SIGKILL)


def ask(served: Served, model: str, status: int = 200, **fields: Any) -> Any:
    body = {"model": model, "messages": MESSAGES, "temperature": 0, "max_tokens": 6, **fields}
    with served.client() as client:
        answer = client.post("/v1/chat/completions", json=body)
    assert answer.status_code == status, answer.text
    return answer.json()


def text(answer: Any) -> str:
    found: str = answer["choices"][0]["message"]["content"]
    return found


def test_from_training_to_answers(
    served: Served, served_model: Path, toy_adapters: Path, toy_tasks: Path, tmp_path: Path
) -> None:
    moa = train("moa", tmp_path / "moa", served_model, toy_tasks, "--steps", "4", "--adapters", str(toy_adapters))
    assert "registered moa" in loramux("routers", "add", "moa", str(moa), url=served.url)
    explained = {"lora": {"explain": True}}
    first = ask(served, "auto:moa", **explained)
    (chosen,) = first["lora"]["adapters"]
    assert (chosen["name"] in NAMES, chosen["weight"], chosen["share"], first["lora"]["cached"]) == (True, 1, 1, False)
    assert len(first["lora"]["layers"]) == 3
    assert text(first) == text(ask(served, chosen["name"]))
    again = ask(served, "auto:moa", **explained)
    assert (text(again), again["lora"]["cached"]) == (text(first), True)
    other = next(name for name in NAMES if name != chosen["name"])
    only = ask(served, "auto:moa", lora={"candidates": [other]})
    assert [each["name"] for each in only["lora"]["adapters"]] == [other]
    assert text(only) == text(ask(served, other))

    milora = train("milora", tmp_path / "milora", served_model, toy_tasks, "--steps", "4")
    adapter = milora / "adapters" / "milora"
    loramux("adapters", "add", "milora", str(adapter), url=served.url)
    loramux("routers", "add", "linears", str(milora), url=served.url)
    told = ask(served, "auto:linears", **explained)
    assert [(each["name"], each["share"]) for each in told["lora"]["adapters"]] == [("milora", pytest.approx(3 / 7))]
    assert [len(layer["chosen"]) for layer in told["lora"]["layers"]] == [3, 3, 3]
    assert "milora" in ask(served, "milora")["lora"]["warnings"][0]
    shown = loramux("explain", "abab", "--router", "linears", url=served.url)
    assert "q_proj" in shown
    refused = ask(served, "auto:linears", 400, messages=[{"role": "user", "content": "ab" * 60}])
    assert refused["error"]["code"] == "prompt_too_long"
    everything = ask(served, "auto:linears", lora={"top_k": 7})
    assert text(everything) == text(ask(served, "milora"))

    # The engine starts anew without them, and reads them for the next request.
    served.kill_engine()
    for router, before in (("auto:moa", first), ("auto:linears", told)):
        after = ask(served, router, **explained)
        assert text(after) == text(before)
        assert [layer["chosen"] for layer in after["lora"]["layers"]] == [
            layer["chosen"] for layer in before["lora"]["layers"]
        ]
        assert after["lora"]["cached"] is False
    listed = json.loads(loramux("routers", "list", "--json", url=served.url))["data"]
    assert {(row["name"], row["kind"], row["stale"]) for row in listed} >= {
        ("moa", "moa", False),
        ("linears", "milora", False),
    }
    assert served.metric("loramux_route_cache_hits_total") >= 1
    assert served.stop() == 0
