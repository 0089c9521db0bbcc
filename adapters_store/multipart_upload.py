"""Adapters and routers that come as multipart/form-data, written to disk while they arrive."""

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from adapters_store.archive import ArchiveLimits, unpack
from adapters_store.blobs import disk_errors
from adapters_store.contents import ADAPTER, Contents
from adapters_store.types import AdapterError

_MAX_FIELD_BYTES = 1 << 20
_FIELD_BYTES = 256
"""What a text field counts for besides its content."""


@dataclass(frozen=True)
class Upload:
    """A multipart body: text fields, and the files on disk, by the names of their fields."""

    fields: Mapping[str, str]
    files: Mapping[str, Path]


class MultipartUpload:
    """Writes the files of a multipart/form-data body to a folder while it arrives; memory stays small.

    `limits` gives the fields that are files and the most bytes of each; all other fields are text, of the names
    `fields` or, without these, of any. What has no place is refused as soon as it begins. Every method raises
    AdapterError (400 `bad_upload`, 413 `adapter_too_large`, 415 `unsupported_media_type`) and BlobUnavailable; then,
    as when the body breaks off, `close` remains to be called, and the folder to be removed.
    """

    def __init__(
        self, content_type: str, folder: Path, limits: Mapping[str, int], fields: Collection[str] | None = None
    ) -> None:
        kind, options = parse_options_header(content_type)
        if kind != b"multipart/form-data":
            raise AdapterError("unsupported_media_type", "content-type is not multipart/form-data: expected it", 415)
        self._folder = folder
        self._limits = limits
        self._texts = fields
        self._fields: dict[str, bytearray] = {}
        self._files: dict[str, Path] = {}
        self._left = _MAX_FIELD_BYTES
        self._left_of_file = 0
        self._headers: dict[bytes, bytes] = {}
        self._header = (bytearray(), bytearray())
        self._name = ""
        self._out: BinaryIO | None = None
        self._is_complete = False
        with _bad_upload():
            self._parser = MultipartParser(
                options.get(b"boundary", b""),
                {
                    "on_part_begin": self._headers.clear,
                    "on_header_field": lambda data, start, end: self._header[0].extend(data[start:end]),
                    "on_header_value": lambda data, start, end: self._header[1].extend(data[start:end]),
                    "on_header_end": self._end_header,
                    "on_headers_finished": self._begin_content,
                    "on_part_data": self._take,
                    "on_part_end": self.close,
                    "on_end": self._end,
                },
            )

    def feed(self, chunk: bytes) -> None:
        """Take the next bytes of the body."""
        with _bad_upload(), disk_errors():
            self._parser.write(chunk)

    def finish(self) -> Upload:
        """What the body held, once all of it has been fed."""
        self.close()
        if not self._is_complete:
            raise AdapterError("bad_upload", "the body breaks off: expected all of its parts", 400)
        with _bad_upload():
            fields = {name: value.decode() for name, value in self._fields.items()}
        return Upload(fields, self._files)

    def close(self) -> None:
        """Close the file that is being written, if any."""
        if self._out:
            self._out.close()
            self._out = None

    def _end_header(self) -> None:
        name, value = map(bytes, self._header)
        self._headers[name.lower()] = value
        self._header = (bytearray(), bytearray())

    def _begin_content(self) -> None:
        _, options = parse_options_header(self._headers.get(b"content-disposition", b""))
        self._name = options.get(b"name", b"").decode()
        if not self._name or self._name in self._fields or self._name in self._files:
            raise AdapterError("bad_upload", f"field {self._name[:80]!a} is nameless or comes twice", 400)
        is_file = b"filename" in options or b"filename*" in options
        if self._name not in self._limits and (is_file or (self._texts is not None and self._name not in self._texts)):
            name = f"{self._name[:80]!a}"[1:-1]
            message = f"{name}: there is no such field; files are {', '.join(self._limits)}"
            raise AdapterError("bad_upload", message, 400, name)
        if self._name in self._limits:
            self._files[self._name] = self._folder / self._name
            self._out = self._files[self._name].open("xb")
            self._left_of_file = self._limits[self._name]
        else:
            self._fields[self._name] = bytearray()
            self._charge(_FIELD_BYTES)

    def _take(self, data: bytes, start: int, end: int) -> None:
        if self._out:
            self._left_of_file -= end - start
            if self._left_of_file < 0:
                message = f"{self._name} is too large: expected at most {self._limits[self._name]} bytes"
                raise AdapterError("adapter_too_large", message, 413)
            self._out.write(memoryview(data)[start:end])
            return
        self._charge(end - start)
        self._fields[self._name] += data[start:end]

    def _charge(self, size: int) -> None:
        self._left -= size
        if self._left < 0:
            message = f"the text fields are too long: expected at most {_MAX_FIELD_BYTES} bytes"
            raise AdapterError("bad_upload", message, 413)

    def _end(self) -> None:
        self._is_complete = True


def take_upload(upload: Upload, into: Path, limits: ArchiveLimits, contents: Contents = ADAPTER) -> Path:
    """What is in the files `config`, `weights` and `card`, or `archive`, of an upload, as `fetch` leaves it."""
    files = dict(upload.files)
    archive = files.pop("archive", None)
    if archive:
        if files:
            raise AdapterError("bad_upload", "archive comes with other files: expected it alone", 400, "archive")
        return unpack(archive, into, limits, contents)
    contents.check({contents.fields[field] for field in files if field in contents.fields})
    with disk_errors():
        into.mkdir(parents=True, exist_ok=True)
        for field, path in files.items():
            if field in contents.fields:
                path.replace(into / contents.fields[field])
    return into


@contextmanager
def _bad_upload() -> Iterator[None]:
    try:
        yield
    except (FormParserError, UnicodeDecodeError) as error:
        raise AdapterError(
            "bad_upload", "the body cannot be read: expected multipart/form-data in UTF-8", 400
        ) from error
