"""Engines of a running server die under load: every request has one ending, and the bill is what clients saw."""

import asyncio
import json
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from served import Served

KEY = "the-admin-key"
KILLS = 2
PROMPT = "Hello world, how is the quick brown fox?"

Json = dict[str, Any]


@pytest.fixture(scope="module")
def served(served_model: Path, adapters: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("served")
    for name in ("all4", "wide24"):
        shutil.copytree(adapters[name], folder / "adapters" / name)
    options = ("--adapters", str(folder / "adapters"), "--admin-key", KEY)
    served = Served(served_model, folder / "data", *options, key=KEY)
    yield served
    assert served.stop() == 0


class Reader:
    """A request, streamed or whole, and what came of it."""

    def __init__(self, number: int) -> None:
        self.is_streamed = number % 3 > 0
        self.body: Json = {"model": ("tiny", "all4", "wide24")[number % 3], "prompt": f"{number} {PROMPT}"}
        self.body |= {"max_tokens": 40 + 30 * number, "ignore_eos": True, "temperature": 0, "stream": self.is_streamed}
        self.text = ""
        self.tokens = 0
        self.endings: list[str] = []

    async def read(self, client: httpx.AsyncClient) -> None:
        if not self.is_streamed:
            answer = await client.post("/v1/completions", json=self.body)
            self._whole(answer.status_code, answer.json())
            return
        options = {"include_usage": True, "continuous_usage_stats": True}
        async with client.stream("POST", "/v1/completions", json=self.body | {"stream_options": options}) as answer:
            if not answer.is_success:
                self._whole(answer.status_code, json.loads(await answer.aread()))
                return
            async for line in answer.aiter_lines():
                if line.startswith("data: {"):
                    self._event(json.loads(line.removeprefix("data: ")))

    def _whole(self, status: int, answer: Json) -> None:
        self.endings.append("finished" if status == 200 else f"{status} {answer['error']['code']}")
        if status == 200:
            self.text, self.tokens = answer["choices"][0]["text"], answer["usage"]["completion_tokens"]

    def _event(self, event: Json) -> None:
        if "error" in event:
            self.endings.append(f"event {event['error']['code']}")
        for choice in event.get("choices", ()):
            self.text += choice["text"]
            self.endings += ["finished"] * bool(choice["finish_reason"])
        self.tokens = (event.get("usage") or {}).get("completion_tokens", self.tokens)


async def ask(served: Served, readers: list[Reader], *, kill: bool) -> None:
    """All at once; the engine dies as soon as some of them are running."""
    async with httpx.AsyncClient(base_url=served.url, headers=served.headers, timeout=120) as client:
        tasks = [asyncio.create_task(reader.read(client)) for reader in readers]
        if kill:
            await asyncio.to_thread(served.until, lambda: served.metric("loramux_requests_running") > 0)
            os.kill(served.engine_pid, signal.SIGKILL)
        await asyncio.gather(*tasks)


def billed(served: Served) -> int:
    with served.client() as client:
        rows = client.get("/admin/v1/usage", params={"limit": 1000}).raise_for_status().json()["data"]
    return sum(row["generation_tokens"] for row in rows)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_kills_under_load(served: Served) -> None:
    seen = unseen = 0
    killed = set[int]()
    for _ in range(KILLS):
        readers = [Reader(number) for number in range(9)]
        killed.add(served.engine_pid)
        asyncio.run(ask(served, readers, kill=True))
        for reader in readers:
            assert len(reader.endings) == 1, reader.endings
            assert reader.endings[0] in ("finished", "event engine_error", "503 engine_error", "503 engine_unavailable")
        seen += sum(reader.tokens for reader in readers)
        # Computed and not seen: what answers in one piece had come to, and of a stream a token without its text yet.
        unseen += sum(1 if reader.is_streamed else reader.body["max_tokens"] for reader in readers)
        # Where all had ended before it, the kill may not have been noticed yet; it was when another engine starts.
        served.until(lambda: not killed.issuperset(served.engine_pids))
        served.until(lambda: served.get("/health").status_code == 200)
        again = [Reader(number) for number in range(9)]
        asyncio.run(ask(served, again, kill=False))
        assert [reader.endings for reader in again] == [["finished"]] * 9
        for cut, whole in zip(readers, again, strict=True):
            assert whole.text.startswith(cut.text), "what was said before the end is what is said without one"
        seen += sum(reader.tokens for reader in again)
    assert served.engine_pid not in killed
    assert seen <= billed(served) <= seen + unseen
    served.until(lambda: served.metric("loramux_kv_cache_usage_ratio") == 0)
