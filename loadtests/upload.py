"""Registrations over HTTP."""

import shutil
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import httpx
import torch

from loadtests.random_adapter import TARGETS, LinearSizes, write_adapter

PARTS = {"config": "adapter_config.json", "weights": "adapter_model.safetensors"}
AT_ONCE = 8


def upload(client: httpx.Client, name: str, folder: Path, **fields: str) -> None:
    """Register the adapter in `folder`; `fields` are the form's."""
    with ExitStack() as opened:
        files = {field: opened.enter_context((folder / file).open("rb")) for field, file in PARTS.items()}
        client.post("/admin/v1/adapters", data={"name": name, **fields}, files=files).raise_for_status()


def upload_random(
    client: httpx.Client,
    names: Iterable[str],
    work: Path,
    sizes: LinearSizes,
    rank: int,
    targets: Sequence[str] = TARGETS,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Register a random, public adapter under every name, its seed the name's number; their folders do not stay."""

    def register(numbered: tuple[int, str]) -> None:
        seed, name = numbered
        folder = write_adapter(work / f"upload-{seed}", sizes, rank, seed, targets, dtype=dtype)
        upload(client, name, folder, public="true")
        shutil.rmtree(folder)

    with ThreadPoolExecutor(AT_ONCE) as pool:
        list(pool.map(register, enumerate(names)))
