"""`--engines 2` with all that may be asked of an engine: routers inside the model, constraints, scores, vectors."""

import asyncio
import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from served import Served
from toy_routers import KEY, loramux, train

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

AT_ONCE = 24
"""More than an engine may have beyond the other one, so that both serve some."""
CHAT = {"messages": [{"role": "user", "content": "abab" * 20}], "temperature": 0, "max_tokens": 6}
PROMPT = {"prompt": "abab" * 20, "temperature": 0, "max_tokens": 30}
ASKED: dict[str, tuple[str, dict[str, Any]]] = {
    "gates": ("chat/completions", CHAT | {"model": "auto:gates", "lora": {"explain": True}}),
    "moa": ("chat/completions", CHAT | {"model": "auto:moa"}),
    "milora": ("chat/completions", CHAT | {"model": "auto:linears"}),
    "mix": ("chat/completions", CHAT | {"model": "tiny", "lora": {"adapters": [{"name": "all4"}, {"name": "qv16"}]}}),
    "fusion": (
        "chat/completions",
        CHAT | {"model": "tiny", "lora": {"adapters": [{"name": "all4"}, {"name": "qv16"}], "composition": "fusion"}},
    ),
    "regex": ("completions", PROMPT | {"model": "all4", "structured_outputs": {"regex": "[ab]{3,5}-[0-9]"}}),
    "scores": ("completions", PROMPT | {"model": "qv16", "echo": True, "logprobs": 2, "max_tokens": 3}),
    "vectors": ("embeddings", {"model": "all4", "input": "abab" * 20}),
}


@pytest.fixture
def served(served_model: Path, toy_adapters: Path, toy_tasks: Path, tmp_path: Path) -> Iterator[Served]:
    """Two engines, and routers of each kind."""
    folder = ("--adapters", str(toy_adapters))
    served = Served(served_model, tmp_path / "data", "--engines", "2", *folder, "--admin-key", KEY, key=KEY)
    made = (served_model, toy_tasks, "--steps", "4")
    gates = train("meteora", tmp_path / "gates", *made, *folder, "--learning-rate", "0.05")
    moa = train("moa", tmp_path / "moa", *made, *folder)
    milora = train("milora", tmp_path / "milora", *made)
    loramux("adapters", "add", "milora", str(milora / "adapters" / "milora"), url=served.url)
    for name, router in (("gates", gates), ("moa", moa), ("linears", milora)):
        loramux("routers", "add", name, str(router), url=served.url)
    yield served
    assert served.stop() == 0


Essence = tuple[list[str], list[float]]
"""What of an answer does not depend on when and where it was computed: what it says, and numbers to three digits."""


def essence(answer: Any) -> Essence:
    if "data" in answer:
        return [], answer["data"][0]["embedding"]
    choice, adapters = answer["choices"][0], answer["lora"]["adapters"]
    scores = (choice.get("logprobs") or {}).get("token_logprobs") or []
    text = choice["text"] if "text" in choice else choice["message"]["content"]
    numbers = [each.get("share", 0.0) for each in adapters] + [score for score in scores if score is not None]
    return [text, *(each["name"] for each in adapters)], numbers


def check_alike(one: Essence, other: Essence) -> None:
    assert one[0] == other[0]
    assert one[1] == pytest.approx(other[1], abs=1e-3)


async def all_at_once(served: Served, path: str, body: dict[str, Any]) -> Essence:
    """What all answers are."""
    async with httpx.AsyncClient(base_url=served.base_url, headers=served.headers, timeout=300) as client:
        answers = await asyncio.gather(*(client.post(f"/{path}", json=body) for _ in range(AT_ONCE)))
    assert [answer.text for answer in answers if answer.status_code != 200] == []
    first, *others = [essence(answer.json()) for answer in answers]
    for other in others:
        check_alike(other, first)
    return first


def engines(served: Served) -> Any:
    with served.client() as client:
        return client.get("/admin/v1/state").json()["engines"]


def test_every_kind_of_request_is_answered_alike_by_both(served: Served) -> None:
    before = {kind: asyncio.run(all_at_once(served, *asked)) for kind, asked in ASKED.items()}
    assert re.fullmatch("[ab]{3,5}-[0-9]", before["regex"][0][0])

    def both_have_served() -> bool:
        asyncio.run(all_at_once(served, *ASKED["mix"]))  # one may have answered some before the others had come
        return all(engine["adapters"]["device"] > 0 for engine in engines(served))

    served.until(both_have_served)

    # A new engine has neither adapters nor routers nor grammars, and is given some of the same requests.
    killed = served.engine_pids[0]
    os.kill(killed, signal.SIGKILL)
    served.until(lambda: killed not in served.engine_pids and len(served.engine_pids) == 2)
    served.until(lambda: all(engine["alive"] for engine in engines(served)))
    for kind, asked in ASKED.items():
        check_alike(asyncio.run(all_at_once(served, *asked)), before[kind])
