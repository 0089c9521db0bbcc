"""A running server and its end: signals, the drain, what streams still get."""

import asyncio
import signal
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import httpx
import pytest
import uvicorn
from fake_engine import REPLY
from fakes import Harness
from polling import until

from server.config import ServeSettings
from server.serve import BindError, Server, bind

GOOD = {"model": "tiny", "prompt": "Hi", "stream": True}


@dataclass
class Running:
    server: Server
    url: str
    serving: "asyncio.Task[None]"
    lines: list[str]


@asynccontextmanager
async def running(harness: Harness, timeout: float) -> AsyncIterator[Running]:
    lines: list[str] = []
    with bind(ServeSettings(port=0)) as listener:
        config = uvicorn.Config(harness.app, log_config=None, log_level="critical", timeout_graceful_shutdown=1)
        server = Server(config, harness.services, timeout, lines.append)
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        while not lines:
            await asyncio.sleep(0.01)
        yield Running(server, f"http://127.0.0.1:{listener.getsockname()[1]}", serving, lines)
        server.handle_exit(signal.SIGTERM, None)
        await asyncio.wait_for(serving, 60)


async def test_the_announcement(harness: Harness) -> None:
    async with running(harness, 1) as server:
        assert server.lines == [f"loramux 0.1.0 serves tiny with 3 adapters on {server.url}/v1"]


async def test_running_streams_finish_and_new_work_is_refused(harness: Harness) -> None:
    harness.engine.gate.clear()
    harness.engine.hold_at = 2
    async with running(harness, 30) as server, httpx.AsyncClient(base_url=server.url, timeout=60) as client:
        asking = asyncio.create_task(client.post("/v1/completions", json=GOOD))
        await until(lambda: harness.engine.num_waiting)
        server.server.handle_exit(signal.SIGTERM, None)
        refused = await client.post("/v1/completions", json=GOOD)
        assert refused.status_code == 503
        assert refused.headers["retry-after"].isdigit()
        assert (await client.get("/ready")).status_code == 503
        harness.engine.gate.set()
        answer = await asking
        assert answer.text.endswith("data: [DONE]\n\n")
        assert '"finish_reason":"stop"' in answer.text
        await asyncio.wait_for(server.serving, 60)


async def test_after_the_timeout_streams_end_with_an_error(harness: Harness) -> None:
    harness.engine.gate.clear()
    harness.engine.hold_at = 2
    async with running(harness, 0.05) as server, httpx.AsyncClient(base_url=server.url, timeout=60) as client:
        asking = asyncio.create_task(client.post("/v1/completions", json=GOOD))
        await until(lambda: harness.engine.num_waiting)
        server.server.handle_exit(signal.SIGTERM, None)
        answer = await asking
        last = answer.text.strip().split("\n\n")[-1]
        assert last.startswith('data: {"error":')
        assert "draining" in last
        await asyncio.wait_for(server.serving, 60)


async def test_the_second_signal_stops_at_once(harness: Harness) -> None:
    harness.engine.gate.clear()
    harness.engine.hold_at = 2
    async with running(harness, 1000) as server, httpx.AsyncClient(base_url=server.url, timeout=60) as client:
        asking = asyncio.create_task(client.post("/v1/completions", json=GOOD))
        await until(lambda: harness.engine.num_waiting)
        server.server.handle_exit(signal.SIGTERM, None)
        server.server.handle_exit(signal.SIGTERM, None)
        await asyncio.wait_for(server.serving, 60)
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
        await until(lambda: harness.engine.ended)


async def test_the_signal_after_a_drain_is_the_first_one(harness: Harness) -> None:
    harness.engine.gate.clear()
    harness.engine.hold_at = 2
    async with running(harness, 30) as server, httpx.AsyncClient(base_url=server.url, timeout=60) as client:
        asking = asyncio.create_task(client.post("/v1/completions", json=GOOD))
        await until(lambda: harness.engine.num_waiting)
        assert (await client.post("/admin/v1/drain")).status_code == 202
        server.server.handle_exit(signal.SIGTERM, None)
        await asyncio.sleep(0.2)
        harness.engine.gate.set()
        assert (await asking).text.endswith("data: [DONE]\n\n")
        await asyncio.wait_for(server.serving, 60)


