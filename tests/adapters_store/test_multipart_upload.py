"""Multipart uploads, in chunks of any size, and bodies that are refused."""

from collections.abc import Mapping
from pathlib import Path

import httpx
import pytest

from adapters_store.archive import ArchiveLimits
from adapters_store.contents import ROUTER
from adapters_store.multipart_upload import MultipartUpload, Upload, take_upload
from adapters_store.types import AdapterError
from tests.adapters_store.fetched import ADAPTER, CONFIG, WEIGHTS, contents, zipped

LIMITS = {"config": 1 << 20, "weights": 1 << 20, "archive": 1 << 20}


def body(fields: Mapping[str, str], files: Mapping[str, bytes]) -> tuple[str, bytes]:
    """Content type and body as httpx, and so the openai client, encodes them."""
    texts: dict[str, tuple[str | None, bytes]] = {name: (None, content.encode()) for name, content in fields.items()}
    parts: dict[str, tuple[str | None, bytes]] = {name: (f"../../{name}", content) for name, content in files.items()}
    request = httpx.Request("POST", "http://h/", files=texts | parts)
    return request.headers["content-type"], request.read()


def receive(content_type: str, data: bytes, folder: Path, size: int = 1000) -> Upload:
    folder.mkdir(exist_ok=True)
    upload = MultipartUpload(content_type, folder, LIMITS)
    try:
        for start in range(0, len(data), size):
            upload.feed(data[start : start + size])
        return upload.finish()
    finally:
        upload.close()


@pytest.mark.parametrize("size", [1, 7, 1000, 10_000_000])
def test_an_upload_of_two_files(size: int, tmp_path: Path) -> None:
    files = {"config": b'{"r": 1}', "weights": b"\r\n--weights\r\n" * 500}
    kind, data = body({"name": "sql", "tags": '["ä"]'}, files)
    upload = receive(kind, data, tmp_path / "upload", size)
    assert upload.fields == {"name": "sql", "tags": '["ä"]'}
    assert {name: path.read_bytes() for name, path in upload.files.items()} == files
    folder = take_upload(upload, tmp_path / "into", ArchiveLimits())
    assert contents(folder) == {CONFIG: files["config"], WEIGHTS: files["weights"]}


def test_an_upload_of_an_archive(tmp_path: Path) -> None:
    upload = receive(*body({"name": "sql"}, {"archive": zipped()}), tmp_path / "upload")
    assert contents(take_upload(upload, tmp_path / "into", ArchiveLimits())) == ADAPTER


def test_uploads_that_are_refused(tmp_path: Path) -> None:
    kind, data = body({"name": "sql"}, {"config": b"{}", "weights": b"x"})
    twice = data.replace(b'name="weights"', b'name="config"')
    nameless = data.replace(b'name="weights"; ', b"")
    cases = [
        ("application/json", data, "unsupported_media_type", 415),
        ("multipart/form-data", data, "bad_upload", 400),
        (kind, data[:-20], "bad_upload", 400),
        (kind, b"", "bad_upload", 400),
        (kind, b"no parts at all", "bad_upload", 400),
        (kind, twice, "bad_upload", 400),
        (kind, nameless, "bad_upload", 400),
        (kind, data.replace(b"sql", b"\xff\xff\xff"), "bad_upload", 400),
        (*body({}, {"weights": bytes((1 << 20) + 1)}), "adapter_too_large", 413),
        (*body({"samples": "s" * (1 << 20)}, {}), "bad_upload", 413),
        (*body({f"field-{index}": "" for index in range(5000)}, {}), "bad_upload", 413),
    ]
    for index, (content_type, content, code, status) in enumerate(cases):
        with pytest.raises(AdapterError) as caught:
            receive(content_type, content, tmp_path / str(index), 100_000)
        assert (index, caught.value.code, caught.value.status) == (index, code, status)


def test_what_has_no_place_is_refused_as_it_begins(tmp_path: Path) -> None:
    """Not one byte of its content is needed."""
    kind, data = body({}, {"adapter": b"content" * 1000})
    upload = MultipartUpload(kind, tmp_path, LIMITS)
    with pytest.raises(AdapterError) as caught:
        upload.feed(data[: data.index(b"content" * 2)])
    assert caught.value.message == "adapter: there is no such field; files are config, weights, archive"
    assert (caught.value.code, caught.value.status, caught.value.param) == ("bad_upload", 400, "adapter")
    kind, data = body({"name": "sql", "nmae": "x" * 1000}, {})
    MultipartUpload(kind, tmp_path, LIMITS).feed(data)
    with pytest.raises(AdapterError, match="nmae: there is no such field") as caught:
        MultipartUpload(kind, tmp_path, LIMITS, fields={"name"}).feed(data)
    assert caught.value.param == "nmae"


@pytest.mark.parametrize("header", [b"x: " + b"a" * (1 << 15), b"x: y\r\n" * 5000, b"a" * (1 << 15)])
def test_headers_of_a_part_are_bounded(header: bytes, tmp_path: Path) -> None:
    """By the parser: former versions held them all in memory."""
    upload = MultipartUpload("multipart/form-data; boundary=b", tmp_path, LIMITS)
    upload.feed(b"--b\r\n")
    with pytest.raises(AdapterError) as caught:
        upload.feed(header)
    assert (caught.value.code, caught.value.status) == ("bad_upload", 400)


def test_an_upload_of_a_router(tmp_path: Path) -> None:
    upload = receive(*body({"name": "r"}, {"config": b"{}", "weights": b"x"}), tmp_path / "upload")
    folder = take_upload(upload, tmp_path / "into", ArchiveLimits(), ROUTER)
    assert contents(folder) == {"router.json": b"{}", "router.safetensors": b"x"}
    upload = receive(*body({"name": "r"}, {"config": b"{}"}), tmp_path / "half")
    with pytest.raises(AdapterError, match=r"router\.safetensors is missing") as caught:
        take_upload(upload, tmp_path / "other", ArchiveLimits(), ROUTER)
    assert caught.value.code == "router_incomplete"


def test_uploads_that_are_no_adapter(tmp_path: Path) -> None:
    cases = [
        ({}, "adapter_incomplete"),
        ({"config": b"{}"}, "adapter_incomplete"),
        ({"weights": b"x"}, "adapter_incomplete"),
    ]
    cases.append(({"config": b"{}", "weights": b"x", "archive": zipped()}, "bad_upload"))
    for index, (files, code) in enumerate(cases):
        upload = receive(*body({"name": "sql"}, files), tmp_path / str(index))
        with pytest.raises(AdapterError) as caught:
            take_upload(upload, tmp_path / "into", ArchiveLimits())
        assert caught.value.code == code
