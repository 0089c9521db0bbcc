"""`loramux serve --frontends 2`: two HTTP processes on one port; one of them is killed, then the engine, then all."""

import asyncio
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from fronts import each_front, front_pids
from served import MESSAGES, OPTIONS, Served

KEY = "the-admin-key"
LONG = {"model": "tiny", "messages": MESSAGES, "max_tokens": 400, "ignore_eos": True, "stream": True}
SHORT = LONG | {"max_tokens": 4, "stream": False}


@pytest.fixture
def served(served_model: Path, tmp_path: Path, adapters: dict[str, Path]) -> Iterator[Served]:
    (tmp_path / "adapters").mkdir()
    shutil.copytree(adapters["all4"], tmp_path / "adapters" / "all4")
    options = ("--frontends", "2", "--adapters", str(tmp_path / "adapters"), "--admin-key", KEY)
    served = Served(served_model, tmp_path / "data", *options, "--adapter-root", str(adapters["all4"].parent), key=KEY)
    yield served
    if served.process.poll() is None:
        assert served.stop() == 0
    assert served.process.stdout is not None
    served.process.stdout.close()


async def until(condition: Any, seconds: float = 60.0) -> None:
    async with asyncio.timeout(seconds):
        while not await condition():
            await asyncio.sleep(0.05)


async def state(client: httpx.AsyncClient) -> Any:
    return (await client.get("/admin/v1/state")).json()


async def test_a_front_end_dies_under_load(served: Served) -> None:
    """The other one serves on, the engine frees all that the dead one had asked, and another one takes its place."""
    async with each_front(served, 4) as clients:
        (dead, dying), (_, (living, other, *_)) = clients.items()

        async def read(client: httpx.AsyncClient) -> str:
            async with client.stream("POST", "/v1/chat/completions", json=LONG) as reply:
                return (await reply.aread()).decode()

        before = front_pids(served)
        streams = [asyncio.create_task(read(client)) for client in dying]
        mine = asyncio.create_task(read(other))

        async def all_run() -> bool:
            return bool((await state(living))["running"] >= 1)

        await until(all_run)
        os.kill(dead, signal.SIGKILL)
        for result in await asyncio.gather(*streams, return_exceptions=True):
            assert isinstance(result, httpx.HTTPError) or "[DONE]" in result
        assert "data: [DONE]" in await mine
        assert (await living.post("/v1/chat/completions", json=SHORT)).status_code == 200

        async def all_is_free() -> bool:
            engine = (await state(living))["engines"][0]
            return (engine["running"], engine["waiting"], engine["kv_used_blocks"]) == (0, 0, 0)

        await until(all_is_free)

        async def there_are_two() -> bool:
            return len(front_pids(served)) == 2 and front_pids(served) != before

        await until(there_are_two)
    async with each_front(served) as clients:
        for client, *_ in clients.values():
            assert (await client.post("/v1/chat/completions", json=SHORT)).status_code == 200


@pytest.mark.slow
async def test_a_front_end_that_hangs_is_replaced(served_model: Path, tmp_path: Path) -> None:
    """Before the kernel has given it connections for long; the other one, however it has to wait, serves on."""
    options = ("--frontends", "2", "--admin-key", KEY, "--stall-timeout", "15")
    served = Served(served_model, tmp_path / "data", *options, key=KEY)
    try:
        async with each_front(served) as clients:
            (hanging, _), (other, (client,)) = clients.items()
            os.kill(hanging, signal.SIGSTOP)

            async def is_replaced() -> bool:
                assert (await client.get("/version")).status_code == 200
                pids = front_pids(served)
                return len(pids) == 2 and hanging not in pids

            await until(is_replaced, 120)
            assert other in front_pids(served)
        async with each_front(served) as clients:
            for (client,) in clients.values():
                assert (await client.post("/v1/chat/completions", json=SHORT)).status_code == 200
    finally:
        served.stop()
        assert served.process.stdout is not None
        served.process.stdout.close()


@pytest.mark.slow
async def test_an_engine_dies_and_both_know(served: Served) -> None:
    async with each_front(served) as clients:
        engine = served.engine_pid
        os.kill(engine, signal.SIGKILL)

        async def answers() -> bool:
            replies = [await client.post("/v1/chat/completions", json=SHORT) for client, *_ in clients.values()]
            assert {reply.status_code for reply in replies} <= {200, 503}
            return [reply.status_code for reply in replies] == [200, 200] and served.engine_pids != [engine]

        await until(answers)


