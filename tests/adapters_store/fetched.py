"""One adapter of two files, packed for a fetch, and what a fetch leaves of it."""

import io
import zipfile
from collections.abc import Mapping
from pathlib import Path

import pytest

from adapters_store.source_policy import SourcePolicy
from adapters_store.sources import fetch
from adapters_store.types import AdapterError

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
ADAPTER = {CONFIG: b"{}", WEIGHTS: b"weights" * 100_000}


def zipped(files: Mapping[str, bytes] = ADAPTER) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return out.getvalue()


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def refused(source: str, into: Path, policy: SourcePolicy) -> AdapterError:
    with pytest.raises(AdapterError) as caught:
        fetch(source, into, policy)
    assert not into.exists() or not list(into.iterdir())
    return caught.value
