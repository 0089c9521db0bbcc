"""The soak sees what is broken; the faults hit what they are meant for."""

import asyncio
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from loadtests.process import ServerProcess
from loadtests.shifted_clock import ShiftedClock
from loadtests.small_disk import FileLimit
from loadtests.soak.adapter_faults import AdapterFaults
from loadtests.soak.answers import PROMPTS, Answers
from loadtests.soak.checks import check_bill, check_leases, check_rest
from loadtests.soak.engine_faults import children
from loadtests.soak.faults import Injector, Report
from loadtests.soak.key_faults import Keys
from loadtests.soak.leaks import Sample, grown, left, slope
from loadtests.soak.places import Place
from loadtests.soak.run import Plan, Soak
from loadtests.soak.seen import Seen
from loadtests.soak.told import Told
from loadtests.soak.traffic import Client, Expected, Manners, Stranger, World
from loadtests.upload import PARTS

TOKEN = {"choices": [{"text": "a", "finish_reason": None}], "usage": {"completion_tokens": 1, "prompt_tokens": 3}}
END = {"choices": [{"text": "", "finish_reason": "length"}], "usage": {"completion_tokens": 2, "prompt_tokens": 3}}
ERROR = {"error": {"type": "server_error", "code": "engine_error", "message": "died"}}
LATE = {"retry-after": "1"}


def stream(*chunks: dict[str, Any], done: bool = True, adapter: str | None = None) -> httpx.Response:
    text = "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks)
    route = {"adapters": [] if adapter is None else [{"digest": adapter}]}
    headers = {"x-loramux-route": json.dumps(route)}
    return httpx.Response(200, headers=headers, text=text + ("data: [DONE]\n\n" if done else ""))


def refusal(status: int, code: str = "some_code", **headers: str) -> httpx.Response:
    return httpx.Response(status, headers=headers, json={"error": {"type": "server_error", "code": code}})


def world(told: Told, seen: Seen) -> World:
    answers = Answers({(key, prompt): "a" for key in ("base", "d1") for prompt in PROMPTS})
    return World("base", ("f1", "f2", "f3"), told, answers, seen)


def client_of(answer: Callable[[httpx.Request], httpx.Response]) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.MockTransport(answer), base_url="http://test")


async def seen_of(response: httpx.Response, manners: Manners, expected: Expected | None, told: Told) -> Seen:
    """What a client makes of one answer."""
    seen = Seen()
    async with client_of(lambda _: response) as http:
        await Client(http, Keys(http, "tenant", seen), manners, world(told, seen), 0)._stream({}, expected)
    return seen


@pytest.mark.parametrize(
    ("response", "ending", "tokens", "is_broken"),
    [
        (stream(TOKEN, END), "finished", 2, False),
        (stream(TOKEN, ERROR), "error event", 1, False),
        (stream(ERROR), "error event", 0, False),
        (stream(TOKEN, {"error": {"type": "invalid_request_error"}}), "error event", 1, True),
        (stream(TOKEN, END, done=False), "finished", 2, True),
        (stream(TOKEN, END, END), "finished", 2, True),
        (stream(END, ERROR), "finished", 2, True),
        (stream(TOKEN), "error event", 1, True),
        (stream(TOKEN | {"choices": [{"text": "a\x85\u2028b", "finish_reason": "stop"}]}), "finished", 1, False),
        (refusal(503, **LATE), "503 some_code", 0, False),
        (refusal(503), "503 some_code", 0, True),
        (refusal(500, **LATE), "500 some_code", 0, True),
        (refusal(429, **LATE), "429 some_code", 0, True),
        (refusal(401, "invalid_api_key"), "401 invalid_api_key", 0, True),
        (refusal(404, "model_not_found"), "404 model_not_found", 0, True),
    ],
)
async def test_what_is_broken(response: httpx.Response, ending: str, tokens: int, is_broken: bool) -> None:
    seen = await seen_of(response, Manners(billed=True), None, Told())
    assert (dict(seen.endings), seen.tokens, bool(seen.broken)) == ({ending: 1}, tokens, is_broken)
    assert seen.prompt_tokens == (3 if tokens else 0)


async def test_an_event_that_cannot_be_read_is_told_and_the_rest_is_read() -> None:
    response = httpx.Response(200, text=f'data: {{"cho\n\ndata: {json.dumps(END)}\n\ndata: [DONE]\n\n')
    seen = await seen_of(response, Manners(billed=True), None, Told())
    assert (seen.endings, seen.tokens) == ({"JSONDecodeError": 1, "finished": 1}, 2)
    (sentence,) = seen.broken
    assert sentence.startswith("an event of a stream, '{\"cho', failed: JSONDecodeError(")


