"""The soak sees what is broken; the faults hit what they are meant for."""

import asyncio
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from loadtests.process import ServerProcess
from loadtests.shifted_clock import ShiftedClock
from loadtests.small_disk import FileLimit
from loadtests.soak.adapter_faults import AdapterFaults
from loadtests.soak.checks import check_bill, check_leases, check_rest
from loadtests.soak.client_faults import ClientFaults
from loadtests.soak.engine_faults import children
from loadtests.soak.faults import Injector, Report
from loadtests.soak.leaks import Sample, grown, left, slope
from loadtests.soak.places import Place
from loadtests.soak.run import Plan, Soak
from loadtests.soak.seen import Seen
from loadtests.soak.told import Told
from loadtests.upload import PARTS


def client_of(answer: Callable[[httpx.Request], httpx.Response]) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.MockTransport(answer), base_url="http://test")


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


STREAM = b"HTTP/1.1 200 OK\r\n\r\n"


@pytest.mark.parametrize(
    ("answer", "outcome", "is_broken"),
    [
        (STREAM + b"data: {}\n\ndata: [DONE]\n\n", "finished", False),
        (STREAM + b'data: {"top_logprobs": [{"error": -1.0}]}\n\ndata: [DONE]\n\n', "finished", False),
        (STREAM + b'data: {"error": {}}\n\n', "error event", False),
        (STREAM + b"data: {}\n\n", "error event", True),
        (b'HTTP/1.1 503 Service Unavailable\r\n\r\n{"error": {}}', "refused: 503", False),
        (b'HTTP/1.1 500 Internal Server Error\r\n\r\n{"error": {}}', "refused", True),
        (b"", "refused", True),
    ],
)
async def test_a_stream_that_is_read_late_ends_once(answer: bytes, outcome: str, is_broken: bool) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        await reader.readexactly(int(head.partition(b"Content-Length: ")[2].split()[0]))
        writer.write(answer)
        writer.close()
        await writer.wait_closed()

    seen = Seen()
    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        assert await ClientFaults(url, "key", "base", seen, 0, unread=0.0).read_late() == outcome
    assert bool(seen.broken) == is_broken


async def test_what_a_process_holds_at_rest_is_told() -> None:
    seen = Seen()
    after = await check_rest(os.getpid(), Sample(0.0, 10**12, 10**6, -1000), seen, 0.0)
    assert seen.broken == [f"at rest the front end has {after.threads + 1000} more threads"]


def test_a_process_that_has_ended_holds_nothing() -> None:
    process = subprocess.Popen([sys.executable, "-c", ""], stdout=subprocess.PIPE)
    process.communicate()
    with pytest.raises(OSError, match="No such file"):
        Sample.of(process.pid)
    process = subprocess.Popen([sys.executable, "-c", ""], stdout=subprocess.PIPE)
    assert process.stdout is not None
    with process.stdout as output:
        output.read()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # ended, and still listed
    with pytest.raises(ProcessLookupError, match="has ended"):
        Sample.of(process.pid)
    process.wait()


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
            return httpx.Response(503, headers={"retry-after": "1"}, json={"error": {"code": "some_code"}})
        if request.method == "POST":
            name = request.content.decode().partition('name="name"\r\n\r\n')[2].partition("\r\n")[0]
            there[name] = "d1"
        name = request.url.path.rpartition("/")[2]
        if request.method == "DELETE":
            del there[name]
        found = request.method == "POST" or request.method == "DELETE" or name in there
        return httpx.Response(200 if found else 404, json={"digest": "d1"})

    told, seen = Told(), Seen()
    async with client_of(server) as admin:
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
