"""Every malformed request gets the right error, and disturbs nobody."""

import json
import re

import httpx
import pytest
from fake_engine import REPLY
from fakes import Harness
from malformed import CASES as TABLE
from malformed import Case
from malformed_more import MORE_CASES
from malformed_tools import TOOLS

CASES = [*TABLE, *TOOLS, *MORE_CASES]
PRIVATE = re.compile(r"Traceback|File \"|/tmp|/home|/root|0x[0-9a-f]{6}|site-packages|\.py\b|127\.0\.0\.1")
OF_PYTHON = re.compile(r"instance of|dictionary|after validation")
"""Clients know JSON's types."""
WHOLE = frozenset({"message", "type", "param", "code"})


def body_of(case: Case) -> bytes:
    if isinstance(case.body, bytes):
        return case.body
    return json.dumps({key: value for key, value in case.body.items() if value is not ...}).encode()


async def send(client: httpx.AsyncClient, case: Case) -> httpx.Response:
    return await client.post(case.url, content=body_of(case), headers={"content-type": case.content_type})


def check_error(response: httpx.Response, case: Case) -> None:
    assert response.status_code == case.status, response.text
    assert response.headers["x-request-id"]
    (error,) = response.json().values()
    assert error.keys() == WHOLE
    assert (error["param"], error["code"]) == (case.param, case.code), error
    assert len(error["message"]) < 500
    assert not PRIVATE.search(error["message"]), error["message"]
    assert not OF_PYTHON.search(error["message"]), error["message"]
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize("case", CASES, ids=str)
async def test_malformed(client: httpx.AsyncClient, harness: Harness, case: Case) -> None:
    response = await send(client, case)
    check_error(response, case)
    assert not harness.engine.requests


async def test_after_all_of_them_a_good_request_works(client: httpx.AsyncClient, harness: Harness) -> None:
    assert len(CASES) >= 300
    for case in CASES:
        await send(client, case)
    assert not harness.engine.requests
    response = await client.post("/v1/completions", json={"model": "sql", "prompt": "Hi"})
    assert response.json()["choices"][0]["text"] == REPLY


async def test_streaming_changes_nothing_about_errors(client: httpx.AsyncClient) -> None:
    cases = [case for case in CASES if isinstance(case.body, dict) and case.url.startswith("/v1/c")]
    cases = [case for case in cases if "stream" not in str(case.param)]
    assert len(cases) > 40
    for case in cases:
        check_error(await send(client, Case(**{**vars(case), "body": {**case.body, "stream": True}})), case)
