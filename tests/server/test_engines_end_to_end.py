"""`loramux serve --engines 2`: one of the engines is killed under load, and no request is lost."""

import asyncio
import json
import os
import shutil
import signal
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from served import MESSAGES, Served, reference_text

KEY = "the-admin-key"
NAMES = ("all4", "wide24", "rslora8", "qv16")
TOKENS = 48
FIRST_TOKENS = "time_to_first_token_seconds_count"


@pytest.fixture(scope="module")
def served(served_model: Path, adapters: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    root = tmp_path_factory.mktemp("adapters-to-serve")
    for name in NAMES:
        shutil.copytree(adapters[name], root / name)
    options = ("--engines", "2", "--adapters", str(root), "--admin-key", KEY)
    served = Served(served_model, tmp_path_factory.mktemp("data"), *options, key=KEY)
    yield served
    assert served.stop() == 0


@dataclass
class Answer:
    """What a client saw of one request."""

    status: int
    text: str = ""
    error: str = ""
    is_done: bool = False

    @property
    def is_whole(self) -> bool:
        return self.is_done and not self.error


async def ask(client: httpx.AsyncClient, model: str, tokens: int = TOKENS, content: str | None = None) -> Answer:
    messages = MESSAGES if content is None else [{"role": "user", "content": content}]
    body = {"model": model, "messages": messages, "max_tokens": tokens, "temperature": 0, "ignore_eos": True}
    async with client.stream("POST", "/v1/chat/completions", json=body | {"stream": True}) as reply:
        answer = Answer(reply.status_code)
        if reply.is_error:
            answer.error = json.loads(await reply.aread())["error"]["code"]
            return answer
        async for line in reply.aiter_lines():
            if line == "data: [DONE]":
                answer.is_done = True
            elif line.startswith("data: "):
                event = json.loads(line.removeprefix("data: "))
                if "error" in event:
                    answer.error = event["error"]["code"]
                else:
                    answer.text += event["choices"][0]["delta"].get("content") or ""
        return answer


def asking(served: Served) -> httpx.AsyncClient:
    return httpx.AsyncClient(base_url=served.url, headers=served.headers, timeout=120)


def state(served: Served) -> Any:
    return served.get("/admin/v1/state").json()


def recovered(served: Served, killed: int | None = None) -> bool:
    """Whether both live, and neither is the one that was killed, which can be seen for a moment longer."""
    pids = served.engine_pids
    return killed not in pids and len(pids) == 2 and all(engine["alive"] for engine in state(served)["engines"])


def test_requests_that_a_dead_engine_had_not_answered_are_answered_by_the_other(served: Served) -> None:
    """Both stand still while they come, so that each gets every second one, and the dead one has answered none."""
    served.until(lambda: recovered(served))
    moved, first = (served.metric(f"loramux_{name}") for name in ("requests_moved_total", FIRST_TOKENS))
    pid, other = served.engine_pids
    for each in (pid, other):
        os.kill(each, signal.SIGSTOP)

    async def burst() -> list[Answer]:
        async with asking(served) as client:
            tasks = [asyncio.create_task(ask(client, "tiny", 200, f"Question {number}")) for number in range(16)]
            await asyncio.to_thread(served.until, lambda: state(served)["requests"] == len(tasks))
            os.kill(other, signal.SIGCONT)
            # The first that came have been placed by now, half of them in the engine that stands still.
            await asyncio.to_thread(served.until, lambda: served.metric(f"loramux_{FIRST_TOKENS}") >= first + 4)
            os.kill(pid, signal.SIGKILL)
            return await asyncio.gather(*tasks)

    answers = asyncio.run(burst())
    assert [answer for answer in answers if answer.status != 200 or not answer.is_whole] == []
    assert served.metric("loramux_requests_moved_total") > moved
    served.until(lambda: recovered(served, pid))


def test_streams_in_a_closed_loop_survive_an_engine(
    served: Served, served_model: Path, adapters: dict[str, Path]
) -> None:
    served.until(lambda: recovered(served))
    answers: list[Answer] = []
    counts: Counter[str] = Counter()
    is_over = asyncio.Event()

    async def loop(client: httpx.AsyncClient, name: str) -> None:
        while not is_over.is_set():
            answers.append(await ask(client, name))
            counts[name] += 1
            if answers[-1].is_whole:
                assert answers[-1].text == expected[name]

    async def enough(more: int) -> None:
        goal = {name: counts[name] + more for name in NAMES}
        async with asyncio.timeout(120):
            while not all(counts[name] >= goal[name] for name in NAMES):
                await asyncio.sleep(0.01)

    async def kill_under_load() -> None:
        async with asking(served) as client:
            loops = [asyncio.create_task(loop(client, name)) for name in NAMES * 2]
            await enough(2)
            killed = served.engine_pids[-1]
            os.kill(killed, signal.SIGKILL)
            assert (await client.get("/health")).status_code == 200
            await asyncio.to_thread(served.until, lambda: recovered(served, killed))
            await enough(3)
            is_over.set()
            await asyncio.gather(*loops)

    expected = {name: reference_text(served_model, adapters, {name: 1.0}, TOKENS) for name in NAMES}
    asyncio.run(kill_under_load())
    broken = [answer for answer in answers if not answer.is_whole]
    assert len(broken) <= 2 * len(NAMES)
    # An engine may have given out tokens that were no text yet; then the stream has not begun, and has a status.
    assert {(answer.status, answer.error) for answer in broken} <= {(200, "engine_error"), (503, "engine_error")}
    assert all(answer.text for answer in broken if answer.status == 200)
    assert served.metric("loramux_engine_up") == 2


def test_what_is_shown_of_several_engines(served: Served) -> None:
    served.until(lambda: recovered(served))
    shown = state(served)
    assert [engine["id"] for engine in shown["engines"]] == ["0", "1"]
    lines = served.get("/metrics").text.splitlines()
    series = Counter(line.partition("{")[0].partition(" ")[0] for line in lines if not line.startswith("#"))
    assert series["loramux_requests_running"] == 2
    for name in ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc"):
        assert series[name] == 1
    assert series["vllm:lora_requests_info"] == 1
    pid = served.engine_pids[0]
    os.kill(pid, signal.SIGSTOP)  # it can neither answer nor be started anew
    try:
        for path in ("/health", "/ready", "/health/decode"):
            assert served.get(path).status_code == 200
    finally:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)
