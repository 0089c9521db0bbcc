"""Adapters that come and go under load: one story, told to a real server process from the first upload to a crash."""

import asyncio
import io
import json
import os
import signal
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest
from served import Served, reference_text

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

KEY = "the-admin-key"
TOKENS = 24
LONG = 160
QUESTION = [{"role": "user", "content": "Hello world, how is the quick brown fox? " * 6}]
"""Several blocks of prompt, so that the prefix cache has something to confuse."""

Json = dict[str, Any]


@pytest.fixture(scope="module")
def folders(make_adapter: Any) -> dict[str, Path]:
    """Two versions of one adapter, and eight more than the pool of pages holds at once."""
    versions = {"v1": make_adapter("story-v1", seed=21), "v2": make_adapter("story-v2", seed=22)}
    return versions | {f"more{index}": make_adapter(f"story-more{index}", seed=30 + index) for index in range(8)}


class Story:
    """The server, and what a client does with it."""

    def __init__(self, model: Path, data: Path) -> None:
        self._model, self._data = model, data
        self.served = self._start()

    def _start(self) -> Served:
        # Pages for six of the adapters.
        return Served(self._model, self._data, "--admin-key", KEY, "--page-memory", "1125KiB", key=KEY)

    def restart(self, how: int) -> None:
        self.served.stop(how)
        self.served = self._start()

    def call(self, method: str, path: str, expected: int = 200, **options: Any) -> Json:
        with self.served.client() as client:
            answer = client.request(method, path, **options)
        assert answer.status_code == expected, answer.text
        found: Json = answer.json()
        return found

    def upload(self, name: str, folder: Path, expected: int = 201, **fields: str) -> Json:
        files = {
            "config": (folder / "adapter_config.json").read_bytes(),
            "weights": (folder / "adapter_model.safetensors").read_bytes(),
        }
        return self.call("POST", "/admin/v1/adapters", expected, data={"name": name, **fields}, files=files)

    def upload_archive(self, name: str, folder: Path) -> Json:
        packed = io.BytesIO()
        with tarfile.open(fileobj=packed, mode="w:gz") as archive:
            for file in ("adapter_config.json", "adapter_model.safetensors"):
                archive.add(folder / file, arcname=f"adapter/{file}")
        return self.call("POST", "/admin/v1/adapters", 201, data={"name": name}, files={"archive": packed.getvalue()})

    def show(self, name: str, expected: int = 200) -> Json:
        return self.call("GET", f"/admin/v1/adapters/{name}", expected)

    def names(self) -> list[str]:
        return [adapter["id"] for adapter in self.call("GET", "/v1/models")["data"]]

    def ask(self, name: str, expected: int = 200) -> Json:
        return self.call("POST", "/v1/chat/completions", expected, json=_body(name, TOKENS))

    def text(self, name: str) -> str:
        content: str = self.ask(name)["choices"][0]["message"]["content"]
        return content


def _body(name: str, tokens: int) -> Json:
    return {"model": name, "messages": QUESTION, "max_tokens": tokens, "temperature": 0, "ignore_eos": True}


async def _stream(client: httpx.AsyncClient, name: str, tokens: int, started: asyncio.Event | None = None) -> str:
    """The text of one stream; `started` is set with its first piece."""
    text = ""
    async with client.stream("POST", "/v1/chat/completions", json=_body(name, tokens) | {"stream": True}) as answer:
        assert answer.status_code == 200, await answer.aread()
        async for line in answer.aiter_lines():
            if line.startswith("data: {"):
                chunk = json.loads(line.removeprefix("data: "))
                assert "error" not in chunk, chunk
                text += "".join(choice["delta"].get("content") or "" for choice in chunk["choices"])
                if started is not None:
                    started.set()
    return text


def _asking(story: Story) -> httpx.AsyncClient:
    return httpx.AsyncClient(base_url=story.served.url, headers=story.served.headers, timeout=300)


async def _while_streaming(story: Story, names: Sequence[str], act: Any) -> tuple[list[set[str]], Any]:
    """For each name the texts of streams, one after the other, while `act` runs in a thread, and what that returned."""
    started, is_over = [asyncio.Event() for _ in names], asyncio.Event()

    async def again(client: httpx.AsyncClient, name: str, event: asyncio.Event) -> set[str]:
        texts = {await _stream(client, name, LONG, event)}
        while not is_over.is_set():
            texts.add(await _stream(client, name, LONG))
        return texts

    async with _asking(story) as client:
        streams = [asyncio.create_task(again(client, name, event)) for name, event in zip(names, started, strict=True)]
        await asyncio.gather(*(event.wait() for event in started))
        acted = await asyncio.to_thread(act)
        is_over.set()
        return await asyncio.gather(*streams), acted


async def _while_stopped(story: Story, name: str, act: Any) -> list[str]:
    """The texts of two streams whose engine stands still while `act` runs in a thread."""
    os.kill(story.served.engine_pid, signal.SIGSTOP)
    async with _asking(story) as client:
        streams = [asyncio.create_task(_stream(client, name, LONG)) for _ in range(2)]
        await asyncio.to_thread(story.served.until, lambda: story.show(name)["leases"] == len(streams))
        await asyncio.to_thread(act)
        os.kill(story.served.engine_pid, signal.SIGCONT)
        return await asyncio.gather(*streams)


@pytest.fixture(scope="module")
def story(served_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Story]:
    story = Story(served_model, tmp_path_factory.mktemp("data"))
    yield story
    if story.served.process.poll() is None:
        story.served.process.kill()
        story.served.stop(signal.SIGKILL)


