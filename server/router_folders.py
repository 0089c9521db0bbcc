"""Trained routers' folders on this machine, made of what the registry has."""

import hashlib
import json
import shutil
import tempfile
from pathlib import Path

from adapters_store.blobs import BlobStore
from adapters_store.registry import Registry, RouterRow
from routing.card_file import CARD_FILE, CHANGE_FILE


class RouterFolders:
    """Folders below `root`, which several processes may share. Methods block, and raise BlobError and OSError."""

    def __init__(self, registry: Registry, blobs: BlobStore, root: Path) -> None:
        self._registry = registry
        self._blobs = blobs
        self._root = root

    def make(self, row: RouterRow) -> Path:
        """The router's folder, there afterwards. Its name says all that is in it, on every machine."""
        folder = self._root / _name(row)
        if (folder / CARD_FILE).is_file():
            return folder
        self._root.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(suffix=".partial", dir=self._root))
        try:
            self._blobs.fetch(row.blob, partial, CHANGE_FILE)
            (partial / CARD_FILE).write_text(_card(row), encoding="utf-8")
            partial.rename(folder)
        except OSError:
            if not (folder / CARD_FILE).is_file():  # else another process was faster
                raise
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        return folder

    def find(self, name: str) -> Path | None:
        """The folder that `make` gives this name, on whichever machine; None for a router that is not registered.

        Raises RegistryUnavailable too.
        """
        folder = self._root / name
        if (folder / CARD_FILE).is_file():
            return folder
        found = next((row for row in self._registry.routers.list() if _name(row) == name), None)
        return self.make(found) if found is not None else None


def _name(row: RouterRow) -> str:
    return hashlib.sha256(f"{row.blob} {_card(row)}".encode()).hexdigest()


def _card(row: RouterRow) -> str:
    return json.dumps(row.meta, sort_keys=True)