@pytest.mark.slow
async def test_a_signal_drains_both(served: Served) -> None:
    """Streams end well, new requests are refused, and then nothing is left: no process, no listener."""
    pids = [*front_pids(served), *served.engine_pids]
    port = int(served.url.rsplit(":", 1)[1])
    async with each_front(served) as clients:

        async def read(client: httpx.AsyncClient) -> str:
            async with client.stream("POST", "/v1/chat/completions", json=LONG) as reply:
                text = b""
                async for part in reply.aiter_bytes():
                    if not text:
                        started.release()
                    text += part
                return text.decode()

        started = asyncio.Semaphore(0)
        streams = [asyncio.create_task(read(client)) for client, *_ in clients.values()]
        for _ in streams:
            await started.acquire()
        served.process.send_signal(signal.SIGTERM)
        for text in await asyncio.gather(*streams):
            assert text.endswith("data: [DONE]\n\n")
    assert await asyncio.to_thread(served.process.wait, 60) == 0
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)
    with socket.create_server(("127.0.0.1", port)):
        pass


@pytest.mark.slow
async def test_front_ends_end_when_their_parent_is_killed(served: Served) -> None:
    pids = [*front_pids(served), *served.engine_pids]
    served.process.kill()
    served.process.wait(60)

    async def gone() -> bool:
        return not any(_is_running(pid) for pid in pids)

    await until(gone)


@pytest.mark.slow
def test_a_port_that_is_taken_is_one_line(served_model: Path, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = str(listener.getsockname()[1])
        options = [*OPTIONS, "--frontends", "2", "--port", port, "--data-dir", str(tmp_path)]
        command = [sys.executable, "-m", "server.cli", "serve", "--model", str(served_model), *options]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1
    assert f"cannot listen on 127.0.0.1 port {port}" in done.stderr


@pytest.mark.slow
def test_what_keeps_front_ends_from_starting_is_one_line(served_model: Path, tmp_path: Path) -> None:
    options = [*OPTIONS, "--frontends", "2", "--data-dir", str(tmp_path), "--database-url", "mysql://elsewhere"]
    command = [sys.executable, "-m", "server.cli", "serve", "--model", str(served_model), *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1
    assert "loramux: database URL has scheme 'mysql'" in done.stderr
    assert "Traceback" not in done.stderr


def _is_running(pid: int) -> bool:
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.slow
async def test_what_one_does_the_other_knows(served: Served, adapters: dict[str, Path]) -> None:
    """Adapters, keys and quotas; a deletion waits for the other one's requests; metrics are those of both."""
    async with each_front(served, 3) as clients:
        (here, *_), (there, other, third, *_) = clients.values()
        added = await here.post("/admin/v1/adapters", json={"name": "fresh", "source": adapters["qv16"].as_uri()})
        assert added.status_code == 201, added.text
        fresh = {"model": "fresh"}

        async def is_usable() -> bool:
            return (await there.post("/v1/chat/completions", json=SHORT | fresh)).status_code == 200

        await until(is_usable)
        quotas = {"id": "acme", "quotas": {"requests_per_second": 0.001}}
        assert (await there.post("/admin/v1/tenants", json=quotas)).status_code == 201
        key = (await there.post("/admin/v1/tenants/acme/keys", json={})).json()["key"]
        mine = {"Authorization": f"Bearer {key}"}
        replies: list[int] = []

        async def is_let_in() -> bool:
            reply = await here.post("/v1/chat/completions", json=SHORT | {"model": "tiny"}, headers=mine)
            replies.append(reply.status_code)
            return reply.status_code != 401

        await until(is_let_in)
        assert replies[-1] == 200
        assert (await there.post("/v1/chat/completions", json=SHORT, headers=mine)).status_code == 429

        line = re.compile(r"^loramux_generation_tokens_total\{.*\} (\S+)$", re.MULTILINE)

        async def totals_agree() -> bool:
            totals = [line.findall((await each.get("/metrics")).text) for each in (here, there)]
            return totals[0] == totals[1] != []

        await until(totals_agree)  # one that is asked by the other and takes long counts with what it told last

        os.kill(served.engine_pid, signal.SIGSTOP)  # so that the request does not end before it is to
        asking = asyncio.create_task(other.post("/v1/chat/completions", json=LONG | fresh))

        async def is_leased() -> bool:
            return (await third.get("/admin/v1/adapters/fresh")).json()["leases"] == 1

        await until(is_leased)
        assert (await here.delete("/admin/v1/adapters/fresh", params={"wait": "false"})).status_code == 409
        assert (await here.delete("/admin/v1/adapters/fresh")).status_code == 202
        os.kill(served.engine_pid, signal.SIGCONT)
        assert (await asking).text.endswith("data: [DONE]\n\n")

        async def is_gone() -> bool:
            return (await here.get("/admin/v1/adapters/fresh")).status_code == 404

        await until(is_gone)

        async def is_unknown() -> bool:
            return (await third.post("/v1/chat/completions", json=SHORT | fresh)).status_code == 404

        await until(is_unknown)
        assert (await here.post("/admin/v1/drain")).status_code == 202

        async def is_draining() -> bool:
            return (await there.get("/ready")).status_code == 503

        await until(is_draining)
