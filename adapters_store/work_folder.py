"""The folder in which one running store keeps what need not survive it."""

import asyncio
import fcntl
import shutil
import tempfile
from pathlib import Path
from types import TracebackType

from adapters_store.blobs import disk_errors
from adapters_store.private_files import make_private_folder

_LOCK = "lock"


class WorkFolder:
    """A fresh folder below `root`, locked for as long as its owner lives: `adapters` and `staging`.

    Any number of processes may share a root. What dead ones left there is removed when the next one starts.
    """

    def __init__(self, root: Path) -> None:
        """Raises BlobUnavailable."""
        with disk_errors():
            make_private_folder(root)
            with (root / _LOCK).open("ab") as gate:
                fcntl.flock(gate, fcntl.LOCK_EX)  # a folder is made and locked, or found and removed, by one at a time
                _remove_abandoned(root)
                self.path = Path(tempfile.mkdtemp(prefix="run-", dir=root)).resolve()
                self._lock = (self.path / _LOCK).open("ab")
                fcntl.flock(self._lock, fcntl.LOCK_EX)
            self.adapters = self.path / "adapters"
            self.adapters.mkdir()
            self._staging = self.path / "staging"
            self._staging.mkdir()

    def staging(self) -> "Staging":
        """A new folder for one upload or download, removed at the end of its block."""
        return Staging(self._staging)

    def close(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)
        self._lock.close()


class Staging:
    """A temporary folder, as a context manager: `with` in threads, `async with` on an event loop."""

    def __init__(self, parent: Path) -> None:
        self._parent = parent
        self._folder: Path | None = None

    def __enter__(self) -> Path:
        """Raises BlobUnavailable."""
        with disk_errors():
            self._folder = Path(tempfile.mkdtemp(dir=self._parent))
        return self._folder

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)

    async def __aenter__(self) -> Path:
        """Raises BlobUnavailable."""
        return await asyncio.to_thread(self.__enter__)

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await asyncio.shield(asyncio.to_thread(self.__exit__, kind, error, trace))


def _remove_abandoned(root: Path) -> None:
    for folder in root.glob("run-*"):
        if not _is_held(folder / _LOCK):
            shutil.rmtree(folder, ignore_errors=True)


def _is_held(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except FileNotFoundError:
        return False
    return False
