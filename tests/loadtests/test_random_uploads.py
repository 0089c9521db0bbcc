"""Adapters that a load test registers: each with weights of its own, several at a time."""

from pathlib import Path

import httpx
import pytest

from loadtests.random_adapter import LinearSizes
from loadtests.upload import AT_ONCE, upload_random

SIZES = LinearSizes(1, {"q_proj": (4, 4)})


def test_every_name_gets_weights_of_its_own_and_no_folder_stays(tmp_path: Path) -> None:
    bodies: list[bytes] = []

    def server(request: httpx.Request) -> httpx.Response:
        bodies.append(request.read())
        return httpx.Response(201)

    names = [f"name-{number:02}" for number in range(2 * AT_ONCE)]
    with httpx.Client(transport=httpx.MockTransport(server), base_url="http://server") as client:
        upload_random(client, names, tmp_path, SIZES, rank=2, targets=("q_proj",))
    found = {name: [body for body in bodies if name.encode() in body] for name in names}
    assert all(len(own) == 1 for own in found.values())
    weights = {
        own[0].partition(b"safetensors")[2].partition(b"}}")[2].rpartition(b"\r\n--")[0] for own in found.values()
    }
    assert len(weights) == len(names)
    assert list(tmp_path.iterdir()) == []


def test_a_refusal_is_raised(tmp_path: Path) -> None:
    transport = httpx.MockTransport(lambda _: httpx.Response(409))
    with (
        httpx.Client(transport=transport, base_url="http://server") as client,
        pytest.raises(httpx.HTTPStatusError, match="409"),
    ):
        upload_random(client, ["one"], tmp_path, SIZES, rank=2, targets=("q_proj",))
