"""An adapter in a request's multipart body: to disk while it arrives, checked, and gone if anything goes wrong."""

import asyncio
from collections.abc import Collection
from pathlib import Path
from typing import Any

from fastapi import Request
from starlette.requests import ClientDisconnect

from adapters_store.archive import ArchiveLimits
from adapters_store.blobs import BlobError
from adapters_store.contents import ADAPTER, Contents
from adapters_store.model_card import CARD_NAME
from adapters_store.multipart_upload import MultipartUpload, Upload, take_upload
from adapters_store.peft_format import CONFIG_NAME, WEIGHTS_NAME
from adapters_store.source_policy import SourcePolicy
from adapters_store.types import AdapterError
from server.admin.protocol import UploadRequest
from server.body import schema_of
from server.catalog import Catalog
from server.errors import ClientGone

ARCHIVE = "archive"
"""The field of one file instead of the several; it has a limit of its own."""
WRITE_BYTES = 1 << 20
"""So much is handed to the disk's thread at once."""
DRAINED_BYTES = 64 << 20
"""So much of a refused body is still read: most senders get to see the refusal instead of a broken connection."""


async def receive(
    request: Request,
    folder: Path,
    catalog: Catalog,
    policy: SourcePolicy,
    contents: Contents = ADAPTER,
    texts: Collection[str] | None = None,
) -> Upload:
    """The body's parts, the files among them in `folder`. Parts that are no files have the names `texts`, or any.

    Raises AdapterError, BlobError, ClientGone.
    """
    limits = {field: policy.limit_of(name) for field, name in {**contents.fields, ARCHIVE: ""}.items()}
    form = MultipartUpload(request.headers.get("content-type", ""), folder, limits, texts)
    try:
        await _feed(request, form, catalog, policy)
        return await catalog.in_thread(form.finish)
    except (AdapterError, BlobError):
        await drain(request, policy.timeout)
        raise
    except TimeoutError:
        message = (
            f"the body stops for {policy.timeout:g} seconds, or takes {policy.deadline:g}: expected all of it sooner"
        )
        raise AdapterError("bad_upload", message, 400) from None
    except ClientDisconnect:
        raise ClientGone from None
    finally:
        await catalog.in_thread(form.close)


async def unpack(
    upload: Upload, into: Path, catalog: Catalog, limits: ArchiveLimits, contents: Contents = ADAPTER
) -> None:
    """Make the folder `into` what was uploaded. Raises AdapterError, BlobError."""
    await catalog.in_thread(take_upload, upload, into, limits, contents)


async def drain(request: Request, timeout: float) -> None:
    """Read on for a while, and forget it."""
    size = 0
    try:
        async with asyncio.timeout(timeout):
            async for chunk in request.stream():
                size += len(chunk)
                if size > DRAINED_BYTES:
                    return
    except (TimeoutError, ClientDisconnect, RuntimeError):  # RuntimeError: it has been read to its end already
        return


async def _feed(request: Request, form: MultipartUpload, catalog: Catalog, policy: SourcePolicy) -> None:
    """Raises TimeoutError when nothing comes for too long, or all of it takes too long."""
    buffer, clock = bytearray(), asyncio.get_running_loop().time
    end = clock() + policy.deadline
    async with asyncio.timeout(policy.timeout) as patience:
        async for chunk in request.stream():
            buffer += chunk
            if len(buffer) >= WRITE_BYTES:
                await catalog.in_thread(form.feed, bytes(buffer))
                buffer.clear()
            patience.reschedule(min(clock() + policy.timeout, end))
    await catalog.in_thread(form.feed, bytes(buffer))


def upload_schema() -> dict[str, Any]:
    """What OpenAPI says of the form."""
    schema = schema_of(UploadRequest)
    schema["properties"] |= {
        "config": _file(f"`{CONFIG_NAME}` of PEFT"),
        "weights": _file(f"`{WEIGHTS_NAME}` of PEFT"),
        "card": _file(f"`{CARD_NAME}`, of which the first paragraph becomes the description"),
        "archive": _file("Instead of the files: a .zip or .tar.gz that holds them, at its top or in one folder"),
    }
    return schema


def _file(description: str) -> dict[str, Any]:
    return {"type": "string", "format": "binary", "description": description}
