"""A real S3 server on a loopback port, and buckets in it."""

from collections.abc import Iterator
from contextlib import contextmanager
from urllib.request import Request, urlopen

import pytest
from moto.server import ThreadedMotoServer


@contextmanager
def running_server() -> Iterator[str]:
    """The URL of a server that is there until the block ends."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    try:
        yield f"http://{host}:{port}"
    finally:
        server.stop()


def make_bucket(server: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A new bucket, and credentials where AWS tools look for them."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    put(f"{server}/{name}", b"")


def put(url: str, content: bytes) -> None:
    """Make what the URL names, a bucket or an object. Raises HTTPError."""
    with urlopen(Request(url, content, {"Content-Type": "application/octet-stream"}, method="PUT")) as response:
        response.read()
