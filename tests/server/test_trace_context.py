"""Trace context as W3C has it, request ids, and both in the log."""

import logging
import re

import httpx
import pytest
from fakes import Harness
from hypothesis import given
from hypothesis import strategies as st

from server.logs import formatter
from server.trace_context import TraceContext, parse_traceparent

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
GOOD = f"00-{TRACE}-{PARENT}-01"
BAD = [
    "",
    GOOD[:-1],
    GOOD + "0",
    GOOD + "-00",
    GOOD.upper(),
    "ff" + GOOD[2:],
    f"00-{'0' * 32}-{PARENT}-01",
    f"00-{TRACE}-{'0' * 16}-01",
    f"00-{TRACE[:-1]}g-{PARENT}-01",
    GOOD.replace("-", "_"),
    "cc" + GOOD[2:] + "what",
]


def test_valid_ones() -> None:
    expected = TraceContext(TRACE, PARENT, "01")
    assert parse_traceparent([GOOD.encode()]) == expected
    assert parse_traceparent([f" {GOOD}\t".encode()]) == expected
    assert parse_traceparent([b"cc" + GOOD[2:].encode()]) == expected
    assert parse_traceparent([b"cc" + GOOD[2:].encode() + b"-what-is-new"]) == expected


@pytest.mark.parametrize("value", BAD)
def test_invalid_ones(value: str) -> None:
    assert parse_traceparent([value.encode()]) is None


def test_states_come_along() -> None:
    found = parse_traceparent([GOOD.encode()], [b"vendor=1", b"other=2"])
    assert found is not None
    assert found.state == "vendor=1,other=2"


def test_two_are_none() -> None:
    assert parse_traceparent([]) is None
    assert parse_traceparent([GOOD.encode()] * 2) is None


@given(st.binary(max_size=80))
def test_anything_is_read(value: bytes) -> None:
    found = parse_traceparent([value])
    assert found is None or re.fullmatch("[0-9a-f]{32}", found.trace_id)


@pytest.mark.parametrize(
    "body", [{"model": "tiny", "prompt": "Hi"}, {"model": "tiny", "prompt": "Hi", "stream": True}, {}]
)
async def test_answers_name_the_trace(client: httpx.AsyncClient, body: dict[str, object]) -> None:
    headers = {"traceparent": GOOD, "tracestate": "vendor=1", "x-request-id": "mine"}
    answer = await client.post("/v1/completions", json=body, headers=headers)
    assert answer.headers["x-request-id"] == "mine"
    found = parse_traceparent([answer.headers["traceresponse"].encode()])
    assert found is not None
    assert (found.trace_id, found.flags) == (TRACE, "01")
    assert found.parent_id != PARENT


@pytest.mark.parametrize("value", BAD)
async def test_invalid_traces_are_ignored(client: httpx.AsyncClient, value: str) -> None:
    answer = await client.get("/v1/models", headers={"traceparent": value})
    assert answer.status_code == 200
    assert "traceresponse" not in answer.headers


async def test_lines_of_the_log_name_the_request(
    harness: Harness, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise TypeError("bug")

    caplog.handler.setFormatter(formatter("text", "front"))
    with monkeypatch.context() as patch:
        patch.setattr(harness.services.store.names, "models", fail)
        async with harness.client() as client:
            headers = {"traceparent": GOOD, "x-request-id": "mine"}
            assert (await client.get("/v1/models", headers=headers)).status_code == 500
            await client.get("/v1/models", headers={"x-request-id": "other"})
    first, second = (line for line in caplog.text.splitlines() if "a request failed" in line)
    assert f"[mine trace {TRACE}] a request failed" in first
    assert "[other] a request failed" in second
    caplog.handler.handle(logging.makeLogRecord({"msg": "outside", "levelname": "INFO", "name": "x"}))
    assert caplog.text.splitlines()[-1].endswith("INFO x: outside")