class Prefetch:
    """Takes the engine's place in a prefetch, which waits until `gate` is set."""

    def __init__(self, harness: Harness, monkeypatch: pytest.MonkeyPatch) -> None:
        self.gate = asyncio.Event()
        self.is_waiting = False
        monkeypatch.setattr(harness.engine, "prefetch_now", self)

    async def __call__(self, *_: str) -> str:
        self.is_waiting = True
        await self.gate.wait()
        return "device"


NEW_WORK = (
    ("/admin/v1/adapters", {"json": {"name": "new", "source": "hf://a/b"}}),
    ("/admin/v1/adapters", {"files": {"config": b"{}", "weights": b""}, "data": {"name": "new"}}),
    ("/admin/v1/merges", {"json": {"name": "new", "adapters": [{"name": "sql"}], "method": "cat"}}),
    ("/admin/v1/adapters/sql/prefetch", {}),
    ("/v1/load_lora_adapter", {"json": {"lora_name": "new", "lora_path": "a/b"}}),
)


async def test_work_on_adapters_finishes_and_new_work_is_refused(
    harness: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    prefetch = Prefetch(harness, monkeypatch)
    async with running(harness, 30) as server, httpx.AsyncClient(base_url=server.url, timeout=60) as client:
        asking = asyncio.create_task(client.post("/admin/v1/adapters/sql/prefetch"))
        await until(lambda: prefetch.is_waiting)
        server.server.handle_exit(signal.SIGTERM, None)
        for path, body in NEW_WORK:
            refused = await client.post(path, **body)
            assert (path, refused.status_code, refused.json()["error"]["code"]) == (path, 503, "draining")
            assert refused.headers["retry-after"].isdigit()
        await asyncio.sleep(0.2)
        prefetch.gate.set()
        assert (await asking).status_code == 200
        await asyncio.wait_for(server.serving, 60)


@pytest.mark.parametrize("signals", [1, 2])
async def test_work_that_is_cut_is_answered(
    harness: Harness, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, signals: int
) -> None:
    prefetch = Prefetch(harness, monkeypatch)
    timeout = 0.05 if signals == 1 else 1000
    async with running(harness, timeout) as server, httpx.AsyncClient(base_url=server.url, timeout=60) as client:
        asking = asyncio.create_task(client.post("/admin/v1/adapters/sql/prefetch"))
        await until(lambda: prefetch.is_waiting)
        for _ in range(signals):
            server.server.handle_exit(signal.SIGTERM, None)
        answer = await asking
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "draining")
        assert answer.headers["x-request-id"]
        await asyncio.wait_for(server.serving, 60)
    assert not [record for record in caplog.records if record.exc_info or record.levelname == "ERROR"]


async def test_an_idle_server_stops_when_asked(harness: Harness) -> None:
    async with running(harness, 1000) as server:
        async with httpx.AsyncClient(base_url=server.url, timeout=60) as client:
            assert REPLY in (await client.post("/v1/completions", json=GOOD | {"stream": False})).text
        server.server.handle_exit(signal.SIGINT, None)
        await asyncio.wait_for(server.serving, 60)


def test_an_address_that_cannot_be_had() -> None:
    with bind(ServeSettings(port=0)) as taken:
        taken.listen()
        with pytest.raises(BindError, match=r"cannot listen on 127\.0\.0\.1 port"):
            bind(ServeSettings(port=taken.getsockname()[1]))
    with pytest.raises(BindError, match="cannot listen on"):
        bind(ServeSettings(host="no.such.host.invalid", insecure=True))


async def test_no_answer_waits_for_an_acknowledgement() -> None:
    """asyncio's own rule for turning Nagle's algorithm off holds for what our listener accepts."""
    options: list[int] = []
    done = asyncio.Event()

    def accepted(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        options.append(writer.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
        writer.close()
        done.set()

    with bind(ServeSettings(port=0)) as listener:
        async with await asyncio.start_server(accepted, sock=listener):
            _, writer = await asyncio.open_connection(*listener.getsockname())
            await asyncio.wait_for(done.wait(), 60)
            writer.close()
            await writer.wait_closed()
    assert options == [1]
