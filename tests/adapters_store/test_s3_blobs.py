"""Blobs in an S3 server over HTTP: where objects lie, the cache, damage, and servers that do not answer."""

import hashlib
import os
import time
from pathlib import Path

import obstore
import pytest
from obstore.store import S3Store

from adapters_store.blobs import BlobCorrupt, BlobStore, BlobUnavailable, Fault, no_fault
from adapters_store.s3_blobs import s3_store
from tests.adapters_store.s3_server import make_bucket

CONTENT = bytes(range(256)) * 5000
DIGEST = hashlib.sha256(CONTENT).hexdigest()
HOUR = 3600.0


@pytest.fixture
def bucket(s3_server: str, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> S3Store:
    """A new bucket, under the folder `some/where`."""
    name = "b" + hashlib.sha256(request.node.nodeid.encode()).hexdigest()[:20]
    make_bucket(s3_server, name, monkeypatch)
    return s3_store(name, "some/where", s3_server, None)


def test_s3_objects_lie_under_the_prefix(bucket: S3Store, tmp_path: Path) -> None:
    blobs = _s3(bucket, tmp_path / "cache")
    blobs.put_stream([CONTENT])
    plain = s3_store(str(bucket.config["bucket"]), "", str(bucket.config["endpoint"]), None)
    keys = [meta["path"] for page in obstore.list(plain) for meta in page]
    assert keys == [f"some/where/sha256/{DIGEST}"]


def test_s3_content_is_uploaded_once_and_kept_by_a_later_put(bucket: S3Store, tmp_path: Path) -> None:
    steps: list[str] = []
    blobs = _s3(bucket, tmp_path / "cache", steps.append)
    blobs.put_stream([CONTENT])
    first = obstore.head(bucket, f"sha256/{DIGEST}")
    time.sleep(1.02 - time.time() % 1)  # into the next second: the clock of an S3 listing has whole ones
    blobs.put_stream([CONTENT])
    assert steps.count("blob.uploading") == 1
    assert steps.count("blob.uploaded") == 2
    assert obstore.head(bucket, f"sha256/{DIGEST}")["last_modified"] == first["last_modified"]
    (stored,) = blobs.list()
    assert stored.modified > first["last_modified"].timestamp()
    assert blobs.sweep(set(), 0.5, first["last_modified"].timestamp() + 0.9) == ()
    assert blobs.sweep(set(), 0.5, stored.modified + HOUR) == (DIGEST,)
    assert list(obstore.list(bucket)) == []


def test_another_front_end_reads_from_s3_and_then_from_its_cache(bucket: S3Store, tmp_path: Path) -> None:
    _s3(bucket, tmp_path / "cache").put_stream([CONTENT])
    other = _s3(bucket, tmp_path / "other")
    assert other.fetch(DIGEST, tmp_path / "out").read_bytes() == CONTENT
    obstore.delete(bucket, f"sha256/{DIGEST}")
    assert other.fetch(DIGEST, tmp_path / "again").read_bytes() == CONTENT


def test_a_damaged_cache_is_read_anew(bucket: S3Store, tmp_path: Path) -> None:
    blobs = _s3(bucket, tmp_path / "cache")
    blobs.put_stream([CONTENT])
    cached = tmp_path / "cache" / "sha256" / DIGEST
    cached.chmod(0o644)
    cached.write_bytes(b"damaged")
    assert blobs.fetch(DIGEST, tmp_path / "out").read_bytes() == CONTENT


def test_a_damaged_object_is_set_aside_and_can_be_put_again(bucket: S3Store, tmp_path: Path) -> None:
    _s3(bucket, tmp_path / "cache").put_stream([CONTENT])
    obstore.put(bucket, f"sha256/{DIGEST}", b"damaged")
    other = _s3(bucket, tmp_path / "other")
    with pytest.raises(BlobCorrupt):
        other.fetch(DIGEST, tmp_path / "out")
    assert not other.exists(DIGEST)
    assert bytes(obstore.get(bucket, f"quarantine/{DIGEST}").bytes()) == b"damaged"
    other.put_stream([CONTENT])
    assert _s3(bucket, tmp_path / "third").fetch(DIGEST, tmp_path / "out").read_bytes() == CONTENT


def test_the_cache_keeps_what_was_used_last(bucket: S3Store, tmp_path: Path) -> None:
    url = f"s3://{bucket.config['bucket']}/some/where?endpoint={bucket.config['endpoint']}"
    blobs = BlobStore.open(url, cache=tmp_path / "cache", cache_bytes=2500)
    digests = []
    for age, letter in enumerate(b"abc"):
        digests.append(blobs.put_stream([bytes([letter]) * 1000]).sha256)
        os.utime(tmp_path / "cache" / "sha256" / digests[-1], (1000 + age, 1000 + age))
    blobs.fetch(digests[1], tmp_path / "out")
    cached = {path.name for path in (tmp_path / "cache" / "sha256").iterdir()}
    assert cached == {digests[1], digests[2]}
    for digest in digests:
        assert blobs.fetch(digest, tmp_path / "out").stat().st_size == 1000
    assert sum(path.stat().st_size for path in (tmp_path / "cache" / "sha256").iterdir()) <= 2500


def test_a_missing_bucket_or_server_is_unavailable(s3_server: str, bucket: S3Store, tmp_path: Path) -> None:
    for url in (f"s3://nowhere?endpoint={s3_server}", "s3://b?endpoint=http://127.0.0.1:1"):
        blobs = BlobStore.open(url, cache=tmp_path / "cache")
        with pytest.raises(BlobUnavailable, match="object store does not answer") as caught:
            blobs.put_stream([CONTENT])
        assert "127.0.0.1" not in caught.value.message
    assert bucket is not None


def _s3(bucket: S3Store, cache: Path, fault: Fault = no_fault) -> BlobStore:
    url = f"s3://{bucket.config['bucket']}/some/where?endpoint={bucket.config['endpoint']}"
    return BlobStore.open(url, cache=cache, fault=fault)
