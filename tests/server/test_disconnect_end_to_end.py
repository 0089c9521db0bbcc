"""Clients that leave a server with a real engine, in every phase: nothing of them is left, others are served."""

import json
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from served import Served

pytestmark = pytest.mark.slow
N = 16
"""Choices of a request: with one row it lasts until a client leaves, however long this process has to wait."""
LONG = {"prompt": [5] * 20, "max_tokens": 480, "ignore_eos": True, "n": N}
PREFILL = {"prompt": list(range(5, 305)), "max_tokens": 200, "ignore_eos": True, "n": N}


@pytest.fixture(scope="module")
def served(served_model: Path, adapters: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """One row at a time, and prompts that take many steps."""
    root = tmp_path_factory.mktemp("adapters-to-serve")
    for name in ("all4", "wide24", "qv16"):
        shutil.copytree(adapters[name], root / name)
    options = ("--adapters", str(root), "--max-num-seqs", "1", "--max-batch-tokens", "4", "--host-memory", "1MiB")
    served = Served(served_model, tmp_path_factory.mktemp("data"), *options)
    yield served
    assert served.stop() == 0


class Leaver:
    """A connection of its own, which is closed without a word."""

    def __init__(self, served: Served, path: str, body: dict[str, Any], cut: int = 0) -> None:
        address = urlsplit(served.url)
        content = json.dumps(body).encode()
        head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        self._socket = socket.create_connection((address.hostname, address.port), timeout=60)
        self._socket.sendall(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content[: len(content) - cut])

    def read(self) -> bytes:
        """What has come, at least something."""
        return self._socket.recv(1 << 16)

    def leave(self) -> None:
        self._socket.close()


def check_nothing_is_left(served: Served) -> None:
    """All that a request holds is free, and the only row with it; adapters have no lease."""
    for name in ("loramux_requests_running", "loramux_requests_waiting"):
        served.until(lambda name=name: served.metric(name) == 0)
    with served.client() as client:
        state = client.get("/admin/v1/state").json()
        assert "error" not in state
        served.until(lambda: not any(row["leases"] for row in client.get("/admin/v1/adapters?limit=10").json()["data"]))
        answer = client.post("/v1/completions", json={"model": "tiny", "prompt": [5, 6], "max_tokens": 2})
    assert answer.status_code == 200


def test_in_the_middle_of_the_upload(served: Served) -> None:
    leaver = Leaver(served, "/v1/completions", {"model": "all4", **LONG}, cut=10)
    leaver.leave()
    check_nothing_is_left(served)


@pytest.mark.parametrize("stream", [False, True])
def test_while_it_waits_for_the_row_and_while_it_has_it(served: Served, stream: bool) -> None:
    first = Leaver(served, "/v1/completions", {"model": "all4", "stream": True, **LONG})
    assert first.read().startswith(b"HTTP/1.1 200")
    waiting = Leaver(served, "/v1/completions", {"model": "qv16", "stream": stream, **LONG})
    served.until(lambda: served.metric("loramux_requests_waiting") >= N)  # those of the first are N - 1 at most
    waiting.leave()
    served.until(lambda: served.get("/admin/v1/state").json()["requests"] == 1)
    first.leave()
    check_nothing_is_left(served)


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/embeddings"])
@pytest.mark.parametrize("model", ["tiny", "wide24"])
def test_in_the_prompt_and_while_its_adapter_comes(served: Served, path: str, model: str) -> None:
    before = served.metric("loramux_request_success_total")
    fields = PREFILL if path == "/v1/completions" else {"input": [PREFILL["prompt"]] * 100}
    leaver = Leaver(served, path, {"model": model, **fields})
    served.until(lambda: served.metric("loramux_requests_running") == 1)
    leaver.leave()
    check_nothing_is_left(served)
    served.until(lambda: served.metric("loramux_request_success_total") > before)


def test_many_at_once(served: Served) -> None:
    leavers = [Leaver(served, "/v1/completions", {"model": "qv16", "stream": True, **LONG}) for _ in range(12)]
    served.until(lambda: served.metric("loramux_requests_waiting") >= 12)
    for leaver in leavers:
        leaver.leave()
    check_nothing_is_left(served)
    assert served.get("/health").status_code == 200
