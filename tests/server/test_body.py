"""From bytes to a checked request."""

import asyncio
import json
import threading
from typing import Any, Self

import pytest

from server import body as module
from server.body import IN_THREAD, parse, parse_object
from server.config import LimitSettings
from server.errors import BadRequest


class Body:
    """Remembers what it was made of, and in which thread."""

    def __init__(self, data: dict[str, Any]) -> None:
        self.data = data
        self.thread = threading.get_ident()

    @classmethod
    def parse(cls, data: dict[str, Any], limits: LimitSettings) -> Self:  # noqa: ARG003
        return cls(data)


async def test_large_bodies_are_parsed_beside_the_event_loop() -> None:
    small = await parse(Body, b'{"a": 1}', LimitSettings())
    large = await parse(Body, json.dumps({"a": "x" * IN_THREAD}).encode(), LimitSettings())
    assert small.data == {"a": 1}
    assert len(large.data["a"]) == IN_THREAD
    assert small.thread == threading.get_ident() != large.thread


async def test_the_event_loop_goes_on_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    loop, has_run = asyncio.get_running_loop(), threading.Event()

    def waits(_: bytes) -> dict[str, Any]:
        loop.call_soon_threadsafe(has_run.set)
        assert has_run.wait(60)
        return {}

    monkeypatch.setattr(module, "parse_object", waits)
    await parse(Body, b" " * IN_THREAD, LimitSettings())


@pytest.mark.parametrize(
    "inner", [b",".join([b"{}"] * 200_000), b",".join([b'""'] * 300_000), b",".join([b"1"] * 600_000)]
)
async def test_structure_is_bounded_before_it_is_parsed(inner: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "json", None)
    with pytest.raises(BadRequest, match="the body has more than") as refused:
        await parse(Body, b'{"x":[' + inner + b"]}", LimitSettings())
    assert refused.value.code == "body_too_complex"


def test_the_place_of_half_a_pair_is_looked_for_only_if_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BadRequest) as refused:
        parse_object(b'{"a": ["\\ud83d\\ude00", {"b": "\\ud83d"}]}')
    assert refused.value.param == "a.1.b"
    with pytest.raises(BadRequest) as refused:
        parse_object(b'{"a": {"\\ude00": 1}}')
    assert refused.value.param == "a"
    monkeypatch.setattr(module, "_surrogate_path", None)
    assert parse_object(b'{"a": ["\\ud83d\\ude00", "\\\\ud83d"]}') == {"a": ["\N{GRINNING FACE}", "\\ud83d"]}
