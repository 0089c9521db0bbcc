"""The disk tier: adapters as PEFT folders, made of verified blobs when they are first needed."""

import asyncio
import contextlib
import os
import shutil
import tempfile
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Executor
from functools import partial
from pathlib import Path

from adapters_store.blobs import BlobStore, disk_errors
from adapters_store.peft_format import CONFIG_NAME, WEIGHTS_NAME
from adapters_store.registry import Resolved


class Folders:
    """Folders `root/<digest>`. `is_used(digest)` keeps one in place; the others go, the longest unused first, when all
    exceed `max_bytes` (None: never, for files that are links to local blobs cost no space). For one event loop.
    """

    def __init__(
        self,
        root: Path,
        blobs: BlobStore,
        threads: Executor,
        is_used: Callable[[str], bool],
        max_bytes: int | None = None,
    ) -> None:
        self._root = root
        self._blobs = blobs
        self._threads = threads
        self._is_used = is_used
        self._max_bytes = max_bytes
        self._sizes: OrderedDict[str, int] = OrderedDict()  # by digest of what is there, last used last
        self._total = 0
        self._moving: dict[str, asyncio.Task[None]] = {}  # one making or removal a digest at a time

    @property
    def digests(self) -> tuple[str, ...]:
        """What is there now."""
        return tuple(self._sizes)

    def find(self, digest: str) -> str | None:
        """The folder if it is there. It counts as used."""
        if digest not in self._sizes:
            return None
        self._sizes.move_to_end(digest)
        return str(self._root / digest)

    async def make(self, adapter: Resolved) -> str:
        """The folder, there afterwards; callers at the same time share one fetch. Raises BlobError."""
        while (path := self.find(adapter.digest)) is None:
            task = self._moving.get(adapter.digest) or self._start(adapter.digest, partial(self._make, adapter))
            await asyncio.shield(task)  # who gives up waiting leaves the others their folder
        return path

    async def remove(self, digest: str) -> None:
        """Remove the folder unless it is used."""
        while digest in self._moving:
            await asyncio.wait({self._moving[digest]})
        if digest in self._sizes and not self._is_used(digest):
            self._total -= self._sizes.pop(digest)
            await asyncio.shield(self._start(digest, partial(self._remove, digest)))

    def check_integrity(self) -> None:
        """Raise RuntimeError unless the total is the sum and nothing that is there is being made."""
        if self._total != sum(self._sizes.values()):
            raise RuntimeError(f"folders have {sum(self._sizes.values())} bytes, counted were {self._total}")
        if self._moving.keys() & self._sizes.keys():
            raise RuntimeError("a folder is there and on the move at the same time")

    def _start(self, digest: str, move: "Callable[[], asyncio.Future[int]]") -> "asyncio.Task[None]":
        task = self._moving[digest] = asyncio.create_task(self._move(digest, move))
        task.add_done_callback(_retrieve)
        return task

    async def _move(self, digest: str, move: "Callable[[], asyncio.Future[int]]") -> None:
        try:
            size = await move()
        finally:
            del self._moving[digest]
        if size:
            self._sizes[digest] = size
            self._total += size
            self._trim()

    def _trim(self) -> None:
        """Remove what exceeds the limit, without waiting for it."""
        if self._max_bytes is None:
            return
        for digest in self.digests:
            if self._total <= self._max_bytes:
                return
            if not self._is_used(digest) and digest not in self._moving:
                self._total -= self._sizes.pop(digest)
                self._start(digest, partial(self._remove, digest))

    def _make(self, adapter: Resolved) -> "asyncio.Future[int]":
        return asyncio.get_running_loop().run_in_executor(self._threads, self._write, adapter)

    def _remove(self, digest: str) -> "asyncio.Future[int]":
        return asyncio.get_running_loop().run_in_executor(self._threads, self._delete, digest)

    def _write(self, adapter: Resolved) -> int:
        """Bytes of the new folder."""
        with disk_errors():
            temporary = Path(tempfile.mkdtemp(prefix=".new-", dir=self._root))
            try:
                files = ((adapter.config_blob, CONFIG_NAME), (adapter.weights_blob, WEIGHTS_NAME))
                size = sum(self._blobs.fetch(blob, temporary, name).stat().st_size for blob, name in files)
                shutil.rmtree(self._root / adapter.digest, ignore_errors=True)  # a removal that failed
                os.replace(temporary, self._root / adapter.digest)
                return size
            except BaseException:
                shutil.rmtree(temporary, ignore_errors=True)
                raise

    def _delete(self, digest: str) -> int:
        """Renamed first, so that what cannot be removed is not in the way of the same adapter's return."""
        with contextlib.suppress(OSError):
            trash = Path(tempfile.mkdtemp(prefix=".old-", dir=self._root))
            os.rename(self._root / digest, trash / digest)
            shutil.rmtree(trash, ignore_errors=True)
        return 0


def _retrieve(task: "asyncio.Task[None]") -> None:
    """Errors belong to those who wait; without any of them, asyncio would complain that nobody looked."""
    if not task.cancelled():
        task.exception()
