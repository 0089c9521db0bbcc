"""The client of the administration's interface: what it sends, and what it says when that fails."""

import json
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from adapters_store.multipart_upload import MultipartUpload
from server.admin_client import (
    AdminClient,
    AdminError,
    UsageError,
    files_to_upload,
    is_source,
    name_in_path,
    router_to_upload,
)

URL = "http://127.0.0.1:8000"
Handler = Callable[[httpx.Request], httpx.Response]


@contextmanager
def client(handler: Handler, key: str | None = "k") -> Iterator[AdminClient]:
    with AdminClient(URL, key, httpx.MockTransport(handler)) as made:
        yield made


def refusing(status: int, message: str, code: str | None, **headers: str) -> Handler:
    error = {"message": message, "type": "invalid_request_error", "param": None, "code": code}
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return lambda _: httpx.Response(status, json={"error": error}, headers=named)


@pytest.mark.parametrize("url", [URL, URL + "/", URL + "/v1", URL + "/v1/", " " + URL])
def test_urls(url: str) -> None:
    assert AdminClient(url, None).url == URL


def test_a_url_below_a_path() -> None:
    seen: list[str] = []

    def answer(request: httpx.Request) -> httpx.Response:
        seen.append(str(request.url))
        return httpx.Response(200, json={})

    with AdminClient("https://example.org/lora/v1", None, httpx.MockTransport(answer)) as made:
        made.get("state")
    assert seen == ["https://example.org/lora/admin/v1/state"]


@pytest.mark.parametrize("url", ["", "x", "127.0.0.1:8000", "ftp://x", "http://", "http://x?y=1", "http://[::1"])
def test_what_is_no_url(url: str) -> None:
    with pytest.raises(UsageError, match="--url"):
        AdminClient(url, None)


@pytest.mark.parametrize("key", ["ключ", "a\nb"])
def test_what_cannot_be_a_key(key: str) -> None:
    with pytest.raises(UsageError, match="--key"):
        AdminClient(URL, key)


@pytest.mark.parametrize("name", ["", "..", "a/b", "a b", "-x", "x" * 129, "ä"])
def test_what_would_be_another_path(name: str) -> None:
    with pytest.raises(UsageError, match="is no name"):
        name_in_path(name)


def test_a_call() -> None:
    def answer(request: httpx.Request) -> httpx.Response:
        assert (request.method, request.url.path) == ("DELETE", "/admin/v1/adapters/sql")
        assert dict(request.url.params) == {"wait": "true", "tenant": "acme"}
        assert request.headers["authorization"] == "Bearer k"
        return httpx.Response(202, json={"status": "draining"})

    with client(answer) as made:
        query = {"wait": True, "tenant": "acme", "tag": None}
        reply = made.call("DELETE", "adapters/sql", query=query)
    assert (reply.status, reply.body) == (202, {"status": "draining"})


def test_no_key_no_header() -> None:
    def answer(request: httpx.Request) -> httpx.Response:
        assert "authorization" not in request.headers
        return httpx.Response(200, json={})

    with client(answer, key=None) as made:
        made.get("state")


def test_all_pages_are_one_list() -> None:
    def answer(request: httpx.Request) -> httpx.Response:
        assert request.url.params["limit"] == "1000"
        assert request.url.params["tag"] == "code"
        start = int(request.url.params.get("cursor", 0))
        return httpx.Response(200, json={"data": [start], "next": str(start + 1) if start < 3 else None})

    with client(answer) as made:
        assert made.pages("adapters", {"tag": "code"}) == {"data": [0, 1, 2, 3], "next": None}


