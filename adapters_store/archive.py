"""An adapter or router packed as zip or tar.gz, unpacked without trusting it."""

import errno
import gzip
import io
import stat
import struct
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import IO, BinaryIO, cast

from adapters_store.blobs import disk_errors
from adapters_store.contents import ADAPTER, Contents
from adapters_store.peft_format import MAX_WEIGHTS_BYTES
from adapters_store.types import AdapterError

ARCHIVE_SUFFIXES = (".zip", ".tar.gz", ".tgz")
_BROKEN = (
    EOFError,
    LookupError,
    MemoryError,
    NotImplementedError,  # of a feature that zipfile lacks
    OSError,  # EINVAL of a seek to nowhere, BadGzipFile
    OverflowError,
    RecursionError,
    ValueError,
    struct.error,
    tarfile.TarError,
    zipfile.BadZipFile,
    zlib.error,
)
_BOUNDED = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
"""Methods of which `zipfile` unpacks no more than it is asked for; of the others, all that a few KiB blow up to."""

_CHUNK_BYTES = 1 << 20
_MAX_DIRECTORY_BYTES = 1 << 20
"""Largest table of contents of a zip, which `zipfile` reads at once: more than 10,000 entries."""

_HEADER_BYTES = 1 << 16
"""Decompressed bytes that one entry's tar headers may take; `tarfile` holds extended headers in memory."""

_READ_BYTES = 1 << 16
"""What `tarfile` reads at once, and so how far it may be ahead of what it was asked for."""


@dataclass(frozen=True)
class ArchiveLimits:
    """`max_bytes` bounds the sizes of all entries together, `max_entries` their number, folders included."""

    max_bytes: int = MAX_WEIGHTS_BYTES + (64 << 20)
    max_entries: int = 1000


def unpack(archive: Path, into: Path, limits: ArchiveLimits, contents: Contents = ADAPTER) -> Path:
    """Unpack the one adapter, or router, of the archive straight into the folder `into`, and return that folder.

    It lies at the archive's top or in one folder there; only its own files are written, yet every entry must be
    harmless: a plain file or folder under a relative path without `..`. On an error `into` is left as it was. Raises
    AdapterError `adapter_unsafe`, `adapter_corrupt`, `adapter_incomplete`, `adapter_unsupported` (several adapters),
    413 `adapter_too_large` (`router_unsafe` and so on), 415 `not_safetensors`; BlobUnavailable when the disk fails.
    """
    with contents.errors(), disk_errors():
        into.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=into, prefix=".unpack-") as staging, archive.open("rb") as file:
            magic = file.read(4)
            file.seek(0)
            if magic[:2] == b"PK":
                names = _unpack_zip(file, _Entries(Path(staging), limits, contents))
            elif magic[:2] == b"\x1f\x8b":
                names = _unpack_tar(file, _Entries(Path(staging), limits, contents))
            else:
                raise AdapterError("adapter_corrupt", "archive is not an archive: expected zip or tar.gz")
            return _take(names, into, contents)


class _Entries:
    """Judges the entries one after the other, and gives those that matter a place in the staging folder."""

    def __init__(self, staging: Path, limits: ArchiveLimits, contents: Contents) -> None:
        self.places: dict[PurePosixPath, Path] = {}
        self._staging = staging
        self._limits = limits
        self._wanted = {*contents.names, contents.pickle}
        self._names: set[PurePosixPath] = set()
        self._bytes = 0

    def admit(self, name: str, is_plain: bool, size: int) -> Path | None:
        """Where to write the entry, or None if it is not wanted. `size`: its unpacked bytes, as declared."""
        path = PurePosixPath(name)
        if not is_plain:
            raise _unsafe(name, "is a link, a device or another special file: expected plain files and folders")
        if not name or not name.isprintable() or _leaves(name):
            raise _unsafe(name, "leaves the archive: expected relative paths of printable characters without '..'")
        if size < 0:
            raise AdapterError("adapter_corrupt", "an entry of the archive declares a negative size")
        if path in self._names:
            raise _unsafe(name, "comes twice: expected each file once")
        self._names.add(path)
        self._bytes += size
        if len(self._names) > self._limits.max_entries:
            raise AdapterError(
                "adapter_unsafe", f"the archive has too many entries: expected at most {self._limits.max_entries}"
            )
        if self._bytes > self._limits.max_bytes:
            message = f"the archive unpacks to too much: expected at most {self._limits.max_bytes} bytes"
            raise AdapterError("adapter_too_large", message, 413)
        if name.endswith("/") or path.name not in self._wanted or len(path.parts) > 2:
            return None
        place = self._staging / str(len(self.places))
        self.places[path] = place
        return place


