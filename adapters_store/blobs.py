"""Content-addressed files: adapters' configs and weights by sha256, in a local folder or an S3-compatible store."""

import errno
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar
from urllib.parse import parse_qsl, unquote, urlsplit

CHUNK_BYTES = 1 << 20
DEFAULT_CACHE_BYTES = 32 << 30
DIGEST = re.compile(r"[0-9a-f]{64}")
UNAVAILABLE = "files cannot be stored or read now"
CLAIMED = "the blob store belongs to another registry: expected another --blob-url, or the --database-url of its own"
_REASONS = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "the file is larger than the system allows",
    errno.EROFS: "the disk is read-only",
    errno.EACCES: "the server may not write there",
    errno.EPERM: "the server may not write there",
}

Fault = Callable[[str], None]
"""Called with the name of each step of a write, for tests that stop the process there."""


def no_fault(_step: str) -> None:
    """The fault of every day."""


class BlobError(RuntimeError):
    """What went wrong in one sentence without paths or addresses; `status` is the HTTP status that fits."""

    code: ClassVar[str]
    status: ClassVar[int] = 503

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


class BlobUnavailable(BlobError):
    """The store cannot be read or written now: disk full or read-only, object store unreachable."""

    code = "store_unavailable"


class BlobMissing(BlobError):
    """The store holds no blob of this digest."""

    code = "blob_missing"


class BlobCorrupt(BlobError):
    """The blob's content is no longer that of its name. It has been set aside: the same content can be put again."""

    code = "blob_corrupt"


class BlobsClaimed(BlobError):
    """The blobs are those of another registry, whose files a sweep would remove."""

    code = "store_claimed"
    status = 409


class BlobTooLarge(BlobError):
    """The content exceeds the size that the caller allows."""

    code = "adapter_too_large"
    status = 413


@dataclass(frozen=True)
class Blob:
    """Name (64 hexadecimal digits) and bytes of one content."""

    sha256: str
    size: int


@dataclass(frozen=True)
class StoredBlob(Blob):
    """`modified`: seconds since the epoch of the last write, or of the last put of the same content."""

    modified: float


@contextmanager
def disk_errors() -> Iterator[None]:
    """Turns OSError into BlobUnavailable with the reason."""
    try:
        yield
    except OSError as error:
        reason = _REASONS.get(error.errno or 0) or (error.strerror or "input/output error").lower()
        raise BlobUnavailable(f"{UNAVAILABLE}: {reason}") from error


class BlobStore(ABC):
    """Where blobs live. All calls block; any number of threads and processes may share one store."""

    @staticmethod
    def open(
        url: str,
        cache: Path | None = None,
        cache_bytes: int = DEFAULT_CACHE_BYTES,
        fault: Fault = no_fault,
    ) -> "BlobStore":
        """A store at a path, at `file:///path`, or at `s3://bucket/prefix?endpoint=URL&region=NAME`.

        An S3 store needs the folder `cache`, which holds at most about `cache_bytes` of what was used last; its
        credentials are those that AWS tools find. Raises ValueError for any other URL, BlobUnavailable if the folder
        cannot be created.
        """
        # Here, because both build on this module; and a local folder needs no S3 client.
        from adapters_store.local_blobs import LocalBlobs

        parts = urlsplit(url)
        if parts.scheme == "s3":
            if cache is None:
                raise ValueError("an s3:// blob URL needs a cache folder")
            options = dict(parse_qsl(parts.query))
            unknown = options.keys() - {"endpoint", "region"}
            if unknown or not parts.netloc:
                raise ValueError("the blob URL is not understood: expected s3://bucket/prefix?endpoint=URL&region=NAME")
            from adapters_store.s3_blobs import S3Blobs, s3_store

            store = s3_store(parts.netloc, parts.path.strip("/"), options.get("endpoint"), options.get("region"))
            return S3Blobs(store, LocalBlobs(cache, fault), cache_bytes, fault)
        if parts.scheme == "file" and parts.netloc in ("", "localhost"):
            return LocalBlobs(Path(unquote(parts.path)), fault)
        if "://" in url:
            raise ValueError("the blob URL is not understood: expected a path, file:///path or s3://bucket/prefix")
        return LocalBlobs(Path(url), fault)

    @abstractmethod
    def claim(self, owner: str) -> None:
        """Bind the store to the registry of this id, for good. Raises BlobsClaimed, BlobUnavailable."""

    @abstractmethod
    def put_file(self, path: Path, max_bytes: int | None = None) -> Blob:
        """Store a copy of the file. Raises BlobUnavailable, BlobTooLarge."""

    @abstractmethod
    def put_stream(self, chunks: Iterable[bytes], max_bytes: int | None = None) -> Blob:
        """Store the content. When it returns, the blob survives a power cut. Raises BlobUnavailable, BlobTooLarge."""

    @abstractmethod
    def fetch(self, sha256: str, folder: Path, name: str | None = None) -> Path:
        """Make `folder/name` (default: the digest) the blob's verified content, read-only, and return it.

        Raises BlobMissing, BlobCorrupt, BlobUnavailable.
        """

    @abstractmethod
    def exists(self, sha256: str) -> bool:
        """Whether the blob is there, unread."""

    @abstractmethod
    def delete(self, sha256: str) -> None:
        """Remove the blob; absent ones are no error. Files fetched before stay."""

    @abstractmethod
    def list(self) -> Iterator[StoredBlob]:
        """All blobs, in no order."""

    @abstractmethod
    def sweep(self, referenced: Collection[str], grace: float, now: float) -> tuple[str, ...]:
        """Remove blobs that nothing references and that nobody put for `grace` seconds; returns their digests.

        `grace` must exceed the time from a put to the commit of what references it. `now`: seconds since the epoch.
        """
