"""Blobs in a folder that any number of processes share."""

import errno
import fcntl
import hashlib
import os
import shutil
import tempfile
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from adapters_store.blobs import (
    CHUNK_BYTES,
    CLAIMED,
    DIGEST,
    Blob,
    BlobCorrupt,
    BlobMissing,
    BlobsClaimed,
    BlobStore,
    BlobTooLarge,
    Fault,
    StoredBlob,
    disk_errors,
    no_fault,
)
from adapters_store.private_files import FROZEN_MODE, make_private_folder


class LocalBlobs(BlobStore):
    """A folder: `sha256/<digest>`, beside `temporary`, `quarantine` and the files `lock` and `owner`."""

    def __init__(self, root: Path, fault: Fault = no_fault) -> None:
        self._blobs = root / "sha256"
        self._temporary = root / "temporary"
        self._quarantine = root / "quarantine"
        self._lock_file = root / "lock"
        self._owner_file = root / "owner"
        self._fault = fault
        with disk_errors():
            for folder in (self._blobs, self._temporary, self._quarantine):
                make_private_folder(folder)

    def claim(self, owner: str) -> None:
        with disk_errors(), self._lock(fcntl.LOCK_EX):
            if not self._owner_file.is_file():
                with tempfile.NamedTemporaryFile(dir=self._temporary, delete=False) as file:
                    file.write(owner.encode())
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(file.name, self._owner_file)
                _sync_folder(self._owner_file.parent)
            found = self._owner_file.read_text()
        if found != owner:
            raise BlobsClaimed(CLAIMED)

    def put_file(self, path: Path, max_bytes: int | None = None) -> Blob:
        with disk_errors(), path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            _check_size(size, max_bytes)
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            if self._keep(digest):
                return Blob(digest, size)
            file.seek(0)
            return self.put_stream(iter(lambda: file.read(CHUNK_BYTES), b""), max_bytes)

    def put_stream(self, chunks: Iterable[bytes], max_bytes: int | None = None) -> Blob:
        with disk_errors():
            handle, name = tempfile.mkstemp(dir=self._temporary)
            temporary = Path(name)
            try:
                with os.fdopen(handle, "wb") as file:
                    self._fault("blob.opened")
                    blob = _copy(chunks, file, max_bytes)
                    self._fault("blob.written")
                    os.fchmod(file.fileno(), FROZEN_MODE)  # fetched files are links to it
                    file.flush()
                    os.fsync(file.fileno())
                self._fault("blob.synced")
                if not self._keep(blob.sha256):
                    self._place(temporary, blob.sha256)
                return blob
            finally:
                temporary.unlink(missing_ok=True)

    def fetch(self, sha256: str, folder: Path, name: str | None = None) -> Path:
        source, target = self.path_of(sha256), folder / (name or sha256)
        with disk_errors():
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder, prefix=".fetch-") as staging:
                staged = Path(staging) / sha256
                try:
                    _link_or_copy(source, staged)
                except FileNotFoundError:
                    raise BlobMissing(f"blob {sha256} is not in the store") from None
                if _sha256(staged) == sha256:
                    os.replace(staged, target)
                    return target
        self._set_aside(sha256)
        raise BlobCorrupt(f"blob {sha256} is damaged and was set aside: register the same content again")

    def exists(self, sha256: str) -> bool:
        with disk_errors():
            return self.path_of(sha256).is_file()

    def delete(self, sha256: str) -> None:
        with disk_errors():
            self.path_of(sha256).unlink(missing_ok=True)

    def list(self) -> Iterator[StoredBlob]:
        with disk_errors(), os.scandir(self._blobs) as entries:
            for entry in entries:
                if DIGEST.fullmatch(entry.name):
                    stat = _stat(Path(entry.path))
                    if stat:
                        yield StoredBlob(entry.name, stat.st_size, stat.st_mtime)

    def sweep(self, referenced: Collection[str], grace: float, now: float) -> tuple[str, ...]:
        removed: list[str] = []
        with disk_errors():
            for blob in list(self.list()):
                if blob.sha256 in referenced or blob.modified > now - grace:
                    continue
                with self._lock(fcntl.LOCK_EX):
                    stat = _stat(self.path_of(blob.sha256))  # a put may have kept it meanwhile
                    if stat and stat.st_mtime <= now - grace:
                        self.path_of(blob.sha256).unlink(missing_ok=True)
                        removed.append(blob.sha256)
            for leftover in self._temporary.iterdir():
                stat = _stat(leftover)
                if stat and stat.st_mtime <= now - grace:
                    leftover.unlink(missing_ok=True)
        return tuple(removed)

    def path_of(self, sha256: str) -> Path:
        """Where the blob lies, there or not; its content is unverified. Raises ValueError for what is no digest."""
        if not DIGEST.fullmatch(sha256):
            raise ValueError("a blob's name is 64 hexadecimal digits")
        return self._blobs / sha256

    def touch(self, sha256: str) -> bool:
        """Make the blob the youngest; False if it is absent."""
        try:
            os.utime(self.path_of(sha256))
        except FileNotFoundError:
            return False
        return True

    def trim(self, max_bytes: int) -> None:
        """Remove the oldest blobs until the rest fits."""
        blobs = sorted(self.list(), key=lambda blob: blob.modified, reverse=True)
        total = 0
        for blob in blobs:
            total += blob.size
            if total > max_bytes:
                self.delete(blob.sha256)

    def _keep(self, sha256: str) -> bool:
        """Whether the content is already there and sound; then it counts as put just now."""
        path = self.path_of(sha256)
        with self._lock(fcntl.LOCK_SH):  # a sweep must see either the new time or no blob
            if not self.touch(sha256):
                return False
            if _sha256(path) == sha256:
                _sync_folder(self._blobs)  # whoever wrote it may not have come so far
                return True
        self._set_aside(sha256)
        return False

    def _place(self, temporary: Path, sha256: str) -> None:
        with self._lock(fcntl.LOCK_SH):
            os.replace(temporary, self.path_of(sha256))
        self._fault("blob.renamed")
        _sync_folder(self._blobs)
        self._fault("blob.stored")

    def _set_aside(self, sha256: str) -> None:
        path = self.path_of(sha256)
        try:
            with self._lock(fcntl.LOCK_EX):
                if path.is_file() and _sha256(path) != sha256:
                    os.replace(path, self._quarantine / f"{sha256}.{path.stat().st_mtime_ns}")
        except OSError:
            return  # on a read-only disk it stays, and every read finds it damaged again

    @contextmanager
    def _lock(self, kind: int) -> Iterator[None]:
        with self._lock_file.open("ab") as file:
            fcntl.flock(file, kind)
            yield


def _copy(chunks: Iterable[bytes], file: BinaryIO, max_bytes: int | None) -> Blob:
    digest, size = hashlib.sha256(), 0
    for chunk in chunks:
        size += len(chunk)
        _check_size(size, max_bytes)
        digest.update(chunk)
        file.write(chunk)
    return Blob(digest.hexdigest(), size)


def _check_size(size: int, max_bytes: int | None) -> None:
    if max_bytes is not None and size > max_bytes:
        raise BlobTooLarge(f"the file is too large: expected at most {max_bytes} bytes")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _link_or_copy(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno not in (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOTSUP):
            raise
        shutil.copyfile(source, target)  # another disk, or one without links
        target.chmod(FROZEN_MODE)


def _stat(path: Path) -> os.stat_result | None:
    try:
        return path.stat()
    except FileNotFoundError:
        return None


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