async def test_a_client_outlives_what_nobody_expects() -> None:
    """And tells each in a sentence, with its place."""
    seen, stop, asked = Seen(), asyncio.Event(), 0

    async def broken() -> AsyncIterator[bytes]:
        yield f"data: {json.dumps(TOKEN)}\n\n".encode()
        raise httpx.ReadError("reset")

    answers = [httpx.Response(502, text="<html>"), httpx.Response(200, content=broken()), stream(TOKEN, END)]

    def server(_: httpx.Request) -> httpx.Response:
        nonlocal asked
        asked += 1
        if asked == 1:
            raise httpx.ConnectError("refused")
        if asked == 1 + len(answers):
            stop.set()
        return answers[asked - 2]

    async with client_of(server) as http:
        await Client(http, Keys(http, "t", seen), Manners(billed=True), world(Told(), seen), 0, 0.0).run(stop)
    assert (asked, seen.requests, seen.tokens) == (4, 4, 3)
    assert seen.endings == {"ConnectError": 1, "ValueError": 1, "ReadError": 1, "finished": 1}
    assert len(seen.broken) == 3
    assert seen.broken[1].startswith(
        "a request failed: ValueError(\"502 without an error's body: '<html>'\") at refusal"
    )


async def test_a_stranger_outlives_a_connection_that_breaks() -> None:
    seen, stop = Seen(), asyncio.Event()

    def server(_: httpx.Request) -> httpx.Response:
        stop.set()
        raise httpx.ReadTimeout("")

    async with client_of(server) as http:
        await Stranger(http, Told(), seen).run(stop)
    assert len(seen.broken) == 1


async def test_a_server_that_does_not_start_is_reported_as_well(tmp_path: Path) -> None:
    @dataclass(frozen=True)
    class Nowhere(Place):
        def server(self, model: Path, *options: str) -> ServerProcess:
            return ServerProcess(model, self.data, *options, runs=(sys.executable, "-c", "raise SystemExit('no room')"))

    place = Nowhere("nowhere", tmp_path, (), (), FileLimit(), ShiftedClock(tmp_path / "clock"), None, None)
    said: list[str] = []
    document = await Soak(place, tmp_path / "model", {}, Plan(0.01, 1, 1.0, 0), said.append).run()
    assert json.loads(json.dumps(document))["requests"] == 0
    (sentence,) = document["broken"]
    assert sentence.startswith("the first server failed: RuntimeError('the server did not start: no room')")


async def test_a_bill_is_all_pages_of_the_ledger_once_it_is_written() -> None:
    pages = {
        None: ([{"generation_tokens": 2, "prompt_tokens": 3}], "2"),
        "2": ([{"generation_tokens": 5, "prompt_tokens": 1}], None),
    }
    asked = 0

    def server(request: httpx.Request) -> httpx.Response:
        nonlocal asked
        asked += 1
        data, cursor = pages[request.url.params.get("cursor")] if asked > 1 else ([], None)
        return httpx.Response(200, json={"data": data, "next": cursor})

    async with client_of(server) as admin:
        seen = Seen(prompt_tokens=4, tokens=7)
        await check_bill(admin, "t", seen, 60.0)
        assert not seen.broken
        await check_bill(admin, "t", Seen(prompt_tokens=4, tokens=7), 0.0)
        seen = Seen(prompt_tokens=4, tokens=8)
        await check_bill(admin, "t", seen, 0.0)
        assert len(seen.broken) == 1


@pytest.mark.parametrize(
    ("name", "answer", "is_broken"),
    [
        ("soak-1", httpx.Response(200, json={"leases": 0}), False),
        ("soak-1", httpx.Response(200, json={"leases": 1}), True),
        ("soak-1", httpx.Response(404), True),
        ("private-1", httpx.Response(404), False),
        ("private-1", httpx.Response(503), True),
    ],
)
async def test_leases_are_looked_at_by_whoever_sees_the_name(
    name: str, answer: httpx.Response, is_broken: bool
) -> None:
    told, seen = Told({name: frozenset(("d1",))}), Seen()
    async with client_of(lambda _: answer) as admin:
        await check_leases(admin, ("tenant",), told, seen)
    assert bool(seen.broken) == is_broken


async def test_quotas_refuse_those_who_have_them() -> None:
    assert not (await seen_of(refusal(429, **LATE), Manners(limited=True), None, Told())).broken


@pytest.mark.parametrize(
    ("adapter", "text", "is_broken"),
    [("d1", "a", False), ("d1", "b", True), ("d2", "a", True)],
    ids=["right", "another text", "another adapter"],
)
async def test_an_answer_is_that_of_the_adapter_that_was_meant(adapter: str, text: str, is_broken: bool) -> None:
    told = Told({"name": frozenset(("d1",))})
    chunk = TOKEN | {"choices": [{"text": text, "finish_reason": "length"}]}
    expected = Expected(PROMPTS[0], "name", 0)
    seen = await seen_of(stream(chunk, adapter=adapter), Manners(), expected, told)
    assert (seen.compared, bool(seen.broken)) == (1, is_broken)


