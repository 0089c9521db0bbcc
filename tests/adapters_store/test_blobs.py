"""What every store of blobs does: the same tests for a local folder and for an S3 server over HTTP."""

import hashlib
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from adapters_store.blobs import Blob, BlobMissing, BlobStore, BlobTooLarge
from tests.adapters_store.s3_server import make_bucket

CONTENT = bytes(range(256)) * 5000
DIGEST = hashlib.sha256(CONTENT).hexdigest()
HOUR = 3600.0


@pytest.fixture(params=["local", "s3"])
def blobs(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> BlobStore:
    if request.param == "local":
        return BlobStore.open(str(tmp_path / "blobs"))
    server: str = request.getfixturevalue("s3_server")
    bucket = "b" + hashlib.sha256(request.node.nodeid.encode()).hexdigest()[:20]
    make_bucket(server, bucket, monkeypatch)
    return BlobStore.open(f"s3://{bucket}/some/where?endpoint={server}&region=eu-west-1", cache=tmp_path / "cache")


def test_what_is_put_is_fetched(blobs: BlobStore, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(CONTENT)
    assert blobs.put_file(tmp_path / "file") == Blob(DIGEST, len(CONTENT))
    empty = blobs.put_stream([])
    assert empty == Blob(hashlib.sha256(b"").hexdigest(), 0)
    path = blobs.fetch(DIGEST, tmp_path / "adapter", "adapter_model.safetensors")
    assert path == tmp_path / "adapter" / "adapter_model.safetensors"
    assert path.read_bytes() == CONTENT
    assert path.stat().st_mode & 0o222 == 0
    assert blobs.fetch(DIGEST, tmp_path / "adapter").name == DIGEST
    assert blobs.fetch(DIGEST, tmp_path / "adapter", path.name) == path
    assert sorted(each.name for each in path.parent.iterdir()) == sorted([path.name, DIGEST])
    assert blobs.exists(DIGEST)
    assert {(blob.sha256, blob.size) for blob in blobs.list()} == {(DIGEST, len(CONTENT)), (empty.sha256, 0)}


def test_large_content_arrives_whole(blobs: BlobStore, tmp_path: Path) -> None:
    chunk = os.urandom(1 << 20)  # 12 MiB: several parts of an S3 upload
    blob = blobs.put_stream(chunk for _ in range(12))
    assert blob.size == 12 << 20
    assert blob.sha256 == hashlib.sha256(chunk * 12).hexdigest()
    assert blobs.fetch(blob.sha256, tmp_path / "out").read_bytes() == chunk * 12


def test_a_fetched_file_survives_deletion(blobs: BlobStore, tmp_path: Path) -> None:
    blobs.put_stream([CONTENT])
    path = blobs.fetch(DIGEST, tmp_path / "out")
    blobs.delete(DIGEST)
    blobs.delete(DIGEST)
    assert path.read_bytes() == CONTENT
    assert not blobs.exists(DIGEST)
    assert list(blobs.list()) == []
    with pytest.raises(BlobMissing):
        blobs.fetch(DIGEST, tmp_path / "again")


def test_what_is_too_large_leaves_nothing(blobs: BlobStore, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(CONTENT)
    with pytest.raises(BlobTooLarge, match="at most 1000 bytes"):
        blobs.put_file(tmp_path / "file", max_bytes=1000)
    with pytest.raises(BlobTooLarge):
        blobs.put_stream(iter([b"a" * 600, b"b" * 600]), max_bytes=1000)
    assert blobs.put_stream([b"a" * 1000], max_bytes=1000).size == 1000
    assert len(list(blobs.list())) == 1


def test_a_broken_stream_leaves_nothing(blobs: BlobStore) -> None:
    def chunks() -> Iterator[bytes]:
        yield CONTENT
        raise KeyError("the client left")

    with pytest.raises(KeyError):
        blobs.put_stream(chunks())
    assert list(blobs.list()) == []


def test_names_that_are_no_digests_are_refused(blobs: BlobStore, tmp_path: Path) -> None:
    for name in ("../lock", "a" * 63, DIGEST.upper(), "", DIGEST + "/x"):
        with pytest.raises(ValueError, match="64 hexadecimal digits"):
            blobs.fetch(name, tmp_path / "out")


def test_a_sweep_takes_old_orphans_only(blobs: BlobStore) -> None:
    kept, orphan = (blobs.put_stream([content]).sha256 for content in (b"kept", b"orphan"))
    now = time.time()
    assert blobs.sweep({kept}, HOUR, now) == ()
    assert blobs.sweep({kept}, HOUR, now + HOUR / 2) == ()
    assert blobs.sweep({kept}, HOUR, now + 2 * HOUR) == (orphan,)
    assert [blob.sha256 for blob in blobs.list()] == [kept]


def test_many_threads_may_put_the_same_content(blobs: BlobStore, tmp_path: Path) -> None:
    results: list[Blob] = []
    threads = [threading.Thread(target=lambda: results.append(blobs.put_stream([CONTENT]))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [Blob(DIGEST, len(CONTENT))] * 8
    assert [blob.sha256 for blob in blobs.list()] == [DIGEST]
    assert blobs.fetch(DIGEST, tmp_path).read_bytes() == CONTENT


@pytest.mark.parametrize(
    "url", ["ftp://host/x", "s3://", "s3://bucket?endpoint=http://h&acl=public", "file://host/path", "http://h/b"]
)
def test_urls_that_are_not_understood(url: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not understood"):
        BlobStore.open(url, cache=tmp_path)


def test_local_urls(tmp_path: Path) -> None:
    BlobStore.open(f"file://{tmp_path}/with%20space").put_stream([CONTENT])
    assert (tmp_path / "with space" / "sha256" / DIGEST).read_bytes() == CONTENT
    with pytest.raises(ValueError, match="cache folder"):
        BlobStore.open("s3://bucket")