@pytest.fixture(scope="module")
def truth(served_model: Path, folders: dict[str, Path]) -> dict[str, str]:
    """What transformers + peft answer; `long:<name>` is the longer answer of the streams."""
    answers = {name: reference_text(served_model, folders, {name: 1.0}, TOKENS, QUESTION) for name in folders}
    base = reference_text(served_model, folders, {}, LONG, QUESTION)
    return answers | {"long:tiny": base, "long:v1": reference_text(served_model, folders, {"v1": 1.0}, LONG, QUESTION)}


def test_the_story(story: Story, folders: dict[str, Path], truth: dict[str, str]) -> None:
    """Every step builds on the one before."""
    assert len(set(truth.values())) == len(truth)
    _registered_while_streams_run(story, folders, truth)
    first = story.show("news")["digest"]
    second = _replaced(story, folders, truth, first)
    _rolled_back(story, truth, first, second)
    _pinned_in_a_pool_that_overflows(story, folders, truth)
    _deleted_while_in_use(story, truth)
    before = {name: story.show(name) for name in story.names() if name != "tiny"}
    for how in (signal.SIGTERM, signal.SIGKILL):
        story.restart(how)
        _still_there(story, truth, before)


def _registered_while_streams_run(story: Story, folders: dict[str, Path], truth: dict[str, str]) -> None:
    story.upload("old", folders["v1"])

    def register() -> str:
        registered = story.upload("news", folders["v1"], tags=json.dumps(["story"]), samples=json.dumps(["how is it?"]))
        assert (registered["name"], registered["rank"], registered["modules"]) == ("news", 4, 21)
        assert registered["digest"] == story.show("old")["digest"]
        return story.text("news")

    names = ["tiny", "old"] * 8
    texts, text = asyncio.run(_while_streaming(story, names, register))
    assert text == truth["v1"]
    expected = {"tiny": truth["long:tiny"], "old": truth["long:v1"]}
    assert texts == [{expected[name]} for name in names]


def _replaced(story: Story, folders: dict[str, Path], truth: dict[str, str], first: str) -> str:
    assert story.ask("news")["usage"]["prompt_tokens_details"]["cached_tokens"] > 0
    refused = story.upload("news", folders["v2"], 409)
    assert refused["error"]["code"] == "adapter_exists"
    assert story.text("news") == truth["v1"]
    story.upload("news", folders["v2"], replace="true")
    answer = story.ask("news")
    assert answer["choices"][0]["message"]["content"] == truth["v2"]
    assert not answer["usage"]["prompt_tokens_details"]["cached_tokens"]
    second: str = story.show("news")["digest"]
    assert answer["lora"]["adapters"][0]["digest"] == second != first
    assert story.text(f"news@{first[:12]}") == story.text("old") == truth["v1"]
    assert [revision["digest"] for revision in story.show("news")["revisions"]] == [first, second]
    return second


def _rolled_back(story: Story, truth: dict[str, str], first: str, second: str) -> None:
    moved = story.call("PATCH", "/admin/v1/adapters/news", json={"digest": first})
    assert moved["digest"] == first
    assert story.text("news") == truth["v1"]
    assert story.text(f"news@{second[:12]}") == truth["v2"]


def _pinned_in_a_pool_that_overflows(story: Story, folders: dict[str, Path], truth: dict[str, str]) -> None:
    assert story.call("PATCH", "/admin/v1/adapters/news", json={"pinned": True})["pinned"]
    more = sorted(name for name in folders if name.startswith("more"))
    for name in more:
        story.upload_archive(name, folders[name])
    assert story.names() == ["tiny", *more, "news", "old"]

    async def ask_all() -> list[str]:
        async with _asking(story) as client:
            return await asyncio.gather(*(_stream(client, name, TOKENS) for name in more * 2))

    assert asyncio.run(ask_all()) == [truth[name] for name in more * 2]
    story.served.until(lambda: story.served.metric("loramux_adapter_evictions_total") > 0)
    story.served.until(lambda: story.show("news")["residency"] == "device")
    story.served.until(lambda: [story.show(name)["residency"] for name in more].count("device") <= 5)
    assert story.text("news") == truth["v1"]


def _deleted_while_in_use(story: Story, truth: dict[str, str]) -> None:
    def delete() -> None:
        story.call("DELETE", "/admin/v1/adapters/old", 409, params={"wait": "false"})
        story.call("DELETE", "/admin/v1/adapters/old", 202)
        unknown = story.call("POST", "/v1/chat/completions", 404, json=_body("old", TOKENS))
        assert unknown["error"]["code"] == "model_not_found"
        assert "old" not in story.names()

    assert asyncio.run(_while_stopped(story, "old", delete)) == [truth["long:v1"]] * 2

    def is_gone() -> bool:
        with story.served.client() as client:
            return client.get("/admin/v1/adapters/old").status_code == 404

    story.served.until(is_gone)
    assert story.text("news") == truth["v1"]  # it shares its weights with what was deleted
    story.call("DELETE", "/admin/v1/adapters/more7")
    assert "more7" not in story.names()


def _still_there(story: Story, truth: dict[str, str], before: dict[str, Json]) -> None:
    after = {name: story.show(name) for name in story.names() if name != "tiny"}
    lasting = ("digest", "tenant", "public", "rank", "alpha", "targets", "modules", "bytes", "tags", "pinned")
    for name in before:
        for field in (*lasting, "created", "revisions"):
            assert after[name][field] == before[name][field], (name, field)
    assert after.keys() == before.keys()
    story.served.until(lambda: story.show("news")["residency"] == "device")
    assert story.text("news") == truth["v1"]
    assert story.text("more3") == truth["more3"]