@pytest.mark.parametrize(
    ("handler", "parts"),
    [
        (refusing(404, "adapter 'x' does not exist", "adapter_not_found"), ["'x' does not exist (adapter_not_found)"]),
        (refusing(400, "no", None), ["no"]),
        (refusing(401, "a key is needed", "invalid_api_key"), ["a key is needed", "--key", "LORAMUX_ADMIN_KEY"]),
        (refusing(403, "not with this key", "forbidden"), ["(forbidden)", "the admin key", "--key"]),
        (refusing(403, "lies outside", "source_not_allowed"), ["lies outside (source_not_allowed)"]),
        (refusing(503, "too many uploads", "busy", retry_after="2"), ["too many uploads (busy)", "try again in 2 s"]),
        (lambda _: httpx.Response(502, text="<html>"), [URL, "/admin/v1/state", "502", "is a loramux server there?"]),
        (lambda _: httpx.Response(404, json={"detail": "no"}), ["404", "is a loramux server there?"]),
        (lambda _: httpx.Response(200, text="<html>"), ["is a loramux server there?"]),
        (lambda _: httpx.Response(200, json=[1]), ["is a loramux server there?"]),
        (lambda _: httpx.Response(307, headers={"location": "http://evil"}), ["307"]),
    ],
)
def test_refusals_say_what_to_do(handler: Handler, parts: list[str]) -> None:
    with client(handler) as made, pytest.raises(AdminError) as caught:
        made.get("state")
    for part in parts:
        assert part in str(caught.value)
    assert not isinstance(caught.value, UsageError)
    assert ("--key" in str(caught.value)) == any("--key" in part for part in parts)


@pytest.mark.parametrize(
    ("error", "part"),
    [
        (httpx.ConnectError("[Errno 111] Connection refused"), f"no server at {URL} (Connection refused)"),
        (httpx.ConnectTimeout(""), "no answer"),
        (httpx.ReadTimeout(""), "did not answer within 60 seconds"),
        (httpx.RemoteProtocolError("peer closed"), "broke: peer closed"),
        (httpx.ReadError(""), "broke: ReadError"),
    ],
)
def test_a_server_out_of_reach(error: Exception, part: str) -> None:
    def answer(_: httpx.Request) -> httpx.Response:
        raise error

    with client(answer) as made, pytest.raises(AdminError) as caught:
        made.get("state")
    assert part in str(caught.value)
    if isinstance(error, httpx.ConnectError | httpx.ConnectTimeout):
        assert "loramux serve --model" in str(caught.value)


