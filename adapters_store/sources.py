"""Adapters and routers fetched from where they lie: file://, hf://, s3:// and https:// sources, within a policy."""

import errno
import os
import re
import stat
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Protocol
from urllib.parse import unquote, urlsplit

import obstore
from huggingface_hub import HfApi, HfFileSystem
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError
from obstore.exceptions import BaseError

from adapters_store.archive import ARCHIVE_SUFFIXES, unpack
from adapters_store.blobs import CHUNK_BYTES, disk_errors
from adapters_store.contents import ADAPTER, Contents
from adapters_store.model_card import CARD_NAME
from adapters_store.s3_blobs import s3_store
from adapters_store.source_policy import SourcePolicy, source_not_allowed, source_unavailable
from adapters_store.types import AdapterError
from adapters_store.web_source import WebFolder

if TYPE_CHECKING:
    from obstore import GetResult

_MAX_PART_BYTES = 255
_MAX_PATH_BYTES = 3800
"""What Linux takes, less the names of an adapter's files."""

_HUB = re.compile(r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@(?P<revision>[A-Za-z0-9][\w./-]*))?")


def fetch(source: str, into: Path, policy: SourcePolicy, contents: Contents = ADAPTER) -> Path:
    """Copy the adapter, or router, at `source` into the folder `into`, and return that folder.

    It then holds its config and weights and perhaps the card, from a local folder also an adapter's `samples.json`,
    all unread. A source is `file:///folder`, `hf://org/repo@revision`, `s3://bucket/prefix` or
    `https://host/folder`; except for hf://, one that ends in .zip, .tar.gz or .tgz is an archive. On an error `into` is
    left as it was. Raises AdapterError: 400
    `bad_source`, 403 `source_not_allowed`, 422 `adapter_unsafe`, `adapter_incomplete`, `source_refused` and those of
    `unpack`, 413 `adapter_too_large`, 415 `not_safetensors`, 503 `source_unavailable`; and BlobUnavailable.
    """
    scheme, separator, rest = source.partition("://")
    origins: Mapping[str, Callable[[str, SourcePolicy], _Origin]] = {
        "file": _LocalFolder,
        "hf": _HubRepository,
        "s3": _Bucket,
        "https": WebFolder,
    }
    if not separator or scheme not in origins or not rest.isprintable():
        raise AdapterError("bad_source", "source is not understood: expected file://, hf://, s3:// or https://", 400)
    expires = policy.clock() + policy.deadline
    with contents.errors(), disk_errors():
        origin = origins[scheme](source, policy)
        into.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=into, prefix=".source-") as staging_name:
            staging = Path(staging_name)
            if scheme != "hf" and urlsplit(source).path.endswith(ARCHIVE_SUFFIXES):
                if not _save(origin, "", staging / "archive", policy, expires):
                    raise AdapterError("adapter_incomplete", "source does not exist: expected an archive there")
                return unpack(staging / "archive", into, policy.archive_limits, contents)
            names = (*contents.names, *([contents.local] if contents.local and scheme == "file" else []))
            present = {name for name in names if _save(origin, name, staging / name, policy, expires)}
            if contents.weights not in present and contents.pickle:
                with origin.open(contents.pickle) as pickle:
                    present |= {contents.pickle} if pickle is not None else set()
            contents.check(present)
            for name in present & set(names):
                (staging / name).replace(into / name)
    return into


class _Origin(Protocol):
    """One place that holds an adapter."""

    def open(self, name: str) -> AbstractContextManager[Iterator[bytes] | None]:
        """The content of one file, None if there is none; the empty name is the source itself."""


def _save(origin: _Origin, name: str, path: Path, policy: SourcePolicy, expires: float) -> bool:
    """Whether the file is there; then it has been copied. A README is cut at its limit instead of refused."""
    limit = policy.limit_of(name)
    with origin.open(name) as chunks:
        if chunks is None:
            return False
        left = limit
        with path.open("xb") as file:
            for chunk in chunks:
                if policy.clock() > expires:
                    raise source_unavailable(
                        f"source takes too long: expected all of it within {policy.deadline:g} seconds"
                    )
                file.write(chunk[:left] if name == CARD_NAME else chunk)
                left -= len(chunk)
                if left < 0 and name == CARD_NAME:
                    break
                if left < 0:
                    raise _too_large(name or "the archive", limit)
    return True


