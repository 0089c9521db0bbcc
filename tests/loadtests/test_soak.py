"""The soak test sees what is broken; the faults hit the processes that they are meant for."""

import asyncio
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from loadtests.faults import Faults, children
from loadtests.soak import PATIENT, Client, Seen
from loadtests.upload import PARTS

TOKEN = {"choices": [{"text": "a", "finish_reason": None}], "usage": {"completion_tokens": 1}}
END = {"choices": [{"text": "", "finish_reason": "length"}], "usage": {"completion_tokens": 2}}
ERROR = {"error": {"code": "engine_error", "message": "died"}}


def stream(*chunks: dict[str, Any], done: bool = True) -> httpx.Response:
    text = "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks)
    return httpx.Response(200, text=text + ("data: [DONE]\n\n" if done else ""))


async def seen_of(response: httpx.Response) -> Seen:
    """What a patient client makes of one answer."""
    seen, stop = Seen(), asyncio.Event()

    def answer(_: httpx.Request) -> httpx.Response:
        stop.set()
        return response

    async with httpx.AsyncClient(transport=httpx.MockTransport(answer), base_url="http://test") as http:
        await Client(http, "base", PATIENT, seen, 0).run(stop)
    return seen


@pytest.mark.parametrize(
    ("response", "ending", "tokens", "is_broken"),
    [
        (stream(TOKEN, END), "finished", 2, False),
        (stream(TOKEN, ERROR), "error event", 1, False),
        (stream(TOKEN, END, done=False), "finished", 2, True),
        (stream(TOKEN, END, END), "finished", 2, True),
        (stream(END, ERROR), "finished", 2, True),
        (stream(TOKEN), "error event", 1, True),
        (httpx.Response(503, headers={"retry-after": "1"}), "http 503", 0, False),
        (httpx.Response(503), "http 503", 0, True),
        (httpx.Response(500, headers={"retry-after": "1"}), "http 500", 0, True),
    ],
)
async def test_what_is_broken(response: httpx.Response, ending: str, tokens: int, is_broken: bool) -> None:
    seen = await seen_of(response)
    assert (dict(seen.endings), seen.tokens, bool(seen.broken)) == ({ending: 1}, tokens, is_broken)


def test_children_are_found_by_their_command_line() -> None:
    program = "import subprocess, sys; p = subprocess.Popen([sys.executable, '-c', 'input() # the-engine'], stdin=-1);"
    program += "print(p.pid, flush=True); input(); p.communicate()"
    command = [sys.executable, "-c", program]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        while children(parent.pid, "the-engine") != [pid]:  # a moment after it began it has no command line yet
            time.sleep(0.01)
        assert children(parent.pid, "another") == []
        parent.communicate("\n")


async def test_adapters_come_and_are_gone_in_the_end(tmp_path: Path) -> None:
    for file in PARTS.values():
        (tmp_path / file).write_text("{}")
    there = 0

    def server(request: httpx.Request) -> httpx.Response:
        nonlocal there
        there += {"POST": 'name="replace"\r\n\r\nfalse' in request.content.decode(), "DELETE": -1}[request.method]
        return httpx.Response(200)

    async with httpx.AsyncClient(transport=httpx.MockTransport(server), base_url="http://test") as admin:
        faults = Faults(0, admin, [tmp_path], seed=0)
        for fault in (faults._register, faults._register, faults._replace, faults._delete, faults._register):
            await fault()
        assert there == 2
        await faults.clean()
    assert there == 0
    assert not faults.refused