async def test_a_name_that_is_being_changed_may_be_unknown() -> None:
    told = Told({"name": frozenset(("d1",))})
    expected = Expected(PROMPTS[0], "name", 0)
    told.tries("name", None)
    assert not (await seen_of(refusal(404, "model_not_found"), Manners(), expected, told)).broken


def test_what_was_told_is_certain_and_what_failed_is_not() -> None:
    told = Told()
    told.tries("name", "d1")
    assert told.uncertain() == ["name"]
    assert told.says("name", "d1")
    assert told.certain() == {"name": "d1"}
    told.tries("name", None)
    assert not told.certain()
    assert not told.says("name", "d3")


async def test_every_fault_comes_once_and_none_is_cut_off() -> None:
    came: list[str] = []
    stop, report, seen = asyncio.Event(), Report(), Seen()

    def fault(name: str) -> Any:
        async def happen() -> str:
            came.append(name)
            if len(came) == 6:
                stop.set()
            await asyncio.sleep(0)
            if name == "b":
                raise OSError("no such process")
            return "done"

        return happen

    kinds = {name: (weight, fault(name)) for name, weight in (("a", 1.0), ("b", 5.0), ("c", 0.0))}
    await asyncio.wait_for(Injector(kinds, report, seen, seed=0).run(0.001, stop), 60)
    assert set(came[:3]) == {"a", "b", "c"}
    assert report.number == len(came) == 6
    assert {name: set(found) for name, found in report.outcomes.items()} == {
        name: {"failed" if name == "b" else "done"} for name in set(came)
    }
    assert len(seen.broken) == came.count("b")
    assert re.fullmatch(r"b failed: OSError\('no such process'\) at test_soak.py:\d+", seen.broken[0])


def test_a_slope_is_that_of_most_points() -> None:
    times = [float(number) for number in range(20)]
    values = [2.0 * time for time in times]
    values[3] = values[11] = 1e9
    assert slope(times, values) == pytest.approx(2.0)
    assert slope([1.0], [5.0]) == 0.0


@pytest.mark.parametrize(("each", "named"), [(0, []), (1, ["descriptors"])])
def test_growth_is_seen(each: int, named: list[str]) -> None:
    samples = [Sample(2.0 * number, 10**9, 30 + each * number, 12) for number in range(90)]
    found = grown(samples)
    assert [name for name in ("memory", "descriptors", "threads") if any(name in one for one in found)] == named


def test_a_short_time_says_nothing_about_growth() -> None:
    assert grown([Sample(2.0 * number, 10**9, 30 + 9 * number, 12) for number in range(30)]) == []
    assert grown([]) == []


def test_what_is_left_at_rest_is_seen() -> None:
    before = Sample(0.0, 10**9, 30, 12)
    assert left(before, Sample(60.0, 10**9 + 2**26, 54, 28)) == []
    found = left(before, Sample(60.0, 10**9 + 2**26 + 1, 55, 29))
    assert found[1:] == ["at rest the front end has 25 more descriptors", "at rest the front end has 17 more threads"]


async def test_what_a_process_holds_at_rest_is_told() -> None:
    seen = Seen()
    after = await check_rest(os.getpid(), Sample(0.0, 10**12, 10**6, -1000), seen, 0.0)
    assert seen.broken == [f"at rest the front end has {after.threads + 1000} more threads"]


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
    there: dict[str, str] = {}
    fails = False

    def server(request: httpx.Request) -> httpx.Response:
        if fails:
            return refusal(503, **LATE)
        if request.method == "POST":
            name = request.content.decode().partition('name="name"\r\n\r\n')[2].partition("\r\n")[0]
            there[name] = "d1"
        name = request.url.path.rpartition("/")[2]
        if request.method == "DELETE":
            del there[name]
        found = request.method == "POST" or request.method == "DELETE" or name in there
        return httpx.Response(200 if found else 404, json={"digest": "d1"})

    told, seen = Told(), Seen()
    async with httpx.AsyncClient(transport=httpx.MockTransport(server), base_url="http://test") as admin:
        faults = AdapterFaults(admin, admin, {"d1": tmp_path}, told, seen, seed=0)
        for fault in (faults.register, faults.register, faults.replace, faults.delete, faults.register):
            assert await fault() == "done"
        assert told.certain() == there
        fails = True
        assert await faults.delete() == "refused: some_code"
        assert len(told.uncertain()) == 1
        fails = False
        await faults.verify()
        assert told.certain() == there
        there.popitem()
        await faults.verify()
        assert len(seen.broken) == 1  # what was told is lost
        there.update(told.certain())
        await faults.clean()
    assert not there