def _unpack_zip(file: BinaryIO, entries: _Entries) -> dict[PurePosixPath, Path]:
    wanted: list[tuple[zipfile.ZipInfo, Path]] = []
    with _corrupt("zip"), zipfile.ZipFile(_CappedReads(file)) as archive:
        for info in archive.infolist():
            kind = stat.S_IFMT(info.external_attr >> 16)
            is_plain = kind in (0, stat.S_IFDIR if info.is_dir() else stat.S_IFREG)
            # `orig_filename` is the name before zipfile cuts it at a NUL
            place = entries.admit(info.orig_filename, is_plain, info.file_size)
            if info.flag_bits & 1:
                raise AdapterError("adapter_corrupt", "the archive is encrypted: expected a plain one")
            if info.compress_type not in _BOUNDED:
                raise _unsafe(info.orig_filename, "is neither stored nor deflated: expected a zip of these methods")
            if place:
                wanted.append((info, place))
        for info, place in wanted:
            with archive.open(info) as content:
                _write(content, place, info.file_size)
    return entries.places


def _unpack_tar(file: BinaryIO, entries: _Entries) -> dict[PurePosixPath, Path]:
    with _corrupt("tar.gz"), gzip.GzipFile(fileobj=file) as unzipped:
        metered = _MeteredReads(unzipped, _HEADER_BYTES + _READ_BYTES)
        with tarfile.open(fileobj=cast(IO[bytes], metered), mode="r|", bufsize=_READ_BYTES) as archive:
            while (member := archive.next()) is not None:
                is_plain = member.type in (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.DIRTYPE) and not member.issparse()
                place = entries.admit(member.name + "/" * member.isdir(), is_plain, member.size)
                content = archive.extractfile(member)
                # The content is read here, so that what next() decompresses is headers only.
                metered.allowance = member.size + _READ_BYTES
                if content:
                    _write(content, place, member.size)
                metered.allowance = _HEADER_BYTES + _READ_BYTES
    return entries.places


def _take(places: dict[PurePosixPath, Path], into: Path, contents: Contents) -> Path:
    folders = sorted({path.parent for path in places if path.name != contents.card})
    if len(folders) > 1:
        message = f"the archive holds {len(folders)} {contents.noun}s: expected exactly one"
        raise AdapterError("adapter_unsupported", message)
    chosen = {path.name: place for path, place in places.items() if path.parent in folders}
    contents.check(set(chosen))
    for name in contents.names:
        if name in chosen:
            chosen[name].replace(into / name)
    return into


def _write(content: IO[bytes], place: Path | None, size: int) -> None:
    """Copy the `size` bytes that the entry declares, or skip them where there is no place for them."""
    left = size
    with place.open("xb") if place else io.BytesIO() as out:
        while chunk := content.read(min(left, _CHUNK_BYTES)):
            left -= len(chunk)
            if place:
                out.write(chunk)
    if left:
        raise AdapterError("adapter_corrupt", "an entry of the archive is cut short: expected a complete archive")


class _CappedReads(io.BufferedReader):
    """A file of which no single read is large: `zipfile` reads the table of contents at once, whatever its size."""

    def __init__(self, file: BinaryIO) -> None:
        super().__init__(io.FileIO(file.fileno(), closefd=False))

    def read(self, size: int | None = -1, /) -> bytes:
        if size is not None and size > _MAX_DIRECTORY_BYTES:
            raise AdapterError("adapter_unsafe", "the archive's table of contents is too long: expected few entries")
        return super().read(size)


class _MeteredReads:
    """A stream that yields at most `allowance` bytes until it is renewed."""

    def __init__(self, file: gzip.GzipFile, allowance: int) -> None:
        self.allowance = allowance
        self._file = file

    def read(self, size: int) -> bytes:
        if size > self.allowance:
            raise AdapterError("adapter_unsafe", "the archive's headers are too long: expected plain file names")
        self.allowance -= size
        return self._file.read(size)


@contextmanager
def _corrupt(kind: str) -> Iterator[None]:
    """Whatever the standard library says of a broken archive becomes `adapter_corrupt`."""
    try:
        yield
    except AdapterError:
        raise
    except _BROKEN as error:
        if isinstance(error, OSError) and not isinstance(error, gzip.BadGzipFile) and error.errno != errno.EINVAL:
            raise
        raise AdapterError("adapter_corrupt", f"the archive cannot be read: expected a complete {kind} file") from error


def _leaves(name: str) -> bool:
    path = PurePosixPath(name)
    return path.is_absolute() or ".." in path.parts or "\\" in name or bool(PureWindowsPath(name).drive)


def _unsafe(name: str, message: str) -> AdapterError:
    return AdapterError("adapter_unsafe", f"entry {name[:80]!a} of the archive {message}")