class Receiver(httpx.BaseTransport):
    """Takes an upload as the server does, without ever holding more than one chunk."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.largest = self.length = 0
        self.headers = httpx.Headers()
        self.fields: dict[str, str] = {}
        self.files: dict[str, bytes] = {}

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        self.headers = request.headers
        limits = dict.fromkeys(("config", "weights", "card", "archive"), 1 << 30)
        upload = MultipartUpload(request.headers["content-type"], self.folder, limits)
        assert isinstance(request.stream, httpx.SyncByteStream)
        for chunk in request.stream:
            self.largest = max(self.largest, len(chunk))
            self.length += len(chunk)
            upload.feed(chunk)
        done = upload.finish()
        self.fields = dict(done.fields)
        self.files = {name: path.read_bytes() for name, path in done.files.items()}
        return httpx.Response(201, json={"name": "sql"})


def write_folder(folder: Path, weights: bytes = b"weights", card: bytes | None = None) -> Path:
    folder.mkdir()
    (folder / "adapter_config.json").write_text("{}")
    (folder / "adapter_model.safetensors").write_bytes(weights)
    if card is not None:
        (folder / "README.md").write_bytes(card)
    return folder


def test_an_upload_is_read_from_the_disk_while_it_is_sent(tmp_path: Path) -> None:
    weights = bytes(range(256)) * 12_000
    source = write_folder(tmp_path / "sql", weights, card=b"# Card")
    (tmp_path / "server").mkdir()
    receiver = Receiver(tmp_path / "server")
    reports: list[int] = []
    fields: dict[str, Any] = {"name": "sql", "tags": ["a", "ü"], "replace": True}
    with AdminClient(URL, "k", receiver) as made:
        reply = made.upload("adapters", files_to_upload(source), fields, reports.append)
    assert (reply.status, reply.body) == (201, {"name": "sql"})
    assert receiver.files == {"config": b"{}", "weights": weights, "card": b"# Card"}
    assert receiver.fields["name"] == "sql"
    assert {name: json.loads(receiver.fields[name]) for name in ("tags", "replace")} == {
        "tags": ["a", "ü"],
        "replace": True,
    }
    assert receiver.largest <= 1 << 16
    assert receiver.length == int(receiver.headers["content-length"])
    assert sum(reports) == len(weights) + len(b"{}") + len(b"# Card")
    assert max(reports) <= 1 << 16


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "sql")
    files = files_to_upload(source)
    files["weights"].unlink()
    with (
        AdminClient(URL, None, Receiver(tmp_path)) as made,
        pytest.raises(AdminError, match=r"cannot read .*adapter_model.safetensors: No such file"),
    ):
        made.upload("adapters", files, {}, lambda _: None)


def test_a_server_that_refuses_before_the_end_is_heard(tmp_path: Path) -> None:
    """Its answer comes, and its connection closes, while the client is still sending."""
    source = write_folder(tmp_path / "sql", bytes(32 << 20))
    body = json.dumps({"error": {"message": "a key is needed", "code": "invalid_api_key"}}).encode()
    head = f"HTTP/1.1 401 Unauthorized\r\ncontent-length: {len(body)}\r\nconnection: close\r\n\r\n".encode()

    with socket.create_server(("127.0.0.1", 0)) as listener:

        def refuse() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.recv(1 << 16)
                connection.sendall(head + body)

        refusing_thread = threading.Thread(target=refuse)
        refusing_thread.start()
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        with AdminClient(url, None) as made, pytest.raises(AdminError, match="a key is needed"):
            made.upload("adapters", files_to_upload(source), {}, lambda _: None)
        refusing_thread.join()


def test_what_is_uploaded(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "a", card=b"card")
    assert files_to_upload(folder).keys() == {"config", "weights", "card"}
    (folder / "README.md").write_bytes(bytes(1 << 17))  # more than the server takes: the adapter goes without it
    assert files_to_upload(folder).keys() == {"config", "weights"}
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(AdminError, match=r"has no adapter_model\.safetensors: expected the folder of one PEFT adapter"):
        files_to_upload(folder)
    (folder / "adapter_config.json").unlink()
    with pytest.raises(AdminError, match=r"no adapter_config\.json and no adapter_model\.safetensors"):
        files_to_upload(folder)
    archive = tmp_path / "a.tar.gz"
    archive.write_bytes(b"x")
    assert files_to_upload(archive) == {"archive": archive}
    other = tmp_path / "a.bin"
    other.write_bytes(b"x")
    with pytest.raises(UsageError, match=r"expected a folder"):
        files_to_upload(other)
    with pytest.raises(UsageError, match="does not exist"):
        files_to_upload(tmp_path / "nothing")


def test_what_is_uploaded_of_a_router(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "a", card=b"card")
    with pytest.raises(AdminError, match=r"no router\.json and no router\.safetensors: expected .* trained"):
        router_to_upload(folder)
    for name in ("router.json", "router.safetensors"):
        (folder / name).write_bytes(b"x")
    wanted = {"config": folder / "router.json", "weights": folder / "router.safetensors"}
    assert router_to_upload(folder) == wanted
    archive = tmp_path / "a.zip"
    archive.write_bytes(b"x")
    assert router_to_upload(archive) == {"archive": archive}
    with pytest.raises(UsageError, match="does not exist"):
        router_to_upload(tmp_path / "nothing")


def test_what_is_a_source() -> None:
    assert all(map(is_source, ["hf://a/b@main", "s3://b/p", "https://x/y", "file:///x"]))
    assert not any(map(is_source, ["./x", "/x/y", "x:y"]))
