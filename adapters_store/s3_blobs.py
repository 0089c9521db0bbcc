"""Blobs in a bucket of an S3-compatible store, with a local folder as cache."""

import contextlib
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError
from obstore.store import S3Store

from adapters_store.blobs import (
    CHUNK_BYTES,
    CLAIMED,
    DIGEST,
    UNAVAILABLE,
    Blob,
    BlobCorrupt,
    BlobMissing,
    BlobsClaimed,
    BlobStore,
    BlobUnavailable,
    Fault,
    StoredBlob,
    disk_errors,
    no_fault,
)
from adapters_store.local_blobs import LocalBlobs

if TYPE_CHECKING:
    from obstore.store import S3Config


class S3Blobs(BlobStore):
    """Objects `sha256/<digest>` of a bucket; `touched/<digest>` marks a later put of the same content.

    Objects become visible when complete. Between the last look of a sweep and its deletion, a put of the same content
    goes unseen: milliseconds, and only for content that was unreferenced longer than the grace.
    """

    def __init__(self, store: S3Store, cache: LocalBlobs, cache_bytes: int, fault: Fault = no_fault) -> None:
        self._store = store
        self._cache = cache
        self._cache_bytes = cache_bytes
        self._fault = fault

    def claim(self, owner: str) -> None:
        with _s3_errors():
            with contextlib.suppress(AlreadyExistsError):
                obstore.put(self._store, "owner", owner.encode(), mode="create")
            found = bytes(obstore.get(self._store, "owner").bytes()).decode()
        if found != owner:
            raise BlobsClaimed(CLAIMED)

    def put_file(self, path: Path, max_bytes: int | None = None) -> Blob:
        return self._upload(self._cache.put_file(path, max_bytes))

    def put_stream(self, chunks: Iterable[bytes], max_bytes: int | None = None) -> Blob:
        return self._upload(self._cache.put_stream(chunks, max_bytes))

    def fetch(self, sha256: str, folder: Path, name: str | None = None) -> Path:
        try:
            path = self._cache.fetch(sha256, folder, name)
        except (BlobMissing, BlobCorrupt):
            self._download(sha256)
            path = self._cache.fetch(sha256, folder, name)
        with disk_errors():
            self._cache.touch(sha256)
            self._cache.trim(self._cache_bytes)
        return path

    def exists(self, sha256: str) -> bool:
        return self._head(f"sha256/{sha256}") is not None

    def delete(self, sha256: str) -> None:
        with _s3_errors():
            obstore.delete(self._store, [f"sha256/{sha256}", f"touched/{sha256}"])
        self._cache.delete(sha256)

    def list(self) -> Iterator[StoredBlob]:
        touched = {blob.sha256: blob.modified for blob in self._list("touched/")}
        for blob in self._list("sha256/"):
            yield StoredBlob(blob.sha256, blob.size, max(blob.modified, touched.get(blob.sha256, 0.0)))

    def sweep(self, referenced: Collection[str], grace: float, now: float) -> tuple[str, ...]:
        removed: list[str] = []
        for blob in list(self.list()):
            if blob.sha256 in referenced or blob.modified > now - grace:
                continue
            touched = self._head(f"touched/{blob.sha256}")
            if touched is None or touched.modified <= now - grace:
                self.delete(blob.sha256)
                removed.append(blob.sha256)
        self._cache.sweep({blob.sha256 for blob in self._cache.list()}, grace, now)
        return tuple(removed)

    def _upload(self, blob: Blob) -> Blob:
        key = f"sha256/{blob.sha256}"
        stored = self._head(key)
        with _s3_errors():
            if stored is not None and stored.size == blob.size:
                obstore.put(self._store, f"touched/{blob.sha256}", b"")
            else:
                self._fault("blob.uploading")
                obstore.put(self._store, key, self._cache.path_of(blob.sha256))
        self._fault("blob.uploaded")
        self._cache.trim(self._cache_bytes)
        return blob

    def _download(self, sha256: str) -> None:
        """Into the cache. What fails to verify is read once more before the object is blamed."""
        for _ in range(2):
            with _s3_errors():
                try:
                    chunks = obstore.get(self._store, f"sha256/{sha256}").stream(CHUNK_BYTES)
                except FileNotFoundError:
                    raise BlobMissing(f"blob {sha256} is not in the store") from None
                found = self._cache.put_stream(bytes(chunk) for chunk in chunks).sha256
            if found == sha256:
                return
            self._cache.delete(found)
        with _s3_errors():
            obstore.copy(self._store, f"sha256/{sha256}", f"quarantine/{sha256}")
            obstore.delete(self._store, f"sha256/{sha256}")
        raise BlobCorrupt(f"blob {sha256} is damaged and was set aside: register the same content again")

    def _head(self, key: str) -> StoredBlob | None:
        with _s3_errors():
            try:
                meta = obstore.head(self._store, key)
            except FileNotFoundError:
                return None
        return StoredBlob(key.rpartition("/")[2], meta["size"], meta["last_modified"].timestamp())

    def _list(self, prefix: str) -> Iterator[StoredBlob]:
        with _s3_errors():
            for page in obstore.list(self._store, prefix):
                for meta in page:
                    name = meta["path"].rpartition("/")[2]
                    if DIGEST.fullmatch(name):
                        yield StoredBlob(name, meta["size"], meta["last_modified"].timestamp())


def s3_store(bucket: str, prefix: str, endpoint: str | None, region: str | None) -> S3Store:
    """A client of a bucket; an `endpoint` of http:// is talked to unencrypted. Whole requests may take an hour."""
    config: S3Config = {}
    if endpoint:
        config["endpoint"] = endpoint
    if region:
        config["region"] = region
    return S3Store(
        bucket,
        prefix=prefix or None,
        config=config,
        client_options={
            "allow_http": bool(endpoint and endpoint.startswith("http://")),
            "connect_timeout": timedelta(seconds=5),
            "read_timeout": timedelta(seconds=30),
            "timeout": timedelta(hours=1),
        },
        retry_config={"max_retries": 3, "retry_timeout": timedelta(seconds=20)},
    )


@contextmanager
def _s3_errors() -> Iterator[None]:
    try:
        yield
    except PermissionError as error:
        raise BlobUnavailable(f"{UNAVAILABLE}: the object store refuses the credentials") from error
    except (BaseError, OSError) as error:
        raise BlobUnavailable(f"{UNAVAILABLE}: the object store does not answer as expected") from error