class _LocalFolder:
    """file:// below an allowed root. Symbolic links count as what they point to."""

    def __init__(self, source: str, policy: SourcePolicy) -> None:
        text = unquote(source.removeprefix("file://").removeprefix("localhost"))
        if not text.startswith("/") or "\0" in text:
            raise AdapterError("bad_source", "source is not understood: expected file:///absolute/path", 400)
        self._path = Path(text)
        longest = max(len(os.fsencode(part)) for part in self._path.parts)
        if longest > _MAX_PART_BYTES or len(os.fsencode(text)) > _MAX_PATH_BYTES:
            raise AdapterError("bad_source", "source has a name that is too long: expected the path of a folder", 400)
        if ".." in self._path.parts:
            raise AdapterError("adapter_unsafe", "source contains '..': expected a plain path")
        self._roots = [Path(os.path.realpath(root)) for root in policy.file_roots]
        if not any(map(self._path.is_relative_to, (*policy.file_roots, *self._roots))):
            # the same answer whether or not it exists
            message = "source lies outside of the folders from which the server may read"
            raise source_not_allowed(message, "one below an --adapter-root, and the admin key")
        handle = self._open_beneath(self._path, any_kind=True)
        if handle is None:
            raise AdapterError("bad_source", "source does not exist: expected a folder or an archive there", 400)
        os.close(handle)

    @contextmanager
    def open(self, name: str) -> Iterator[Iterator[bytes] | None]:
        handle = self._open_beneath(self._path / name if name else self._path)
        if handle is None:
            yield None
            return
        with os.fdopen(handle, "rb") as file:
            yield iter(lambda: file.read(CHUNK_BYTES), b"")

    def _open_beneath(self, path: Path, *, any_kind: bool = False) -> int | None:
        """A plain file, or with `any_kind` whatever is there.

        Walks down from the root without following links, for one may be put there after the path was resolved.
        """
        real = Path(os.path.realpath(path))
        root = next(filter(real.is_relative_to, self._roots), None)
        if root is None:
            raise AdapterError("adapter_unsafe", "source holds a link out of the folders that the server may read")
        handle = None
        try:
            handle = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
            for part in real.relative_to(root).parts:
                is_folder = stat.S_ISDIR(os.stat(part, dir_fd=handle, follow_symlinks=False).st_mode)
                flags = os.O_RDONLY | os.O_NOFOLLOW | (os.O_DIRECTORY if is_folder else os.O_NONBLOCK)
                parent, handle = handle, os.open(part, flags, dir_fd=handle)
                os.close(parent)
            if not any_kind and not stat.S_ISREG(os.fstat(handle).st_mode):
                raise AdapterError("adapter_unsafe", f"{path.name} is not a plain file: expected one")
            found, handle = handle, None
            return found
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            if error.errno != errno.ELOOP:
                raise
            raise AdapterError("adapter_unsafe", "source changes while it is read") from error
        finally:
            if handle is not None:
                os.close(handle)


class _HubRepository:
    """hf://, read through huggingface_hub at the commit that the revision names now."""

    def __init__(self, source: str, policy: SourcePolicy) -> None:
        match = _HUB.fullmatch(source.removeprefix("hf://"))
        if not match or ".." in source:
            raise AdapterError("bad_source", "source is not understood: expected hf://org/repository@revision", 400)
        if policy.hub_endpoint is None:
            raise source_not_allowed("source hf:// is switched off", "the setting sources.hub_endpoint")
        self._repo = match["repo"]
        self._policy = policy
        token = policy.hub_token or False
        self._files = HfFileSystem(endpoint=policy.hub_endpoint, token=token, skip_instance_cache=True)
        with self._errors():
            info = HfApi(endpoint=policy.hub_endpoint, token=token).model_info(
                self._repo, revision=match["revision"], files_metadata=True, timeout=policy.timeout
            )
        self._commit = info.sha
        self._sizes = {file.rfilename: file.size for file in info.siblings or ()}

    @contextmanager
    def open(self, name: str) -> Iterator[Iterator[bytes] | None]:
        if name not in self._sizes:
            yield None
            return
        limit, size = self._policy.limit_of(name), self._sizes[name]
        if size is not None and size > limit and name != CARD_NAME:
            raise _too_large(name, limit)
        with self._errors():
            file = self._files.open(f"{self._repo}@{self._commit}/{name}", "rb", block_size=0)
        with file:
            yield self._read(file, size)

    def _read(self, file: BinaryIO, size: int | None) -> Iterator[bytes]:
        found = 0
        with self._errors():
            while chunk := file.read(CHUNK_BYTES):
                found += len(chunk)
                yield chunk
        if size is not None and found != size:
            raise source_unavailable("source cannot be read: the hub sends another size than it declares")

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except (RepositoryNotFoundError, RevisionNotFoundError) as error:
            raise AdapterError(
                "adapter_incomplete", "source does not exist on the hub, or the server may not read it"
            ) from error
        except HfHubHTTPError as error:
            raise source_unavailable("source cannot be read: the hub does not answer as expected") from error
        except Exception as error:  # the library's HTTP client, and so its exceptions, changed between versions
            raise source_unavailable("source cannot be read: the hub is not reachable") from error


class _Bucket:
    """s3:// of an allowed bucket, under the server's credentials."""

    def __init__(self, source: str, policy: SourcePolicy) -> None:
        parts = urlsplit(source)
        if not parts.netloc or parts.query or parts.fragment or ".." in parts.path.split("/"):
            raise AdapterError("bad_source", "source is not understood: expected s3://bucket/prefix", 400)
        if parts.netloc not in policy.s3_buckets:
            message = "source names a bucket from which the server may not read"
            raise source_not_allowed(message, "one of the setting sources.s3_buckets, and the admin key")
        self._store = s3_store(parts.netloc, "", policy.s3_endpoint, policy.s3_region)
        self._key = unquote(parts.path).strip("/")

    @contextmanager
    def open(self, name: str) -> Iterator[Iterator[bytes] | None]:
        with self._errors():
            try:
                found = obstore.get(self._store, "/".join(filter(None, (self._key, name))))
            except FileNotFoundError:
                found = None
        yield self._read(found) if found else None

    def _read(self, found: "GetResult") -> Iterator[bytes]:
        with self._errors():
            for chunk in found.stream(CHUNK_BYTES):
                yield bytes(chunk)

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except PermissionError as error:
            raise AdapterError("source_refused", "source cannot be read: the object store refuses it") from error
        except BaseError as error:
            raise source_unavailable("source cannot be read: the object store does not answer as expected") from error


def _too_large(name: str, limit: int) -> AdapterError:
    return AdapterError("adapter_too_large", f"{name} is too large: expected at most {limit} bytes", 413)
